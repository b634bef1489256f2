"""Packing numbers to bits, on where they are not zero, or not their mean.

Bits run along the rows of ``[samples * positions, units]``: word ``[w, u]`` holds rows 64 w to 64 w + 63 of
unit u.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import ALL, aligned, load, pointer, store
from truestep.kernels.loops.norms import reached
from truestep.kernels.loops.numbers import (
    ADDRESS,
    ALONE,
    ASKED,
    BY_UNIT,
    FIELDS,
    FULL,
    GROUPS,
    MAGNITUDE,
    MEANS,
    PAIR,
    POSITION_STRIDE,
    POSITIONS,
    REACHED,
    SAMPLE_STRIDE,
    SAMPLES,
    SIZE,
    UNIT_STRIDE,
    UNITS,
    WORDS,
    bits_of,
    nonzero,
    off_mean,
    transpose,
)

__all__ = ["pack"]

# Rows are read so many words' bits at a time: in the order in which they lie, as far as caches go.
PIECES = 32


@njit(cache=True, nogil=True)
def pack(start: Any, stop: Any, address: Any, lines: Any, words_address: Any) -> None:
    """Packs several tensors, since a call from Python costs more than a small one's packing.

    Args:
        start: first of all tensors' words, one tensor's after the other's; the row of words that it lies
            in goes to whoever has the row's first one.
        stop: the word after the last.
        address: of a table, int64 ``[lines, FIELDS]``, whose `FULL` become 0 where not all bits are on.
        lines: how many tensors.
        words_address: of all words.
    """
    table = carray(pointer(address), (lines, FIELDS), np.int64)
    before, done = 0, False
    for index in range(lines):
        line = table[index]
        pair, rows, units = line[PAIR], _words_of(line), line[UNITS]
        if pair in (ASKED, REACHED):
            other = table[index + 1]
            both = rows * units + _words_of(other) * other[UNITS]
            done = start < before + both and stop > before
            if done and pair == ASKED:
                # All parts of the work that have words of the two find the same.
                done = _last_on(line) and _last_on(other)
            elif done:
                first, last = max(0, start - before), min(both, stop - before)
                reached((first + 1) // 2, (last + 1) // 2, line, other, words_address)
        first = max(0, (start - before + units - 1) // units)
        last = min(rows, (stop - before + units - 1) // units)
        before += rows * units
        if first < last and not (pair != ALONE and done):
            words = words_address + 8 * line[WORDS]
            if line[BY_UNIT] != 0:
                full = _by_unit(first, last, line, words)
            else:
                full = _by_row(first, last, line, words)
            if full == 0:
                line[FULL] = 0


@internal
def _words_of(line: Any) -> Any:
    """How many words each unit takes."""
    positions = 1 if line[PAIR] >= REACHED else line[POSITIONS]
    return (line[SAMPLES] * positions + 63) // 64


@internal
def _last_on(line: Any) -> Any:
    """Whether all bits of each sample's last position are on, of a tensor whose units are neighbours."""
    size, units, last = line[SIZE], line[UNITS], line[POSITIONS] - 1
    for sample in range(line[SAMPLES]):
        place = line[ADDRESS] + sample * line[SAMPLE_STRIDE] + last * line[POSITION_STRIDE]
        for first in range(0, units, 64):
            length = min(64, units - first)
            on = np.uint64(nonzero(place + first * size, size, line[MAGNITUDE], length))
            if on != ALL >> np.uint64(64 - length):
                return False
    return True


@internal
def _by_row(start: Any, stop: Any, line: Any, words_address: Any) -> Any:
    """Packs words `start` to `stop` of a tensor whose units are neighbours in memory.

    Returns:
        1 if all bits are on, else 0.
    """
    size, magnitude, units, positions = line[SIZE], line[MAGNITUDE], line[UNITS], line[POSITIONS]
    total = line[SAMPLES] * positions
    block = aligned(PIECES * 64).reshape((PIECES, 64))
    places, means = np.zeros(64, np.int64), np.zeros(64, np.int64)
    centred = line[MEANS] != 0
    every = np.int64(-1)
    for word in range(start, stop):
        rows = min(64, total - 64 * word)
        sample = (64 * word) // positions
        position = 64 * word - sample * positions
        for row in range(rows):
            places[row] = (
                line[ADDRESS] + sample * line[SAMPLE_STRIDE] + position * line[POSITION_STRIDE]
            )
            means[row] = line[MEANS] + (64 * word + row) * size
            position += 1
            if position == positions:
                sample, position = sample + 1, 0
        unused = np.int64(0) if rows == 64 else np.int64(-1) << np.int64(rows)
        for first in range(0, units, 64 * PIECES):
            width = min(64 * PIECES, units - first)
            pieces = (width + 63) // 64
            for row in range(rows):
                place = places[row] + first * size
                for piece in range(pieces):
                    count = min(64, width - 64 * piece)
                    if centred:
                        block[piece, row] = off_mean(place, size, means[row], count)
                    else:
                        block[piece, row] = nonzero(place, size, magnitude, count)
                    place += 64 * size
            for piece in range(pieces):
                for row in range(rows, 64):
                    block[piece, row] = 0
                transpose(block.ctypes.data + 512 * piece)
            there = words_address + 8 * (word * units + first)
            target = carray(pointer(there), (width,), np.int64)
            source = carray(pointer(block.ctypes.data), (width,), np.int64)
            for unit in range(width):
                bits = source[unit]
                target[unit] = bits
                every &= bits | unused
    return 1 if every == -1 else 0


@internal
def _by_unit(start: Any, stop: Any, line: Any, words_address: Any) -> Any:
    """As `_by_row`, of a tensor whose positions are neighbours in memory."""
    size, units, positions = line[SIZE], line[UNITS], line[POSITIONS]
    first, last = 64 * start, min(64 * stop, line[SAMPLES] * positions)
    full = True
    for sample in range(first // positions, (last + positions - 1) // positions):
        begin = max(first - sample * positions, 0)
        count = min(last - sample * positions, positions) - begin
        row = sample * positions + begin
        there = line[ADDRESS] + sample * line[SAMPLE_STRIDE] + begin * size
        target = words_address + 8 * (row >> 6) * units
        for unit in range(units):
            mean = line[MEANS]
            if mean != 0:
                mean += (sample * line[GROUPS] + unit * line[GROUPS] // units) * size
            place, goal = there + unit * line[UNIT_STRIDE], target + 8 * unit
            numbers = place, size, line[MAGNITUDE], mean
            if not _string(*numbers, count, goal, row & 63, 8 * units):
                full = False
    return 1 if full else 0


@internal
def _string(
    address: Any,
    size: Any,
    magnitude: Any,
    mean: Any,
    count: Any,
    target: Any,
    shift: Any,
    step: Any,
) -> Any:
    """Packs `count` neighbours to one word after the other.

    Args:
        address: of the first number.
        size: see `nonzero`.
        magnitude: see `nonzero`.
        mean: see `off_mean`; 0 where numbers are compared with zero.
        count: how many.
        target: address of the first word, whose bits below `shift` are there already.
        shift: the first number's bit.
        step: bytes from word to word.

    Returns:
        Whether all bits are on.
    """
    left, rest = np.uint64(shift), np.uint64(63 - shift)
    known, every = load(target) if shift != 0 else np.uint64(0), ALL
    for _ in range(count >> 6):
        word = bits_of(address, size, magnitude, mean, np.int64(64))
        every &= word
        store(known | word << left, target)
        known = (word >> np.uint64(1)) >> rest
        address += 64 * size
        target += step
    length = count & 63
    if length != 0:
        word = bits_of(address, size, magnitude, mean, length)
        every &= word | ALL << np.uint64(length)
        store(known | word << left, target)
        known = (word >> np.uint64(1)) >> rest
        if shift + length > 64:
            store(known, target + step)
    elif shift != 0:
        store(known, target)
    return every == ALL
