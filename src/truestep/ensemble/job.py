"""A training as the backends take it: everything checked, in numbers and arrays."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from truestep.ensemble.data import Data
from truestep.ensemble.settings import SPLITS, Network, Optimizer, Record, Stop
from truestep.ensemble.starts import first_parameters, orders
from truestep.errors import TruestepError

__all__ = ["DIVERGED", "FINISHED", "RUNNING", "STATUSES", "STOPPED", "Block", "Job"]

Order = Callable[[int, int], NDArray[np.int64]]

# A replica's status as the backends number it.
STATUSES = ("running", "done", "stopped", "diverged")
RUNNING, FINISHED, STOPPED, DIVERGED = range(4)
# How many indices an item's order may take at a time.
ORDER_NUMBERS = 2_000_000
# How much arithmetic there is between two looks at whether to go on: some tenths of a second.
BLOCK_PRODUCTS = 5e9


@dataclass(frozen=True)
class Block:
    """Steps that are taken in one call.

    Attributes:
        start: How many steps were taken before.
        stop: How many are taken then.
        epochs: Which ones the order holds.
    """

    start: int
    stop: int
    epochs: range


@dataclass(frozen=True)
class Job:
    """One call of `train`, but for where its results go.

    Attributes:
        network: What is trained.
        data: What on.
        optimizers: One for each replica.
        seeds: Likewise.
        steps: Of each replica, at most.
        batch_size: At most the samples.
        record: What to measure.
        stop: When to end early.
        starts: Parameters to begin with, float32 ``[replicas, parameters]``, or None.
        order: A function of seed and epoch, or None.
    """

    network: Network
    data: Data
    optimizers: Sequence[Optimizer]
    seeds: NDArray[np.int64]
    steps: int
    batch_size: int
    record: Record
    stop: Stop | None
    starts: NDArray[np.float32] | None
    order: Order | None

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return math.ceil(self.data.train.samples / self.batch_size)

    @property
    def full(self) -> bool:
        """Whether each batch is the whole training split, in its own order."""
        return self.batch_size == self.data.train.samples

    @cached_property
    def measured(self) -> NDArray[np.int64]:
        """After how many steps to measure."""
        return self.record.at(self.steps, self.steps_per_epoch)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The splits to measure on; the one that decides when to stop is among them."""
        chosen = set(self.data.splits if self.record.splits is None else self.record.splits)
        if self.stop is not None:
            chosen.add(self.stop.split)
        if self.record.under is not None:
            chosen.add("train")
        return tuple(name for name in SPLITS if name in chosen)

    @property
    def products(self) -> float:
        """Multiplications of a step with its share of the measurements, about."""
        weights = sum(inputs * outputs for inputs, outputs in self.network.layers)
        samples = sum(split.samples for split in self.data.splits.values())
        return weights * (3.0 * self.batch_size + samples * len(self.measured) / self.steps)

    def start(self, replica: int) -> NDArray[np.float32]:
        """The parameters that a replica begins with."""
        if self.starts is not None:
            return np.asarray(self.starts[replica])
        return first_parameters(self.network, int(self.seeds[replica]))

    def orders(self, replicas: range, epochs: range) -> NDArray[np.int32]:
        """In which order replicas see the samples: int32 ``[replicas, epochs * samples]``."""
        samples = self.data.train.samples
        if self.full:
            return np.arange(samples, dtype=np.int32)[None]
        seeds = [int(self.seeds[replica]) for replica in replicas]
        if self.order is None:
            return orders(seeds, epochs, samples)
        rows = [[self.permutation(seed, epoch) for epoch in epochs] for seed in seeds]
        return np.array(rows, np.int32).reshape(len(seeds), -1)

    def permutation(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """What the user's order gives.

        Raises:
            TruestepError: It is no permutation of the samples: the loops would read other memory.
        """
        samples = self.data.train.samples
        found = np.asarray(self.order(seed, epoch) if self.order else np.arange(samples))
        if found.dtype.kind not in "iu" or not np.array_equal(np.sort(found), np.arange(samples)):
            raise TruestepError(
                f"train(order=...): what it returns for seed {seed} and epoch {epoch} is no permutation "
                f"of the {samples} training samples."
            )
        return found

    def blocks(self, replicas: int) -> list[Block]:
        """The whole training in blocks, each short enough to be interrupted."""
        length = max(1, int(BLOCK_PRODUCTS / (self.products * replicas)))
        a_pass = self.steps_per_epoch
        samples = self.data.train.samples
        passes = max(1, ORDER_NUMBERS // (samples * replicas)) if not self.full else length
        blocks = []
        for first in range(0, math.ceil(self.steps / a_pass), passes):
            end = min((first + passes) * a_pass, self.steps)
            epochs = range(first, math.ceil(end / a_pass))
            blocks += [
                Block(start, min(start + length, end), epochs)
                for start in range(first * a_pass, end, length)
            ]
        return blocks

    def schedules(self, block: Block, replicas: range) -> tuple[NDArray[np.float64], list[int]]:
        """Factors of the learning rates ``[schedules, steps]``, and which row is a replica's."""
        rows: list[NDArray[np.float64]] = []
        known: dict[object, int] = {}
        which = []
        for replica in replicas:
            schedule = self.optimizers[replica].schedule
            if schedule not in known:
                known[schedule] = len(rows)
                rows.append(self._factors(schedule, block))
            which.append(known[schedule])
        return np.array(rows), which

    def _factors(self, schedule: str | Callable[[int], float], block: Block) -> NDArray[np.float64]:
        steps = np.arange(block.start, block.stop)
        if schedule == "constant":
            return np.ones(len(steps))
        if schedule == "cosine":
            return (1 + np.cos(np.pi * steps / self.steps)) / 2
        factor = cast("Callable[[int], float]", schedule)
        return np.array([_factor(factor(int(step)), int(step)) for step in steps], np.float64)


def _factor(value: Any, step: int) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise TruestepError(
            f"Optimizer(schedule=...): what it returns for step {step} is {value!r}; return a factor of the "
            "learning rate."
        )
    return found
