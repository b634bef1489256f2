"""The compiled loops of DA-SGD: all parameters of a call in one pass over their elements.

They get a table of addresses, since handing one array to a compiled function costs more than a small
parameter's step, and run over the elements of all parameters in a row, so that a range of them is a
part of the work whatever the parameters' sizes.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from truestep.kernels.loops.bfloat16 import narrow, widen
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import fma, pointer, prefetch

__all__ = ["boost", "boosted_step"]

# So many elements are taken at a time, while the processor fetches those so many bytes further on. That is
# asked for in loops of known length: within `_numbers` it made the pass a tenth slower.
STRETCH, AHEAD = 64, 2048


@internal
def _stretch(start: Any, stop: Any, table: Any, row: Any, size: Any) -> Any:
    """What to go over next: its first element in the row's parameter, its length, and if it is the last."""
    before, end = (table[0, row - 1] // size if row > 0 else 0), table[0, row] // size
    first, length = start - before, min(stop, end, start + STRETCH) - start
    return first, length, start + length == end


@internal
def _numbers(address: Any, first: Any, length: Any, like: Any) -> Any:
    """The `length` numbers from the `first` on of those that begin at an address."""
    return carray(pointer(address + first * like.itemsize), (length,), like.dtype)


@internal
def _boosted(gradient: Any, previous: Any) -> Any:
    """One element's gradient plus its booster; two zeros agree too, but theirs is 0."""
    agree = ((gradient > 0) & (previous > 0)) | ((gradient < 0) & (previous < 0))
    number = type(gradient)
    return gradient + ((gradient + previous) * number(0.5) if agree else number(0))


@njit(cache=True, nogil=True)
def boosted_step(
    start: Any, stop: Any, table: Any, like: Any, lr: Any, weight_decay: Any, maximize: Any
) -> None:
    """DA-SGD's step from element `start` to `stop`; the previous gradient becomes the present one.

    Args:
        start: the first element, of all parameters in a row.
        stop: the element to stop before.
        table: int64 ``[5, parameters]``: the byte before which each parameter ends if they lay in a row,
            whether this is its first step, the addresses of its gradient, previous gradient and weights.
        like: an array of the dtype that all these are stored in.
        lr: the learning rate.
        weight_decay: the L2 penalty.
        maximize: whether to ascend.
    """
    stored = like.dtype.type(0)
    number = type(widen(stored))
    rate, decay, sign = number(-lr), number(weight_decay), number(-1 if maximize else 1)
    row = np.searchsorted(table[0], start * like.itemsize, side="right")
    while start < stop:
        first, length, whole = _stretch(start, stop, table, row, like.itemsize)
        for kind in range(2, 5):
            prefetch(table[kind, row] + first * like.itemsize + AHEAD, length * like.itemsize)
        gradient = _numbers(table[2, row], first, length, like)
        previous = _numbers(table[3, row], first, length, like)
        weights = _numbers(table[4, row], first, length, like)
        plain = table[1, row] != 0
        for index in range(length):
            present, weight = widen(gradient[index]), widen(weights[index])
            direction = sign * (present if plain else _boosted(present, widen(previous[index])))
            if decay != 0:
                direction = fma(decay, weight, direction)
            previous[index] = gradient[index]
            weights[index] = narrow(fma(rate, direction, weight), stored)
        start += length
        row += whole


@njit(cache=True, nogil=True)
def boost(start: Any, stop: Any, table: Any, like: Any) -> None:
    """Adds their boosters to the gradients; the previous gradient becomes the one there was.

    Args:
        start: the first element, of all gradients in a row.
        stop: the element to stop before.
        table: as that of `boosted_step`, without weights and first steps.
        like: an array of the dtype that the gradients are stored in.
    """
    row = np.searchsorted(table[0], start * like.itemsize, side="right")
    while start < stop:
        first, length, whole = _stretch(start, stop, table, row, like.itemsize)
        for kind in range(2, 4):
            prefetch(table[kind, row] + first * like.itemsize + AHEAD, length * like.itemsize)
        gradient = _numbers(table[2, row], first, length, like)
        previous = _numbers(table[3, row], first, length, like)
        for index in range(length):
            present = gradient[index]
            boosted = _boosted(widen(present), widen(previous[index]))
            gradient[index] = narrow(boosted, present)
            previous[index] = present
        start += length
        row += whole
