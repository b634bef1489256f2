"""From counts to corrected gradients, or to a step: what all kinds of rows end with."""

from typing import Any, NamedTuple

from numba import carray

from truestep.kernels.loops.bfloat16 import narrow, widen
from truestep.kernels.loops.fields import BATCH_SIZE, BUFFER, COLUMNS, FRESH, GRADIENT, PARAMETER
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import fma, pointer

__all__ = [
    "EPS",
    "LIMIT",
    "LR",
    "MAXIMIZE",
    "STRETCH",
    "WEIGHT_DECAY",
    "Options",
    "finish",
    "options_of",
    "update",
]

# The places in `Options.numbers`.
LR, WEIGHT_DECAY, MOMENTUM, KEPT, NESTEROV, MAXIMIZE, EPS, LIMIT = range(8)
OPTIONS = 8

# How many elements with one factor are gone through at once.
STRETCH = 1024


class Options(NamedTuple):
    """What all parameters of a pass share.

    Attributes:
        numbers: learning rate and so on, of the dtype that is reckoned in.
        like: no element, of the dtype that parameters, gradients and buffers are stored in.
    """

    numbers: Any
    like: Any


# Division as numpy does it: a check for zeros would keep loops from being vectorised.
@internal(error_model="numpy")
def _factor(adaptive: Any, batch_size: Any, eps: Any, limit: Any, one: Any) -> Any:
    """``N / (m + eps)``, at most the limit; 1 where m, `adaptive`, is 0."""
    return one if adaptive == 0 else min(batch_size / (adaptive + eps), limit)


@internal
def options_of(address: Any, stored: Any) -> Any:
    """The options at an address.

    Args:
        address: of the numbers.
        stored: what parameters are stored as.
    """
    like = carray(pointer(address), (0,), stored)
    number = type(widen(like.dtype.type(0)))
    return Options(carray(pointer(address), (OPTIONS,), number), like)


@internal
def update(entry: Any, first: Any, counts: Any, options: Any) -> None:
    """Elements from `first` on, one for each count: ``w <- w - lr g N / (m + eps)``, or g alone."""
    columns, number, stored = len(counts), options.numbers.dtype.type, options.like.dtype
    place, like = first * options.like.itemsize, stored.type(0)
    gradient = carray(pointer(entry[GRADIENT] + place), (columns,), stored)
    size, one = number(entry[BATCH_SIZE]), number(1)
    eps, limit = options.numbers[EPS], options.numbers[LIMIT]
    if entry[PARAMETER] == 0:
        for column in range(columns):
            factor = _factor(number(counts[column]), size, eps, limit, one)
            gradient[column] = narrow(widen(gradient[column]) * factor, like)
        return
    parameter = carray(pointer(entry[PARAMETER] + place), (columns,), stored)
    # In the order of torch's SGD, and with its roundings.
    sign = number(-1) if options.numbers[MAXIMIZE] != 0 else one
    back, decay = -options.numbers[LR], options.numbers[WEIGHT_DECAY]
    if entry[BUFFER] == 0 and decay == 0:
        for column in range(columns):
            factor = _factor(number(counts[column]), size, eps, limit, one)
            direction = sign * (widen(gradient[column]) * factor)
            parameter[column] = narrow(fma(back, direction, widen(parameter[column])), like)
        return
    if entry[BUFFER] == 0:
        for column in range(columns):
            factor = _factor(number(counts[column]), size, eps, limit, one)
            direction = sign * (widen(gradient[column]) * factor)
            before = widen(parameter[column])
            direction = fma(decay, before, direction)
            parameter[column] = narrow(fma(back, direction, before), like)
        return
    buffer = carray(pointer(entry[BUFFER] + place), (columns,), stored)
    momentum, kept = options.numbers[MOMENTUM], options.numbers[KEPT]
    nesterov, fresh = options.numbers[NESTEROV] != 0, entry[FRESH] != 0
    for column in range(columns):
        factor = _factor(number(counts[column]), size, eps, limit, one)
        direction = sign * (widen(gradient[column]) * factor)
        before = widen(parameter[column])
        if decay != 0:
            direction = fma(decay, before, direction)
        slower = momentum * widen(buffer[column])
        speed = direction if fresh else fma(kept, direction, slower)
        buffer[column] = narrow(speed, like)
        if nesterov:
            speed = fma(momentum, speed, direction)
        parameter[column] = narrow(fma(back, speed, before), like)


@internal
def finish(entry: Any, row: Any, first: Any, counts: Any, options: Any, counted: Any) -> None:
    """Updates a row's elements from column `first` on, or, where `counted` has rows, writes counts there."""
    if len(counted) == 0:
        update(entry, row * entry[COLUMNS] + first, counts, options)
        return
    for column in range(len(counts)):
        counted[row, first + column] = counts[column]
