"""One compiled loop on several cores: on the threads of torch's own operations, or on some of our own.

torch's threads are OpenMP's. They stay awake for a while after an operation: what they are handed begins at
once, and what other threads do in that time has to share their cores. Where OpenMP is another than GNU's, or
a loop is not compiled for it, there are own threads, which sleep between the calls.
"""

import ctypes
import functools
import os
import threading
from array import array
from collections.abc import Callable
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from truestep.kernels.dispatch import installed, loops

__all__ = ["GRAIN", "TEAM_GRAIN", "spread", "teams"]

# Nanoseconds. Handing a part to a sleeping thread and hearing of its end took 60,000 on a virtual machine:
# a part that is shorter costs more than it saves.
GRAIN = 75_000
# Handing it to OpenMP's threads, with all that Python does for it, took 20,000.
TEAM_GRAIN = 30_000

# Where a team counts the parts that have ended, see `truestep.kernels.loops.teams`.
ENDED = 3

Loop = Callable[..., Any]
Done = SimpleQueue[BaseException | None]


def spread(loop: Loop, length: int, work: float, *arguments: Any) -> None:
    """Calls ``loop(start, stop, *arguments)`` over all of ``[0, length)``, in parts where that is faster.

    There are at most `torch.get_num_threads()` parts, the first in the caller's thread. Returns or
    raises when all have ended: the first error that one raised, a RuntimeError on torch's threads.

    Args:
        loop: compiled with ``nogil=True``; its parts write to different places.
        length: how far it runs.
        work: about how many nanoseconds one core takes for all of it.
        arguments: what the loop takes after its range.

    Example:
        >>> spread(lambda start, stop, name: print(start, stop, name), 8, 100.0, "short")
        0 8 short
    """
    threads = 1 if work < 2 * TEAM_GRAIN else torch.get_num_threads()
    team = None if threads == 1 else _team(loop, arguments)
    parts = min(threads, int(work / (GRAIN if team is None else TEAM_GRAIN)), length)
    if parts < 2:  # noqa: PLR2004 - nothing to share
        loop(0, length, *arguments)
        return
    if team is not None:
        _run(team, length, parts, arguments)
        return
    jobs, done = _jobs(parts - 1), Done()
    ends = [length * part // parts for part in range(1, parts + 1)]
    for start, stop in pairwise(ends):
        jobs.put((loop, start, stop, arguments, done))
    try:
        loop(0, ends[0], *arguments)
    finally:
        failures = _wait(done, parts - 1)
    if failures:
        raise failures[0]


@functools.cache
def teams() -> Any:
    """What starts a team of torch's threads; None where there is no GNU OpenMP.

    It is looked up among the symbols that torch has loaded for the whole process.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


def _team(loop: Loop, arguments: tuple[Any, ...]) -> Any:
    if not installed() or teams() is None or _forked.is_set():
        return None
    numbers = [each.dtype.type for each in arguments if isinstance(each, np.ndarray)]
    return loops().team(loop, numbers[-1] if numbers else None)


def _run(team: Any, length: int, parts: int, arguments: tuple[Any, ...]) -> None:
    """Lets a team run a loop.

    Raises:
        RuntimeError: the loop has raised something, which its thread has printed.
    """
    work = array("q", (0, parts, length, 0))
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            work.extend((argument.ctypes.data, argument.size, argument.itemsize))
        elif isinstance(argument, float):
            work.append(int(np.float64(argument).view(np.int64)))
        else:
            work.append(int(argument))
    teams()(team.address, work.buffer_info()[0], parts, 0)
    if work[ENDED] != parts:
        raise RuntimeError(
            f"a compiled loop has not ended {parts - work[ENDED]} of {parts} parts, most likely for want of "
            "memory; what it was writing is incomplete, and its error is on standard error"
        )


def _wait(done: Done, parts: int) -> list[BaseException]:
    """What the other parts raised, when all have ended."""
    failures: list[BaseException] = []
    while parts > 0:
        try:
            failure = done.get()
        except KeyboardInterrupt as error:
            # Raised later: until they end, the parts write to memory that the caller may then free.
            failures.append(error)
            continue
        parts -= 1
        if failure is not None:
            failures.append(failure)
    return failures


@functools.cache
def _jobs(threads: int) -> SimpleQueue[tuple[Loop, int, int, tuple[Any, ...], Done]]:
    """The queue that this many threads serve for as long as the process lives."""
    jobs: SimpleQueue[tuple[Loop, int, int, tuple[Any, ...], Done]] = SimpleQueue()
    for number in range(threads):
        name = f"truestep {number + 1} of {threads}"
        threading.Thread(target=_serve, args=(jobs,), name=name, daemon=True).start()
    return jobs


def _serve(jobs: SimpleQueue[tuple[Loop, int, int, tuple[Any, ...], Done]]) -> None:
    while True:
        loop, start, stop, arguments, done = jobs.get()
        try:
            loop(start, stop, *arguments)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            done.put(error)
        else:
            done.put(None)
        del arguments, done  # nothing is kept alive while the thread sleeps


_forked = threading.Event()


def _forget() -> None:
    """In a forked child, which has the queues and OpenMP's state but none of the threads."""
    _forked.set()
    _jobs.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
