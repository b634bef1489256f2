"""A task whose runs take milliseconds, as a user would write it; tests race on it."""

from pathlib import Path

import torch
from torch import nn

from truestep.lab.tasks import Split, Splits, Task

TRAIN, VALIDATION, TEST = 20, 12, 16


def load(data_dir: Path | None) -> Splits:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(TRAIN + VALIDATION + TEST, 4, generator=generator)
    noise = torch.randn(len(inputs), generator=generator)
    targets = (inputs[:, 0] + inputs[:, 1].abs() + noise > 0).long()
    parts = zip(
        inputs.split([TRAIN, VALIDATION, TEST]),
        targets.split([TRAIN, VALIDATION, TEST]),
        strict=True,
    )
    return Splits(*(Split(x, y) for x, y in parts), source="random numbers")


def accuracy(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == targets).float().mean()


task = Task(
    name="tiny",
    title="A line through noise",
    load=load,
    model=lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)),
    loss=nn.functional.cross_entropy,
    metrics={"accuracy": accuracy},
    batch_size=8,
    epochs=3,
    target=("accuracy", 0.6),
    optimizers=("sgd", "adam"),
    learning_rates={"sgd": (0.1, 0.3), "adam": (0.01, 0.03)},
)
