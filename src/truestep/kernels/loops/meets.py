"""Where inputs meet outputs: a sample's words of positions against 8, 16 or 32 outputs at once.

A column's word, one channel's behind one tap, is funnelled out of two laid-out ones; each output has a lane.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import funnel, population, read, repeat, write

__all__ = ["LANES", "TOGETHER", "are_on", "meet_all", "meet_first"]

# Outputs of a vector, and at most at once.
LANES, TOGETHER = 8, 32
# Words between whose stretches it is asked whether all have met: to ask takes longer than to read a few.
SHIFT = 2
STRETCH = 1 << SHIFT
WORD, HALF = ir.IntType(64), ir.IntType(32)
KIND, COUNTS = ir.VectorType(WORD, LANES), ir.VectorType(HALF, LANES)
NONE = ir.Constant(KIND, None)


def _load(builder: Any, address: Any) -> Any:
    return builder.load(builder.inttoptr(address, WORD.as_pointer()))


def _seen(builder: Any, address: Any, stride: Any, bit: Any) -> Any:
    """For all lanes an input's 64 bits from `bit` of the word at an address on."""
    low, high = (
        repeat(builder, _load(builder, place), KIND)
        for place in (address, builder.add(address, stride))
    )
    return funnel(builder, high, low, bit)


def _vectors(builder: Any, address: Any, vectors: int) -> list[Any]:
    """So many vectors of outputs' words."""
    places = [builder.add(address, WORD(8 * LANES * number)) for number in range(vectors)]
    return [read(builder, place, KIND) for place in places]


def _column(builder: Any, columns: Any, index: Any) -> tuple[Any, Any]:
    """Where a column's word is, and for all lanes the bit of the first position."""
    entry = builder.add(columns, builder.mul(index, WORD(16)))
    bit = _load(builder, builder.add(entry, WORD(8)))
    return _load(builder, entry), repeat(builder, bit, KIND)


def _lanes_of(builder: Any, bits: Any, vectors: int) -> list[Any]:
    """Vectors of bits, one for each output."""
    octets = [
        builder.trunc(builder.lshr(bits, WORD(LANES * number)), ir.IntType(LANES))
        for number in range(vectors)
    ]
    kind = ir.VectorType(ir.IntType(1), LANES)
    return [builder.bitcast(octet, kind) for octet in octets]


def _misses(builder: Any, vectors: list[Any], wanted: list[Any]) -> Any:
    """Whether any wanted lane is zero."""
    missed = [
        builder.and_(builder.icmp_unsigned("==", vector, NONE), lanes)
        for vector, lanes in zip(vectors, wanted, strict=True)
    ]
    together = functools.reduce(builder.or_, missed)
    octet = ir.IntType(LANES)
    return builder.icmp_unsigned("!=", builder.bitcast(together, octet), octet(0))


def _add(builder: Any, counts: Any, column: Any, vectors: list[Any]) -> None:
    """Adds vectors of numbers to a column's counts."""
    line = builder.add(counts, builder.mul(column, WORD(4 * TOGETHER)))
    for number, vector in enumerate(vectors):
        place = builder.add(line, WORD(4 * LANES * number))
        write(builder, builder.add(read(builder, place, COUNTS), vector), place)


def _asking(vectors: int) -> Callable[..., Any]:
    """`are_on` for so many vectors of outputs."""

    @intrinsic
    def ask(_context: Any, outputs: Any, step: Any, words: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            outputs, step, words = arguments
            found = [cgutils.alloca_once_value(builder, NONE) for _ in range(vectors)]
            with cgutils.for_range(builder, words) as loop:
                line = builder.add(outputs, builder.mul(loop.index, step))
                for more, total in zip(_vectors(builder, line, vectors), found, strict=True):
                    builder.store(builder.or_(builder.load(total), more), total)
            bits = WORD(0)
            for number, total in enumerate(found):
                lanes = builder.icmp_unsigned("!=", builder.load(total), NONE)
                octet = builder.zext(builder.bitcast(lanes, ir.IntType(LANES)), WORD)
                bits = builder.or_(bits, builder.shl(octet, WORD(LANES * number)))
            return bits

        return types.int64(*[types.int64] * 3), generate

    return ask


def _beginning(vectors: int) -> Callable[..., Any]:
    """`meet_first` for so many vectors of outputs."""

    @intrinsic
    def run(
        _context: Any,
        image: Any,
        stride: Any,
        columns: Any,
        many: Any,
        outputs: Any,
        wanted: Any,
        counts: Any,
        left: Any,
    ) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            image, stride, columns, many, outputs, wanted, counts, left = arguments
            lines = _vectors(builder, outputs, vectors)
            lanes = _lanes_of(builder, wanted, vectors)
            _add(builder, counts, many, [builder.zext(on, COUNTS) for on in lanes])
            number = cgutils.alloca_once_value(builder, WORD(0))
            with cgutils.for_range(builder, many) as loop:
                place, bit = _column(builder, columns, loop.index)
                same = _seen(builder, builder.add(image, place), stride, bit)
                both = [builder.and_(line, same) for line in lines]
                with builder.if_then(_misses(builder, both, lanes)):
                    _add(builder, counts, loop.index, [builder.sext(on, COUNTS) for on in lanes])
                    index = builder.load(number)
                    to = builder.add(left, builder.mul(index, WORD(8)))
                    builder.store(loop.index, builder.inttoptr(to, WORD.as_pointer()))
                    builder.store(builder.add(index, WORD(1)), number)
            return builder.load(number)

        return types.int64(*[types.int64] * 8), generate

    return run


def _going_on(vectors: int, *, apart: bool) -> Callable[..., Any]:
    """`meet_all` for so many vectors of outputs."""

    @intrinsic
    def run(
        _context: Any,
        image: Any,
        stride: Any,
        columns: Any,
        left: Any,
        many: Any,
        outputs: Any,
        step: Any,
        words: Any,
        wanted: Any,
        counts: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            image, stride, columns, left, many, outputs, step, words, wanted, counts = arguments
            found = [cgutils.alloca_once(builder, KIND) for _ in range(vectors)]
            lanes = _lanes_of(builder, wanted, vectors)
            stretches = builder.lshr(builder.add(words, WORD(STRETCH - 1)), WORD(SHIFT))

            def look(start: Any, index: Any) -> None:
                there = builder.add(start, builder.mul(index, stride))
                same = _seen(builder, there, stride, bit)
                line = builder.add(outputs, builder.mul(index, step))
                for bits, total in zip(_vectors(builder, line, vectors), found, strict=True):
                    both, before = builder.and_(bits, same), builder.load(total)
                    if apart:
                        after = builder.add(before, population(builder, both))
                    else:
                        after = builder.or_(before, both)
                    builder.store(after, total)

            with cgutils.for_range(builder, many) as loop:
                column = _load(builder, builder.add(left, builder.mul(loop.index, WORD(8))))
                place, bit = _column(builder, columns, column)
                start = builder.add(image, place)
                for total in found:
                    builder.store(NONE, total)
                if apart:
                    with cgutils.for_range(builder, words) as word:
                        look(start, word.index)
                else:
                    with cgutils.for_range(builder, stretches) as stretch:
                        first = builder.shl(stretch.index, WORD(SHIFT))
                        rest = builder.sub(words, first)
                        more = builder.icmp_signed(">", rest, WORD(STRETCH))
                        length = builder.select(more, WORD(STRETCH), rest)
                        with cgutils.for_range(builder, length) as word:
                            look(start, builder.add(first, word.index))
                        with builder.if_then(more):
                            met = [builder.load(total) for total in found]
                            with builder.if_then(builder.not_(_misses(builder, met, lanes))):
                                stretch.do_break()
                met = [builder.load(total) for total in found]
                if not apart:
                    met = [builder.zext(builder.icmp_unsigned("!=", v, NONE), KIND) for v in met]
                _add(builder, counts, column, [builder.trunc(vector, COUNTS) for vector in met])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return run


ON_1, ON_2, ON_4 = (_asking(vectors) for vectors in (1, 2, 4))
BEGIN_1, BEGIN_2, BEGIN_4 = (_beginning(vectors) for vectors in (1, 2, 4))
JOIN_1, JOIN_2, JOIN_4 = (_going_on(vectors, apart=False) for vectors in (1, 2, 4))
TALLY_1, TALLY_2, TALLY_4 = (_going_on(vectors, apart=True) for vectors in (1, 2, 4))


@internal
def are_on(outputs: Any, height: Any, step: Any, words: Any) -> Any:
    """Which outputs are on anywhere: bit by bit.

    Args:
        outputs: address of the first one's first word.
        height: how many there are, at most `TOGETHER`.
        step: bytes from word to word.
        words: how many.
    """
    if height <= LANES:
        found = ON_1(outputs, step, words)
    elif height <= 2 * LANES:
        found = ON_2(outputs, step, words)
    else:
        found = ON_4(outputs, step, words)
    return found & ~(np.int64(-1) << height)


@internal
def meet_first(
    image: Any,
    stride: Any,
    columns: Any,
    many: Any,
    outputs: Any,
    height: Any,
    wanted: Any,
    counts: Any,
    left: Any,
) -> Any:
    """Counts all wanted outputs for all columns, and finds those that do not meet all in the first word.

    Args:
        image: address of the first column's channel, laid out.
        stride: bytes from word to word, of which there is one more than a column sees.
        columns: address of int64 ``[columns, 2]``: bytes from the image to a column's word, and the bit in it
            that is the first position's.
        many: how many columns.
        outputs: see `are_on`.
        height: see `are_on`.
        wanted: the outputs that are on anywhere, see `are_on`.
        counts: address of int32 ``[columns + 1, TOGETHER]``: the last, which is to be added to all others, is
            one more for wanted outputs, and of columns that do not meet all it is taken off again.
        left: address of int64 ``[columns]``, where these columns' numbers are written.

    Returns:
        How many they are.
    """
    if height <= LANES:
        return BEGIN_1(image, stride, columns, many, outputs, wanted, counts, left)
    if height <= 2 * LANES:
        return BEGIN_2(image, stride, columns, many, outputs, wanted, counts, left)
    return BEGIN_4(image, stride, columns, many, outputs, wanted, counts, left)


@internal
def meet_all(
    image: Any,
    stride: Any,
    columns: Any,
    left: Any,
    many: Any,
    outputs: Any,
    height: Any,
    step: Any,
    words: Any,
    wanted: Any,
    apart: Any,
    counts: Any,
) -> None:
    """Adds to some columns' counts whether, or at how many positions, they meet each output.

    Args:
        image: see `meet_first`.
        stride: see `meet_first`.
        columns: see `meet_first`.
        left: address of these columns' numbers, int64.
        many: how many they are.
        outputs: see `are_on`.
        height: see `are_on`.
        step: see `are_on`.
        words: see `are_on`.
        wanted: see `meet_first`.
        apart: whether positions are counted.
        counts: address of int32 ``[columns, TOGETHER]``.
    """
    window = image, stride, columns, left, many
    rest = outputs, step, words, wanted, counts
    if apart and height <= LANES:
        TALLY_1(*window, *rest)
    elif apart and height <= 2 * LANES:
        TALLY_2(*window, *rest)
    elif apart:
        TALLY_4(*window, *rest)
    elif height <= LANES:
        JOIN_1(*window, *rest)
    elif height <= 2 * LANES:
        JOIN_2(*window, *rest)
    else:
        JOIN_4(*window, *rest)
