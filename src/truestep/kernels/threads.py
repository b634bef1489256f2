"""One compiled loop on several cores: own threads, which sleep between the calls."""

import functools
import os
import threading
from collections.abc import Callable
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import torch

__all__ = ["GRAIN", "spread"]

# Nanoseconds. Handing a part to a sleeping thread and hearing of its end took 60,000 on a virtual machine:
# a part that is shorter costs more than it saves.
GRAIN = 75_000

Loop = Callable[..., Any]
Done = SimpleQueue[tuple[Any, BaseException | None]]


def spread(loop: Loop, length: int, work: float, *arguments: Any) -> list[Any]:
    """Calls ``loop(start, stop, *arguments)`` over all of ``[0, length)``, in parts where that is faster.

    There are at most `torch.get_num_threads()` parts, the first in the caller's thread. Returns or
    raises when all have ended, with the first error that one raised.

    Args:
        loop: compiled with ``nogil=True``; its parts write to different places.
        length: how far it runs.
        work: about how many nanoseconds one core takes for all of it.
        arguments: what the loop takes after its range.

    Returns:
        What the loop returned for each part, in no order.

    Example:
        >>> spread(lambda start, stop, name: (start, stop, name), 8, 100.0, "short")
        [(0, 8, 'short')]
    """
    parts = 1 if work < 2 * GRAIN else min(torch.get_num_threads(), int(work / GRAIN), length)
    if parts < 2:  # noqa: PLR2004 - nothing to share
        return [loop(0, length, *arguments)]
    jobs, done = _jobs(parts - 1), Done()
    ends = [length * part // parts for part in range(1, parts + 1)]
    for start, stop in pairwise(ends):
        jobs.put((loop, start, stop, arguments, done))
    try:
        results = [loop(0, ends[0], *arguments)]
    finally:
        others, failures = _wait(done, parts - 1)
    if failures:
        raise failures[0]
    return results + others


def _wait(done: Done, parts: int) -> tuple[list[Any], list[BaseException]]:
    """What the other parts returned and raised, when all have ended."""
    results: list[Any] = []
    failures: list[BaseException] = []
    while parts > 0:
        try:
            result, failure = done.get()
        except KeyboardInterrupt as error:
            # Raised later: until they end, the parts write to memory that the caller may then free.
            failures.append(error)
            continue
        parts -= 1
        if failure is None:
            results.append(result)
        else:
            failures.append(failure)
    return results, failures


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
            result = loop(start, stop, *arguments)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            done.put((None, error))
        else:
            done.put((result, None))
        del arguments, done  # nothing is kept alive while the thread sleeps


# A forked child has the queues but none of the threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_jobs.cache_clear)
