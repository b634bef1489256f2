"""Trains with aSGD in plain torch: accumulation, clipping, a schedule, and a run that can be resumed.

    python examples/train_plain.py --checkpoint run.pt --stop-after 2
    python examples/train_plain.py --checkpoint run.pt

The second run goes on where the first one stopped.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import truestep

ACCUMULATE = 4


def data() -> TensorDataset:
    """2,000 bags of 8 words; a class has words of its own, and frequent ones are shared by all."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 8, (2000,), generator=generator)
    own = targets[:, None] * 100 + torch.randint(0, 100, (2000, 4), generator=generator)
    shared = torch.randint(800, 820, (2000, 4), generator=generator)
    return TensorDataset(torch.cat([own, shared], 1), targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument(
        "--checkpoint", type=Path, help="written after each epoch, read at the start"
    )
    parser.add_argument("--stop-after", type=int, metavar="EPOCHS")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    examples = data()
    model = nn.Sequential(nn.EmbeddingBag(820, 16), nn.ReLU(), nn.Linear(16, 8))
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=1.0, counter=counter, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    # Counts belong to a batch and are never saved: resuming needs nothing of truestep's.
    done = 0
    if arguments.checkpoint is not None and arguments.checkpoint.exists():
        saved = torch.load(arguments.checkpoint)
        done = saved.pop("epochs")
        for name, state in saved.items():
            parts[name].load_state_dict(state)

    for epoch in range(done, arguments.stop_after or arguments.epochs):
        order = torch.Generator().manual_seed(epoch)
        batches = list(DataLoader(examples, batch_size=64, shuffle=True, generator=order))
        total = 0.0
        for first in range(0, len(batches), ACCUMULATE):
            group = batches[first : first + ACCUMULATE]  # the last one may be shorter
            samples = sum(len(targets) for _, targets in group)
            optimizer.zero_grad()
            for words, targets in group:
                loss = functional.cross_entropy(model(words), targets, reduction="sum") / samples
                loss.backward()
                total += loss.item() * samples / len(examples)
            counter.correct_gradients()  # before clipping; step() does not repeat it
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        scheduler.step()
        print(f"epoch {epoch + 1}: loss {total:.4f}")
        if arguments.checkpoint is not None:
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save(states | {"epochs": epoch + 1}, arguments.checkpoint)
    print(truestep.monitor.table(counter.statistics()))


if __name__ == "__main__":
    main()
