"""Where runs happen: in this process, or in worker processes that never outlive it."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import torch

from truestep.errors import TruestepError
from truestep.lab.store import RunKey, RunResult
from truestep.lab.tasks import Splits, Task, find_task
from truestep.lab.training import train

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess
    from multiprocessing.process import BaseProcess

__all__ = ["Assignment", "Failure", "Here", "Loads", "Workers", "one_line", "one_thread"]

SPAWN = multiprocessing.get_context("spawn")

# What tells runs apart, and what they give, is the business of the one who hands them out.
Key = Any
Result = Any


class Loads(Protocol):
    """What a worker is given once, by pickling: it loads data and returns what makes a run."""

    def load(self) -> Callable[[Key], Result]:
        """Is called in the worker.

        Raises:
            TruestepError: There is nothing to run with.
        """
        ...


@dataclass(frozen=True)
class Failure:
    """A run that ended with an exception, such as of user code, or whose process died.

    Attributes:
        key: The run.
        reason: One line.
        trace: The whole traceback, "" if the process died.
    """

    key: Key
    reason: str
    trace: str = ""


@dataclass(frozen=True)
class Ready:
    """What a worker says when it has its task."""


@dataclass(frozen=True)
class Assignment:
    """What a worker loads once: the task, by the name or file that the user gave, and its data."""

    task: str
    epochs: int | None = None
    data_dir: Path | None = None

    def find(self) -> Task:
        """The task, with the epochs of this race."""
        task = find_task(self.task)
        return task if self.epochs is None else replace(task, epochs=self.epochs)

    def load(self) -> Callable[[RunKey], RunResult]:
        """What makes a run of the task.

        Raises:
            TruestepError: The task's own code fails.
        """
        try:
            task = self.find()
            return partial(train, task, task.load(self.data_dir))
        except Exception as error:
            raise TruestepError(f"The task can't be loaded: {one_line(error)}") from error


class Here:
    """Runs one after the other in this process, with the same results as a worker gives."""

    def __init__(self, task: Task, splits: Splits) -> None:
        self._train = partial(train, task, splits)

    def run(self, keys: Iterable[RunKey]) -> Iterator[RunResult | Failure]:
        """Results and failures, each as its run ends."""
        for key in keys:
            with one_thread():
                outcome = _attempt(self._train, key)
            yield outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Workers:
    """Runs in several processes of one thread each: tiny networks gain nothing from threads.

    A process that dies costs its run alone: that is a failure, and another process takes its
    place. All end with the ``with`` block, and when this process is killed.

    Args:
        assignment: What every worker loads.
        jobs: Number of processes, started as runs need them.
    """

    def __init__(self, assignment: Loads, jobs: int) -> None:
        self._assignment = assignment
        self._jobs = jobs
        self._processes: dict[Connection, SpawnProcess] = {}
        self._ready: set[Connection] = set()

    def run(self, keys: Iterable[Key]) -> Iterator[Result | Failure]:
        """Results and failures, each as its run ends; `keys` is asked when a worker is free.

        Raises:
            TruestepError: A worker can't load the task.
        """
        waiting = iter(keys)
        free = list(self._processes)
        busy: dict[Connection, Key] = {}
        outcomes: list[Result | Failure] = []
        while True:
            # Work is handed out before its results are, so that nobody waits for the store.
            while len(busy) < self._jobs and (key := next(waiting, None)) is not None:
                connection = free.pop() if free else self._start()
                busy[connection] = key
                connection.send(key)
            yield from outcomes
            if not busy:
                return
            outcomes = []
            for connection in cast("list[Connection]", wait(list(busy))):
                message = self._receive(connection, busy[connection])
                if isinstance(message, Ready):
                    self._ready.add(connection)
                    continue
                outcomes.append(message)
                del busy[connection]
                if connection in self._processes:
                    free.append(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.join()

    def _start(self) -> Connection:
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=_work, args=(theirs, self._assignment), daemon=True)
        with _interrupts_ignored():
            process.start()
        # Or the end of the process would not close the pipe.
        theirs.close()
        self._processes[ours] = process
        return ours

    def _receive(self, connection: Connection, key: Key) -> Result | Ready:
        try:
            message = connection.recv()
        except (EOFError, ConnectionError) as error:
            process = self._processes.pop(connection)
            process.join()
            ending = _ending(process.exitcode)
            if connection not in self._ready:
                raise TruestepError(
                    f"A worker process ended while it started ({ending}). See what it printed, "
                    "or use --jobs 1, which needs no other process."
                ) from error
            return Failure(key, f"its process ended ({ending})")
        if isinstance(message, TruestepError):
            raise message
        return message


def one_line(error: Exception) -> str:
    """An exception as the message of a `TruestepError`, or as its type and first line."""
    if isinstance(error, TruestepError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch use one thread, as every run does: sums are then the same everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _work(connection: Connection, assignment: Loads) -> None:
    """The life of a worker process: load what it needs, then run what the pipe brings."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Standard output is for the race's own result, which may be JSON.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    try:
        run = assignment.load()
    except TruestepError as error:
        connection.send(error)
        return
    connection.send(Ready())
    while True:
        connection.send(_attempt(run, connection.recv()))


def _end_with_parent() -> None:
    parent = cast("BaseProcess", multiprocessing.parent_process())
    wait([parent.sentinel])
    # Not sys.exit, which ends a thread; there is nothing to clean up.
    os._exit(1)


def _attempt(run: Callable[[Key], Result], key: Key) -> Result | Failure:
    try:
        return run(key)
    except Exception as error:  # noqa: BLE001 - a user's code may raise anything
        return Failure(key, one_line(error), traceback.format_exc())


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}, as when memory runs out"
    return f"exit code {exit_code}"


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process started here leaves Ctrl-C to its parent, from its first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
