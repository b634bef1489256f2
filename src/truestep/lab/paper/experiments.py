"""The experiments by name: which units each is made of, at three scales.

A plan is a list in the order in which units are run: all cells at the first seed, then all at the
second, so that what is interrupted is balanced. Variants, in which one thing differs from the main
protocol, say so in a word or two.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from truestep.errors import TruestepError
from truestep.lab.paper.images import DASGD_HIDDEN, MNIST_HIDDEN, Images
from truestep.lab.paper.points import Points
from truestep.lab.paper.premise import Premise
from truestep.lab.paper.small import Panels, Trajectories
from truestep.lab.paper.unit import Unit

__all__ = [
    "ASGD_LRS",
    "BATCHES",
    "DASGD_DATA",
    "EXPERIMENTS",
    "GROUPS",
    "LR_GRIDS",
    "SCALES",
    "SGD_LRS",
    "Experiment",
    "Planned",
    "find_experiment",
]

Value = TypeVar("Value")

SCALES = ("smoke", "small", "paper")

GROUPS = (
    ("circles", "asgd", 0.01),
    ("circles", "sgd", 0.01),
    ("spirals", "asgd", 0.05),
    ("spirals", "sgd", 0.05),
)
# Where each optimizer's own best learning rate is looked for, besides the paper's.
LR_GRIDS = {
    ("circles", "asgd"): (0.005, 0.02, 0.03, 0.05, 0.1),
    ("circles", "sgd"): (0.005, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3),
    ("spirals", "asgd"): (0.005, 0.01, 0.02, 0.03, 0.1),
    ("spirals", "sgd"): (0.02, 0.03, 0.1, 0.15, 0.2),
}
ASGD_LRS = (0.001, 0.003, 0.005, 0.01)
SGD_LRS = (0.001, 0.003, 0.01, 0.03, 0.05, 0.07, 0.1)
BATCHES = {
    1: 0.001,
    2: 0.001,
    4: 0.001,
    8: 0.002,
    16: 0.003,
    32: 0.004,
    64: 0.005,
    128: 0.006,
    256: 0.007,
}
DASGD_DATA = ("fashion-mnist", "kmnist10k", "quickdraw10")
DASGD_LRS = tuple(round(0.001 * k, 3) for k in range(1, 11))
RIVALS = ("momentum 0.5", "momentum 0.9", "nesterov 0.9")
RIVAL_BATCHES = (32, 128, 256)
SGD_FACTORS = (1.5, 2.0)
# Batches below this cost hours at 200 epochs: a third of the seeds.
CHEAP_FROM = 8
LEVEL_STEPS = 32_000  # 500 epochs of up to 64 steps


@dataclass(frozen=True)
class Planned:
    """A unit and its place in an experiment.

    Attributes:
        unit: The work.
        variant: ``""`` for the main protocol; else what differs: ``"start: torch"``.
    """

    unit: Unit
    variant: str = ""


@dataclass(frozen=True)
class Experiment:
    """One of the papers' experiments.

    Attributes:
        name: As on the command line.
        title: What it is, in a few words.
        artefacts: Which of the paper's figures and tables it gives.
        seeds: How many seeds each cell has at the scales, where none are asked for.
        plan: From a scale and a number of seeds (None for the usual) to the units.
    """

    name: str
    title: str
    artefacts: str
    seeds: dict[str, int]
    plan: Callable[[str, int], list[Planned]]

    def units(self, scale: str, seeds: int | None = None) -> list[Planned]:
        """The plan at a scale, in the order of running.

        Args:
            scale: One of `SCALES`.
            seeds: How many; by default the scale's own.
        """
        return self.plan(scale, seeds or self.seeds[scale])


def find_experiment(name: str) -> Experiment:
    """An experiment by name.

    Raises:
        TruestepError: There is none; the message names the nearest.
    """
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
    hint = f"Perhaps {near[0]} is meant." if near else f"There are {', '.join(EXPERIMENTS)}."
    raise TruestepError(f"{name} is no experiment. {hint}")


# aSGD.


def _backprop(scale: str, seeds: int) -> list[Planned]:
    return [Planned(Panels(0.01, replicas=seeds, steps=_at(scale, 50, 10_000, 10_000)))]


def _trajectories(scale: str, seeds: int) -> list[Planned]:
    main = Trajectories(0.01, replicas=seeds, steps=_at(scale, 50, 10_000, 10_000))
    starts = ("he_uniform", "torch") if scale == "paper" else ()
    return [
        Planned(main),
        *(Planned(replace(main, start=start), f"start: {start}") for start in starts),
    ]


def _synthetic(scale: str, seeds: int) -> list[Planned]:
    steps = _at(scale, 60, 10_000, 10_000)
    chunk = min(_at(scale, 4, 100, 500), seeds)
    main = [
        Planned(Points(data, name, lr, first, min(chunk, seeds - first), steps))
        for first in range(0, seeds, chunk)
        for data, name, lr in GROUPS
    ]
    if scale == "smoke":
        return main
    few = min(chunk, seeds)
    groups = [Points(data, name, lr, 0, few, steps) for data, name, lr in GROUPS]
    variants = [
        Planned(replace(unit, **changes), label)
        for label, only, changes in _SYNTHETIC_VARIANTS
        for unit in groups
        if unit.data == (only or unit.data)
    ]
    rates = [
        Planned(Points(data, name, lr, 0, few, steps), "learning rate")
        for (data, name), grid in LR_GRIDS.items()
        for lr in grid
    ]
    first = 2 * len(GROUPS)
    return main[:first] + variants + rates + main[first:]


_SYNTHETIC_VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("start: he_uniform", "", {"start": "he_uniform"}),
    ("start: glorot_normal", "", {"start": "glorot_normal"}),
    ("start: torch", "", {"start": "torch"}),
    ("eps: 2", "", {"eps": 2.0}),
    ("eps: 10", "", {"eps": 10.0}),
    ("own data", "", {"own_data": True}),
    ("noise: 0.1", "circles", {"noise": 0.1}),
    ("factor: 0.8", "circles", {"shape": 0.8}),
    ("noise: 0.1 ", "spirals", {"noise": 0.1}),
    ("degrees: 360", "spirals", {"shape": 360.0}),
)


def _mnist_unit(name: str, lr: float, seed: int, epochs: int, train: int = 0) -> Images:
    return Images(
        "mnist", MNIST_HIDDEN, "relu", "softmax", "cross_entropy", name, lr, 64, epochs, seed, train
    )


def _mnist(scale: str, seeds: int) -> list[Planned]:
    epochs = _at(scale, 2, 20, 500)
    train = _at(scale, 640, 0, 0)
    cells = [("asgd", lr) for lr in ASGD_LRS] + [("sgd", lr) for lr in SGD_LRS]
    main = [
        Planned(_mnist_unit(name, lr, seed, epochs, train))
        for seed in range(seeds)
        for name, lr in cells
    ]
    if scale != "paper":
        return main
    few = range(min(2, seeds))
    some = (("asgd", 0.005), ("asgd", 0.01), ("sgd", 0.01), ("sgd", 0.03))
    variants = [
        Planned(replace(_mnist_unit(name, lr, seed, 200), **changes), label)
        for label, changes in _MNIST_VARIANTS
        for seed in few
        for name, lr in some
    ]
    level = [
        Planned(
            replace(
                _mnist_unit(name, lr, seed, LEVEL_STEPS // math.ceil(images / 64), images),
                start=start,
                measure=max(1, 20_000 // images),
            ),
            f"level: {images:,} images, start {start}",
        )
        for seed in few
        for images, start in _LEVELS
        for name, lr in cells
    ]
    first = len(few) * len(cells)
    return main[:first] + level + variants + main[first:]


_LEVELS = (
    (5_000, "glorot_uniform"),
    (10_000, "glorot_uniform"),
    (20_000, "glorot_uniform"),
    (10_000, "torch"),
)
# 200 epochs, of which the main protocol's curves are read up to the same epoch.
_MNIST_VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("start: torch", {"start": "torch"}),
    ("start: he_uniform", {"start": "he_uniform"}),
    ("eps: 0", {"eps": 0.0}),
    ("train: 60,000", {"train": 60_000}),
    ("train: 10,000", {"train": 10_000}),
)

STABILISED: dict[str, tuple[str, float, dict[str, Any]]] = {
    "alone": ("{}", 1.0, {}),
    "cosine schedule": ("{}", 1.0, {"schedule": "cosine"}),
    "momentum 0.9": ("momentum", 0.1, {}),
    "dropout 0.2": ("{}", 1.0, {"dropout": 0.2}),
    "LayerNorm": ("{}", 1.0, {"norm": "layer"}),
    "BatchNorm": ("{}", 1.0, {"norm": "batch"}),
}


def _stabilised(scale: str, seeds: int) -> list[Planned]:
    epochs = _at(scale, 2, 20, 200)
    train = _at(scale, 640, 5_000, 10_000)
    planned = []
    for seed in range(seeds):
        for help_, (name, factor, changes) in STABILISED.items():
            for base, lr in (("asgd", 0.01), ("sgd", 0.03)):
                optimizer = base if name == "{}" else _WITH_MOMENTUM[base]
                unit = _mnist_unit(optimizer, lr * factor, seed, epochs, train)
                planned.append(Planned(replace(unit, measure=2, **changes), f"help: {help_}"))
    return planned


_WITH_MOMENTUM = {"asgd": "asgd, momentum 0.9", "sgd": "momentum 0.9"}

# DA-SGD.


def _dasgd_unit(
    data: str, name: str, lr: float, batch_size: int, seed: int, epochs: int, train: int = 0
) -> Images:
    return Images(
        data, DASGD_HIDDEN, "sigmoid", "sigmoid", "half_squared_error", name, lr, batch_size,
        epochs, seed, train, start="book", train_curve=False, signs=True,
    )  # fmt: skip


def _lr(scale: str, seeds: int) -> list[Planned]:
    return [
        Planned(_dasgd_unit("fashion-mnist", "sgd", lr, 8, seed, *_size(scale)))
        for seed in range(seeds)
        for lr in DASGD_LRS
    ]


def _batch(scale: str, seeds: int) -> list[Planned]:
    size = _size(scale)
    main = [
        Planned(_dasgd_unit(data, name, lr, batch, seed, *size))
        for seed in range(seeds)
        for data in DASGD_DATA
        for batch, lr in reversed(BATCHES.items())
        for name in ("sgd", "dasgd")
        if batch >= CHEAP_FROM or seed < max(1, seeds // 3)
    ]
    if scale != "paper":
        return main
    variants = [
        Planned(
            replace(_dasgd_unit("kmnist10k", name, BATCHES[batch], batch, seed, *size), **changes),
            label,
        )
        for label, changes in _BATCH_VARIANTS
        for seed in range(min(3, seeds))
        for batch in (8, 32, 256)
        for name in ("sgd", "dasgd")
    ]
    return main + variants


_BATCH_VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("loss: squared error", {"loss": "squared_error"}),
    ("loss: binary cross-entropy", {"loss": "binary_cross_entropy"}),
    ("loss: cross-entropy, softmax", {"loss": "cross_entropy", "output": "softmax"}),
    ("start: glorot_uniform", {"start": "glorot_uniform"}),
    ("start: torch", {"start": "torch"}),
    ("train: all 8,000", {"train": 8_000}),
)


def _premise(scale: str, seeds: int) -> list[Planned]:
    epochs = _at(scale, (0, 1), (0, 1, 2, 5, 10), (0, 1, 2, 5, 10, 20, 50))
    pairs = _at(scale, 2, 20, 50)
    return [
        Planned(Premise("fashion-mnist", epochs, seed, pairs, train=_at(scale, 640, 10_000, 0)))
        for seed in range(seeds)
    ]


def _momentum(scale: str, seeds: int) -> list[Planned]:
    size = _size(scale)
    return [
        Planned(_dasgd_unit("fashion-mnist", name, lr, batch, seed, *size))
        for seed in range(seeds)
        for batch in RIVAL_BATCHES
        for name, lr in _rivals(BATCHES[batch])
    ]


def _rivals(lr: float) -> Iterable[tuple[str, float]]:
    yield from (("dasgd", lr), ("sgd", lr))
    yield from (("sgd", round(factor * lr, 6)) for factor in SGD_FACTORS)
    yield from ((name, lr) for name in RIVALS)


def _size(scale: str) -> tuple[int, int]:
    """Epochs and training images of the DA-SGD experiments."""
    return _at(scale, (2, 640), (20, 6_000), (200, 0))


def _at(scale: str, smoke: Value, small: Value, paper: Value) -> Value:
    return {"smoke": smoke, "small": small, "paper": paper}[scale]


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "asgd-backprop",
            "every sample's part in the gradient of a 2-3-2-1 network",
            "aSGD Figs 1-3",
            {"smoke": 4, "small": 50, "paper": 200},
            _backprop,
        ),
        Experiment(
            "asgd-trajectories",
            "every parameter over training under aSGD and SGD",
            "aSGD Fig 4",
            {"smoke": 4, "small": 50, "paper": 200},
            _trajectories,
        ),
        Experiment(
            "asgd-synthetic",
            "steps, accuracy, loss and dummy nodes on circles and spirals",
            "aSGD Figs 5-7",
            {"smoke": 8, "small": 200, "paper": 10_000},
            _synthetic,
        ),
        Experiment(
            "asgd-mnist",
            "784-30-20-10 on MNIST at equal and at suitable learning rates",
            "aSGD Fig 8, Tables 1-2",
            {"smoke": 2, "small": 3, "paper": 100},
            _mnist,
        ),
        Experiment(
            "asgd-stabilised",
            "aSGD with what its authors advise against late instability",
            "aSGD section 3.3",
            {"smoke": 2, "small": 3, "paper": 5},
            _stabilised,
        ),
        Experiment(
            "dasgd-lr",
            "784-128-128-10 at batch 8, learning rates 0.001 to 0.01",
            "DA-SGD Fig 3",
            {"smoke": 2, "small": 3, "paper": 3},
            _lr,
        ),
        Experiment(
            "dasgd-batch",
            "SGD and DA-SGD at nine batch sizes on three data sets",
            "DA-SGD Figs 4-5",
            {"smoke": 2, "small": 3, "paper": 3},
            _batch,
        ),
        Experiment(
            "dasgd-premise",
            "gradient size and kept signs against the batch size",
            "DA-SGD section 2",
            {"smoke": 2, "small": 3, "paper": 3},
            _premise,
        ),
        Experiment(
            "dasgd-momentum",
            "DA-SGD against momentum, Nesterov and SGD at 1.5x and 2x",
            "DA-SGD section 4",
            {"smoke": 2, "small": 3, "paper": 3},
            _momentum,
        ),
    )
}
