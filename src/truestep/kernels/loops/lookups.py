"""Rows of embeddings."""

from typing import Any

import numpy as np
from numba import carray

from truestep.kernels.loops.fields import (
    BUFFER,
    BY_ENTRY,
    COLUMNS,
    ENTRIES,
    GRADIENT,
    LOOKED_UP,
    OUTPUTS,
    OWNERS,
    PARAMETER,
)  # fmt: skip
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import pointer, prefetch
from truestep.kernels.loops.update import MAXIMIZE, STRETCH, WEIGHT_DECAY, finish, update

__all__ = ["lookups"]

# How many rows are fetched ahead.
AHEAD = 8


@internal
def lookups(entry: Any, first: Any, last: Any, options: Any, counted: Any) -> None:
    """Rows `first` to `last` of an embedding."""
    columns, entries = entry[COLUMNS], entry[ENTRIES]
    rows = carray(pointer(entry[LOOKED_UP]), (entries,), np.int32)
    owners = carray(pointer(entry[OWNERS]), (entries,), np.int32)
    full = entry[OUTPUTS] == 0
    place = np.full(last - first, np.int32(-1), np.int32)
    found, looked_up = 0, np.empty(min(entries, last - first), np.int32)
    for index in range(entries):
        row = rows[index] - first
        if rows[index] >= first and rows[index] < last and place[row] < 0:
            place[row], looked_up[found] = found, rows[index]
            found += 1
    counts = np.zeros((found, columns), np.int32)
    by_entry = entry[BY_ENTRY] != 0 and not full
    # The last sample counted: one that looks a row up twice counts once. Where its entries share their bits,
    # one number stands for all columns.
    latest = np.full((found, columns if by_entry else 1), np.int32(-1), np.int32)
    # A sample's bits, or an entry's: views by address, which cost no reference counts.
    on, latest_bit = np.ones(columns, np.int32), np.int64(-1)
    for index in range(entries):
        if rows[index] < first or rows[index] >= last:
            continue
        sample, line = owners[index], np.int64(place[rows[index] - first])
        bit = index if by_entry else np.int64(sample)
        if bit != latest_bit and not full:
            latest_bit, shift = bit, np.int64(bit % 64)
            address = entry[OUTPUTS] + 8 * (bit // 64) * columns
            source = carray(pointer(address), (columns,), np.int64)
            for column in range(columns):
                on[column] = np.int32((source[column] >> shift) & 1)
        count = carray(pointer(counts.ctypes.data + 4 * line * columns), (columns,), np.int32)
        if by_entry:
            place_seen = latest.ctypes.data + 4 * line * columns
            seen = carray(pointer(place_seen), (columns,), np.int32)
            for column in range(columns):
                count[column] += on[column] & np.int32(seen[column] != sample)
                seen[column] = sample if on[column] else seen[column]
        elif latest[line, 0] != sample:
            latest[line, 0] = sample
            for column in range(columns):
                count[column] += on[column]
    _looked_up(entry, looked_up[:found], counts, options, counted)
    if len(counted) == 0 and entry[PARAMETER] != 0:
        _not_looked_up(entry, first, last, place, options)


@internal
def _looked_up(entry: Any, rows: Any, counts: Any, options: Any, counted: Any) -> None:
    """The rows of an embedding that any sample looks up."""
    columns = counts.shape[1]
    size, start = columns * options.itemsize, np.int64(0)
    for line in range(len(rows)):
        row = np.int64(rows[line])
        count = carray(pointer(counts.ctypes.data + 4 * line * columns), (columns,), np.int32)
        # They lie far apart: each would be waited for.
        if len(counted) == 0 and line + AHEAD < len(rows):
            place = np.int64(rows[line + AHEAD]) * size
            prefetch(entry[GRADIENT] + place, size)
            prefetch(entry[PARAMETER] + place, size)
        finish(entry, row, start, count, options, counted)


@internal
def _not_looked_up(entry: Any, first: Any, last: Any, place: Any, options: Any) -> None:
    """The others of rows `first` to `last`, where `place` is negative."""
    columns = entry[COLUMNS]
    size = max(1, STRETCH // columns)
    none = np.zeros(size * columns, np.int32)
    # A gradient that is zero leaves a weight as it is: most need not even be read.
    plain = entry[BUFFER] == 0 and options[WEIGHT_DECAY] == 0 and options[MAXIMIZE] == 0
    row = first
    while row < last:
        start, row = row, row + 1
        if place[start - first] >= 0:
            continue
        while row < last and row - start < size and place[row - first] < 0:
            row += 1
        elements = (row - start) * columns
        if not (plain and _is_zero(entry, start * columns, elements, options)):
            update(entry, start * columns, none[:elements], options)


@internal
def _is_zero(entry: Any, first: Any, elements: Any, options: Any) -> Any:
    """Whether so many elements of the gradient are zero, without a sign."""
    words = elements * options.itemsize // 4
    address = entry[GRADIENT] + first * options.itemsize
    gradient = carray(pointer(address), (words,), np.int32)
    found = np.int32(0)
    for word in range(words):
        found |= gradient[word]
    return found == 0
