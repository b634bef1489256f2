"""Taking turns: how two steps are compared on a machine whose speed drifts."""

import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable

from truestep.lab.training import processor

Step = Callable[[], None]
WARM_UP = 3  # rounds that allocate and compile


def take_turns(first: Step, second: Step, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each step of the two, A B A B ..."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM_UP + rounds):
        for step, own in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            step()
            if number >= WARM_UP:
                own.append(time.perf_counter() - start)
    return seconds


def compare(pairs: Iterable[tuple[Step, Step]], rounds: int) -> dict[str, float | list[float]]:
    """Median seconds of both steps of the pairs, and the quartiles of the ratios of neighbouring turns."""
    own: list[float] = []
    base: list[float] = []
    for first, second in pairs:
        seconds = take_turns(first, second, rounds)
        own += seconds[0]
        base += seconds[1]
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    return {
        "seconds": statistics.median(own),
        "baseline_seconds": statistics.median(base),
        "ratio": statistics.quantiles(ratios, n=4),
    }


def machine() -> dict[str, str | int]:
    """What the figures depend on."""
    versions = {name: version(name) for name in ("truestep", "torch", "numba", "numpy")}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "cpu": processor(),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        **versions,
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine_line(found: dict[str, str | int]) -> str:
    versions = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "numba", "numpy"))
    by = f" by `{found['command']}`" if "command" in found else ""
    return f"{found['cpu']}, {found['cores']} cores{by}; {versions}"
