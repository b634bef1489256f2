"""Outputs and inputs that are on together: the innermost loops of counting, vector by vector.

They are written out since compilers take vectors of half the width, and load inputs for one output alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from truestep.kernels.loops.bfloat16 import kept, widened
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import LINE, population, prefetch, read, repeat, write

__all__ = ["BLOCK", "count_pairs", "update_pairs"]

WORD, HALF = ir.IntType(64), ir.IntType(32)
LANES = 8

# How many rows are counted at once.
BLOCK = 4


def _count(builder: Any, arguments: Sequence[Any], lanes: int, before: Sequence[Any]) -> list[Any]:
    """Adds to vectors of counts, one for each row, how many bits are on: each stays in a register.

    Args:
        builder: of an intrinsic.
        arguments: address of the outputs' words and bytes from word to word, the same of inputs; how many
            words.
        lanes: how many columns.
        before: the counts.
    """
    output, output_step, source, source_step, length = arguments
    kind = ir.VectorType(WORD, lanes)
    totals = [cgutils.alloca_once_value(builder, vector) for vector in before]
    at_output = cgutils.alloca_once_value(builder, output)
    at_source = cgutils.alloca_once_value(builder, source)
    with cgutils.for_range(builder, length):
        here, there = builder.load(at_output), builder.load(at_source)
        line = read(builder, there, kind)
        for row, total in enumerate(totals):
            place = builder.inttoptr(builder.add(here, WORD(8 * row)), WORD.as_pointer())
            same = repeat(builder, builder.load(place), kind)
            found = population(builder, builder.and_(line, same))
            builder.store(builder.add(builder.load(total), found), total)
        builder.store(builder.add(here, output_step), at_output)
        builder.store(builder.add(there, source_step), at_source)
    return [builder.load(total) for total in totals]


def _counting(rows: int, lanes: int) -> Callable[..., Any]:
    """`count_pairs` for so many rows and columns."""
    kind, half = ir.VectorType(WORD, lanes), ir.VectorType(HALF, lanes)

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
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            *bits, target, target_step = arguments
            places = [builder.add(target, builder.mul(target_step, WORD(r))) for r in range(rows)]
            before = [builder.zext(read(builder, place, half), kind) for place in places]
            for total, place in zip(_count(builder, bits, lanes, before), places, strict=True):
                write(builder, builder.trunc(total, half), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return add


def _updating(rows: int, lanes: int) -> Callable[..., Any]:
    """`update_pairs` for so many rows and columns."""

    @intrinsic
    def update(
        _context: Any,
        outputs: Any,
        output_stride: Any,
        inputs: Any,
        input_stride: Any,
        words: Any,
        gradients: Any,
        parameters: Any,
        stride: Any,
        size: Any,
        eps: Any,
        limit: Any,
        sign: Any,
        back: Any,
        like: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            *bits, gradient, parameter, step = arguments[:8]
            number, stored = arguments[8].type, arguments[13].type
            kind, half = ir.VectorType(number, lanes), ir.VectorType(HALF, lanes)
            short = ir.VectorType(stored, lanes)
            none = ir.Constant(ir.VectorType(WORD, lanes), None)
            size, eps, limit, sign, back = (repeat(builder, a, kind) for a in arguments[8:13])
            one = ir.Constant(kind, [1.0] * lanes)
            width = 32 if number == ir.FloatType() else 64
            function, name = ir.FunctionType(kind, [kind] * 3), f"llvm.fma.v{lanes}f{width}"
            fma = cgutils.get_or_insert_function(builder.module, function, name)
            for row, total in enumerate(_count(builder, bits, lanes, [none] * rows)):
                offset = builder.mul(step, WORD(row))
                place, there = builder.add(gradient, offset), builder.add(parameter, offset)
                adaptive = builder.sitofp(builder.trunc(total, half), kind)
                factor = builder.fdiv(size, builder.fadd(adaptive, eps))
                within = builder.fcmp_ordered("<", factor, limit)
                factor = builder.select(within, factor, limit)
                unreached = builder.icmp_unsigned("==", total, none)
                factor = builder.select(unreached, one, factor)
                given = widened(builder, read(builder, place, short))
                effective = builder.fmul(given, factor)
                with builder.if_else(builder.icmp_unsigned("==", parameter, WORD(0))) as (
                    corrects,
                    steps,
                ):
                    with corrects:
                        write(builder, kept(builder, effective, stored), place)
                    with steps:
                        before = widened(builder, read(builder, there, short))
                        direction = builder.fmul(sign, effective)
                        after = builder.call(fma, [back, direction, before])
                        write(builder, kept(builder, after, stored), there)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8, *[size] * 5, like), generate

    return update


COUNT_1_1, COUNT_1_8, COUNT_4_1, COUNT_4_8 = (
    _counting(rows, lanes) for rows in (1, 4) for lanes in (1, LANES)
)
UPDATE_1_1, UPDATE_1_8, UPDATE_4_1, UPDATE_4_8 = (
    _updating(rows, lanes) for rows in (1, 4) for lanes in (1, LANES)
)


@internal
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
    column = 0
    while column < columns:
        whole = column + LANES <= columns
        bits = outputs, output_stride, inputs + 8 * column, input_stride, words
        places = counts + 4 * column, 4 * columns
        if rows == 4 and whole:
            COUNT_4_8(*bits, *places)
        elif rows == 4:
            COUNT_4_1(*bits, *places)
        elif whole:
            COUNT_1_8(*bits, *places)
        else:
            COUNT_1_1(*bits, *places)
        column += LANES if whole else 1


@internal
def update_pairs(
    outputs: Any,
    output_stride: Any,
    inputs: Any,
    input_stride: Any,
    words: Any,
    rows: Any,
    columns: Any,
    gradients: Any,
    parameters: Any,
    like: Any,
    factors: Any,
    steps: Any,
) -> None:
    """Counts as `count_pairs`, and takes a step with each element while its count is in a register.

    Args:
        outputs: address of int64.
        output_stride: bytes from word to word.
        inputs: address of int64.
        input_stride: bytes from word to word.
        words: how many.
        rows: how many: 4 or 1.
        columns: how many.
        gradients: address of ``[rows, columns]``.
        parameters: address of the same, or 0 to correct the gradients alone.
        like: an array of the dtype that parameters are stored in.
        factors: batch size, eps and limit, of the type that is reckoned in.
        steps: 1 or -1, and the learning rate below zero.
    """
    numbers, item = (*factors, *steps, like.dtype.type(0)), like.itemsize
    column = 0
    while column < columns:
        whole = column + LANES <= columns
        parameter = parameters + item * column if parameters != 0 else 0
        bits = outputs, output_stride, inputs + 8 * column, input_stride, words
        places = gradients + item * column, parameter, item * columns
        if column * item % LINE == 0:
            # The rows that come next.
            for row in range(rows, 2 * rows):
                ahead = item * (row * columns + column)
                prefetch(gradients + ahead, LINE)
                if parameters != 0:
                    prefetch(parameters + ahead, LINE)
        if rows == 4 and whole:
            UPDATE_4_8(*bits, *places, *numbers)
        elif rows == 4:
            UPDATE_4_1(*bits, *places, *numbers)
        elif whole:
            UPDATE_1_8(*bits, *places, *numbers)
        else:
            UPDATE_1_1(*bits, *places, *numbers)
        column += LANES if whole else 1
