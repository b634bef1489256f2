"""Numbers in memory as bits: the table that says where tensors lie, and the bits of 64 neighbours."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import (
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
    constant,
    prefetch,
    read,
    write,
)

__all__ = ["bits_of", "nonzero", "off_mean", "transpose"]

# The columns of the table of tensors that are to be packed: see `truestep.kernels.packing`.
ADDRESS, SIZE, MAGNITUDE, SAMPLES, POSITIONS, UNITS = range(6)
SAMPLE_STRIDE, POSITION_STRIDE, UNIT_STRIDE, BY_UNIT, MEANS, GROUPS, WORDS, FULL = range(6, 14)
PAIR, FIELDS = 14, 15

# What `PAIR` says of a tensor: it is packed alone; it and the next are packed unless each sample's last
# position is on in both; it is a norm's input and the next its output's gradient. The next says one more.
ALONE, ASKED, REACHED = 0, 1, 3

# While 64 numbers are read, the processor fetches so many bytes (of float32, as many numbers) so far ahead.
AHEAD, FETCHED = 4096, 256


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
def nonzero(address: Any, size: Any, magnitude: Any, count: Any) -> Any:
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
def off_mean(address: Any, size: Any, mean: Any, count: Any) -> Any:
    """As `nonzero`, on where a float of `size` bytes is not equal to the one at the address `mean`."""
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
def transpose(_context: Any, address: Any) -> Any:
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


@internal
def bits_of(address: Any, size: Any, magnitude: Any, mean: Any, count: Any) -> Any:
    """`nonzero`, or, where the mean has an address, `off_mean`."""
    if mean != 0:
        return np.uint64(off_mean(address, size, mean, count))
    return np.uint64(nonzero(address, size, magnitude, count))
