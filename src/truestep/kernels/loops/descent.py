"""The update rules on one row of a replica's parameters, in the order of torch's optimizers.

`gradient` is changed on the way: to the mean effective gradient (aSGD), plus the booster (DA-SGD), plus
the weight decay; then the rule takes its step.
"""

from typing import Any

import numpy as np

from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import count_bits, fma
from truestep.kernels.loops.tables import (
    ADAGRAD,
    ADAMW,
    ADAPTIVE_EPS,
    BETA_1,
    BETA_2,
    BOOST,
    EPS,
    FACTOR_LIMIT,
    MOMENTUM,
    NESTEROV,
    RMSPROP,
    RULE,
    SGD,
    WEIGHT_DECAY,
    numbers,
    words,
)

__all__ = ["correct", "count", "descend", "factor"]

F = np.float32


@internal
def count(outputs: Any, inputs: Any, unit: Any, units: Any, word_count: Any, counts: Any) -> None:
    """The adaptive batch sizes of one row of a weight.

    Args:
        outputs: address of int64 ``[words, units]``, which gradients of the layer's sums are not zero.
        inputs: address of int64 ``[words, columns]``, which of its inputs.
        unit: the row.
        units: how many rows there are.
        word_count: how many words.
        counts: int32 ``[columns]``.
    """
    columns = len(counts)
    on, line = words(outputs + 8 * unit, 1)[0], words(inputs, columns)
    for column in range(columns):
        counts[column] = count_bits(on & line[column])
    for word in range(1, word_count):
        on = words(outputs + 8 * (word * units + unit), 1)[0]
        line = words(inputs + 8 * word * columns, columns)
        for column in range(columns):
            counts[column] += np.int32(count_bits(on & line[column]))


@internal(error_model="numpy")
def factor(adaptive: Any, batch_size: Any, settings: Any) -> Any:
    """``N / (m + eps)``, at most the limit; `adaptive` is m, in float32."""
    eps, limit = F(settings[ADAPTIVE_EPS]), F(settings[FACTOR_LIMIT])
    return min(F(batch_size) / (adaptive + eps), limit)


@internal(error_model="numpy")
def correct(gradient: Any, counts: Any, batch_size: Any, settings: Any) -> None:
    """``g * N / (m + eps)`` where m > 0: the mean effective gradient."""
    size, eps, limit = F(batch_size), F(settings[ADAPTIVE_EPS]), F(settings[FACTOR_LIMIT])
    for k in range(len(gradient)):
        scale = min(size / (F(counts[k]) + eps), limit)
        gradient[k] = gradient[k] * scale if counts[k] > 0 else gradient[k]


@internal(error_model="numpy")
def descend(
    weights: Any,
    gradient: Any,
    previous: Any,
    first: Any,
    second: Any,
    settings: Any,
    lr: Any,
    step: Any,
) -> None:
    """One step of the rule along a gradient.

    Args:
        weights: float32 ``[K]``.
        gradient: float32 ``[K]``.
        previous: address of the gradient of the step before; read and written by DA-SGD alone.
        first: address of the momentum, the first moment, or Adagrad's and RMSprop's squares.
        second: address of the second moment.
        settings: the replica's row of the table of optimizers.
        lr: this step's learning rate.
        step: how many steps there were before.
    """
    length = len(weights)
    if settings[BOOST] != 0:
        before = numbers(previous, length)
        for k in range(length):
            present = gradient[k]
            agree = ((present > 0) & (before[k] > 0)) | ((present < 0) & (before[k] < 0))
            gradient[k] = present + ((present + before[k]) * F(0.5) if agree else F(0))
            before[k] = present
    rule, decay = settings[RULE], F(settings[WEIGHT_DECAY])
    if rule == ADAMW:
        keep = F(1 - lr * settings[WEIGHT_DECAY])
        for k in range(length):
            weights[k] *= keep
    elif decay != 0:
        for k in range(length):
            gradient[k] = fma(decay, weights[k], gradient[k])
    if rule == SGD:
        _sgd(weights, gradient, first, settings, lr, step)
    elif rule == ADAGRAD:
        squares = numbers(first, length)
        rate, eps = F(-lr), F(settings[EPS])
        for k in range(length):
            squares[k] += gradient[k] * gradient[k]
            weights[k] += rate * gradient[k] / (np.sqrt(squares[k]) + eps)
    elif rule == RMSPROP:
        squares = numbers(first, length)
        rate, eps = F(-lr), F(settings[EPS])
        kept, added = F(settings[BETA_2]), F(1 - settings[BETA_2])
        for k in range(length):
            squares[k] = squares[k] * kept + added * gradient[k] * gradient[k]
            weights[k] += rate * gradient[k] / (np.sqrt(squares[k]) + eps)
    else:
        _adam(
            weights, gradient, numbers(first, length), numbers(second, length), settings, lr, step
        )


@internal
def _sgd(weights: Any, gradient: Any, first: Any, settings: Any, lr: Any, step: Any) -> None:
    rate, momentum = F(-lr), F(settings[MOMENTUM])
    if momentum != 0:
        buffer = numbers(first, len(weights))
        nesterov = settings[NESTEROV] != 0
        for k in range(len(weights)):
            moved = gradient[k] if step == 0 else buffer[k] * momentum + gradient[k]
            buffer[k] = moved
            gradient[k] = fma(momentum, moved, gradient[k]) if nesterov else moved
    for k in range(len(weights)):
        weights[k] = fma(rate, gradient[k], weights[k])


@internal(error_model="numpy")
def _adam(
    weights: Any, gradient: Any, mean: Any, squares: Any, settings: Any, lr: Any, step: Any
) -> None:
    beta_1, beta_2 = settings[BETA_1], settings[BETA_2]
    size = F(-lr / (1 - beta_1 ** (step + 1)))
    root, eps = F(np.sqrt(1 - beta_2 ** (step + 1))), F(settings[EPS])
    added, kept, squared = F(1 - beta_1), F(beta_2), F(1 - beta_2)
    for k in range(len(weights)):
        mean[k] += added * (gradient[k] - mean[k])
        squares[k] = squares[k] * kept + squared * gradient[k] * gradient[k]
        weights[k] += size * mean[k] / (np.sqrt(squares[k]) / root + eps)
