"""Trainings that the ensemble engine can't do: dropout and normalisation, with torch's own layers."""

import math
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from truestep import RULES, AdaptiveBatchSGD, SampleCounter
from truestep.errors import TruestepError
from truestep.lab.paper.curves import Curves, measured_epochs
from truestep.lab.paper.data import Vectors, splits_of
from truestep.rules import BATCH_NORM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from truestep.lab.paper.images import Images

__all__ = ["train_in_torch"]

NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


def train_in_torch(plan: "Images", data: Vectors) -> Curves:
    """Trains a ReLU network with dropout or normalisation on the cross-entropy.

    Args:
        plan: Of the optimizers ``sgd`` and ``asgd``.
        data: The images.

    Raises:
        TruestepError: The plan asks for something that only the engine does.
    """
    if (
        plan.optimizer not in {"sgd", "asgd"}
        or plan.schedule != "constant"
        or plan.activation != "relu"
    ):
        raise TruestepError(
            "Dropout and normalisation go with sgd or asgd, ReLU and no schedule; leave the rest "
            "out."
        )
    splits = {
        name: (torch.from_numpy(inputs), torch.from_numpy(targets))
        for name, (inputs, targets) in splits_of(data, plan.train).items()
    }
    torch.manual_seed(plan.seed)
    model = _model(plan)
    optimizer, counter = _optimizer(plan, model)
    inputs, targets = splits["train"]
    measured = measured_epochs(plan.epochs, plan.measure)
    shown = {name: pair for name, pair in splits.items() if name != "train" or plan.train_curve}
    rows = [_measure(model, shown)]
    steps, status, began = 0, "done", time.thread_time()
    for epoch in range(1, plan.epochs + 1):
        for index in _batches(len(targets), plan.batch_size, plan.seed, epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[index]), targets[index]).backward()
            optimizer.step()
            steps += 1
        if epoch in measured:
            rows.append(_measure(model, shown))
            if not math.isfinite(rows[-1]["test_loss"]):
                status = "diverged"
                break
    if counter is not None:
        counter.close()
    arrays: dict[str, NDArray[np.generic]] = {
        name: np.array(
            [row[name] for row in rows] + [math.nan] * (len(measured) - len(rows)), np.float32
        )
        for name in rows[0]
    }
    return Curves(arrays, status, "torch", steps, time.thread_time() - began)


def _model(plan: "Images") -> nn.Sequential:
    layers: list[nn.Module] = []
    widths = (784, *plan.hidden)
    for inputs, outputs in pairwise(widths):
        layers.append(nn.Linear(inputs, outputs))
        if plan.norm:
            layers.append(NORMS[plan.norm](outputs))
        layers.append(nn.ReLU())
        if plan.dropout:
            layers.append(nn.Dropout(plan.dropout))
    layers.append(nn.Linear(widths[-1], 10))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def _optimizer(
    plan: "Images", model: nn.Module
) -> tuple[torch.optim.Optimizer, SampleCounter | None]:
    if plan.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=plan.lr), None
    # Given the batch's statistics: no per-sample gradient exists under batch normalisation.
    rules = dict(RULES)
    if plan.norm == "batch":
        rules[nn.BatchNorm1d] = BATCH_NORM[nn.BatchNorm1d]
    counter = SampleCounter(model, rules=rules)
    return AdaptiveBatchSGD(model.parameters(), plan.lr, counter=counter, eps=plan.eps), counter


def _batches(samples: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    yield from torch.randperm(samples, generator=generator).split(batch_size)


def _measure(model: nn.Module, splits: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    model.eval()
    row = {}
    with torch.no_grad():
        for name, (inputs, targets) in splits.items():
            output = model(inputs)
            row[f"{name}_loss"] = nn.functional.cross_entropy(output, targets).item()
            row[f"{name}_accuracy"] = (output.argmax(1) == targets).float().mean().item()
    model.train()
    return row
