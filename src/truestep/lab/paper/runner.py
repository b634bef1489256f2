"""Runs the units of an experiment that the store doesn't have yet."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from truestep.lab.board import LONG_SECONDS, duration
from truestep.lab.paper.data import at_hand
from truestep.lab.paper.store import UnitStore
from truestep.lab.paper.unit import Record, Unit, key, settings
from truestep.lab.training import versions
from truestep.lab.workers import Failure, Workers, one_thread

__all__ = ["Bench", "run"]


@dataclass(frozen=True)
class Bench:
    """What a worker process is given: where data is, and the command for the records."""

    data_dir: Path | None
    command: str

    def load(self) -> Callable[[Unit], Record]:
        """What makes a record of a unit."""
        return self.run

    def run(self, unit: Unit) -> Record:
        """Runs a unit."""
        start = time.perf_counter()
        with one_thread():
            outcome = unit.run(self.data_dir)
        seconds = time.perf_counter() - start
        return Record(unit.kind, settings(unit), outcome, seconds, self.command, versions())


def run(
    units: Iterable[Unit],
    store: UnitStore,
    console: Console,
    *,
    jobs: int = 2,
    data_dir: Path | None = None,
    command: str = "",
) -> list[Failure]:
    """Runs what is missing; each unit is stored as it ends.

    Args:
        units: What there is to run, in this order.
        store: Has what is done, and gets the rest.
        console: Gets the progress.
        jobs: Processes of one thread each.
        data_dir: Folder of local data sets.
        command: The command line, for the records.

    Returns:
        Units that failed.

    Raises:
        TruestepError: Data is missing, or the store can't be written.
    """
    wanted = {key(unit): unit for unit in units}
    done = store.keys() & wanted.keys()
    pending = [unit for name, unit in wanted.items() if name not in done]
    # Before any process starts, so that missing data is said once and at once.
    for name in dict.fromkeys(name for unit in pending for name in unit.data_sets()):
        at_hand(name, data_dir)
    failures: list[Failure] = []
    if not pending:
        console.print(f"All {len(wanted)} units are in the store.", highlight=False)
        return failures
    with (
        Workers(Bench(data_dir, command), jobs) as workers,
        Tally(console, len(wanted), pending, jobs) as tally,
    ):
        for outcome in workers.run(_still_missing(pending, store, tally)):
            if isinstance(outcome, Failure):
                failures.append(outcome)
                tally.count(outcome.key)
            else:
                store.add(outcome)
                tally.count_record(outcome)
    return failures


def _still_missing(pending: list[Unit], store: UnitStore, tally: "Tally") -> Iterator[Unit]:
    """The units without those that another process has done by the time of their turn."""
    for unit in pending:
        if key(unit) in store.keys():  # noqa: SIM118 - a method of the store's
            tally.count(unit)
        else:
            yield unit


class Tally:
    """A progress bar in units, with replica-steps per second and the time left.

    Args:
        console: Where it is shown.
        total: How many units the experiment has.
        pending: Those that are to be run.
        jobs: How many run at a time.
    """

    def __init__(self, console: Console, total: int, pending: list[Unit], jobs: int) -> None:
        self._console = console
        self._jobs = jobs
        self._left = {key(unit): unit.cost().seconds for unit in pending}
        self._expected = dict(self._left)
        self._estimated = self._measured = 0.0
        self._steps = 0
        self._start = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("units{task.fields[left]}"),
            console=console,
        )
        self._bar = self._progress.add_task(
            "running", total=total, completed=total - len(pending), left=""
        )
        line = f"{total} units"
        if total > len(pending):
            line += f", {total - len(pending)} of them done earlier"
        line += f": {duration(self.seconds_left)} with {jobs} process{'es' * (jobs > 1)}"
        if self.seconds_left > LONG_SECONDS:
            line += ". Interrupt at any time: the same command goes on"
        console.print(f"{line}.", highlight=False)

    def count_record(self, record: Record) -> None:
        """Counts a unit that was run here."""
        self._estimated += self._expected[record.key]
        self._measured += record.seconds
        self._steps += record.outcome.replica_steps
        self._count(record.key)

    def count(self, unit: Unit) -> None:
        """Counts a unit that failed, or that another process has run."""
        self._count(key(unit))

    @property
    def seconds_left(self) -> float:
        """The estimate, corrected by what units have taken so far."""
        ratio = self._measured / self._estimated if self._estimated else 1.0
        return sum(self._left.values()) * ratio / self._jobs

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _count(self, name: str) -> None:
        del self._left[name]
        rate = self._steps / (time.monotonic() - self._start)
        left = f", {rate:,.0f} replica-steps/s"
        if self._left:
            left += f", {duration(self.seconds_left)} left"
        self._progress.update(self._bar, advance=1, left=left)
