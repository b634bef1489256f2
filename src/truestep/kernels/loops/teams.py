"""The loops as a team of OpenMP's threads runs them: each thread takes parts until none is left.

Such a function gets one address, of int64 numbers: the next part, how many there are, how far the loop runs,
how many parts have ended, and the loop's further arguments: an array as its address, size and item size, a
float by its bits.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from truestep.kernels.loops.boost import boost, boosted_step
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import pointer
from truestep.kernels.loops.pack import pack
from truestep.kernels.loops.scan import scan
from truestep.kernels.loops.step import count, step

__all__ = ["TEAMS"]

PARTS, LENGTH, ENDED, ARGUMENTS = range(1, 5)
MOST = 24  # numbers
Team = Callable[[Any], None]


@intrinsic
def _take(_context: Any, address: Any) -> Any:
    """The number at an address, which becomes one more in the same instant."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        place = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", place, word(1), "seq_cst")

    return types.int64(types.int64), generate


@internal
def _next(address: Any) -> Any:
    """Start and stop of the next part; both 0 where none is left."""
    work = carray(pointer(address), (MOST,), np.int64)
    part, parts = _take(address), work[PARTS]
    if part >= parts:
        return np.int64(0), np.int64(0)
    return work[LENGTH] * part // parts, work[LENGTH] * (part + 1) // parts


@internal
def _end(address: Any) -> None:
    """Notes that a part has ended: a loop that raises does not come to it."""
    _take(address + 8 * ENDED)


def _pack(_number: Any) -> Team:
    def run(address: Any) -> None:
        w = carray(pointer(address + 8 * ARGUMENTS), (MOST,), np.int64)
        start, stop = _next(address)
        while stop > 0:
            pack(start, stop, w[0], w[1], w[2])
            _end(address)
            start, stop = _next(address)

    return run


def _step(_number: Any) -> Team:
    def run(address: Any) -> None:
        w = carray(pointer(address + 8 * ARGUMENTS), (MOST,), np.int64)
        start, stop = _next(address)
        while stop > 0:
            step(start, stop, w[0], w[1], w[2], w[3])
            _end(address)
            start, stop = _next(address)

    return run


def _count(_number: Any) -> Team:
    def run(address: Any) -> None:
        w = carray(pointer(address + 8 * ARGUMENTS), (MOST,), np.int64)
        start, stop = _next(address)
        while stop > 0:
            count(start, stop, w[0], w[1], w[2], w[3])
            _end(address)
            start, stop = _next(address)

    return run


def _boosted_step(number: Any) -> Team:
    def run(address: Any) -> None:
        w = carray(pointer(address + 8 * ARGUMENTS), (MOST,), np.int64)
        table = carray(pointer(w[0]), (5, w[1] // 5), np.int64)
        like = carray(pointer(w[3]), (w[4],), number)
        floats = carray(pointer(address + 8 * ARGUMENTS), (MOST,), np.float64)
        start, stop = _next(address)
        while stop > 0:
            boosted_step(start, stop, table, like, floats[6], floats[7], w[8] != 0)
            _end(address)
            start, stop = _next(address)

    return run


def _boost(number: Any) -> Team:
    def run(address: Any) -> None:
        w = carray(pointer(address + 8 * ARGUMENTS), (MOST,), np.int64)
        table = carray(pointer(w[0]), (4, w[1] // 4), np.int64)
        like = carray(pointer(w[3]), (w[4],), number)
        start, stop = _next(address)
        while stop > 0:
            boost(start, stop, table, like)
            _end(address)
            start, stop = _next(address)

    return run


def _scan(number: Any) -> Team:
    def run(address: Any) -> None:
        w = carray(pointer(address + 8 * ARGUMENTS), (MOST,), np.int64)
        like = carray(pointer(w[3]), (w[4],), number)
        start, stop = _next(address)
        while stop > 0:
            scan(start, stop, w[0], w[1], w[2], like, w[6], w[7], w[8])
            _end(address)
            start, stop = _next(address)

    return run


# Each loop's function for numbers of a type, that of the loop's last array; None for loops without arrays.
TEAMS: dict[Any, Callable[[Any], Team]] = {
    pack: _pack,
    step: _step,
    count: _count,
    boosted_step: _boosted_step,
    boost: _boost,
    scan: _scan,
}
