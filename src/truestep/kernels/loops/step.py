"""From activity to corrected gradients, or to a whole step, row by row: no count outlives its row.

What is to be done with one parameter stands in one row of a table of int64. A parameter is seen as
``[J, K]``: weight (j, k) counts the samples in which output j and input k are on at one position.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from truestep.kernels.loops.fields import (
    APART,
    BATCH_SIZE,
    BUFFER,
    BY_ENTRY,
    COLUMNS,
    COUNTS,
    ENTRIES,
    FIELDS,
    FRESH,
    GRADIENT,
    INPUTS,
    LOOKED_UP,
    OUTPUTS,
    OWNERS,
    PARAMETER,
    POSITIONS,
    ROWS,
    SAMPLES,
    WINDOW,
    WORK,
)  # fmt: skip
from truestep.kernels.loops.memory import aligned, count_bits, fma, pointer, prefetch
from truestep.kernels.loops.operands import find_silent, look, nothing, operands
from truestep.kernels.loops.pairs import count_pairs, join_pairs, update_pairs
from truestep.kernels.loops.window import channels_first, sizes

__all__ = ["count", "step"]

# How many rows are counted at once.
BLOCK = 4

# How many elements with one factor are gone through at once.
STRETCH = 1024

# How many rows of an embedding are fetched ahead.
AHEAD = 8

# The places in `options`, whose dtype is the parameters'.
LR, WEIGHT_DECAY, MOMENTUM, KEPT, NESTEROV, MAXIMIZE, EPS, LIMIT = range(8)


# Division as numpy does it: a check for zeros would keep loops from being vectorised.
@njit(cache=True, nogil=True, error_model="numpy")
def _factor(adaptive: Any, batch_size: Any, eps: Any, limit: Any, one: Any) -> Any:
    """``N / (m + eps)``, at most the limit; 1 where m, `adaptive`, is 0."""
    return one if adaptive == 0 else min(batch_size / (adaptive + eps), limit)


@njit(cache=True, nogil=True)
def _count_samples(outputs: Any, view: Any, row: Any, rows: Any, group: Any, counts: Any) -> None:
    """The bits that are on in both ``outputs[:, :, row : row + rows]`` and the inputs of a group."""
    inputs = view.inputs
    counts[:rows] = 0
    columns, words = counts.shape[1], outputs.shape[1]
    width = inputs.shape[2] * columns
    for sample in range(outputs.shape[0]):
        image = sample % inputs.shape[0]
        for word in range(words):
            if not view.ready[image, word]:
                look(view, image, word)
        count_pairs(
            outputs.ctypes.data + 8 * (sample * words * outputs.shape[2] + row),
            8 * outputs.shape[2],
            inputs.ctypes.data + 8 * (image * words * width + group * columns),
            8 * width,
            words,
            rows,
            columns,
            counts.ctypes.data,
        )


@njit(cache=True, nogil=True)
def _count_joined(outputs: Any, view: Any, row: Any, group: Any, hits: Any, counts: Any) -> None:
    """The samples with any position where both are on."""
    inputs, ready, silent = view.inputs, view.ready, view.silent
    counts[:] = 0
    # Samples that hit every column.
    whole = np.int32(0)
    columns, words = len(counts), outputs.shape[1]
    for sample in range(outputs.shape[0]):
        seen, missing, image = False, columns, sample % inputs.shape[0]
        for word in range(words):
            output = outputs[sample, word, row]
            if output == 0:
                continue
            if not ready[image, word]:
                look(view, image, word)
            line = (image * words + word) * inputs.shape[2] + group
            source = inputs.ctypes.data + 8 * line * columns
            missing = join_pairs(output, source, columns, hits.ctypes.data, not seen)
            seen = True
            if missing == 0:
                break
            if silent[image, group] < 0:
                find_silent(view, image)
            if missing <= silent[image, group]:
                break
        if missing == 0:
            whole += np.int32(1)
        elif seen:
            for column in range(columns):
                counts[column] += np.int32(hits[column] != 0)
    for column in range(columns):
        counts[column] += whole


@njit(cache=True, nogil=True)
def _count_on(words: Any, unit: Any, joined: Any) -> Any:
    """The bits of one unit that are on in ``[samples, words, units]``, or the samples with any."""
    total = 0
    for sample in range(words.shape[0]):
        for word in range(words.shape[1]):
            if not joined:
                total += count_bits(words[sample, word, unit])
            elif words[sample, word, unit] != 0:
                total += 1
                break
    return total


@njit(cache=True, nogil=True)
def _update(entry: Any, first: Any, counts: Any, options: Any) -> None:
    """Elements from `first` on, one for each count: ``w <- w - lr g N / (m + eps)``, or g alone."""
    columns, number = len(counts), options.dtype.type
    place = first * options.itemsize
    gradient = carray(pointer(entry[GRADIENT] + place), (columns,), options.dtype)
    size, eps, limit, one = number(entry[BATCH_SIZE]), options[EPS], options[LIMIT], number(1)
    if entry[PARAMETER] == 0:
        for column in range(columns):
            gradient[column] *= _factor(number(counts[column]), size, eps, limit, one)
        return
    parameter = carray(pointer(entry[PARAMETER] + place), (columns,), options.dtype)
    # In the order of torch's SGD, and with its roundings.
    sign = number(-1) if options[MAXIMIZE] != 0 else one
    back, decay = -options[LR], options[WEIGHT_DECAY]
    if entry[BUFFER] == 0 and decay == 0:
        for column in range(columns):
            factor = _factor(number(counts[column]), size, eps, limit, one)
            direction = sign * (gradient[column] * factor)
            parameter[column] = fma(back, direction, parameter[column])
        return
    if entry[BUFFER] == 0:
        for column in range(columns):
            factor = _factor(number(counts[column]), size, eps, limit, one)
            direction = fma(decay, parameter[column], sign * (gradient[column] * factor))
            parameter[column] = fma(back, direction, parameter[column])
        return
    buffer = carray(pointer(entry[BUFFER] + place), (columns,), options.dtype)
    momentum, kept = options[MOMENTUM], options[KEPT]
    nesterov, fresh = options[NESTEROV] != 0, entry[FRESH] != 0
    for column in range(columns):
        factor = _factor(number(counts[column]), size, eps, limit, one)
        direction = sign * (gradient[column] * factor)
        if decay != 0:
            direction = fma(decay, parameter[column], direction)
        speed = direction if fresh else fma(kept, direction, momentum * buffer[column])
        buffer[column] = speed
        if nesterov:
            speed = fma(momentum, speed, direction)
        parameter[column] = fma(back, speed, parameter[column])


@njit(cache=True, nogil=True)
def _linear(entry: Any, first: Any, last: Any, options: Any, counted: Any) -> None:
    """Rows `first` to `last` of a linear map: counts them, then updates or, with `counted`, keeps them."""
    rows, columns, samples = entry[ROWS], entry[COLUMNS], entry[SAMPLES]
    joined = entry[POSITIONS] > 1 and entry[APART] == 0
    if entry[APART] != 0:
        samples *= entry[POSITIONS]
    counts, hits = np.empty(columns, np.int32), aligned(columns)
    block, block_start, block_stop = np.empty((BLOCK, columns), np.int32), first, first
    groups, taps = sizes(entry[WINDOW])
    ordered = np.empty(columns, np.int32) if taps > 1 else counts
    by_row = entry[INPUTS] == 0 and entry[WINDOW] == 0
    by_column = entry[OUTPUTS] == 0
    known = -1
    constant = by_row and by_column
    if constant and counted.shape[0] == 0:
        same = np.full(STRETCH, np.int32(samples))
        _stretch(entry, first * columns, last * columns, same, options)
        return
    outputs, view = nothing() if constant else operands(entry)
    at_once = entry[BUFFER] == 0 and (entry[PARAMETER] == 0 or options[WEIGHT_DECAY] == 0)
    at_once = at_once and counted.shape[0] == 0 and len(outputs) == 1 and entry[WINDOW] == 0
    if at_once and not (by_row or by_column or joined):
        _at_once(entry, outputs, view, first, last, options)
        return
    for row in range(first, last):
        group = row // (rows // groups)
        if constant:
            counts[:] = samples
        elif by_row:
            counts[:] = _count_on(outputs, row, joined)
        elif not by_column:
            if joined:
                _count_joined(outputs, view, row, group, hits, counts)
            else:
                if row == block_stop:
                    left = min(last, (group + 1) * (rows // groups)) - row
                    block_start, block_stop = row, row + (BLOCK if left >= BLOCK else 1)
                    _count_samples(outputs, view, row, block_stop - row, group, block)
                counts = block[row - block_start]
                if taps == 1:
                    ordered = counts
        elif known != group:
            _count_columns(outputs, view, group, joined, counts)
            if entry[WINDOW] != 0:
                counts *= np.int32(entry[SAMPLES] // len(view.inputs))
        if by_row or not by_column or known != group:
            if taps > 1:
                channels_first(counts, taps, ordered)
            known = group
        if counted.shape[0] > 0:
            counted[row] = ordered
        else:
            _update(entry, row * columns, ordered, options)


@njit(cache=True, nogil=True)
def _at_once(entry: Any, outputs: Any, view: Any, first: Any, last: Any, options: Any) -> None:
    """Counts and updates rows of a linear map without positions, buffer and weight decay."""
    columns, words, rows = entry[COLUMNS], outputs.shape[1], outputs.shape[2]
    number = options.dtype.type
    factors = number(entry[BATCH_SIZE]), options[EPS], options[LIMIT]
    steps = number(-1) if options[MAXIMIZE] != 0 else number(1), -options[LR]
    row = first
    while row < last:
        block = BLOCK if last - row >= BLOCK else 1
        place = row * columns * options.itemsize
        update_pairs(
            outputs.ctypes.data + 8 * row,
            8 * rows,
            view.inputs.ctypes.data,
            8 * columns,
            words,
            block,
            columns,
            entry[GRADIENT] + place,
            entry[PARAMETER] + place if entry[PARAMETER] != 0 else 0,
            options.itemsize,
            factors,
            steps,
        )
        row += block


@njit(cache=True, nogil=True)
def _count_columns(outputs: Any, view: Any, group: Any, joined: Any, counts: Any) -> None:
    """The samples that each input is on in, of outputs that are on wherever there is a position."""
    counts[:] = 0
    hits = np.empty(len(counts), np.int64)
    for sample in range(view.inputs.shape[0]):
        hits[:] = 0
        for word in range(view.inputs.shape[1]):
            if not view.ready[sample, word]:
                look(view, sample, word)
            source = view.inputs[sample, word, group]
            output = outputs[sample % len(outputs), word, 0]
            for column in range(len(counts)):
                if joined:
                    hits[column] |= source[column] & output
                else:
                    counts[column] += count_bits(source[column] & output)
        if joined:
            for column in range(len(counts)):
                counts[column] += hits[column] != 0


@njit(cache=True, nogil=True)
def _table(entry: Any, first: Any, last: Any, options: Any, counted: Any) -> None:
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
    if counted.shape[0] == 0 and entry[PARAMETER] != 0:
        _not_looked_up(entry, first, last, place, options)


@njit(cache=True, nogil=True)
def _looked_up(entry: Any, rows: Any, counts: Any, options: Any, counted: Any) -> None:
    """The rows of an embedding that any sample looks up."""
    columns = counts.shape[1]
    size = columns * options.itemsize
    for line in range(len(rows)):
        row = np.int64(rows[line])
        count = carray(pointer(counts.ctypes.data + 4 * line * columns), (columns,), np.int32)
        if counted.shape[0] > 0:
            counted[row] = count
            continue
        # They lie far apart: each would be waited for.
        if line + AHEAD < len(rows):
            place = np.int64(rows[line + AHEAD]) * size
            prefetch(entry[GRADIENT] + place, size)
            prefetch(entry[PARAMETER] + place, size)
        _update(entry, row * columns, count, options)


@njit(cache=True, nogil=True)
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
            _update(entry, start * columns, none[:elements], options)


@njit(cache=True, nogil=True)
def _is_zero(entry: Any, first: Any, elements: Any, options: Any) -> Any:
    """Whether so many elements of the gradient are zero, without a sign."""
    words = elements * options.itemsize // 4
    address = entry[GRADIENT] + first * options.itemsize
    gradient = carray(pointer(address), (words,), np.int32)
    found = np.int32(0)
    for word in range(words):
        found |= gradient[word]
    return found == 0


@njit(cache=True, nogil=True)
def _stretch(entry: Any, first: Any, last: Any, same: Any, options: Any) -> None:
    """Elements `first` to `last`, whose counts are all the one that `same` is filled with."""
    for start in range(first, last, len(same)):
        _update(entry, start, same[: min(len(same), last - start)], options)


@njit(cache=True, nogil=True)
def _counted(entry: Any, first: Any, last: Any, options: Any) -> None:
    """Rows whose counts are there already."""
    known = carray(pointer(entry[COUNTS]), (entry[ROWS], entry[COLUMNS]), np.int64)
    counts = np.empty(entry[COLUMNS], np.int32)
    for row in range(first, last):
        for column in range(len(counts)):
            counts[column] = np.int32(known[row, column])
        _update(entry, row * entry[COLUMNS], counts, options)


@njit(cache=True, nogil=True)
def step(start: Any, stop: Any, address: Any, lines: Any, options: Any) -> None:
    """Corrects gradients, or takes a step, for a share of all parameters' rows.

    Args:
        start: of the work of all rows, one after the other, the first unit; the row that it is for goes
            to whoever has the row's first one.
        stop: the unit after the last.
        address: of the table, int64 ``[lines, fields]``.
        lines: how many.
        options: learning rate and so on, of the parameters' dtype.
    """
    table = carray(pointer(address), (lines, FIELDS), np.int64)
    nothing = np.empty((0, 0), np.int64)
    before = 0
    for index in range(len(table)):
        entry = table[index]
        rows, work = entry[ROWS], entry[WORK]
        first = max(0, (start - before + work - 1) // work)
        last = min(rows, (stop - before + work - 1) // work)
        before += rows * work
        if first < last:
            if entry[COUNTS] != 0:
                _counted(entry, first, last, options)
            elif entry[LOOKED_UP] != 0:
                _table(entry, first, last, options, nothing)
            else:
                _linear(entry, first, last, options, nothing)


@njit(cache=True, nogil=True)
def count(start: Any, stop: Any, line: Any, options: Any, address: Any) -> None:
    """Writes rows `start` to `stop` of the counts of a table's one line to int64 zeros ``[J, K]``."""
    entry = carray(pointer(line), (FIELDS,), np.int64)
    counted = carray(pointer(address), (entry[ROWS], entry[COLUMNS]), np.int64)
    if entry[LOOKED_UP] != 0:
        _table(entry, start, stop, options, counted)
    else:
        _linear(entry, start, stop, options, counted)
