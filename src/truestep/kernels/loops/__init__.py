"""The compiled loops, which alone import numba; the compiler vectorises the inner ones, over units."""

import functools
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numba import cfunc, types
from numba.core import config

from truestep.kernels.dispatch import machine_code

settings: Any = config
before = settings.CACHE_DIR


@contextmanager
def _keeping() -> Iterator[None]:
    """Keeps the machine code of what is defined inside in a place of our own; numba asks for it then."""
    settings.CACHE_DIR = str(machine_code(before))
    try:
        yield
    finally:
        settings.CACHE_DIR = before


with _keeping():
    from truestep.kernels.loops import replicas, tables
    from truestep.kernels.loops.boost import boost, boosted_step
    from truestep.kernels.loops.joins import join
    from truestep.kernels.loops.pack import pack
    from truestep.kernels.loops.scan import scan
    from truestep.kernels.loops.step import KINDS, SIGNATURE, count, step
    from truestep.kernels.loops.teams import TEAMS

__all__ = [
    "boost",
    "boosted_step",
    "count",
    "functions_of",
    "join",
    "pack",
    "replicas",
    "scan",
    "step",
    "tables",
    "team",
]


@functools.cache
def team(loop: Any, number: Any) -> Any:
    """What OpenMP calls to run a loop on numbers of a type, see `teams`; None for other functions."""
    make = TEAMS.get(loop)
    if make is None:
        return None
    with _keeping():
        return cfunc(types.void(types.int64), cache=True)(make(number))


@functools.cache
def functions_of(kinds: int, stored: Any) -> "array[int]":
    """The addresses of the loops that `step` and `count` call, 0 for kinds that are not asked for.

    Args:
        kinds: the bits of those in the table.
        stored: what parameters are stored as.
    """
    return array("q", [_kind(kind, stored).address if kinds & kind else 0 for kind in KINDS])


@functools.cache
def _kind(kind: int, stored: Any) -> Any:
    with _keeping():
        return cfunc(SIGNATURE, cache=True)(KINDS[kind](stored))
