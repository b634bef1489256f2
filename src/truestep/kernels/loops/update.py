"""From counts to corrected gradients, or to a step: what all kinds of rows end with."""

from typing import Any

from numba import carray

from truestep.kernels.loops.fields import BATCH_SIZE, BUFFER, COLUMNS, FRESH, GRADIENT, PARAMETER
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import fma, pointer

__all__ = [
    "EPS",
    "LIMIT",
    "LR",
    "MAXIMIZE",
    "OPTIONS",
    "STRETCH",
    "WEIGHT_DECAY",
    "finish",
    "update",
]

# The places in `options`, whose dtype is the parameters'.
LR, WEIGHT_DECAY, MOMENTUM, KEPT, NESTEROV, MAXIMIZE, EPS, LIMIT = range(8)
OPTIONS = 8

# How many elements with one factor are gone through at once.
STRETCH = 1024


# Division as numpy does it: a check for zeros would keep loops from being vectorised.
@internal(error_model="numpy")
def _factor(adaptive: Any, batch_size: Any, eps: Any, limit: Any, one: Any) -> Any:
    """``N / (m + eps)``, at most the limit; 1 where m, `adaptive`, is 0."""
    return one if adaptive == 0 else min(batch_size / (adaptive + eps), limit)


@internal
def update(entry: Any, first: Any, counts: Any, options: Any) -> None:
    """Elements from `first` on, one for each count: ``w <- w - lr g N / (m + eps)``, or g alone."""
    columns, number = len(counts), options.dtype.type
    place = first * options.itemsize
    gradient = carray(pointer(entry[GRADIENT] + place), (columns,), options.dtype)
    size, eps, limit, one = number(entry[BATCH_SIZE]), options[EPS], options[LIMIT], number(1)
    if entry[PARAMETER] == 0:
        for column in range(columns):
            gradient[column] *= _factor(number(counts[column]), size, eps, limit, one)
        return
    parameter = carray(pointer(entry[PARAMETER] + place), (columns,), options.dtype)
    # In the order of torch's SGD, and with its roundings.
    sign = number(-1) if options[MAXIMIZE] != 0 else one
    back, decay = -options[LR], options[WEIGHT_DECAY]
    if entry[BUFFER] == 0 and decay == 0:
        for column in range(columns):
            factor = _factor(number(counts[column]), size, eps, limit, one)
            direction = sign * (gradient[column] * factor)
            parameter[column] = fma(back, direction, parameter[column])
        return
    if entry[BUFFER] == 0:
        for column in range(columns):
            factor = _factor(number(counts[column]), size, eps, limit, one)
            direction = fma(decay, parameter[column], sign * (gradient[column] * factor))
            parameter[column] = fma(back, direction, parameter[column])
        return
    buffer = carray(pointer(entry[BUFFER] + place), (columns,), options.dtype)
    momentum, kept = options[MOMENTUM], options[KEPT]
    nesterov, fresh = options[NESTEROV] != 0, entry[FRESH] != 0
    for column in range(columns):
        factor = _factor(number(counts[column]), size, eps, limit, one)
        direction = sign * (gradient[column] * factor)
        if decay != 0:
            direction = fma(decay, parameter[column], direction)
        speed = direction if fresh else fma(kept, direction, momentum * buffer[column])
        buffer[column] = speed
        if nesterov:
            speed = fma(momentum, speed, direction)
        parameter[column] = fma(back, speed, parameter[column])


@internal
def finish(entry: Any, row: Any, first: Any, counts: Any, options: Any, counted: Any) -> None:
    """Updates a row's elements from column `first` on, or, where `counted` has rows, writes counts there."""
    if len(counted) == 0:
        update(entry, row * entry[COLUMNS] + first, counts, options)
        return
    for column in range(len(counts)):
        counted[row, first + column] = counts[column]
