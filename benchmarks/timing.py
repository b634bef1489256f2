"""Taking turns: how two steps are compared on a machine whose speed drifts."""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from truestep.lab.training import processor

Step = Callable[[], None]
WARM_UP = 3  # rounds that allocate and compile
FEWEST = 2  # rounds with quartiles
STEPS = 10  # of a turn, on other devices than the CPU


def take_turns(
    first: Step, second: Step, rounds: int, device: str = "cpu"
) -> tuple[list[float], list[float]]:
    """Seconds of each step of the two, A B A B ...

    Other devices than the CPU work while Python goes on, so there a turn is several steps and a wait.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    steps = 1 if device == "cpu" else STEPS
    for number in range(WARM_UP + rounds):
        for step, own in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            for _ in range(steps):
                step()
            if device != "cpu":
                torch.accelerator.synchronize()
            if number >= WARM_UP:
                own.append((time.perf_counter() - start) / steps)
    return seconds


def compare(
    pairs: Iterable[tuple[Step, Step]], rounds: int, device: str = "cpu"
) -> dict[str, float | list[float]]:
    """Median seconds of both steps of the pairs, and the quartiles of the ratios of neighbouring turns."""
    own: list[float] = []
    base: list[float] = []
    for first, second in pairs:
        seconds = take_turns(first, second, rounds, device)
        own += seconds[0]
        base += seconds[1]
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    return {
        "seconds": statistics.median(own),
        "baseline_seconds": statistics.median(base),
        "ratio": statistics.quantiles(ratios, n=4),
    }


def enough_rounds(text: str) -> int:
    """A number of rounds that has quartiles, for argparse."""
    if not text.isdecimal() or int(text) < FEWEST:
        raise argparse.ArgumentTypeError(f"{text} has no quartiles; give {FEWEST} or more")
    return int(text)


def chosen(names: Iterable[str], parts: str) -> list[str]:
    """The names that hold any of some parts, given by commas."""
    return [name for name in names if any(part in name for part in parts.split(","))]


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], str],
) -> None:
    """Measures, or reads earlier figures; prints the tables where asked."""
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--read", type=Path, help="figures of an earlier run instead of a new one")
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown")
    arguments = parser.parse_args()
    results = json.loads(arguments.read.read_text()) if arguments.read else measure(arguments)
    if arguments.markdown:
        print("\n" + markdown(results))


def machine(device: str = "cpu") -> dict[str, str | int]:
    """What the figures depend on."""
    versions = {name: version(name) for name in ("truestep", "torch", "numba", "numpy")}
    if device != "cpu":
        versions |= {"device": torch.cuda.get_device_name(), "triton": version("triton")}
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
    names = [n for n in ("python", "torch", "numba", "numpy", "triton") if n in found]
    versions = ", ".join(f"{name} {found[name]}" for name in names)
    by = f" by `{found['command']}`" if "command" in found else ""
    device = f"{found['device']}, " if "device" in found else ""
    return f"{device}{found['cpu']}, {found['cores']} cores{by}; {versions}"
