"""The losses of a replica's batch, how much of it is right, and the gradients they start with."""

from typing import Any

import numpy as np

from truestep.kernels.loops.functions import exp, log, sigmoid
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.tables import (
    BINARY_CROSS_ENTROPY,
    CROSS_ENTROPY,
    MEAN_SQUARED_ERROR,
    OUTPUTS,
    PAD,
    SIGMOID_OUTPUT,
    SOFTMAX,
    VALUES,
    indices,
    numbers,
)

__all__ = ["score"]

F = np.float32


@internal(error_model="numpy")
def score(
    layers: Any,
    sizes: Any,
    scratch: Any,
    labels: Any,
    targets: Any,
    index: Any,
    n: Any,
    train: Any,
) -> Any:
    """The summed loss of a batch and how many it gets right; with `train`, the gradient of its mean too.

    Args:
        layers: as of `forward`.
        sizes: as of `forward`.
        scratch: as of `forward`, after it.
        labels: address of int32 ``[samples]``, classes, or 0 where targets are numbers.
        targets: address of float32 ``[samples, outputs]``, or 0 where there are classes.
        index: as of `forward`.
        n: as of `forward`.
        train: whether the gradient of the mean loss by the last layer's sums is left at delta; it is 0
            behind the batch.
    """
    row, units = sizes.width * 4, layers[-1, OUTPUTS]
    padded = (n + PAD - 1) // PAD * PAD
    z, t = scratch + layers[-1, VALUES], scratch + sizes.targets
    delta, other = scratch + sizes.delta, scratch + sizes.other
    samples = indices(index, n)
    _spread_targets(samples, labels, targets, units, t, row)
    correct = np.int64(-1)
    if labels != 0:
        correct = _correct(samples, labels, units, z, row, sizes.output == SIGMOID_OUTPUT)
    total = 0.0
    if sizes.loss == CROSS_ENTROPY:
        total = _cross_entropy(units, n, z, t, delta, other, row)
    elif sizes.loss == BINARY_CROSS_ENTROPY:
        for unit in range(units):
            total += _binary_cross_entropy(
                numbers(z + unit * row, n),
                numbers(t + unit * row, n),
                numbers(delta + unit * row, n),
            )
        total /= units
    else:
        total = _squared_error(sizes.output, units, n, z, t, delta, other, row)
        if sizes.loss == MEAN_SQUARED_ERROR:
            total /= units
    if train:
        scale = F(1) / F(n)
        if sizes.loss in (BINARY_CROSS_ENTROPY, MEAN_SQUARED_ERROR):
            scale = F(1) / F(n * units)
        for unit in range(units):
            line = numbers(delta + unit * row, padded)
            for s in range(n):
                line[s] *= scale
            for s in range(n, padded):
                line[s] = 0
    return total, correct


@internal
def _spread_targets(samples: Any, labels: Any, targets: Any, units: Any, t: Any, row: Any) -> None:
    """Targets as ``[unit, sample]``; a class is 1 at its unit, and a single unit's target is the class."""
    n = len(samples)
    for unit in range(units):
        line = numbers(t + unit * row, n)
        if labels == 0:
            for s in range(n):
                line[s] = numbers(targets + 4 * (samples[s] * units + unit), 1)[0]
        else:
            wanted = 1 if units == 1 else unit
            for s in range(n):
                label = indices(labels + 4 * samples[s], 1)[0]
                line[s] = F(1) if label == wanted else F(0)


@internal
def _correct(samples: Any, labels: Any, units: Any, z: Any, row: Any, logits: Any) -> Any:
    """How many samples have their largest output at their class, or a single output on its side."""
    right = np.int64(0)
    border = F(0) if logits else F(0.5)
    for s in range(len(samples)):
        label = indices(labels + 4 * samples[s], 1)[0]
        if units == 1:
            right += (numbers(z + 4 * s, 1)[0] > border) == (label == 1)
            continue
        best = np.int64(0)
        largest = numbers(z + 4 * s, 1)[0]
        for unit in range(1, units):
            value = numbers(z + unit * row + 4 * s, 1)[0]
            if value > largest:
                best, largest = np.int64(unit), value
        right += best == label
    return right


@internal(error_model="numpy", fastmath={"reassoc"})
def _sum(line: Any) -> Any:
    total = 0.0
    for s in range(len(line)):
        total += line[s]
    return total


@internal(error_model="numpy")
def _softmax(units: Any, n: Any, z: Any, out: Any, largest: Any, sums: Any, row: Any) -> None:
    """The softmax of ``z`` at ``out``; the largest of each sample, and the sum beside it."""
    top, total = numbers(largest, n), numbers(sums, n)
    first = numbers(z, n)
    for s in range(n):
        top[s] = first[s]
        total[s] = 0
    for unit in range(1, units):
        line = numbers(z + unit * row, n)
        for s in range(n):
            top[s] = line[s] if line[s] > top[s] or line[s] != line[s] else top[s]
    for unit in range(units):
        line, power = numbers(z + unit * row, n), numbers(out + unit * row, n)
        for s in range(n):
            power[s] = exp(line[s] - top[s])
            total[s] += power[s]
    for unit in range(units):
        power = numbers(out + unit * row, n)
        for s in range(n):
            power[s] /= total[s]


@internal(error_model="numpy")
def _cross_entropy(units: Any, n: Any, z: Any, t: Any, delta: Any, other: Any, row: Any) -> Any:
    """``sum over units of t * (log(sum of e ** z) - z)``; its gradient ``softmax(z) * sum(t) - t``."""
    _softmax(units, n, z, delta, other, other + row, row)
    top, total = numbers(other, n), numbers(other + row, n)
    weight, losses = numbers(other + 2 * row, n), numbers(other + 3 * row, n)
    for s in range(n):
        total[s] = log(total[s])
        weight[s] = 0
        losses[s] = 0
    for unit in range(units):
        line, target = numbers(z + unit * row, n), numbers(t + unit * row, n)
        for s in range(n):
            weight[s] += target[s]
            losses[s] += target[s] * (top[s] - line[s] + total[s])
    for unit in range(units):
        power, target = numbers(delta + unit * row, n), numbers(t + unit * row, n)
        for s in range(n):
            power[s] = power[s] * weight[s] - target[s]
    return _sum(losses)


@internal(error_model="numpy", fastmath={"reassoc"})
def _binary_cross_entropy(z: Any, t: Any, delta: Any) -> Any:
    """``log(1 + e ** -|z|) + max(z, 0) - t * z``; its gradient ``sigmoid(z) - t``."""
    total = 0.0
    for s in range(len(z)):
        power = exp(-abs(z[s]))
        larger = F(0) if z[s] <= F(0) else z[s]  # noqa: FURB136 - max hides what is not a number
        total += log(F(1) + power) + larger - t[s] * z[s]
        delta[s] = (F(1) if z[s] >= F(0) else power) / (F(1) + power) - t[s]
    return total


@internal(error_model="numpy")
def _squared_error(
    output: Any, units: Any, n: Any, z: Any, t: Any, delta: Any, other: Any, row: Any
) -> Any:
    """``sum of (output - t) ** 2``, and its gradient by z through the output function."""
    total = 0.0
    if output == SOFTMAX:
        _softmax(units, n, z, delta, other, other + row, row)
        dots = numbers(other, n)
        dots[:] = 0
        for unit in range(units):
            p, target = numbers(delta + unit * row, n), numbers(t + unit * row, n)
            for s in range(n):
                difference = p[s] - target[s]
                dots[s] += F(2) * difference * p[s]
                total += difference * difference
        for unit in range(units):
            p, target = numbers(delta + unit * row, n), numbers(t + unit * row, n)
            for s in range(n):
                p[s] = p[s] * (F(2) * (p[s] - target[s]) - dots[s])
        return total
    for unit in range(units):
        line, target = numbers(z + unit * row, n), numbers(t + unit * row, n)
        to, squares = numbers(delta + unit * row, n), numbers(other, n)
        for s in range(n):
            value = sigmoid(line[s]) if output == SIGMOID_OUTPUT else line[s]
            difference = value - target[s]
            squares[s] = difference * difference
            slope = value * (F(1) - value) if output == SIGMOID_OUTPUT else F(1)
            to[s] = F(2) * difference * slope
        total += _sum(squares)
    return total
