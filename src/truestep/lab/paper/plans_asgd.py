"""Plans of the aSGD paper's experiments."""

import math
from dataclasses import replace
from typing import Any

from truestep.lab.paper.compression import Compression
from truestep.lab.paper.data import POINTS_TRAIN
from truestep.lab.paper.images import MNIST_HIDDEN, Images
from truestep.lab.paper.planned import LEARNING_RATE, Planned, at
from truestep.lab.paper.points import HIDDEN, NOISE, Points
from truestep.lab.paper.small import Panels, Trajectories

__all__ = [
    "ASGD_LRS",
    "COMPRESSION_DATA",
    "GROUPS",
    "LR_GRIDS",
    "SGD_LRS",
    "STABILISED",
    "backprop",
    "compression",
    "mnist",
    "stabilised",
    "synthetic",
    "trajectories",
]

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
# How many times aSGD's learning rate SGD gets where their paths are compared at equal loss.
SGD_FACTORS = (1.5, 2.0, 3.0, 5.0)
LEVEL_STEPS = 32_000  # 500 epochs of up to 64 steps


def backprop(scale: str, seeds: int) -> list[Planned]:
    """asgd-backprop: one unit of all starts."""
    return [Planned(Panels(0.01, replicas=seeds, steps=at(scale, 50, 10_000, 10_000)))]


def trajectories(scale: str, seeds: int) -> list[Planned]:
    """asgd-trajectories: one unit of all starts, one for each other start law and faster SGD."""
    main = Trajectories(0.01, replicas=seeds, steps=at(scale, 50, 10_000, 10_000))
    if scale != "paper":
        return [Planned(main)]
    return [
        Planned(main),
        *(Planned(replace(main, start=s), f"start: {s}") for s in ("he_uniform", "torch")),
        *(Planned(replace(main, sgd_factor=f), LEARNING_RATE) for f in SGD_FACTORS),
    ]


def synthetic(scale: str, seeds: int) -> list[Planned]:
    """asgd-synthetic: trainings in chunks, then variants and a grid of learning rates."""
    steps = at(scale, 60, 10_000, 10_000)
    chunk = min(at(scale, 4, 100, 500), seeds)
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
        Planned(Points(data, name, lr, 0, few, steps), LEARNING_RATE)
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
    ("loss: squared error", "", {"loss": "squared_error"}),
    ("circles, noise: 0.1", "circles", {"noise": 0.1}),
    ("circles, factor: 0.8", "circles", {"shape": 0.8}),
    ("spirals, noise: 0.1", "spirals", {"noise": 0.1}),
    ("spirals, degrees: 360", "spirals", {"shape": 360.0}),
)


def _mnist_unit(name: str, lr: float, seed: int, epochs: int, train: int = 0) -> Images:
    return Images(
        "mnist", MNIST_HIDDEN, "relu", "softmax", "cross_entropy", name, lr, 64, epochs, seed, train
    )


def mnist(scale: str, seeds: int) -> list[Planned]:
    """asgd-mnist: Tables 1 and 2's cells, the search for their level, and variants."""
    epochs = at(scale, 2, 20, 500)
    train = at(scale, 640, 0, 0)
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
    ("loss: squared error", {"output": "sigmoid", "loss": "squared_error"}),
)

STABILISED: dict[str, tuple[str, float, dict[str, Any]]] = {
    "alone": ("{}", 1.0, {}),
    "cosine schedule": ("{}", 1.0, {"schedule": "cosine"}),
    "momentum 0.9": ("momentum", 0.1, {}),
    "dropout 0.2": ("{}", 1.0, {"dropout": 0.2}),
    "LayerNorm": ("{}", 1.0, {"norm": "layer"}),
    "BatchNorm": ("{}", 1.0, {"norm": "batch"}),
}


def stabilised(scale: str, seeds: int) -> list[Planned]:
    """asgd-stabilised: each help with aSGD and with SGD."""
    epochs = at(scale, 2, 20, 200)
    train = at(scale, 640, 5_000, 10_000)
    planned = []
    for seed in range(seeds):
        for help_, (name, factor, changes) in STABILISED.items():
            for base, lr in (("asgd", 0.01), ("sgd", 0.03)):
                optimizer = base if name == "{}" else _WITH_MOMENTUM[base]
                unit = _mnist_unit(optimizer, lr * factor, seed, epochs, train)
                planned.append(Planned(replace(unit, measure=2, **changes), f"help: {help_}"))
    return planned


_WITH_MOMENTUM = {"asgd": "asgd, momentum 0.9", "sgd": "momentum 0.9"}

# The same for both optimizers, so that each is seen at the other's best.
COMPRESSION_LRS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
COMPRESSION_DATA = ("circles", "spirals", "mnist", "fashion-mnist")
# Trainings on images take about so many times as long as those on points.
FEWER_IMAGES = 5
# The paper's network leaves little to take out.
WIDE_HIDDEN = (128, 64)
WIDE = "hidden: 128-64"


def compression(scale: str, seeds: int) -> list[Planned]:
    """asgd-compression: every learning rate with aSGD and SGD, fewer seeds on images; then wider networks."""
    rates = at(scale, COMPRESSION_LRS[2:4], COMPRESSION_LRS, COMPRESSION_LRS)
    cells = [
        (first, data, lr, name, count)
        for data in COMPRESSION_DATA
        for first, count in _chunks(data, scale, seeds)
        for lr in rates
        for name in ("asgd", "sgd")
    ]
    cells.sort(key=lambda cell: cell[0])
    main = [
        Planned(_compression_unit(scale, data, name, lr, first, count))
        for first, data, lr, name, count in cells
    ]
    if scale != "paper":
        return main
    wide = [
        Planned(_compression_unit(scale, data, name, lr, first, count, WIDE_HIDDEN), WIDE)
        for first, data, lr, name, count in cells
        if data not in NOISE and first == 0 and lr in COMPRESSION_LRS[2:]
    ]
    begun = sum(cell[0] == 0 for cell in cells)
    return main[:begun] + wide + main[begun:]


def _chunks(data: str, scale: str, seeds: int) -> list[tuple[int, int]]:
    """First seeds and numbers of seeds of the units of a cell."""
    images = data not in NOISE
    count = max(1, seeds // FEWER_IMAGES) if images else seeds
    size = at(scale, 1, 1, 5) if images else at(scale, 2, 10, 25)
    return [(first, min(size, count - first)) for first in range(0, count, size)]


def _compression_unit(
    scale: str,
    data: str,
    name: str,
    lr: float,
    first: int,
    replicas: int,
    hidden: tuple[int, ...] = MNIST_HIDDEN,
) -> Compression:
    if data in NOISE:
        epochs = at(scale, 60, 10_000, 10_000)
        return Compression(data, HIDDEN, name, lr, POINTS_TRAIN, epochs, first, replicas)
    epochs, train = at(scale, (2, 640), (5, 0), (20, 0))
    return Compression(data, hidden, name, lr, 64, epochs, first, replicas, train)
