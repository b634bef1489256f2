"""Trains with aSGD in Accelerate: gradient accumulation and clipping, in one process or many.

    python examples/train_accelerate.py
    torchrun --nproc-per-node 2 examples/train_accelerate.py

With two processes, the batches are twice as large.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import truestep


def data() -> TensorDataset:
    """2,000 bags of 8 words; a class has words of its own, and frequent ones are shared by all."""
    targets = torch.randint(0, 8, (2000,))
    own = targets[:, None] * 100 + torch.randint(0, 100, (2000, 4))
    shared = torch.randint(800, 820, (2000, 4))
    return TensorDataset(torch.cat([own, shared], 1), targets)


def main() -> None:
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = nn.Sequential(nn.EmbeddingBag(820, 16), nn.ReLU(), nn.Linear(16, 8))
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=1.0, counter=counter, momentum=0.9)
    loader = DataLoader(data(), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(4):
        total = torch.zeros(())
        for words, targets in loader:
            with accelerator.accumulate(model):
                loss = functional.cross_entropy(model(words), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    counter.correct_gradients()  # before clipping; step() does not repeat it
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        mean = accelerator.reduce(total, "mean") / len(loader)
        accelerator.print(f"epoch {epoch + 1}: loss {mean:.4f}")


if __name__ == "__main__":
    main()
