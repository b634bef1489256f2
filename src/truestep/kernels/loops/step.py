"""From activity to corrected gradients, or to a whole step, a few rows at a time, whose counts then go.

What is to be done with one parameter stands in one row of a table of int64. A parameter is seen as
``[J, K]``: weight (j, k) counts the samples in which output j and input k are on at one position.
Each kind of row has loops of its own, called by address, so that only those are compiled that a model needs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from truestep.kernels.loops.fields import COLUMNS, FIELDS, KIND, ROWS, WORK
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.linear import linear
from truestep.kernels.loops.lookups import lookups
from truestep.kernels.loops.memory import pointer
from truestep.kernels.loops.positions import positions
from truestep.kernels.loops.update import options_of

__all__ = ["KINDS", "SIGNATURE", "count", "step"]

# An entry's kind, a bit; shifted right by one, the place of its loops' address.
LINEAR, POSITIONS, LOOKUPS = 1, 2, 4
SIGNATURE = types.int64(*[types.int64] * 5)


@intrinsic
def _call(
    _context: Any, function: Any, line: Any, first: Any, last: Any, options: Any, counted: Any
) -> Any:
    """Calls a function at an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word] * 5)
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])

    return types.int64(*[types.int64] * 6), generate


@njit(cache=True, nogil=True)
def step(start: Any, stop: Any, address: Any, lines: Any, functions: Any, options: Any) -> None:
    """Corrects gradients, or takes a step, for a share of all parameters' rows (see `positions`).

    Args:
        start: of the work of all rows, one after the other, the first unit; the row that it is for goes
            to whoever has the row's first one.
        stop: the unit after the last.
        address: of the table, int64 ``[lines, fields]``.
        lines: how many.
        functions: address of each kind's loops' addresses, see `truestep.kernels.loops.functions_of`.
        options: address of learning rate and so on, of the dtype that is reckoned in.
    """
    table = carray(pointer(address), (lines, FIELDS), np.int64)
    before = 0
    for index in range(lines):
        rows, work = table[index, ROWS], table[index, WORK]
        first = max(0, (start - before + work - 1) // work)
        last = min(rows, (stop - before + work - 1) // work)
        before += rows * work
        if first < last:
            _run(address + 8 * FIELDS * index, first, last, functions, options, 0)


@njit(cache=True, nogil=True)
def count(start: Any, stop: Any, line: Any, functions: Any, options: Any, address: Any) -> None:
    """Writes the counts that rows `start` to `stop` of a table's line stand for to int64 ``[J, K]``."""
    _run(line, start, stop, functions, options, address)


@internal
def _run(line: Any, first: Any, last: Any, functions: Any, options: Any, counted: Any) -> None:
    entry = carray(pointer(line), (FIELDS,), np.int64)
    function = carray(pointer(functions), (3,), np.int64)[entry[KIND] >> 1]
    if _call(function, line, first, last, options, counted) == 0:
        raise MemoryError(
            "a compiled loop has failed, most likely for want of memory; its error is on standard error"
        )


@internal
def _views(line: Any, counted: Any) -> Any:
    """A line of the table, and the counts at an address, without rows where that is 0."""
    entry = carray(pointer(line), (FIELDS,), np.int64)
    shape = entry[ROWS] if counted != 0 else 0, entry[COLUMNS]
    return entry, carray(pointer(counted), shape, np.int64)


def _linear(stored: Any) -> Callable[..., Any]:
    def run(line: Any, first: Any, last: Any, options: Any, address: Any) -> Any:
        entry, counted = _views(line, address)
        linear(entry, first, last, options_of(options, stored), counted)
        return 1

    return run


def _positions(stored: Any) -> Callable[..., Any]:
    def run(line: Any, first: Any, last: Any, options: Any, address: Any) -> Any:
        entry, counted = _views(line, address)
        positions(entry, first, last, options_of(options, stored), counted)
        return 1

    return run


def _lookups(stored: Any) -> Callable[..., Any]:
    def run(line: Any, first: Any, last: Any, options: Any, address: Any) -> Any:
        entry, counted = _views(line, address)
        lookups(entry, first, last, options_of(options, stored), counted)
        return 1

    return run


# What makes the loops of each kind, for what parameters are stored as.
KINDS = {LINEAR: _linear, POSITIONS: _positions, LOOKUPS: _lookups}
