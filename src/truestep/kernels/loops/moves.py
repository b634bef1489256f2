"""Bits moved to other places in their words, of many units at once: the innermost loops of laying out.

They are written out since compilers take vectors of half the width and first compare the memory's ends.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import HALVES, constant, funnel, read, repeat, write

__all__ = ["move"]

WORD = ir.IntType(64)
LANES = 8


def _every_second(builder: Any, bits: Any) -> Any:
    """The even bits of each word, side by side."""
    bits = builder.and_(bits, constant(bits.type, HALVES[1]))
    for distance in (1, 2, 4, 8, 16):
        nearer = builder.lshr(bits, constant(bits.type, distance))
        bits = builder.and_(builder.or_(bits, nearer), constant(bits.type, HALVES[2 * distance]))
    return bits


def _moving(lanes: int, *, stride: int) -> Callable[..., Any]:
    """`move` of so many units at a time."""
    kind = ir.VectorType(WORD, lanes)

    @intrinsic
    def run(
        _context: Any,
        source: Any,
        beyond: Any,
        right: Any,
        kept: Any,
        up: Any,
        target: Any,
        vectors: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            start, step, *numbers, to, length = arguments
            down, mask, height = (repeat(builder, number, kind) for number in numbers)
            with cgutils.for_range(builder, length) as loop:
                offset = builder.mul(loop.index, WORD(8 * lanes))
                place, goal = builder.add(start, offset), builder.add(to, offset)
                low, high = (
                    read(builder, place, kind),
                    read(builder, builder.add(place, step), kind),
                )
                bits = builder.and_(funnel(builder, high, low, down), mask)
                if stride == 2:
                    bits = _every_second(builder, bits)
                bits = builder.or_(builder.shl(bits, height), read(builder, goal, kind))
                write(builder, bits, goal)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return run


MOVE_1, MOVE_8 = (_moving(lanes, stride=1) for lanes in (1, LANES))
HALVE_1, HALVE_8 = (_moving(lanes, stride=2) for lanes in (1, LANES))


@internal
def move(
    source: Any,
    beyond: Any,
    bit: Any,
    count: Any,
    halve: Any,
    target: Any,
    place: Any,
    units: Any,
) -> None:
    """Adds bits of each unit's word, and of its next word where they go on there, to those of another word.

    Args:
        source: address of int64 ``[units]``.
        beyond: how many bytes on the next words are, or 0.
        bit: the first one's place in the first word.
        count: how many, at most 64.
        halve: whether only every second of them is moved.
        target: address of int64 ``[units]``.
        place: of the first bit there.
        units: how many.
    """
    # -1 >> n keeps its sign: two shifts leave the last `count` bits on.
    kept = ~((-1 << (count - 1)) << 1)
    vectors = units // LANES
    passed, left = 8 * LANES * vectors, units - LANES * vectors
    if halve:
        HALVE_8(source, beyond, bit, kept, place, target, vectors)
        HALVE_1(source + passed, beyond, bit, kept, place, target + passed, left)
    else:
        MOVE_8(source, beyond, bit, kept, place, target, vectors)
        MOVE_1(source + passed, beyond, bit, kept, place, target + passed, left)
