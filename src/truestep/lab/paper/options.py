"""What the papers leave open, changed from the command line."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from truestep.errors import TruestepError
from truestep.lab.paper.planned import Planned

__all__ = ["OPTIONS", "changed", "parse_options"]

# By name of a unit's field: its kind of value.
OPTIONS: dict[str, type[Any]] = {
    "start": str,
    "loss": str,
    "output": str,
    "eps": float,
    "noise": float,
    "shape": float,
    "own_data": bool,
    "train": int,
    "epochs": int,
    "steps": int,
    "batch_size": int,
    "schedule": str,
}
LEAST = {"eps": 0, "noise": 0, "shape": 0, "train": 0, "epochs": 1, "steps": 1, "batch_size": 1}
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Options such as ``start=torch`` and ``own_data=true``.

    Raises:
        TruestepError: One is unknown, its value is of another kind or too small, or it is given
            twice with different values.

    Example:
        >>> parse_options(["start=torch", "eps=2"])
        {'start': 'torch', 'eps': 2.0}
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"Perhaps {near[0]} is meant." if near else f"There are {', '.join(OPTIONS)}."
            raise TruestepError(f"--option {text} is not NAME=VALUE of a known option. {hint}")
        kind = OPTIONS[name]
        try:
            given = TRUTH[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise TruestepError(f"--option {text}: give {wanted}.") from None
        if name in LEAST and not LEAST[name] <= given < math.inf:
            raise TruestepError(f"--option {text}: give {LEAST[name]} or more.")
        if options.setdefault(name, given) != given:
            raise TruestepError(
                f"--option {name} is {options[name]} and {given}: give one, and run the command for each."
            )
    return options


def changed(planned: Iterable[Planned], options: Mapping[str, Any]) -> list[Planned]:
    """Units with these options, as a variant of their own; the main protocol's alone.

    Raises:
        TruestepError: No unit of the experiment has such an option, or it can't have this value.
    """
    planned = list(planned)
    if not options:
        return planned
    fields = {
        name
        for item in planned
        for name, kind in OPTIONS.items()
        if isinstance(getattr(item.unit, name, None), kind)
    }
    unknown = sorted(options.keys() - fields)
    if unknown:
        known = ", ".join(sorted(fields))
        raise TruestepError(
            f"This experiment has no option {unknown[0]}. It has {known or 'none'}."
        )
    label = ", ".join(f"{name}: {value}" for name, value in options.items())
    variants = [
        Planned(dataclasses.replace(item.unit, **options), label)
        for item in planned
        if not item.variant
    ]
    if not variants:
        raise TruestepError("This experiment is made of variants only: leave --option out.")
    for item in variants:
        try:
            item.unit.check()
        except TruestepError as error:
            given = " ".join(f"--option {name}={value}" for name, value in options.items())
            raise TruestepError(f"{given}: {error}") from error
    return variants
