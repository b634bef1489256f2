"""What the commands share: options, errors in one line, JSON."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from truestep.errors import TruestepError
from truestep.files import unwritable

__all__ = [
    "DataDir",
    "Debug",
    "Json",
    "check_folder",
    "complain",
    "lab_installed",
    "print_json",
    "telling_of_compiling",
]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of local data sets; or set TRUESTEP_DATA.",
        exists=True,
        file_okay=False,
    ),
]


@contextlib.contextmanager
def lab_installed() -> Iterator[None]:
    """Says how to install what a command of the lab can't import."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise TruestepError(
            f"{error.name} is not installed. Run in the clone: pip install '.[lab]'"
        ) from error


@contextlib.contextmanager
def telling_of_compiling(console: Console) -> Iterator[None]:
    """Says why a machine's first time takes longer, if it does."""
    from truestep.kernels.dispatch import when_compiling  # noqa: PLC0415 - torch takes seconds

    line = "Compiling loops, once on this machine."
    with when_compiling(lambda: console.print(line, highlight=False)):
        yield


def print_json(data: Any) -> None:
    """Prints plain data; what is not finite as null, which is all that JSON has for it."""
    json.dump(_finite(data), sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")


def _finite(data: Any) -> Any:
    """The same with None for nan and infinity, which JSON doesn't have."""
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data


def check_folder(folder: Path, option: str) -> None:
    """Raises a usage error for a folder that could not be written to when the work is done."""
    reason = unwritable(folder)
    if reason:
        raise typer.BadParameter(f"{reason}; choose another folder", param_hint=option)


def complain(reason: str, code: int = 1) -> int:
    """Prints one line on stderr and gives the exit code back."""
    sys.stderr.write(f"truestep: {reason}\n")
    return code
