"""Packing numbers to bits, on where they are not zero, or not their mean.

Bits run along the rows of ``[samples * positions, units]``: word ``[w, u]`` holds rows 64 w to 64 w + 63 of
unit u.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import (
    ALL,
    DOUBLE_1,
    DOUBLE_8,
    DOUBLE_64,
    HALF_1,
    HALF_8,
    HALF_64,
    HALVES,
    OCTET_1,
    OCTET_8,
    OCTET_64,
    OFF_DOUBLE_1,
    OFF_DOUBLE_8,
    OFF_DOUBLE_64,
    OFF_SINGLE_1,
    OFF_SINGLE_8,
    OFF_SINGLE_64,
    SINGLE_1,
    SINGLE_8,
    SINGLE_64,
    aligned,
    constant,
    load,
    pointer,
    prefetch,
    read,
    store,
    write,
)

__all__ = ["pack"]

# The columns of the table of tensors that are to be packed: see `truestep.kernels.packing`.
ADDRESS, SIZE, MAGNITUDE, SAMPLES, POSITIONS, UNITS = range(6)
SAMPLE_STRIDE, POSITION_STRIDE, UNIT_STRIDE, BY_UNIT, MEANS, GROUPS, WORDS, FULL = range(6, 14)
PAIR, FIELDS = 14, 15

# While 64 numbers are read, the processor fetches so many bytes (of float32, as many numbers) so far ahead.
AHEAD, FETCHED = 4096, 256

# Rows are read so many words' bits at a time: in the order in which they lie, as far as caches go.
PIECES = 32


@internal
def _read_64(address: Any, size: Any, magnitude: Any) -> Any:
    """One bit each for 64 neighbours of `size` bytes."""
    prefetch(address + AHEAD, FETCHED)
    if size == 4:
        return SINGLE_64(address, magnitude)
    if size == 2:
        return HALF_64(address, magnitude)
    if size == 8:
        return DOUBLE_64(address, magnitude)
    return OCTET_64(address, magnitude)


@internal
def _read_8(address: Any, size: Any, magnitude: Any) -> Any:
    """For eight."""
    if size == 4:
        return SINGLE_8(address, magnitude)
    if size == 2:
        return HALF_8(address, magnitude)
    if size == 8:
        return DOUBLE_8(address, magnitude)
    return OCTET_8(address, magnitude)


@internal
def _read_1(address: Any, size: Any, magnitude: Any) -> Any:
    """For one."""
    if size == 4:
        return SINGLE_1(address, magnitude)
    if size == 2:
        return HALF_1(address, magnitude)
    if size == 8:
        return DOUBLE_1(address, magnitude)
    return OCTET_1(address, magnitude)


@internal
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


@internal
def _off_mean(address: Any, size: Any, mean: Any, count: Any) -> Any:
    """As `_word`, on where a float of `size` bytes is not equal to the one at the address `mean`."""
    word, place = np.int64(0), np.int64(0)
    if count == 64:
        prefetch(address + AHEAD, FETCHED)
        return OFF_SINGLE_64(address, mean) if size == 4 else OFF_DOUBLE_64(address, mean)
    while place + 8 <= count:
        there = address + place * size
        word |= (OFF_SINGLE_8(there, mean) if size == 4 else OFF_DOUBLE_8(there, mean)) << place
        place += 8
    while place < count:
        there = address + place * size
        word |= (OFF_SINGLE_1(there, mean) if size == 4 else OFF_DOUBLE_1(there, mean)) << place
        place += 1
    return word


@intrinsic
def _transpose(_context: Any, address: Any) -> Any:
    """Transposes 64 x 64 bits in place, swapping halves, then quarters, and so on; int64 ``[64]``."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(ir.IntType(64), 64)
        rows = read(builder, arguments[0], kind)
        for distance, kept in reversed(HALVES.items()):
            partners = [row ^ distance for row in range(64)]
            order = ir.Constant(ir.VectorType(ir.IntType(32), 64), partners)
            other = builder.shuffle_vector(rows, ir.Constant(kind, ir.Undefined), order)
            mask, far = constant(kind, kept), constant(kind, distance)
            moved = builder.shl(builder.and_(other, mask), far)
            low = builder.or_(builder.and_(rows, mask), moved)
            moved = builder.and_(builder.lshr(other, far), mask)
            high = builder.or_(builder.and_(rows, constant(kind, kept << distance)), moved)
            first = [row & distance == 0 for row in range(64)]
            rows = builder.select(ir.Constant(ir.VectorType(ir.IntType(1), 64), first), low, high)
        write(builder, rows, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


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
    before, decided = 0, False
    for index in range(lines):
        line = table[index]
        rows, units = _words_of(line), line[UNITS]
        if line[PAIR] == 1:
            # All parts of the work that have words of the two find the same.
            other = table[index + 1]
            after = before + rows * units + _words_of(other) * other[UNITS]
            asked = start < after and stop > before
            decided = asked and _last_on(line) and _last_on(other)
        first = max(0, (start - before + units - 1) // units)
        last = min(rows, (stop - before + units - 1) // units)
        before += rows * units
        if first < last and not (line[PAIR] != 0 and decided):
            words = words_address + 8 * line[WORDS]
            if line[BY_UNIT] != 0:
                full = _by_unit(first, last, line, words)
            else:
                full = _by_row(first, last, line, words)
            if full == 0:
                line[FULL] = 0


@internal
def _bits(address: Any, size: Any, magnitude: Any, mean: Any, count: Any) -> Any:
    """`_word`, or, where the mean has an address, `_off_mean`."""
    if mean != 0:
        return np.uint64(_off_mean(address, size, mean, count))
    return np.uint64(_word(address, size, magnitude, count))


@internal
def _words_of(line: Any) -> Any:
    """How many words each unit takes."""
    return (line[SAMPLES] * line[POSITIONS] + 63) // 64


@internal
def _last_on(line: Any) -> Any:
    """Whether all bits of each sample's last position are on, of a tensor whose units are neighbours."""
    size, units, last = line[SIZE], line[UNITS], line[POSITIONS] - 1
    for sample in range(line[SAMPLES]):
        place = line[ADDRESS] + sample * line[SAMPLE_STRIDE] + last * line[POSITION_STRIDE]
        mean = line[MEANS]
        if mean != 0:
            mean += (sample * line[POSITIONS] + last) * size
        for first in range(0, units, 64):
            length = min(64, units - first)
            there = place + first * size
            if _bits(there, size, line[MAGNITUDE], mean, length) != ALL >> np.uint64(64 - length):
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
                        block[piece, row] = _off_mean(place, size, means[row], count)
                    else:
                        block[piece, row] = _word(place, size, magnitude, count)
                    place += 64 * size
            for piece in range(pieces):
                for row in range(rows, 64):
                    block[piece, row] = 0
                _transpose(block.ctypes.data + 512 * piece)
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
        size: see `_word`.
        magnitude: see `_word`.
        mean: see `_off_mean`; 0 where numbers are compared with zero.
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
        word = _bits(address, size, magnitude, mean, np.int64(64))
        every &= word
        store(known | word << left, target)
        known = (word >> np.uint64(1)) >> rest
        address += 64 * size
        target += step
    length = count & 63
    if length != 0:
        word = _bits(address, size, magnitude, mean, length)
        every &= word | ALL << np.uint64(length)
        store(known | word << left, target)
        known = (word >> np.uint64(1)) >> rest
        if shift + length > 64:
            store(known, target + step)
    elif shift != 0:
        store(known, target)
    return every == ALL
