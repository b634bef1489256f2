"""How much smaller trained networks get when their redundant units are taken out (aSGD, section 2.2.3)."""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from truestep import compress, ensemble, find_dummy_nodes
from truestep.lab.paper.data import Vectors, circles, spirals, splits_of, vectors
from truestep.lab.paper.engine import named, optimizer
from truestep.lab.paper.images import CLASSES, PIXELS
from truestep.lab.paper.points import DEGREES, FACTOR, NOISE, make_data
from truestep.lab.paper.unit import Cost, Outcome
from truestep.lab.tasks import binary_loss, perceptron

__all__ = ["MEASURES", "Compression", "network_of", "splits_at", "trained"]

# Points are free, so that accuracy is measured on many.
HELD_OUT = 2000
ROWS_AT_ONCE = 1000
# Seconds of a step on points, and of a compression.
POINTS_STEP, LOOK = 1e-5, 0.15
# Of a step at batch 64 for each weight, of which 784-30-20-10 has 24,320.
WEIGHT_STEP = 8e-9

Splits = dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]

# What is kept of each network; nan throughout where training diverged.
MEASURES = (
    *("true", "constant", "duplicate", "pseudo", "removed"),
    *("parameters", "bytes", "flops"),
    *("validation_loss", "accuracy", "accuracy_before", "changed"),
    *("difference", "largest"),
)


@dataclass(frozen=True)
class Compression:
    """Networks that are trained, and then made smaller with the same output on the training data.

    Attributes:
        data: ``"circles"``, ``"spirals"``, or an image data set as in `truestep data list`.
        hidden: Widths of the hidden layers, all ReLU.
        optimizer: As in `engine.OPTIMIZERS`.
        lr: Learning rate.
        batch_size: Samples per step.
        epochs: Passes over the training data.
        first: The first seed; network r has seed first + r.
        replicas: How many networks.
        train: How many training images are used, the first ones; 0 for all but the last sixth, which is
            for validation. Says nothing to points.
        start: Law of the first weights, as in `truestep.ensemble.Network`.
        eps: Of the mean effective gradient.
    """

    kind: ClassVar[str] = "compression"

    data: str
    hidden: tuple[int, ...]
    optimizer: str
    lr: float
    batch_size: int
    epochs: int
    first: int
    replicas: int
    train: int = 0
    start: str = "glorot_uniform"
    eps: float = 1.0

    def check(self) -> None:
        """Raises `TruestepError` for settings that the engine does not know."""
        network_of(self)

    def cost(self) -> Cost:
        """An estimate."""
        samples = self.batch_size if self.data in NOISE else self.train or 50_000
        steps = self.replicas * self.epochs * math.ceil(samples / self.batch_size)
        weights = sum(i * o for i, o in pairwise((PIXELS, *self.hidden, CLASSES)))
        step = POINTS_STEP if self.data in NOISE else WEIGHT_STEP * weights
        return Cost(steps, steps * step + self.replicas * LOOK)

    def data_sets(self) -> tuple[str, ...]:
        """The one, of images; points are generated."""
        return () if self.data in NOISE else (self.data,)

    def run(self, data_dir: Path | None) -> Outcome:
        """Trains, takes out of each network what is redundant on the training data, and compares."""
        splits, told = splits_at(self, data_dir)
        result = trained(self, splits)
        network = network_of(self)
        tensors = {
            name: (torch.from_numpy(inputs), torch.from_numpy(labels))
            for name, (inputs, labels) in splits.items()
        }
        rows: list[dict[str, float]] = []
        size: dict[str, int] = {}
        for parameters, status in zip(result.final, result.status, strict=True):
            if status == "diverged":
                rows.append(dict.fromkeys(MEASURES, math.nan))
                continue
            row, size = _compressed(_model(network, parameters), tensors)
            rows.append(row)
        arrays = {
            name: np.array([row[name] for row in rows], dtype=np.float32) for name in MEASURES
        }
        summary = told | {name: len(labels) for name, (_, labels) in splits.items()}
        return Outcome(
            summary | {"hidden units": network.hidden, "before": size},
            arrays,
            f"{named(result)}, then torch",
            int(result.stopped_at.sum()),
            float(result.seconds.sum()),
        )


def splits_at(unit: Compression, data_dir: Path | None) -> tuple[Splits, dict[str, Any]]:
    """A unit's data by split, and where they came from.

    Args:
        unit: Of points or of images.
        data_dir: Folder of local copies.
    """
    if unit.data not in NOISE:
        data: Vectors = vectors(unit.data, data_dir)
        return splits_of(data, unit.train), {
            "source": data.source,
            "fingerprint": data.fingerprint,
        }
    train, _ = make_data(unit.data, 0, noise=0, shape=0)
    draws = {"validation": 1, "test": 2}
    noise = NOISE[unit.data]
    held = {
        name: circles(HELD_OUT, seed, noise=noise, factor=FACTOR)
        if unit.data == "circles"
        else spirals(HELD_OUT, seed, noise=noise, degrees=DEGREES)
        for name, seed in draws.items()
    }
    return {"train": train} | held, {}


def network_of(unit: Compression) -> ensemble.Network:
    """A unit's network: one sigmoid output on points, a softmax on images."""
    points = unit.data in NOISE
    inputs, outputs = (2, 1) if points else (PIXELS, CLASSES)
    return ensemble.Network(
        widths=(inputs, *unit.hidden, outputs),
        activation="relu",
        output="sigmoid" if points else "softmax",
        loss="binary_cross_entropy" if points else "cross_entropy",
        start=unit.start,
    )


def trained(unit: Compression, splits: Splits) -> ensemble.Result:
    """A unit's networks, trained; their dummy nodes as the engine counts them are with them."""
    return ensemble.train(
        network_of(unit),
        ensemble.Data(train=ensemble.Split(*splits["train"])),
        replicas=unit.replicas,
        epochs=unit.epochs,
        batch_size=unit.batch_size,
        optimizer=optimizer(unit.optimizer, unit.lr, eps=unit.eps),
        seed=unit.first,
        record=ensemble.Record(nodes=True),
        threads=1,
    )


def _model(network: ensemble.Network, parameters: NDArray[np.float32]) -> nn.Sequential:
    """A network of the engine as a torch module, without what its loss puts behind it."""
    model = perceptron(*network.widths)
    values = [torch.from_numpy(part) for pair in network.split(parameters) for part in pair]
    with torch.no_grad():
        for own, value in zip(model.parameters(), values, strict=True):
            own.copy_(value)
    return model.eval()


def _compressed(
    model: nn.Module, splits: dict[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, float], dict[str, int]]:
    """What compressing a model on its training data gives, and the size that it had before."""
    loader = splits["train"][0].split(ROWS_AT_ONCE)
    nodes = find_dummy_nodes(model, loader)
    small, report = compress(model, nodes, loader[0])
    inputs, labels = splits["test"]
    before, after = _answers(model, inputs), _answers(small, inputs)
    measured = {
        **{kind: nodes.count(kind) for kind in ("true", "constant", "duplicate", "pseudo")},
        "removed": len(report.removed),
        "parameters": report.after.parameters,
        "bytes": report.after.bytes,
        "flops": report.after.flops,
        "validation_loss": _loss(model, *splits["validation"]),
        "accuracy": _share(after, labels),
        "accuracy_before": _share(before, labels),
        "changed": int((before != after).sum()),
        "difference": report.difference,
        "largest": report.largest,
    }
    old = report.before
    return measured, {"parameters": old.parameters, "bytes": old.bytes, "flops": old.flops}


def _answers(model: nn.Module, inputs: Tensor) -> Tensor:
    """The class that a model gives each sample."""
    with torch.no_grad():
        output: Tensor = model(inputs)
    return (output.squeeze(1) > 0).long() if output.shape[1] == 1 else output.argmax(1)


@torch.no_grad()
def _loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    output = model(inputs)
    if output.shape[1] == 1:
        return float(binary_loss(output, labels))
    return float(nn.functional.cross_entropy(output, labels))


def _share(answers: Tensor, labels: Tensor) -> float:
    return float((answers == labels).double().mean())
