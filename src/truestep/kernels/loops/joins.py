"""Joining the positions of samples: whether a unit is on in any of them, of packed bits."""

from typing import Any

import numpy as np
from numba import carray, njit

from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import ALL, aligned, pointer

__all__ = ["join"]

# The columns of the table of masks: see `truestep.kernels.packing.Join`.
ADDRESS, OTHER, SAMPLES, POSITIONS, UNITS = range(5)
WORDS, FULL = 5, 6
FIELDS = 7


@njit(cache=True, nogil=True)
def join(address: Any, lines: Any, words_address: Any) -> None:
    """Joins the positions of each sample, of several masks: int64 ``[words of samples, units]`` each.

    Args:
        address: of a table, int64 ``[lines, FIELDS]``, whose `FULL` become 0 where not all bits
            are on.
        lines: how many masks.
        words_address: of all joined words.
    """
    table = carray(pointer(address), (lines, FIELDS), np.int64)
    for index in range(lines):
        line = table[index]
        units = line[UNITS]
        shape = (line[SAMPLES] + 63) // 64, units
        joined = carray(pointer(words_address + 8 * line[WORDS]), shape, np.int64)
        if line[POSITIONS] == 1:
            line[FULL] = _both(line, joined)
            continue
        joined[:] = 0
        found = aligned(units)
        full = 1
        for sample in range(line[SAMPLES]):
            found[:] = 0
            first = sample * line[POSITIONS]
            end = first + line[POSITIONS]
            _gather(line[ADDRESS], line[OTHER], first, end, found)
            target, on = joined[sample // 64], np.int64(1) << np.int64(sample % 64)
            for unit in range(units):
                target[unit] |= on if found[unit] != 0 else np.int64(0)
                full &= found[unit] != 0
        line[FULL] = full


@internal
def _gather(words_address: Any, other: Any, row: Any, end: Any, found: Any) -> Any:
    """Adds the bits of rows `row` to `end` to each unit's word in `found`, until no unit's is zero.

    Args:
        words_address: of int64 ``[words, units]``.
        other: of words in which bits must be on too, or 0.
        row: the first.
        end: the row after the last.
        found: int64 ``[units]``.

    Returns:
        How many units' words are zero.
    """
    units = len(found)
    missing = units
    while row < end and missing > 0:
        # To the end of the word or of the rows.
        length = min(end - row, 64 - row % 64)
        kept = (ALL >> np.uint64(64 - length)) << np.uint64(row % 64)
        place = 8 * (row // 64) * units
        source = carray(pointer(words_address + place), (units,), np.uint64)
        missing = 0
        if other == 0:
            for unit in range(units):
                found[unit] |= np.int64(source[unit] & kept)
                missing += found[unit] == 0
        else:
            second = carray(pointer(other + place), (units,), np.uint64)
            for unit in range(units):
                found[unit] |= np.int64(source[unit] & second[unit] & kept)
                missing += found[unit] == 0
        row += length
    return missing


@internal
def _both(line: Any, joined: Any) -> Any:
    """Writes the bits that are on in both masks; returns 1 if all are on, else 0."""
    words, units = joined.shape
    first = carray(pointer(line[ADDRESS]), (words, units), np.int64)
    second = carray(pointer(line[OTHER]), (words, units), np.int64)
    every = np.int64(-1)
    for word in range(words):
        rows = min(64, line[SAMPLES] - 64 * word)
        unused = np.int64(0) if rows == 64 else np.int64(-1) << np.int64(rows)
        for unit in range(units):
            bits = first[word, unit] & second[word, unit]
            joined[word, unit] = bits
            every &= bits | unused
    return 1 if every == -1 else 0
