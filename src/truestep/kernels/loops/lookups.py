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
    STORED,
    VALUES,
)  # fmt: skip
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import pointer, prefetch
from truestep.kernels.loops.update import MAXIMIZE, STRETCH, WEIGHT_DECAY, finish, update

__all__ = ["lookups"]

# How many rows are fetched ahead.
AHEAD = 8
# Where one of so many rows is looked up, all are gone through alike.
DENSE = 8


@internal
def lookups(entry: Any, first: Any, last: Any, options: Any, counted: Any) -> None:
    """Rows `first` to `last` of an embedding."""
    if entry[STORED] != 0:
        _stored(entry, options)
        return
    columns, full = entry[COLUMNS], entry[OUTPUTS] == 0
    # The line in `counts` of each row that is looked up.
    place = np.full(last - first, np.int32(-1), np.int32)
    # Where all bits are on, one number stands for all columns.
    counts = np.empty((min(entry[ENTRIES], last - first), 1 if full else columns), np.int32)
    numbers = np.empty(len(counts), np.int32)
    if full:
        found = _count_entries(entry, first, last, place, counts, numbers)
    else:
        found = _count_bits(entry, first, last, place, counts, numbers)
    block = np.empty((max(1, STRETCH // columns), columns), np.int32)
    if len(counted) == 0 and DENSE * found >= last - first:
        _take_all(entry, first, place, counts, block, options)
        return
    _take_few(entry, numbers[:found], counts, block, options, counted)
    if len(counted) == 0 and entry[PARAMETER] != 0:
        _take_others(entry, first, place, block, options)


@internal
def _count_entries(entry: Any, first: Any, last: Any, place: Any, counts: Any, numbers: Any) -> Any:
    """Counts the samples of the rows that are looked up.

    Args:
        entry: the line of the table.
        first: the first row.
        last: the row after the last.
        place: int32, -1 for each row; gets the lines in `counts` of those that are looked up.
        counts: int32, of as many lines as there can be.
        numbers: int32, gets the row of each line.

    Returns:
        How many rows are looked up.
    """
    entries = entry[ENTRIES]
    rows = carray(pointer(entry[LOOKED_UP]), (entries,), np.int32)
    owners = carray(pointer(entry[OWNERS]), (entries,), np.int32)
    # The last sample counted: one that looks a row up twice counts once.
    latest, found = np.empty(len(counts), np.int32), np.int64(0)
    for index in range(entries):
        row = np.int64(rows[index])
        if row < first or row >= last:
            continue
        line, sample = place[row - first], owners[index]
        if line < 0:
            place[row - first], numbers[found] = found, row
            latest[found], counts[found, 0] = sample, 1
            found += 1
        elif latest[line] != sample:
            latest[line] = sample
            counts[line, 0] += 1
    return found


@internal
def _count_bits(entry: Any, first: Any, last: Any, place: Any, counts: Any, numbers: Any) -> Any:
    """The same where some bits are off."""
    columns, entries = entry[COLUMNS], entry[ENTRIES]
    rows = carray(pointer(entry[LOOKED_UP]), (entries,), np.int32)
    owners = carray(pointer(entry[OWNERS]), (entries,), np.int32)
    by_entry = entry[BY_ENTRY] != 0
    # Where a sample's entries share their bits, one number stands for all columns.
    latest = np.empty((len(counts), columns if by_entry else 1), np.int32)
    # A sample's bits, or an entry's.
    on, latest_bit, found = np.empty(columns, np.int32), np.int64(-1), np.int64(0)
    for index in range(entries):
        row = np.int64(rows[index])
        if row < first or row >= last:
            continue
        sample, line = owners[index], np.int64(place[row - first])
        bit = np.int64(index) if by_entry else np.int64(sample)
        if bit != latest_bit:
            latest_bit, shift = bit, np.int64(bit % 64)
            address = entry[OUTPUTS] + 8 * (bit // 64) * columns
            source = carray(pointer(address), (columns,), np.int64)
            for column in range(columns):
                on[column] = np.int32((source[column] >> shift) & 1)
        fresh = line < 0
        if fresh:
            line = found
            place[row - first], numbers[found] = found, row
            found += 1
        count = carray(pointer(counts.ctypes.data + 4 * line * columns), (columns,), np.int32)
        if by_entry:
            place_seen = latest.ctypes.data + 4 * line * columns
            seen = carray(pointer(place_seen), (columns,), np.int32)
            if fresh:
                for column in range(columns):
                    count[column] = on[column]
                    seen[column] = sample if on[column] else np.int32(-1)
            else:
                for column in range(columns):
                    count[column] += on[column] & np.int32(seen[column] != sample)
                    seen[column] = sample if on[column] else seen[column]
        elif fresh:
            latest[line, 0] = sample
            for column in range(columns):
                count[column] = on[column]
        elif latest[line, 0] != sample:
            latest[line, 0] = sample
            for column in range(columns):
                count[column] += on[column]
    return found


@internal
def _take_all(entry: Any, first: Any, place: Any, counts: Any, block: Any, options: Any) -> None:
    """Goes through all rows in their order, as many at a time as `block` has."""
    columns, width, size = entry[COLUMNS], counts.shape[1], len(block)
    # Views by address cost no reference counts, which take longer than a row.
    each, known, lines = block.ctypes.data, counts.ctypes.data, place.ctypes.data
    for start in range(0, len(place), size):
        rows = min(len(place) - start, size)
        line = carray(pointer(lines + 4 * start), (rows,), np.int32)
        for row in range(rows):
            _copy(known, line[row], each + 4 * row * columns, width, columns)
        count = carray(pointer(each), (rows * columns,), np.int32)
        update(entry, (first + start) * columns, count, options)


@internal
def _take_few(
    entry: Any, numbers: Any, counts: Any, block: Any, options: Any, counted: Any
) -> None:
    """Goes through the rows that are looked up."""
    columns, width = entry[COLUMNS], counts.shape[1]
    size, start = columns * options.like.itemsize, np.int64(0)
    each, known = block.ctypes.data, counts.ctypes.data
    rows = carray(pointer(numbers.ctypes.data), (len(numbers),), np.int32)
    count = carray(pointer(each), (columns,), np.int32)
    for line in range(len(rows)):
        # They lie far apart: each would be waited for.
        if len(counted) == 0 and line + AHEAD < len(rows):
            ahead = np.int64(rows[line + AHEAD]) * size
            prefetch(entry[GRADIENT] + ahead, size)
            prefetch(entry[PARAMETER] + ahead, size)
        _copy(known, line, each, width, columns)
        finish(entry, np.int64(rows[line]), start, count, options, counted)


@internal
def _take_others(entry: Any, first: Any, place: Any, block: Any, options: Any) -> None:
    """Takes a step with the other rows, most of which need not even be read."""
    columns, size = entry[COLUMNS], len(block)
    # A gradient that is zero leaves a weight as it is.
    numbers = options.numbers
    plain = entry[BUFFER] == 0 and numbers[WEIGHT_DECAY] == 0 and numbers[MAXIMIZE] == 0
    block[:] = 0
    lines = carray(pointer(place.ctypes.data), (len(place),), np.int32)
    each, row = block.ctypes.data, 0
    while row < len(lines):
        start, row = row, row + 1
        if lines[start] >= 0:
            continue
        while row < len(lines) and row - start < size and lines[row] < 0:
            row += 1
        goal, elements = (first + start) * columns, (row - start) * columns
        if not (plain and _is_zero(entry, goal, elements, options)):
            update(entry, goal, carray(pointer(each), (elements,), np.int32), options)


@internal
def _copy(counts: Any, line: Any, target: Any, width: Any, columns: Any) -> None:
    """Writes a row's counts from a line to an address, zeros where `line` is negative."""
    there = carray(pointer(target), (columns,), np.int32)
    if line >= 0 and width == columns:
        found = carray(pointer(counts + 4 * np.int64(line) * columns), (columns,), np.int32)
        for column in range(columns):
            there[column] = found[column]
        return
    count = np.int32(0)
    if line >= 0:
        count = carray(pointer(counts + 4 * np.int64(line)), (1,), np.int32)[0]
    for column in range(columns):
        there[column] = count


@internal
def _is_zero(entry: Any, first: Any, elements: Any, options: Any) -> Any:
    """Whether so many elements of the gradient are zero, without a sign."""
    size = elements * options.like.itemsize
    address = entry[GRADIENT] + first * options.like.itemsize
    gradient = carray(pointer(address), (size // 4,), np.int32)
    found = np.int32(0)
    for word in range(len(gradient)):
        found |= gradient[word]
    if size % 4 != 0:  # an odd number of 16 bits
        found |= np.int32(carray(pointer(address + size - 2), (1,), np.int16)[0])
    return found == 0


@internal
def _stored(entry: Any, options: Any) -> None:
    """An embedding whose gradient is sparse: what it takes does not grow with the table."""
    columns, entries, full = entry[COLUMNS], entry[ENTRIES], entry[OUTPUTS] == 0
    rows = carray(pointer(entry[LOOKED_UP]), (entries,), np.int32)
    stored = carray(pointer(entry[STORED]), (entry[VALUES],), np.int64)
    # Each row's number among those that are looked up, at a place that it is hashed to.
    size = np.int64(2)
    while size < 2 * entries:
        size *= 2
    keys, numbers = np.full(size, np.int64(-1)), np.empty(size, np.int32)
    among, found = np.empty(entries, np.int32), np.int64(0)
    for index in range(entries):
        row = np.int64(rows[index])
        place = _place(keys, row)
        if keys[place] < 0:
            keys[place], numbers[place] = row, found
            found += 1
        among[index] = numbers[place]
    few, each = entry.copy(), np.empty(found, np.int32)
    few[LOOKED_UP] = among.ctypes.data
    lines = np.full(found, np.int32(-1), np.int32)
    counts = np.empty((found, 1 if full else columns), np.int32)
    if full:
        _count_entries(few, np.int64(0), found, lines, counts, each)
    else:
        _count_bits(few, np.int64(0), found, lines, counts, each)
    block = np.empty((1, columns), np.int32)
    _take_stored(few, stored, keys, numbers, lines, counts, block, among, options)


@internal
def _place(keys: Any, row: Any) -> Any:
    """Where a row is in a hash table of a power of two of places, or where it belongs."""
    mask = len(keys) - 1
    place = ((row * np.int64(0x9E3779B1)) >> np.int64(15)) & mask
    while keys[place] >= 0 and keys[place] != row:
        place = (place + 1) & mask
    return place


@internal
def _take_stored(
    entry: Any,
    stored: Any,
    keys: Any,
    numbers: Any,
    lines: Any,
    counts: Any,
    block: Any,
    held: Any,
    options: Any,
) -> None:
    """Goes through the values of a sparse gradient, one row's several ones after the other.

    Args:
        entry: the line of the table; is written to.
        stored: each value's row.
        keys: see `_stored`.
        numbers: see `_stored`.
        lines: of each number the line in `counts`.
        counts: of the lines.
        block: room for one row's counts.
        held: what the line has the address of.
        options: see `truestep.kernels.loops.step`.
    """
    columns, width, gradient = entry[COLUMNS], counts.shape[1], entry[GRADIENT]
    size = columns * options.like.itemsize
    each, known = block.ctypes.data, counts.ctypes.data
    count = carray(pointer(each), (columns,), np.int32)
    for index in range(len(stored)):
        ahead = index + AHEAD
        if ahead < len(stored):
            prefetch(entry[PARAMETER] + stored[ahead] * size, size)
        row = stored[index]
        place = _place(keys, row)
        _copy(known, lines[numbers[place]] if keys[place] >= 0 else -1, each, width, columns)
        # As if the gradient were dense, and this its row.
        entry[GRADIENT] = gradient + (index - row) * size
        update(entry, row * columns, count, options)
