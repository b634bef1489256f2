"""What a race shows while it runs: how many runs are done, and how long the rest will take."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from truestep.lab.store import RunKey, RunResult
from truestep.lab.training import Cost

__all__ = ["Board", "duration"]

MINUTE = 60
HOUR = 3600
# From here on it is worth telling that a race can be interrupted.
LONG_SECONDS = 60.0

Place = tuple[str, int]
"""Optimizer and batch size: what the cost of a run depends on."""


class Board:
    """A progress bar that knows what runs cost.

    Args:
        console: Where it is shown.
        costs: Estimate per optimizer and batch size; corrected by what runs really take.
        jobs: How many runs go on at a time.
        workers: What they are, more than one of them.
    """

    def __init__(
        self,
        console: Console,
        costs: Mapping[Place, Cost],
        jobs: int,
        workers: str = "processes",
    ) -> None:
        self._console = console
        self._costs = costs
        self._jobs = jobs
        self._workers = f"{jobs} {workers}" if jobs > 1 else "1 at a time"
        self._left: Counter[Place] = Counter()
        self._done = 0
        self._measured = self._estimated = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs{task.fields[left]}"),
            console=console,
        )
        self._bar = self._progress.add_task("", total=None, left="")

    def announce(self, selection: int, finals: int, left: list[RunKey]) -> None:
        """Says before the first run what is to come.

        Args:
            selection: Number of runs to choose learning rates from.
            finals: Number of runs on test data.
            left: Those that the store does not have yet.
        """
        earlier = selection + finals - len(left)
        self.expect("choosing learning rates", left, done=earlier)
        line = f"{selection} runs to choose learning rates, then {finals} on test data"
        if earlier:
            line += f"; {earlier} of them were done earlier"
        if left:
            line += f": {duration(self.seconds_left)} with {self._workers}"
        if self.seconds_left > LONG_SECONDS:
            line += ". Interrupt at any time: the same command goes on"
        self._console.print(f"{line}.", highlight=False)

    def expect(self, doing: str, left: Iterable[RunKey], done: int) -> None:
        """Says what goes on, what is left in all, and how much was done already."""
        self._left = Counter(map(_place, left))
        self._done = done
        self._progress.update(self._bar, description=doing)
        self._show()

    def count(self, key: RunKey, result: RunResult | None = None) -> None:
        """Counts a run as done; without a result it failed, or another process did it."""
        place = _place(key)
        self._left[place] -= 1
        self._done += 1
        if result is not None and result.curve:
            self._measured += result.curve[-1]["seconds"]
            self._estimated += self._costs[place].training
        self._show()

    @property
    def seconds_left(self) -> float:
        """The estimate."""
        ratio = self._measured / self._estimated if self._estimated else 1.0
        return (
            sum(
                number * (self._costs[place].training * ratio + self._costs[place].evaluation)
                for place, number in self._left.items()
            )
            / self._jobs
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self) -> None:
        left = self._left.total()
        self._progress.update(
            self._bar,
            total=self._done + left,
            completed=self._done,
            left=f", {duration(self.seconds_left)} left" if left else "",
        )


def duration(seconds: float) -> str:
    """A rough duration, for people.

    Example:
        >>> duration(3.2), duration(95), duration(10_000)
        ('about 4 s', 'about 2 min', 'about 2 h 47 min')
    """
    if seconds < MINUTE:
        return f"about {int(seconds) + 1} s"
    minutes = round(seconds / MINUTE)
    if seconds < HOUR:
        return f"about {minutes} min"
    return f"about {minutes // MINUTE} h {minutes % MINUTE} min"


def _place(key: RunKey) -> Place:
    return key.optimizer, key.batch_size
