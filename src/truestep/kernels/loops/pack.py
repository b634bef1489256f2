"""Packing to bits and laying bits out anew.

Bits run along the rows of ``[samples * positions, units]``: word ``[w, u]`` holds rows 64 w to 64 w + 63 of
unit u. *Aligned* words, ``[samples, words of a sample, units]``, start anew with each sample.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from truestep.kernels.loops.memory import (
    DOUBLE_1,
    DOUBLE_8,
    DOUBLE_64,
    HALF_1,
    HALF_8,
    HALF_64,
    OCTET_1,
    OCTET_8,
    OCTET_64,
    SINGLE_1,
    SINGLE_8,
    SINGLE_64,
    aligned,
    pointer,
)

__all__ = ["align", "join", "pack_many", "pack_positions", "pack_units"]

ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


@njit(cache=True, nogil=True)
def _read_64(address: Any, size: Any, magnitude: Any) -> Any:
    """One bit each for 64 neighbours of `size` bytes."""
    if size == 4:
        return SINGLE_64(address, magnitude)
    if size == 2:
        return HALF_64(address, magnitude)
    if size == 8:
        return DOUBLE_64(address, magnitude)
    return OCTET_64(address, magnitude)


@njit(cache=True, nogil=True)
def _read_8(address: Any, size: Any, magnitude: Any) -> Any:
    """For eight."""
    if size == 4:
        return SINGLE_8(address, magnitude)
    if size == 2:
        return HALF_8(address, magnitude)
    if size == 8:
        return DOUBLE_8(address, magnitude)
    return OCTET_8(address, magnitude)


@njit(cache=True, nogil=True)
def _read_1(address: Any, size: Any, magnitude: Any) -> Any:
    """For one."""
    if size == 4:
        return SINGLE_1(address, magnitude)
    if size == 2:
        return HALF_1(address, magnitude)
    if size == 8:
        return DOUBLE_1(address, magnitude)
    return OCTET_1(address, magnitude)


@njit(cache=True, nogil=True)
def _word(address: Any, size: Any, magnitude: Any, count: Any) -> Any:
    """One bit each for `count` neighbours (at most 64) of `size` bytes."""
    if count == 64:
        return _read_64(address, size, magnitude)
    word, place = np.int64(0), np.int64(0)
    while place + 8 <= count:
        word |= _read_8(address + place * size, size, magnitude) << place
        place += 8
    while place < count:
        word |= _read_1(address + place * size, size, magnitude) << place
        place += 1
    return word


@njit(cache=True, nogil=True)
def _transpose(block: Any) -> None:
    """Transposes 64 x 64 bits in place, swapping halves, then quarters, and so on."""
    width, kept = np.uint64(32), np.uint64(0x00000000FFFFFFFF)
    for _ in range(6):
        step = np.int64(width)
        for start in range(0, 64, 2 * step):
            low, high = block[start : start + step], block[start + step : start + 2 * step]
            for i in range(step):
                swapped = ((low[i] >> width) ^ high[i]) & kept
                high[i] ^= swapped
                low[i] ^= swapped << width
        width >>= np.uint64(1)
        kept ^= kept << width


@njit(cache=True, nogil=True)
def pack_units(
    start: Any,
    stop: Any,
    address: Any,
    size: Any,
    magnitude: Any,
    samples: Any,
    positions: Any,
    units: Any,
    sample_stride: Any,
    position_stride: Any,
    words_address: Any,
) -> Any:
    """Packs words `start` to `stop` of numbers whose units are neighbours in memory.

    Args:
        start: first word.
        stop: the word after the last.
        address: of the numbers.
        size: bytes of a number.
        magnitude: the bits of a number that tell it from zero.
        samples: how many.
        positions: of a sample.
        units: at a position.
        sample_stride: bytes.
        position_stride: bytes.
        words_address: of int64 ``[words, units]``.

    Returns:
        1 if all bits are on, else 0.
    """
    total = samples * positions
    words = carray(pointer(words_address), ((total + 63) // 64, units), np.uint64)
    block = np.zeros(64, np.uint64)
    places = np.zeros(64, np.int64)
    every = ALL
    for word in range(start, stop):
        rows = min(64, total - 64 * word)
        sample = (64 * word) // positions
        position = 64 * word - sample * positions
        for row in range(rows):
            places[row] = address + sample * sample_stride + position * position_stride
            position += 1
            if position == positions:
                sample, position = sample + 1, 0
        target = words[word]
        unused = np.uint64(0) if rows == 64 else ALL << np.uint64(rows)
        for unit in range(0, units, 64):
            count = min(64, units - unit)
            for row in range(rows):
                block[row] = np.uint64(_word(places[row] + unit * size, size, magnitude, count))
            block[rows:] = np.uint64(0)
            _transpose(block)
            piece = target[unit : unit + count]
            for place in range(count):
                piece[place] = block[place]
                every &= block[place] | unused
    return 1 if every == ALL else 0


@njit(cache=True, nogil=True)
def pack_many(start: Any, stop: Any, address: Any, lines: Any, words_address: Any) -> None:
    """`pack_units` of several tensors, since a call from Python costs more than a small one's packing.

    Args:
        start: first of all tensors' words, one tensor's after the other's; the row of words that it lies
            in goes to whoever has the row's first one.
        stop: the word after the last.
        address: of a table, int64 ``[lines, 10]``: the arguments of `pack_units` after its range, with the
            words' place in bytes, and a 1 that becomes 0 where not all bits are on.
        lines: how many tensors.
        words_address: of all words.
    """
    table = carray(pointer(address), (lines, 10), np.int64)
    before = 0
    for index in range(lines):
        t = table[index]
        rows, units = (t[3] * t[4] + 63) // 64, t[5]
        first = max(0, (start - before + units - 1) // units)
        last = min(rows, (stop - before + units - 1) // units)
        before += rows * units
        if first < last:
            place = words_address + t[8]
            full = pack_units(first, last, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], place)
            if full == 0:
                t[9] = 0


@njit(cache=True, nogil=True)
def pack_positions(
    start: Any,
    stop: Any,
    address: Any,
    size: Any,
    magnitude: Any,
    samples: Any,
    positions: Any,
    units: Any,
    sample_stride: Any,
    unit_stride: Any,
    words_address: Any,
) -> Any:
    """As `pack_units`, of numbers whose positions are neighbours: units `start` to `stop`."""
    count = (samples * positions + 63) // 64
    words = carray(pointer(words_address), (count, units), np.uint64)
    for word in range(count):
        words[word, start:stop] = np.uint64(0)
    full = 1
    for sample in range(samples):
        for unit in range(start, stop):
            place = address + sample * sample_stride + unit * unit_stride
            for position in range(0, positions, 64):
                length = min(64, positions - position)
                word = np.uint64(_word(place + position * size, size, magnitude, length))
                if word != ALL >> np.uint64(64 - length):
                    full = 0
                row = sample * positions + position
                shift = row % 64
                words[row // 64, unit] |= word << np.uint64(shift)
                if shift + length > 64:
                    words[row // 64 + 1, unit] |= word >> np.uint64(64 - shift)
    return full


@njit(cache=True, nogil=True)
def align(words: Any, samples: Any, positions: Any) -> Any:
    """Aligned words of packed ones; bits past a sample's last position are off."""
    units = words.shape[1]
    count = (positions + 63) // 64
    moved = aligned(samples * count * units).reshape((samples, count, units))
    for sample in range(samples):
        for index in range(count):
            row = sample * positions + 64 * index
            length = min(64, positions - 64 * index)
            _extract(words, row, length, moved[sample, index])
    return moved


@njit(cache=True, nogil=True)
def _extract(words: Any, row: Any, length: Any, target: Any) -> None:
    """The bits of `length` rows (at most 64) from `row` on, for all units."""
    shift, source = np.uint64(row % 64), words[row // 64]
    kept = ALL >> np.uint64(64 - length)
    if row % 64 + length > 64:
        following, left = words[row // 64 + 1], np.uint64(64) - shift
        for unit in range(len(target)):
            word = (np.uint64(source[unit]) >> shift) | (np.uint64(following[unit]) << left)
            target[unit] = np.int64(word & kept)
    else:
        for unit in range(len(target)):
            target[unit] = np.int64((np.uint64(source[unit]) >> shift) & kept)


@njit(cache=True, nogil=True)
def join(words_address: Any, samples: Any, positions: Any, units: Any, joined_address: Any) -> Any:
    """Joins the positions of each sample: int64 ``[words of samples, units]``.

    Returns:
        1 if all bits are on, else 0.
    """
    joined = carray(pointer(joined_address), ((samples + 63) // 64, units), np.int64)
    joined[:] = 0
    found = aligned(units)
    full = 1
    for sample in range(samples):
        found[:] = 0
        row, end = sample * positions, (sample + 1) * positions
        while row < end:
            # To the end of the word or of the sample.
            length = min(end - row, 64 - row % 64)
            kept = (ALL >> np.uint64(64 - length)) << np.uint64(row % 64)
            place = words_address + 8 * (row // 64) * units
            source = carray(pointer(place), (units,), np.uint64)
            missing = 0
            for unit in range(units):
                found[unit] |= np.int64(source[unit] & kept)
                missing += found[unit] == 0
            if missing == 0:
                break
            row += length
        target, on = joined[sample // 64], np.int64(1) << np.int64(sample % 64)
        for unit in range(units):
            target[unit] |= on if found[unit] != 0 else np.int64(0)
            full &= found[unit] != 0
    return full
