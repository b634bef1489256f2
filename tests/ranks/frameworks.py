"""Trains with a framework's own Trainer in two processes: torchrun frameworks.py FRAMEWORK FILE.

The first rank writes what came out: weights, and N and counts of the last batch over all ranks.
"""

import os
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

import truestep
from zoo import sparse_inputs

SAMPLES, PER_RANK, EPOCHS, CLIP = 24, 4, 2, 0.5


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def samples():
    torch.manual_seed(2)
    return sparse_inputs(SAMPLES, 12), torch.randint(0, 3, (SAMPLES,))


def optimizer_of(model, counter):
    return truestep.AdaptiveBatchSGD(model.parameters(), lr=0.3, momentum=0.9, counter=counter)


def by_lightning():
    import lightning.pytorch as lightning  # noqa: PLC0415

    from truestep.integrations.lightning import MeanEffectiveGradient  # noqa: PLC0415

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.counter = truestep.SampleCounter(self.net)

        def training_step(self, batch):
            inputs, targets = batch
            return functional.cross_entropy(self.net(inputs), targets)

        def configure_optimizers(self):
            return optimizer_of(self.net, self.counter)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=EPOCHS,
        gradient_clip_val=CLIP,
        callbacks=[MeanEffectiveGradient(module.counter)],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(*samples())
    # Lightning's own sampler shuffles.
    mine = DistributedSampler(data, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=PER_RANK, sampler=mine))
    return module.net, module.counter


def by_huggingface():
    import transformers  # noqa: PLC0415

    from truestep.integrations.huggingface import MeanEffectiveGradient  # noqa: PLC0415

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, inputs, labels):
            return {"loss": functional.cross_entropy(self.net(inputs), labels)}

    class Trainer(MeanEffectiveGradient, transformers.Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    model = Classifier()
    counter = truestep.SampleCounter(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(Path(sys.argv[2]).parent / "trainer"),
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=PER_RANK,
        num_train_epochs=EPOCHS,
        max_grad_norm=CLIP,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"inputs": row, "labels": label} for row, label in zip(*samples(), strict=True)]
    optimizers = optimizer_of(model, counter), None
    Trainer(
        model=model, args=arguments, train_dataset=rows, optimizers=optimizers, counter=counter
    ).train()
    return model.net, counter


def in_one_process():
    """The same training in plain torch, on the joint batches."""
    model = net()
    counter = truestep.SampleCounter(model)
    optimizer = optimizer_of(model, counter)
    for _ in range(EPOCHS):
        for inputs, targets in DataLoader(TensorDataset(*samples()), batch_size=2 * PER_RANK):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            counter.correct_gradients()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
    return model, counter


def outcome(model, counter):
    counts = {name.removeprefix("net."): c for name, c in counter.counts(reduce=True).items()}
    return {"weights": model.state_dict(), "counts": counts, "own": counter.batch_size}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = outcome(*{"lightning": by_lightning, "huggingface": by_huggingface}[sys.argv[1]]())
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()
    # One run in a hundred was aborted after this, as the interpreter went: by a thread of torch's or the
    # framework's that C++ found still running. All that is tested has ended.
    sys.stdout.flush()
    os._exit(0)
