"""Parameters in bfloat16, the upper halves of float32, which numpy and numba do not know.

Loops see them as uint16, reckon in float32, and round what they store.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from truestep.kernels.loops.memory import constant

__all__ = ["kept", "narrow", "widen", "widened"]

BITS, HALF = ir.IntType(16), ir.IntType(32)
NOT_A_NUMBER = 0x7FC0


def _like(kind: Any, element: Any) -> Any:
    """The type of a number, or of a vector of as many as there are in another."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _each(kind: Any, number: int) -> Any:
    return constant(kind, number) if isinstance(kind, ir.VectorType) else ir.Constant(kind, number)


def widened(builder: Any, value: Any) -> Any:
    """A number or a vector as it is reckoned with, for intrinsics."""
    if _element(value.type) != BITS:
        return value
    kind = _like(value.type, HALF)
    high = builder.shl(builder.zext(value, kind), _each(kind, 16))
    return builder.bitcast(high, _like(kind, ir.FloatType()))


def kept(builder: Any, value: Any, element: Any) -> Any:
    """A number or a vector as parameters of a type are stored, for intrinsics: to the nearest even."""
    if element != BITS:
        return value
    kind, short = _like(value.type, HALF), _like(value.type, BITS)
    bits = builder.bitcast(value, kind)
    odd = builder.and_(builder.lshr(bits, _each(kind, 16)), _each(kind, 1))
    nearest = builder.add(bits, builder.add(odd, _each(kind, 0x7FFF)))
    high = builder.trunc(builder.lshr(nearest, _each(kind, 16)), short)
    lost = builder.fcmp_unordered("uno", value, value)
    return builder.select(lost, _each(short, NOT_A_NUMBER), high)


def _element(kind: Any) -> Any:
    return kind.element if isinstance(kind, ir.VectorType) else kind


@intrinsic
def widen(_context: Any, number: Any) -> Any:
    """A stored number as it is reckoned with."""
    found = types.float32 if number == types.uint16 else number

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return widened(builder, arguments[0])

    return found(number), generate


@intrinsic
def narrow(_context: Any, number: Any, like: Any) -> Any:
    """A number as it is stored where numbers like another one are."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return kept(builder, arguments[0], context.get_value_type(like))

    return like(number, like), generate
