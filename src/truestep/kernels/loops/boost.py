"""The compiled loops of DA-SGD: all parameters of a call in one pass over their elements.

They get a table of addresses, since handing one array to a compiled function costs more than a small
parameter's step, and run over the elements of all parameters in a row, so that a range of them is a
part of the work whatever the parameters' sizes.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from truestep.kernels.loops.memory import fma, pointer

__all__ = ["boost", "boosted_step"]


@njit(cache=True, nogil=True)
def _numbers(address: Any, first: Any, length: Any, like: Any) -> Any:
    """The `length` numbers from the `first` on of those that begin at an address."""
    return carray(pointer(address + first * like.itemsize), (length,), like.dtype)


@njit(cache=True, nogil=True)
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
        like: an array of the dtype of all these.
        lr: the learning rate.
        weight_decay: the L2 penalty.
        maximize: whether to ascend.
    """
    number = like.dtype.type
    rate, decay, sign = number(-lr), number(weight_decay), number(-1 if maximize else 1)
    row = np.searchsorted(table[0], start * like.itemsize, side="right")
    while start < stop:
        first = start - (table[0, row - 1] // like.itemsize if row > 0 else 0)
        length = min(stop, table[0, row] // like.itemsize) - start
        gradient = _numbers(table[2, row], first, length, like)
        previous = _numbers(table[3, row], first, length, like)
        weights = _numbers(table[4, row], first, length, like)
        plain = table[1, row] != 0
        for index in range(length):
            present = gradient[index]
            direction = sign * (present if plain else _boosted(present, previous[index]))
            if decay != 0:
                direction = fma(decay, weights[index], direction)
            previous[index] = present
            weights[index] = fma(rate, direction, weights[index])
        start += length
        row += 1


@njit(cache=True, nogil=True)
def boost(start: Any, stop: Any, table: Any, like: Any) -> None:
    """Adds their boosters to the gradients; the previous gradient becomes the one there was.

    Args:
        start: the first element, of all gradients in a row.
        stop: the element to stop before.
        table: as that of `boosted_step`, without weights and first steps.
        like: an array of the dtype of the gradients.
    """
    row = np.searchsorted(table[0], start * like.itemsize, side="right")
    while start < stop:
        first = start - (table[0, row - 1] // like.itemsize if row > 0 else 0)
        length = min(stop, table[0, row] // like.itemsize) - start
        gradient = _numbers(table[2, row], first, length, like)
        previous = _numbers(table[3, row], first, length, like)
        for index in range(length):
            present = gradient[index]
            gradient[index] = _boosted(present, previous[index])
            previous[index] = present
        start += length
        row += 1
