"""Rows of weights and biases whose samples have no positions, or whose counts are there already."""

from typing import Any

import numpy as np
from numba import carray

from truestep.kernels.loops.fields import (
    BATCH_SIZE,
    BUFFER,
    COLUMNS,
    COUNTS,
    GRADIENT,
    INPUTS,
    OUTPUTS,
    PARAMETER,
    ROWS,
    SAMPLES,
)  # fmt: skip
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import count_bits, pointer
from truestep.kernels.loops.pairs import BLOCK, count_pairs, update_pairs
from truestep.kernels.loops.update import (
    EPS,
    LIMIT,
    LR,
    MAXIMIZE,
    STRETCH,
    WEIGHT_DECAY,
    finish,
    update,
)  # fmt: skip

__all__ = ["linear"]


@internal
def linear(entry: Any, first: Any, last: Any, options: Any, counted: Any) -> None:
    """Counts rows `first` to `last`, and updates them or, where `counted` has rows, keeps the counts."""
    columns, keeps = entry[COLUMNS], len(counted) > 0
    if entry[COUNTS] != 0:
        _known(entry, first, last, options, counted)
        return
    by_row, by_column = entry[INPUTS] == 0, entry[OUTPUTS] == 0
    if not (by_row or by_column or keeps or entry[BUFFER] != 0) and (
        options.numbers[WEIGHT_DECAY] == 0 or entry[PARAMETER] == 0
    ):
        _at_once(entry, first, last, options)
        return
    if by_row and by_column and not keeps:
        same = np.full(STRETCH, np.int32(entry[SAMPLES]))
        for start in range(first * columns, last * columns, STRETCH):
            update(entry, start, same[: min(STRETCH, last * columns - start)], options)
        return
    block = np.full((BLOCK, columns), np.int32(entry[SAMPLES]))
    if by_column and not by_row:
        _count_columns(entry, block[0])
    row, column = first, np.int64(0)
    while row < last:
        rows = BLOCK if last - row >= BLOCK else 1
        if not by_column:
            _count_rows(entry, row, block[:rows])
        for index in range(rows):
            finish(entry, row + index, column, block[0 if by_column else index], options, counted)
        row += rows


@internal
def _at_once(entry: Any, first: Any, last: Any, options: Any) -> None:
    """Counts and updates rows without buffer and weight decay."""
    columns, words, rows = entry[COLUMNS], _words(entry), entry[ROWS]
    numbers, like = options
    number = numbers.dtype.type
    factors = number(entry[BATCH_SIZE]), numbers[EPS], numbers[LIMIT]
    steps = number(-1) if numbers[MAXIMIZE] != 0 else number(1), -numbers[LR]
    row = first
    while row < last:
        block = BLOCK if last - row >= BLOCK else 1
        place = row * columns * like.itemsize
        update_pairs(
            entry[OUTPUTS] + 8 * row,
            8 * rows,
            entry[INPUTS],
            8 * columns,
            words,
            block,
            columns,
            entry[GRADIENT] + place,
            entry[PARAMETER] + place if entry[PARAMETER] != 0 else 0,
            like,
            factors,
            steps,
        )
        row += block


@internal
def _count_rows(entry: Any, row: Any, counts: Any) -> None:
    """The samples that reach the elements of one row or of `BLOCK`."""
    rows, columns = counts.shape
    if entry[INPUTS] == 0:
        outputs = carray(pointer(entry[OUTPUTS]), (_words(entry), entry[ROWS]), np.int64)
        for index in range(rows):
            total = np.int32(0)
            for word in range(len(outputs)):
                total += np.int32(count_bits(outputs[word, row + index]))
            counts[index] = total
        return
    counts[:] = 0
    count_pairs(
        entry[OUTPUTS] + 8 * row,
        8 * entry[ROWS],
        entry[INPUTS],
        8 * columns,
        _words(entry),
        rows,
        columns,
        counts.ctypes.data,
    )


@internal
def _count_columns(entry: Any, counts: Any) -> None:
    """The samples that each input is on in."""
    counts[:] = 0
    for word in range(_words(entry)):
        place = entry[INPUTS] + 8 * word * len(counts)
        source = carray(pointer(place), (len(counts),), np.int64)
        for column in range(len(counts)):
            counts[column] += np.int32(count_bits(source[column]))


@internal
def _words(entry: Any) -> Any:
    return (entry[SAMPLES] + 63) // 64


@internal
def _known(entry: Any, first: Any, last: Any, options: Any, counted: Any) -> None:
    """Rows whose counts are there already."""
    known = carray(pointer(entry[COUNTS]), (entry[ROWS], entry[COLUMNS]), np.int64)
    counts, start = np.empty(entry[COLUMNS], np.int32), np.int64(0)
    for row in range(first, last):
        for column in range(len(counts)):
            counts[column] = np.int32(known[row, column])
        finish(entry, row, start, counts, options, counted)
