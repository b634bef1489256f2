"""Single instructions, and memory at raw addresses: a call with numbers costs a tenth of one with arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from truestep.kernels.loops.internal import internal

__all__ = [
    "ALL",
    "HALVES",
    "LINE",
    "aligned",
    "constant",
    "count_bits",
    "fma",
    "funnel",
    "load",
    "pointer",
    "population",
    "prefetch",
    "read",
    "repeat",
    "store",
    "write",
]

LANES = (64, 8, 1)
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
LINE = 64  # bytes of a line of the processor's caches

# Of a word cut into pieces of so many bits, the bits of every second one, from the lowest on.
HALVES = {
    1: 0x5555555555555555,
    2: 0x3333333333333333,
    4: 0x0F0F0F0F0F0F0F0F,
    8: 0x00FF00FF00FF00FF,
    16: 0x0000FFFF0000FFFF,
    32: 0x00000000FFFFFFFF,
}


@intrinsic
def pointer(_context: Any, address: Any) -> Any:
    """The pointer that `numba.carray` takes, of an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def load(_context: Any, address: Any) -> Any:
    """The uint64 at an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))

    return types.uint64(types.int64), generate


@intrinsic
def store(_context: Any, word: Any, address: Any) -> Any:
    """Writes a uint64 to an address."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[1], ir.IntType(64).as_pointer())
        builder.store(arguments[0], place)
        return context.get_dummy_value()

    return types.void(types.uint64, types.int64), generate


@intrinsic
def count_bits(_context: Any, word: Any) -> Any:
    """The number of bits that are on in an int64."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        function = builder.module.declare_intrinsic("llvm.ctpop", [ir.IntType(64)])
        return builder.call(function, arguments)

    return types.int64(types.int64), generate


@intrinsic
def fma(_context: Any, factor: Any, other: Any, addend: Any) -> Any:
    """``factor * other + addend``, rounded once, as torch's ``add`` with ``alpha`` does."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return factor(factor, other, addend), generate


@intrinsic
def _fetch(_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place, number, number, number])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        # To be read, into all caches, data.
        options = [number(0), number(3), number(1)]
        builder.call(fetch, [builder.inttoptr(arguments[0], place), *options])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@internal
def prefetch(address: Any, size: Any) -> None:
    """Lets the processor fetch so many bytes while it goes on: by itself it stops at the end of a page."""
    for passed in range(0, size, LINE):
        _fetch(address + passed)


@internal
def aligned(count: Any) -> Any:
    """So many int64 numbers in a row that begins with a line of the processor's caches.

    Vectors as long as such a line are read at half the speed where they lie across two.
    """
    numbers = np.empty(count + 8, np.int64)
    skipped = -(numbers.ctypes.data // 8) % 8
    return numbers[skipped : skipped + count]


def funnel(builder: Any, high: Any, low: Any, bit: Any) -> Any:
    """Of two words side by side, the 64 bits from `bit` of the low one on, in each lane, for intrinsics."""
    kind = low.type
    function = ir.FunctionType(kind, [kind] * 3)
    name = f"llvm.fshr.v{kind.count}i64"
    return builder.call(
        cgutils.get_or_insert_function(builder.module, function, name), [high, low, bit]
    )


def population(builder: Any, words: Any) -> Any:
    """How many bits are on in each lane, for intrinsics."""
    function = ir.FunctionType(words.type, [words.type])
    name = f"llvm.ctpop.v{words.type.count}i64"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), [words])


def constant(kind: Any, number: int) -> Any:
    """A vector of one number that is known beforehand, for intrinsics."""
    return ir.Constant(kind, [number] * kind.count)


def repeat(builder: Any, number: Any, kind: Any) -> Any:
    """A vector of one number, for intrinsics."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), None)
    return builder.shuffle_vector(first, nothing, zeros)


def read(builder: Any, address: Any, kind: Any) -> Any:
    """A vector at an address that need not be aligned to more than its items, for intrinsics."""
    vector = builder.load(builder.inttoptr(address, kind.as_pointer()))
    vector.align = _bytes(kind.element)
    return vector


def write(builder: Any, vector: Any, address: Any) -> None:
    """Stores a vector at such an address, for intrinsics."""
    stored = builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()))
    stored.align = _bytes(vector.type.element)


def _bytes(kind: Any) -> int:
    """Of a number."""
    if kind == ir.FloatType():
        return 4
    return 8 if kind == ir.DoubleType() else kind.width // 8


def _lanes(width: int, lanes: int) -> Callable[..., Any]:
    """Reads `lanes` neighbours of `width` bits at an address: one bit each, on where `magnitude` sees any."""

    @intrinsic
    def bits_at(_context: Any, address: Any, magnitude: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            item, word = ir.IntType(width), ir.IntType(64)
            kind = ir.VectorType(item, lanes)
            values = read(builder, arguments[0], kind)
            kept = arguments[1] if width == word.width else builder.trunc(arguments[1], item)
            every = builder.and_(values, repeat(builder, kept, kind))
            on = builder.icmp_unsigned("!=", every, ir.Constant(kind, None))
            bits = builder.bitcast(on, ir.IntType(lanes))
            return bits if lanes == word.width else builder.zext(bits, word)

        return types.int64(types.int64, types.int64), generate

    return bits_at


OCTET_64, OCTET_8, OCTET_1 = (_lanes(8, lanes) for lanes in LANES)
HALF_64, HALF_8, HALF_1 = (_lanes(16, lanes) for lanes in LANES)
SINGLE_64, SINGLE_8, SINGLE_1 = (_lanes(32, lanes) for lanes in LANES)
DOUBLE_64, DOUBLE_8, DOUBLE_1 = (_lanes(64, lanes) for lanes in LANES)


def _lanes_off(kind: Any, width: int, lanes: int) -> Callable[..., Any]:
    """Reads `lanes` neighbouring floats: one bit each, on where they are not equal to the one at `mean`."""

    @intrinsic
    def bits_at(_context: Any, address: Any, mean: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            integer, word, floats = ir.IntType(width), ir.IntType(64), ir.VectorType(kind, lanes)
            place = builder.inttoptr(arguments[1], kind.as_pointer())
            same = repeat(builder, builder.load(place), floats)
            bits = read(builder, arguments[0], ir.VectorType(integer, lanes))
            on = builder.fcmp_unordered("!=", builder.bitcast(bits, floats), same)
            bits = builder.bitcast(on, ir.IntType(lanes))
            return bits if lanes == word.width else builder.zext(bits, word)

        return types.int64(types.int64, types.int64), generate

    return bits_at


OFF_SINGLE_64, OFF_SINGLE_8, OFF_SINGLE_1 = (_lanes_off(ir.FloatType(), 32, n) for n in LANES)
OFF_DOUBLE_64, OFF_DOUBLE_8, OFF_DOUBLE_1 = (_lanes_off(ir.DoubleType(), 64, n) for n in LANES)
