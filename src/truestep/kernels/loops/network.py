"""A fully connected network of one replica: its outputs, and which numbers are not zero.

Values lie as ``[unit, sample]``, rows padded to whole vectors. A wide input is read where its samples
lie, ``[sample, feature]``; a narrow one is brought to the layout of the rest.
"""

from typing import Any

import numpy as np

from truestep.kernels.loops.functions import erf, exp, sigmoid, tanh
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import SINGLE_8, SINGLE_64
from truestep.kernels.loops.tables import (
    BIAS,
    INPUTS,
    LEAKY_RELU,
    OUTPUTS,
    PAD,
    RELU,
    SIGMOID,
    STRIDE,
    SUMS,
    TANH,
    VALUES,
    WEIGHT,
    indices,
    numbers,
    words,
)
from truestep.kernels.loops.tiles import LANES, inner, outer

__all__ = [
    "active_units",
    "forward",
    "forward_one",
    "lay_rows",
    "pack_rows",
    "pack_samples",
    "through_activation",
]

F = np.float32
SLOPE = F(0.01)
HALF_ROOT, DENSITY = F(0.70710678118654752), F(0.39894228040143268)
MAGNITUDE = 0x7FFFFFFF
_NO_BIAS = np.zeros(1, F)


@internal
def forward(
    layers: Any, sizes: Any, scratch: Any, weights: Any, x: Any, x_row: Any, index: Any, n: Any
) -> None:
    """Leaves each layer's outputs at its VALUES, the last one's before the output function.

    Args:
        layers: int64 ``[layers, 8]``.
        sizes: `Sizes`.
        scratch: address of the memory of this thread.
        weights: address of the replica's parameters.
        x: address of the inputs, float32 ``[samples, features]``.
        x_row: bytes from one sample to the next.
        index: address of int32 ``[n]``, the samples of the batch.
        n: how many there are.
    """
    row = sizes.width * 4
    padded = (n + PAD - 1) // PAD * PAD
    below = scratch + sizes.samples
    wide = sizes.wide != 0
    if not wide:
        _transpose(x, x_row, index, n, layers[0, INPUTS], below, row, padded)
    last = len(layers) - 1
    for layer in range(last + 1):
        units = layers[layer, OUTPUTS]
        weight, stride = weights + layers[layer, WEIGHT], layers[layer, STRIDE]
        values = scratch + layers[layer, VALUES]
        if layer == 0 and wide:
            inner(units, n, stride // LANES, weight, stride * 4, x, x_row, index, values, row)
            for unit in range(units):
                tail = numbers(values + unit * row + n * 4, padded - n)
                tail[:] = 0
        else:
            outer(
                units,
                padded // LANES,
                layers[layer, INPUTS],
                weight,
                stride * 4,
                4,
                below,
                row,
                scratch + sizes.identity,
                values,
                row,
            )
        bias = numbers(weights + layers[layer, BIAS], units)
        if layer == last:
            for unit in range(units):
                line = numbers(values + unit * row, padded)
                for s in range(padded):
                    line[s] += bias[unit]
        else:
            sums = scratch + layers[layer, SUMS]
            _activate(sizes.activation, units, row, padded, values, sums, bias)
            # Without a sample there is only the bias, which might outgrow what the samples have.
            for unit in range(units):
                numbers(values + unit * row + n * 4, padded - n)[:] = 0
        below = values


@internal
def forward_one(layers: Any, sizes: Any, scratch: Any, weights: Any, sample: Any) -> None:
    """`forward` of a single sample: each layer's outputs are one row, but for the last ones.

    Args:
        layers: as of `forward`.
        sizes: as of `forward`.
        scratch: as of `forward`.
        weights: as of `forward`.
        sample: address of its inputs, padded to whole vectors.
    """
    below, last = sample, len(layers) - 1
    for layer in range(last + 1):
        units, stride = layers[layer, OUTPUTS], layers[layer, STRIDE]
        weight, values = weights + layers[layer, WEIGHT], scratch + layers[layer, VALUES]
        identity = scratch + sizes.identity
        inner(1, units, stride // LANES, below, 0, weight, stride * 4, identity, values, 0)
        line = numbers(values, (units + PAD - 1) // PAD * PAD)
        bias = numbers(weights + layers[layer, BIAS], units)
        for unit in range(units):
            line[unit] += bias[unit]
        line[units:] = 0
        if layer < last:
            _activate(
                sizes.activation, 1, 0, units, values, scratch + layers[layer, SUMS], _NO_BIAS
            )
        below = values
    spread = numbers(below, layers[last, OUTPUTS] * sizes.width)
    for back in range(layers[last, OUTPUTS]):
        unit = layers[last, OUTPUTS] - 1 - back
        spread[unit * sizes.width] = spread[unit]


@internal
def lay_rows(values: Any, row: Any, units: Any, n: Any, lines: Any, columns: Any) -> None:
    """``[unit, sample]`` as ``[sample, unit]``, padded with zeros.

    Args:
        values: address of the numbers.
        row: bytes from one unit to the next.
        units: how many there are.
        n: how many samples.
        lines: address of where they go.
        columns: numbers in a row there.
    """
    for sample in range(n):
        line = numbers(lines + sample * columns * 4, columns)
        for unit in range(units):
            line[unit] = numbers(values + unit * row + sample * 4, 1)[0]
        line[units:] = 0


@internal
def _transpose(
    x: Any, x_row: Any, index: Any, n: Any, features: Any, to: Any, row: Any, padded: Any
) -> None:
    samples = indices(index, n)
    for feature in range(features):
        line = numbers(to + feature * row, padded)
        for s in range(n):
            line[s] = numbers(x + samples[s] * x_row + feature * 4, 1)[0]
        for s in range(n, padded):
            line[s] = 0


@internal(error_model="numpy")
def _activate(
    kind: Any, units: Any, row: Any, padded: Any, values: Any, sums: Any, biases: Any
) -> None:
    """The activation of ``values + bias``, in place; GELU keeps the argument at `sums`."""
    for unit in range(units):
        line, bias = numbers(values + unit * row, padded), biases[unit]
        if kind == RELU:
            for s in range(padded):
                z = line[s] + bias
                # max(0, z) would hide what is not a number.
                line[s] = F(0) if z <= F(0) else z  # noqa: FURB136
        elif kind == LEAKY_RELU:
            for s in range(padded):
                z = line[s] + bias
                line[s] = z if z > F(0) else z * SLOPE
        elif kind == TANH:
            for s in range(padded):
                line[s] = tanh(line[s] + bias)
        elif kind == SIGMOID:
            for s in range(padded):
                line[s] = sigmoid(line[s] + bias)
        else:
            kept = numbers(sums + unit * row, padded)
            for s in range(padded):
                z = line[s] + bias
                kept[s] = z
                line[s] = F(0.5) * z * (F(1) + erf(z * HALF_ROOT))


@internal(error_model="numpy")
def through_activation(
    kind: Any, units: Any, row: Any, padded: Any, deltas: Any, outputs: Any, arguments: Any
) -> None:
    """From the gradient of a layer's outputs to that of its sums, in place.

    Args:
        kind: the activation.
        units: how many rows there are.
        row: bytes from one to the next.
        padded: numbers in a row.
        deltas: address of the gradient.
        outputs: address of the layer's outputs.
        arguments: address of its sums, read for GELU alone.
    """
    for unit in range(units):
        delta = numbers(deltas + unit * row, padded)
        values = numbers(outputs + unit * row, padded)
        if kind == RELU:
            for s in range(padded):
                delta[s] = delta[s] if values[s] > F(0) else F(0)
        elif kind == LEAKY_RELU:
            for s in range(padded):
                delta[s] = delta[s] if values[s] > F(0) else delta[s] * SLOPE
        elif kind == TANH:
            for s in range(padded):
                delta[s] = delta[s] * (F(1) - values[s] * values[s])
        elif kind == SIGMOID:
            for s in range(padded):
                delta[s] = delta[s] * (F(1) - values[s]) * values[s]
        else:
            sums = numbers(arguments + unit * row, padded)
            for s in range(padded):
                z = sums[s]
                below = F(0.5) * (F(1) + erf(z * HALF_ROOT))
                delta[s] = delta[s] * (below + z * DENSITY * exp(F(-0.5) * z * z))


@internal
def active_units(layers: Any, sizes: Any, scratch: Any, n: Any, active: Any) -> None:
    """Adds to each hidden unit's count the samples whose sum is above 0.

    Args:
        layers: as of `forward`.
        sizes: as of `forward`.
        scratch: as of `forward`, after it.
        n: the samples of the batch.
        active: int64 ``[hidden units]``.
    """
    border = F(0.5) if sizes.activation == SIGMOID else F(0)
    place = 0
    for layer in range(len(layers) - 1):
        for unit in range(layers[layer, OUTPUTS]):
            line = numbers(scratch + layers[layer, VALUES] + unit * sizes.width * 4, n)
            on = np.int32(0)
            for s in range(n):
                on += np.int32(line[s] > border)
            active[place] += on
            place += 1


@internal
def pack_rows(rows: Any, units: Any, row: Any, padded: Any, bits: Any) -> None:
    """Bit by bit along the samples, which numbers of ``[unit, sample]`` are not zero.

    Args:
        rows: address of the numbers.
        units: how many rows there are.
        row: bytes from one to the next.
        padded: numbers in a row; a multiple of 16, those behind the batch included.
        bits: address of int64 ``[words, units]``.
    """
    count = (padded + 63) // 64
    for unit in range(units):
        at = rows + unit * row
        for word in range(count):
            packed = words(bits + 8 * (word * units + unit), 1)
            left = padded - 64 * word
            if left >= 64:
                packed[0] = SINGLE_64(at + 256 * word, MAGNITUDE)
            else:
                together = np.int64(0)
                for octet in range(left // 8):
                    part = SINGLE_8(at + 256 * word + 32 * octet, MAGNITUDE)
                    together |= np.int64(part) << np.int64(8 * octet)
                packed[0] = together


@internal
def pack_samples(x: Any, x_row: Any, index: Any, n: Any, features: Any, bits: Any) -> None:
    """The same of inputs that lie as ``[sample, feature]``."""
    samples = indices(index, n)
    for word in range((n + 63) // 64):
        packed = words(bits + 8 * word * features, features)
        packed[:] = 0
        for s in range(min(64, n - 64 * word)):
            line = numbers(x + samples[64 * word + s] * x_row, features)
            one = np.int64(1) << np.int64(s)
            for feature in range(features):
                packed[feature] |= one if line[feature] != F(0) else np.int64(0)
