"""The ends of each unit's numbers and how many are positive, in one pass."""

from typing import Any

import numpy as np
from numba import carray, njit

from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import pointer

__all__ = ["scan"]

TILE = 512  # units whose results stay in the first cache


@internal
def _row(numbers: Any, low: Any, high: Any, positive: Any) -> None:
    for unit in range(len(numbers)):
        number = numbers[unit]
        nan = number != number  # noqa: PLR0124
        low[unit] = number if (number < low[unit]) | nan else low[unit]
        high[unit] = number if (number > high[unit]) | nan else high[unit]
        positive[unit] += number > 0


@njit(cache=True, nogil=True)
def scan(
    start: Any,
    stop: Any,
    address: Any,
    rows: Any,
    units: Any,
    like: Any,
    low_address: Any,
    high_address: Any,
    positive_address: Any,
) -> None:
    """Scans units `start` to `stop`.

    Args:
        start: the first unit.
        stop: the unit to end before.
        address: of the numbers, ``[rows, units]``, without gaps.
        rows: how many, at least one.
        units: in a row.
        like: an array of the numbers' dtype.
        low_address: where the smallest number of each unit goes, nan if there is any.
        high_address: where the largest goes.
        positive_address: where the count of positive numbers goes, int64.
    """
    size = like.itemsize
    low = carray(pointer(low_address), (units,), like.dtype)
    high = carray(pointer(high_address), (units,), like.dtype)
    positive = carray(pointer(positive_address), (units,), np.int64)
    counts = np.empty(TILE, np.int32)
    for first in range(start, stop, TILE):
        last = min(first + TILE, stop)
        width = last - first
        counts[:width] = 0
        for row in range(rows):
            place = pointer(address + (row * units + first) * size)
            numbers = carray(place, (width,), like.dtype)
            if row == 0:
                for unit in range(width):
                    low[first + unit] = high[first + unit] = numbers[unit]
            _row(numbers, low[first:last], high[first:last], counts[:width])
        for unit in range(width):
            positive[first + unit] = counts[unit]
