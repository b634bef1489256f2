"""Rows of weights whose samples have positions, or whose inputs are seen through a convolution's window.

A column's word of 64 positions, one channel's behind one tap of the window, is held against those of up to 32
outputs at once. Where a sample reaches an element in any of its positions, a few words mostly tell.
"""

from typing import Any

import numpy as np

from truestep.kernels.loops.fields import (
    APART,
    COLUMNS,
    INPUTS,
    OUTPUTS,
    POSITIONS,
    ROWS,
    SAMPLES,
    WINDOW,
)  # fmt: skip
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.meets import LANES, TOGETHER, are_on, meet_all, meet_first
from truestep.kernels.loops.operands import BEGUN, WHOLE, look, outputs_of, view_of
from truestep.kernels.loops.update import finish
from truestep.kernels.loops.window import CHANNELS, GROUPS, window_of

__all__ = ["positions"]

# Columns that are looked at together, if that is a channel at least: their counts fit into the nearest cache.
TILE = 128
# Where the first word seldom tells all, it is tried on one of so many samples.
TRIED = 8
# Parts of the work share the channels where there are so many, and else the rows.
SHARED = 2 * LANES


@internal
def positions(entry: Any, first: Any, last: Any, options: Any, counted: Any) -> None:
    """As `linear`, of rows whose samples have positions, or whose inputs a window sees."""
    if entry[INPUTS] == 0 and entry[WINDOW] == 0:
        _alike(entry, first, last, options, counted)
        return
    rows, alone = entry[ROWS], entry[OUTPUTS] == 0
    window = window_of(entry[WINDOW], entry[POSITIONS], entry[COLUMNS])
    channels, groups = window[CHANNELS], window[GROUPS]
    height, width = rows // groups, channels // groups
    begin, end = np.int64(0), channels
    if channels >= SHARED:
        # A share of the rows stands for as large a share of the channels, in all rows: inputs are more
        # than outputs mostly, and nobody lays out another's.
        begin, end = _share(first, rows, channels), _share(last, rows, channels)
        if begin == end:
            return
        # The rows of the groups that these channels belong to.
        first, last = begin // width * height, ((end - 1) // width + 1) * height
    view = view_of(entry, window, begin, end)
    outputs = outputs_of(entry, window, first, last)
    taps, most = len(view.taps), min(width, end - begin)
    columns = _columns(view, min(most, max(1, TILE // taps)))
    block = np.empty((1 if alone else TOGETHER, most * taps), np.int32)
    row = first
    while row < last:
        group = row // height
        stop = min(last, (group + 1) * height)
        if not alone:
            stop = min(stop, row + TOGETHER)
        start, ahead = max(begin, group * width), min(end, (group + 1) * width)
        place, many = (0, 1) if alone else (row - first, stop - row)
        _count(outputs, place, many, view, start - begin, ahead - begin, entry, columns, block)
        column, passed = (start - group * width) * taps, (ahead - start) * taps
        for each in range(row, stop):
            counts = block[0 if alone else each - row, :passed]
            finish(entry, each, column, counts, options, counted)
        row = stop


@internal
def _alike(entry: Any, first: Any, last: Any, options: Any, counted: Any) -> None:
    """Rows whose inputs are on everywhere: it counts where an output is."""
    window = window_of(entry[WINDOW], entry[POSITIONS], entry[COLUMNS])
    outputs = outputs_of(entry, window, first, last)
    counts, start = np.empty(entry[COLUMNS], np.int32), np.int64(0)
    for row in range(first, last):
        total = np.int32(0)
        for sample in range(len(outputs)):
            word = np.int64(0)
            for index in range(outputs.shape[1]):
                word |= outputs[sample, index, row - first]
            total += np.int32(word != 0)
        counts[:] = total
        finish(entry, row, start, counts, options, counted)


@internal
def _share(row: Any, rows: Any, channels: Any) -> Any:
    """The channel that a row stands for: the first, the one after the last, or the first of a vector."""
    channel = row * channels // rows
    return channel if row == rows else channel // LANES * LANES


@internal
def _columns(view: Any, channels: Any) -> Any:
    """Where the columns of so many channels find their words; see `meet_first`."""
    taps, width = len(view.taps), view.images.shape[2]
    columns = np.empty((channels * taps, 2), np.int64)
    for column in range(len(columns)):
        tap = column % taps
        columns[column, 0] = 8 * (view.taps[tap, 0] * width + column // taps)
        columns[column, 1] = view.taps[tap, 1]
    return columns


@internal
def _count(
    outputs: Any,
    place: Any,
    height: Any,
    view: Any,
    begin: Any,
    end: Any,
    entry: Any,
    columns: Any,
    block: Any,
) -> None:
    """Counts the samples, or positions, that reach the elements of some rows and channels.

    Args:
        outputs: see `outputs_of`.
        place: of the first row in them.
        height: how many rows.
        view: of the inputs.
        begin: the first of its channels.
        end: the channel after the last.
        entry: a line of the table.
        columns: see `_columns`, of as many channels as are looked at together.
        block: is written to, int32 ``[rows, channels * taps]``.
    """
    taps, apart = len(view.taps), entry[APART] != 0
    _, words, lanes = outputs.shape
    images, deep, width = view.images.shape
    most, samples = len(columns) // taps, max(len(outputs), images)
    # Where one stands for all.
    times = np.int32(entry[SAMPLES] // samples)
    tile = np.empty((len(columns) + 1, TOGETHER), np.int32)
    left = np.empty(len(columns), np.int64)
    # Calls with arrays count who holds them: here are none in the loop over samples but of `look`.
    table, counts, rest = columns.ctypes.data, tile.ctypes.data, left.ctypes.data
    all_outputs, all_images = outputs.ctypes.data, view.images.ctypes.data
    for start in range(begin, end, most):
        many = (min(end, start + most) - start) * taps
        tile[: many + 1] = 0
        tries, open_, waited = not apart, False, 0
        for sample in range(samples):
            source = all_outputs + 8 * (sample % len(outputs) * words * lanes + place)
            wanted = are_on(source, height, 8 * lanes, words)
            if wanted == 0:
                continue
            image, number = sample % images, many
            seen = all_images + 8 * (image * deep * width + start)
            if tries:
                if view.state[image] < BEGUN:
                    look(view, image, BEGUN)
                number = meet_first(
                    seen, 8 * width, table, many, source, height, wanted, counts, rest
                )
            else:
                for column in range(many):
                    left[column] = column
            waited = 0 if tries else waited + 1
            tries = not apart and (2 * number <= many if tries else waited == TRIED)
            if number == 0:
                continue
            if view.state[image] < WHOLE:
                look(view, image, WHOLE)
            open_, heard = True, number
            if view.silent[image, width]:
                heard = np.int64(0)
                for index in range(number):
                    column = left[index]
                    left[heard] = column
                    heard += np.int64(not view.silent[image, start + column // taps])
            meet_all(
                seen,
                8 * width,
                table,
                rest,
                heard,
                source,
                height,
                8 * lanes,
                words,
                wanted,
                apart,
                counts,
            )
        first = (start - begin) * taps
        for row in range(height):
            for column in range(many):
                block[row, first + column] = times * tile[many, row]
            if open_:
                for column in range(many):
                    block[row, first + column] += times * tile[column, row]
