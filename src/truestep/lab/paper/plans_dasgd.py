"""Plans of the DA-SGD paper's experiments."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from truestep.lab.paper.images import DASGD_HIDDEN, Images
from truestep.lab.paper.planned import LEARNING_RATE, Planned, at
from truestep.lab.paper.premise import Premise

__all__ = ["BATCHES", "DASGD_DATA", "batch", "lr", "momentum", "premise"]

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
RIVAL_BATCHES = (32, 64, 128, 256)
SGD_FACTORS = (1.5, 2.0)
# Batches below this cost hours at 200 epochs: a third of the seeds on the data that no claim is about.
CHEAP_FROM = 8
UNCLAIMED = "quickdraw10"
SMALLEST = "kmnist10k"


def _dasgd_unit(
    data: str, name: str, lr: float, batch_size: int, seed: int, epochs: int, train: int = 0
) -> Images:
    return Images(
        data, DASGD_HIDDEN, "sigmoid", "sigmoid", "half_squared_error", name, lr, batch_size,
        epochs, seed, train, start="book", train_curve=False, signs=True,
    )  # fmt: skip


def lr(scale: str, seeds: int) -> list[Planned]:
    """dasgd-lr: ten learning rates at batch 8."""
    return [
        Planned(_dasgd_unit("fashion-mnist", "sgd", lr, 8, seed, *_size(scale)))
        for seed in range(seeds)
        for lr in DASGD_LRS
    ]


def batch(scale: str, seeds: int) -> list[Planned]:
    """dasgd-batch: nine batch sizes on three data sets; on the smallest, variants and SGD's rates."""
    length = _size(scale)
    cells = [
        (seed, data, size, rate)
        for seed in range(seeds)
        for size, rate in reversed(BATCHES.items())
        for data in DASGD_DATA
        if size >= CHEAP_FROM or data != UNCLAIMED or seed < max(1, seeds // 3)
    ]
    # Last what takes as long as all others together: small batches on the larger data sets.
    cells.sort(key=lambda cell: cell[2] < CHEAP_FROM and cell[1] != SMALLEST)
    main = [
        Planned(_dasgd_unit(data, name, rate, size, seed, *length))
        for seed, data, size, rate in cells
        for name in ("sgd", "dasgd")
    ]
    if scale != "paper":
        return main
    variants = [
        Planned(
            replace(_dasgd_unit(SMALLEST, name, BATCHES[size], size, seed, *length), **changes),
            label,
        )
        for label, changes in _BATCH_VARIANTS
        for seed in range(min(3, seeds))
        for size in (8, 32, 256)
        for name in ("sgd", "dasgd")
    ]
    variants += [
        Planned(
            _dasgd_unit(SMALLEST, "sgd", round(factor * rate, 6), size, seed, *length),
            LEARNING_RATE,
        )
        for seed in range(min(3, seeds))
        for size, rate in BATCHES.items()
        for factor in SGD_FACTORS
        if size < CHEAP_FROM
    ]
    slow = sum(cell[2] < CHEAP_FROM and cell[1] != SMALLEST for cell in cells) * 2
    return main[: len(main) - slow] + variants + main[len(main) - slow :]


_BATCH_VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("loss: squared error", {"loss": "squared_error"}),
    ("loss: binary cross-entropy", {"loss": "binary_cross_entropy"}),
    ("loss: cross-entropy, softmax", {"loss": "cross_entropy", "output": "softmax"}),
    ("start: glorot_uniform", {"start": "glorot_uniform"}),
    ("start: torch", {"start": "torch"}),
    ("train: all 8,000", {"train": 8_000}),
)


def premise(scale: str, seeds: int) -> list[Planned]:
    """dasgd-premise: one unit a seed."""
    epochs = at(scale, (0, 1), (0, 1, 2, 5, 10), (0, 1, 2, 5, 10, 20, 50))
    pairs = at(scale, 2, 20, 50)
    return [
        Planned(Premise("fashion-mnist", epochs, seed, pairs, train=at(scale, 640, 10_000, 0)))
        for seed in range(seeds)
    ]


def momentum(scale: str, seeds: int) -> list[Planned]:
    """dasgd-momentum: DA-SGD, SGD at three rates, momentum and Nesterov."""
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
    return at(scale, (2, 640), (20, 6_000), (200, 0))
