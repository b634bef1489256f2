"""Single instructions, and memory at raw addresses: a call with numbers costs a tenth of one with arrays."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["count_bits", "count_pairs", "fma", "pointer"]

LANES = (64, 8, 1)


@intrinsic
def pointer(_context: Any, address: Any) -> Any:
    """The pointer that `numba.carray` takes, of an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


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


def _pairs(rows: int, lanes: int) -> Callable[..., Any]:
    """Adds to ``counts[r, c]`` the bits that are on in both ``outputs[w, r]`` and ``inputs[w, c]``.

    Compilers take vectors of half the width that this asks for, and load each input for one row alone.

    Args:
        rows: how many there are; each count stays in a register for all words.
        lanes: how many columns there are.
    """

    @intrinsic
    def add(
        _context: Any,
        outputs: Any,
        output_stride: Any,
        inputs: Any,
        input_stride: Any,
        words: Any,
        counts: Any,
        count_stride: Any,
    ) -> Any:
        word, kind = ir.IntType(64), ir.VectorType(ir.IntType(64), lanes)
        half = ir.VectorType(ir.IntType(32), lanes)
        zeros = ir.Constant(half, None)

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            output, output_step, source, source_step, length, target, target_step = arguments
            function = ir.FunctionType(kind, [kind])
            name = f"llvm.ctpop.v{lanes}i64"
            population = cgutils.get_or_insert_function(builder.module, function, name)
            totals, places = [], []
            for row in range(rows):
                offset = builder.mul(target_step, word(row))
                place = builder.inttoptr(builder.add(target, offset), half.as_pointer())
                places.append(place)
                before = builder.zext(_near(builder.load(place), 4), kind)
                totals.append(cgutils.alloca_once_value(builder, before))
            at_output = cgutils.alloca_once_value(builder, output)
            at_source = cgutils.alloca_once_value(builder, source)
            with cgutils.for_range(builder, length):
                here, there = builder.load(at_output), builder.load(at_source)
                line = _near(builder.load(builder.inttoptr(there, kind.as_pointer())), 8)
                for row, total in enumerate(totals):
                    place = builder.inttoptr(builder.add(here, word(8 * row)), word.as_pointer())
                    one = builder.insert_element(
                        ir.Constant(kind, ir.Undefined), builder.load(place), ir.IntType(32)(0)
                    )
                    same = builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)
                    found = builder.call(population, [builder.and_(line, same)])
                    builder.store(builder.add(builder.load(total), found), total)
                builder.store(builder.add(here, output_step), at_output)
                builder.store(builder.add(there, source_step), at_source)
            for total, place in zip(totals, places, strict=True):
                _near(builder.store(builder.trunc(builder.load(total), half), place), 4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return add


def _near(access: Any, size: int) -> Any:
    """A vector's load or store, which need not be aligned to more than its items of `size` bytes."""
    access.align = size
    return access


def _lanes(width: int, lanes: int) -> Callable[..., Any]:
    """Reads `lanes` neighbours of `width` bits at an address: one bit each, on where `magnitude` sees any."""

    @intrinsic
    def read(_context: Any, address: Any, magnitude: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            item, word = ir.IntType(width), ir.IntType(64)
            kind = ir.VectorType(item, lanes)
            source = builder.inttoptr(arguments[0], kind.as_pointer())
            values = builder.load(source)
            values.align = width // 8
            kept = arguments[1] if width == word.width else builder.trunc(arguments[1], item)
            one = builder.insert_element(ir.Constant(kind, ir.Undefined), kept, ir.IntType(32)(0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)
            spread = builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)
            on = builder.icmp_unsigned("!=", builder.and_(values, spread), ir.Constant(kind, None))
            bits = builder.bitcast(on, ir.IntType(lanes))
            return bits if lanes == word.width else builder.zext(bits, word)

        return types.int64(types.int64, types.int64), generate

    return read


OCTET_64, OCTET_8, OCTET_1 = (_lanes(8, lanes) for lanes in LANES)
HALF_64, HALF_8, HALF_1 = (_lanes(16, lanes) for lanes in LANES)
SINGLE_64, SINGLE_8, SINGLE_1 = (_lanes(32, lanes) for lanes in LANES)
DOUBLE_64, DOUBLE_8, DOUBLE_1 = (_lanes(64, lanes) for lanes in LANES)
PAIRS_1_1, PAIRS_1_8, PAIRS_4_1, PAIRS_4_8 = (
    _pairs(rows, lanes) for rows in (1, 4) for lanes in (1, 8)
)


@njit(cache=True, nogil=True)
def count_pairs(
    outputs: Any,
    output_stride: Any,
    inputs: Any,
    input_stride: Any,
    words: Any,
    rows: Any,
    columns: Any,
    counts: Any,
) -> None:
    """Adds to ``counts[r, c]`` how many bits are on in both ``outputs[w, r]`` and ``inputs[w, c]``.

    Args:
        outputs: address of int64.
        output_stride: bytes from word to word.
        inputs: address of int64.
        input_stride: bytes from word to word.
        words: how many.
        rows: how many: 4 or 1.
        columns: how many.
        counts: address of int32 ``[rows, columns]``.
    """
    stride, column = 4 * columns, 0
    while column + 8 <= columns:
        source, target = inputs + 8 * column, counts + 4 * column
        if rows == 4:
            PAIRS_4_8(outputs, output_stride, source, input_stride, words, target, stride)
        else:
            PAIRS_1_8(outputs, output_stride, source, input_stride, words, target, stride)
        column += 8
    while column < columns:
        source, target = inputs + 8 * column, counts + 4 * column
        if rows == 4:
            PAIRS_4_1(outputs, output_stride, source, input_stride, words, target, stride)
        else:
            PAIRS_1_1(outputs, output_stride, source, input_stride, words, target, stride)
        column += 1
