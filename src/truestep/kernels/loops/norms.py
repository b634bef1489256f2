"""The samples that reach a norm's weights and biases, of its input and its output's gradient.

A sample reaches a bias if its unit's gradient is not zero at any position, and a weight if the input is not
its mean there as well: of most samples and units a few numbers tell.
"""

from typing import Any

import numpy as np

from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import ALL, aligned, store
from truestep.kernels.loops.numbers import (
    ADDRESS,
    BY_UNIT,
    FULL,
    GROUPS,
    MAGNITUDE,
    MEANS,
    POSITION_STRIDE,
    POSITIONS,
    SAMPLE_STRIDE,
    SAMPLES,
    SIZE,
    UNIT_STRIDE,
    UNITS,
    WORDS,
    nonzero,
    off_mean,
    transpose,
)

__all__ = ["reached"]

# So many numbers of a unit are looked at first, a line of the caches of float32, if there are many.
FEW, MANY = 16, 128

# So many words' bits of rows are found at a time.
PIECES = 32


@internal
def reached(start: Any, stop: Any, line: Any, other: Any, words_address: Any) -> None:
    """Writes words of samples, int64 ``[ceil(samples / 64), units]`` for weights and the same for biases.

    Args:
        start: the first word, of weights as of biases.
        stop: the word after the last.
        line: the input's, with its means; its `WORDS` and `FULL` are the weights'.
        other: the gradient's, which lies in the same way; the biases'.
        words_address: of all words.
    """
    units, full = line[UNITS], 3
    while start < stop:
        row = start // units
        first = start - row * units
        last = min(units, first + stop - start)
        if line[BY_UNIT] != 0:
            full &= _by_unit(row, first, last, line, other, words_address)
        else:
            full &= _by_row(row, first, last, line, other, words_address)
        start += last - first
    if full & 1 == 0:
        line[FULL] = 0
    if full & 2 == 0:
        other[FULL] = 0


@internal
def _keep(weight: Any, bias: Any, samples: Any, place: Any, line: Any, other: Any) -> Any:
    """Writes a unit's two words; returns 1 if the weight's bits are all on, plus 2 if the bias's are."""
    store(weight, place + 8 * line[WORDS])
    store(bias, place + 8 * other[WORDS])
    every = ALL >> np.uint64(64 - samples)
    return (1 if weight == every else 0) + (2 if bias == every else 0)


@internal
def _by_unit(row: Any, first: Any, last: Any, line: Any, other: Any, words_address: Any) -> Any:
    """Of tensors whose positions are neighbours in memory, with a mean for each group of units."""
    size, magnitude, units = line[SIZE], line[MAGNITUDE], line[UNITS]
    samples, full, positions = min(64, line[SAMPLES] - 64 * row), 3, line[POSITIONS]
    begin = FEW if positions > MANY else min(64, positions)
    for unit in range(first, last):
        weight = bias = np.uint64(0)
        group = unit * line[GROUPS] // units
        for place in range(samples):
            sample = 64 * row + place
            offset = sample * line[SAMPLE_STRIDE] + unit * line[UNIT_STRIDE]
            mean = line[MEANS] + (sample * line[GROUPS] + group) * size
            left, length = positions, begin
            met = some = np.int64(0)
            while met == 0 and left > 0:
                on = nonzero(other[ADDRESS] + offset, size, magnitude, length)
                if on != 0:
                    some = on
                    met = on & off_mean(line[ADDRESS] + offset, size, mean, length)
                offset += length * size
                left -= length
                length = min(64, left)
            on = np.uint64(1) << np.uint64(place)
            weight |= on if met != 0 else np.uint64(0)
            bias |= on if some != 0 else np.uint64(0)
        full &= _keep(weight, bias, samples, words_address + 8 * (row * units + unit), line, other)
    return full


@internal
def _by_row(row: Any, first: Any, last: Any, line: Any, other: Any, words_address: Any) -> Any:
    """Of tensors whose units are neighbours in memory."""
    units, samples, full = line[UNITS], min(64, line[SAMPLES] - 64 * row), 3
    weights, biases = aligned(PIECES * 64), aligned(PIECES * 64)
    weights, biases = weights.reshape((PIECES, 64)), biases.reshape((PIECES, 64))
    for begin in range(first, last, 64 * PIECES):
        width = min(64 * PIECES, last - begin)
        pieces = (width + 63) // 64
        weights[:], biases[:] = 0, 0
        for place in range(samples):
            for piece in range(pieces):
                unit = begin + 64 * piece
                end = min(last, unit + 64)
                met, some = _any(64 * row + place, unit, end, line, other)
                weights[piece, place], biases[piece, place] = met, some
        for piece in range(pieces):
            transpose(weights.ctypes.data + 512 * piece)
            transpose(biases.ctypes.data + 512 * piece)
            unit = begin + 64 * piece
            target = words_address + 8 * (row * units + unit)
            for lane in range(min(64, last - unit)):
                weight, bias = np.uint64(weights[piece, lane]), np.uint64(biases[piece, lane])
                full &= _keep(weight, bias, samples, target + 8 * lane, line, other)
    return full


@internal
def _any(sample: Any, unit: Any, end: Any, line: Any, other: Any) -> Any:
    """Two bits for each of up to 64 units, for weight and bias; the last positions are looked at first."""
    size, magnitude, positions = line[SIZE], line[MAGNITUDE], line[POSITIONS]
    apart = line[GROUPS] > 0  # in groups of units, not row by row
    of_group = line[UNITS] // line[GROUPS] if apart else line[UNITS]
    weight = bias = np.int64(0)
    begin = unit
    while unit < end:
        group = unit // of_group
        length = min(end, (group + 1) * of_group) - unit
        every = np.int64(ALL >> np.uint64(64 - length))
        met, some, position = np.int64(0), np.int64(0), positions - 1
        while met != every and position >= 0:
            offset = sample * line[SAMPLE_STRIDE] + position * line[POSITION_STRIDE] + unit * size
            on = nonzero(other[ADDRESS] + offset, size, magnitude, length)
            some |= on
            if on & ~met != 0:
                number = sample * line[GROUPS] + group if apart else sample * positions + position
                mean = line[MEANS] + number * size
                met |= on & off_mean(line[ADDRESS] + offset, size, mean, length)
            position -= 1
        weight |= met << (unit - begin)
        bias |= some << (unit - begin)
        unit += length
    return weight, bias
