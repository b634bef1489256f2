"""What a race is to run: settings checked, and the task's defaults filled in."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from truestep.errors import TruestepError
from truestep.lab.optimizers import find_optimizer, learning_rates
from truestep.lab.store import RunKey
from truestep.lab.tasks import TASKS, Splits, Task, find_task

__all__ = ["ENGINES", "EVERY", "Plan", "Settings", "UsageError", "make_plan"]

Number = TypeVar("Number", int, float)

# Key of `Settings.learning_rates` for the optimizers that have none of their own.
EVERY = ""
ENGINES = ("auto", "ensemble", "torch")


class UsageError(TruestepError):
    """What was asked for can't be: nothing was run, and the command line exits with 2."""

    exit_code = 2


@dataclass(frozen=True)
class Settings:
    """What to race. What is left out is the task's own default.

    Attributes:
        task: Name of a built-in task, or path of a Python file that holds one.
        optimizers: Names as for `truestep.lab.optimizers.find_optimizer`.
        learning_rates: Optimizer name -> learning rates; the key "" serves all others.
        batch_sizes: Samples per step.
        seeds: How many; they are 0, 1, ...
        epochs: Passes over the training data.
        out: Folder for the results, ``truestep-race/TASK`` by default.
        data_dir: Folder of local data sets.
        jobs: Processes, or threads of the ensemble; as many as there are processors by default.
        engine: "auto", "ensemble" or "torch": see `truestep.lab.engines`.
    """

    task: str = "digits"
    optimizers: tuple[str, ...] = ()
    learning_rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    batch_sizes: tuple[int, ...] = ()
    seeds: int = 3
    epochs: int | None = None
    out: Path | None = None
    data_dir: Path | None = None
    jobs: int | None = None
    engine: str = "auto"


@dataclass(frozen=True)
class Plan:
    """What a race is to run.

    Attributes:
        task: With the epochs of this race.
        file: The Python file that holds a user's task, None for built-in tasks.
        grids: Optimizer name -> learning rates.
        batch_sizes: Samples per step, ascending.
        seeds: How many.
        folder: For the results.
    """

    task: Task
    file: Path | None
    grids: Mapping[str, tuple[float, ...]]
    batch_sizes: tuple[int, ...]
    seeds: int
    folder: Path

    @property
    def reference(self) -> int:
        """The batch size whose best learning rate is also tried at the others."""
        default = self.task.batch_size
        return default if default in self.batch_sizes else self.batch_sizes[0]

    @property
    def places(self) -> list[tuple[str, int]]:
        """Every optimizer at every batch size."""
        return [(name, batch_size) for batch_size in self.batch_sizes for name in self.grids]

    def has(self, key: RunKey) -> bool:
        """Whether a run of this experiment belongs to this race."""
        return (
            key.lr in self.grids.get(key.optimizer, ())
            and key.batch_size in self.batch_sizes
            and key.seed < self.seeds
        )

    def selection(self, experiment: str) -> list[RunKey]:
        """The runs among which learning rates are chosen."""
        # Seeds outermost: every optimizer has results early, and the time left is told well.
        return [
            RunKey(experiment, optimizer, lr, batch_size, seed, final=False)
            for seed in range(self.seeds)
            for batch_size in self.batch_sizes
            for optimizer, grid in self.grids.items()
            for lr in grid
        ]

    def finals(self, experiment: str, chosen: Mapping[tuple[str, int], float]) -> list[RunKey]:
        """The runs that read the test set.

        Args:
            experiment: As in the key.
            chosen: Optimizer and batch size -> chosen learning rate, nan where all diverged.

        Returns:
            Every seed at each chosen learning rate, and at the one chosen at the reference batch
            size.
        """
        keys = (
            RunKey(experiment, optimizer, lr, batch_size, seed, final=True)
            for seed in range(self.seeds)
            for optimizer, batch_size in chosen
            for lr in (
                chosen[optimizer, batch_size],
                chosen.get((optimizer, self.reference), math.nan),
            )
            if math.isfinite(lr)
        )
        return list(dict.fromkeys(keys))

    def check_data(self, splits: Splits) -> None:
        """Refuses batches that are larger than the training data.

        Raises:
            UsageError: There is one.
        """
        samples = len(splits.train.targets)
        if self.batch_sizes[-1] > samples:
            raise UsageError(
                f"Batch size {self.batch_sizes[-1]} is larger than the training data of "
                f"{self.task.name}. Give at most {samples}."
            )


def make_plan(settings: Settings) -> Plan:
    """Checks settings and fills in the task's defaults.

    Raises:
        UsageError: A name is unknown or a value impossible.
    """
    _check_values(settings)
    with _wrong_usage():
        task = find_task(settings.task)
        optimizers = settings.optimizers or task.optimizers
        names = dict.fromkeys(find_optimizer(name).name for name in optimizers)
        asked = {
            name and find_optimizer(name).name: grid
            for name, grid in settings.learning_rates.items()
        }
        grids = {
            name: _ascending(
                asked.get(name) or asked.get(EVERY) or learning_rates(name, task.learning_rates)
            )
            for name in names
        }
    for name in asked.keys() - names.keys() - {EVERY}:
        raise UsageError(
            f"--lr has learning rates for {name}, which does not race. Add it to --optimizers, "
            "or leave its learning rates out."
        )
    if settings.epochs is not None:
        task = replace(task, epochs=settings.epochs)
    folder = settings.out or Path("truestep-race", re.sub(r"[^\w.-]+", "-", task.name))
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file. Give a folder.")
    return Plan(
        task=task,
        file=None if settings.task in TASKS else Path(settings.task),
        grids=grids,
        batch_sizes=_ascending(settings.batch_sizes or (task.batch_size,)),
        seeds=settings.seeds,
        folder=folder,
    )


def _check_values(settings: Settings) -> None:
    for name in ("seeds", "epochs", "jobs"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value} is impossible. Give 1 or more.")
    if settings.engine not in ENGINES:
        raise UsageError(
            f"--engine {settings.engine} is unknown. Give one of {', '.join(ENGINES)}."
        )
    for batch_size in settings.batch_sizes:
        if batch_size < 1:
            raise UsageError(f"--batch-size {batch_size} is impossible. Give 1 or more.")
    for lr in (lr for grid in settings.learning_rates.values() for lr in grid):
        if not (math.isfinite(lr) and lr > 0):
            raise UsageError(f"--lr {lr:g} is impossible. Give positive numbers.")


def _ascending(values: Iterable[Number]) -> tuple[Number, ...]:
    return tuple(sorted(set(values)))


@contextmanager
def _wrong_usage() -> Iterator[None]:
    try:
        yield
    except TruestepError as error:
        raise UsageError(str(error)) from error
