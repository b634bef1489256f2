"""The backward pass of one replica, and with it the step, layer by layer from the last one."""

from typing import Any

import numpy as np

from truestep.kernels.loops.descent import correct, count, descend, factor
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import count_bits
from truestep.kernels.loops.network import lay_rows, pack_rows, pack_samples, through_activation
from truestep.kernels.loops.tables import (
    ADAPTIVE,
    BIAS,
    INPUT_BITS,
    INPUTS,
    OUTPUTS,
    PAD,
    STRIDE,
    SUMS,
    TRAIN,
    VALUES,
    WEIGHT,
    X_ROW,
    indices,
    numbers,
    words,
)
from truestep.kernels.loops.tiles import LANES, inner, outer

__all__ = ["backward"]

# How many gradients are made before their parameters take the step: few enough for the nearest cache.
GROUP = 4096


@internal
def backward(
    scratch: Any,
    options: Any,
    plan: Any,
    state: Any,
    records: Any,
    replica: Any,
    x: Any,
    index: Any,
    n: Any,
    lr: Any,
    step: Any,
    place: Any,
    compared: Any,
) -> None:
    """The backward pass and the step, layer by layer from the last one.

    Args:
        scratch: address of this thread's memory.
        options: `Options`.
        plan: `Plan`.
        state: `State`.
        records: `Records`.
        replica: which.
        x: address of the inputs, float32 ``[samples, features]``.
        index: address of int32 ``[n]``, the samples of the batch.
        n: how many there are.
        lr: this step's learning rate.
        step: how many steps there were before.
        place: of what is measured at this step; -1 where nothing is.
        compared: whether gradients are measured at this step or the next one, which looks at this one's.
    """
    sizes, settings = plan.sizes, state.settings[replica]
    row, padded = sizes.width * 4, (n + PAD - 1) // PAD * PAD
    weights = state.parameters[replica:].ctypes.data
    previous = state.previous[replica:].ctypes.data
    moments, squares = state.moments[replica:].ctypes.data, state.squares[replica:].ctypes.data
    delta, other = scratch + sizes.delta, scratch + sizes.other
    gradient, identity = scratch + sizes.gradient, scratch + sizes.identity
    delta_bits, word_count = scratch + sizes.delta_bits, (padded + 63) // 64
    thin, one = sizes.thin != 0, sizes.one != 0
    # Of a single sample, a layer's gradients by its sums are one row.
    delta_row, extent = (np.int64(4), np.int64(1)) if one else (row, padded)
    if one:
        spread = numbers(delta, plan.layers[-1, OUTPUTS] * sizes.width)
        for unit in range(plan.layers[-1, OUTPUTS]):
            spread[unit] = spread[unit * sizes.width]
    recorded = place >= 0 and options.with_batch_sizes != 0
    counting = settings[ADAPTIVE] != 0 or recorded
    # The factor of a single sample needs no counts.
    packing = recorded or (counting and n > 1)
    nothing = records.batch_sizes[:0].reshape(0)
    x_row = plan.splits[TRAIN, X_ROW]
    size_sum, agreeing = 0.0, np.int64(0)
    for back in range(len(plan.layers)):
        layer = len(plan.layers) - 1 - back
        line = plan.layers[layer]
        units, inputs, columns = line[OUTPUTS], line[INPUTS], line[STRIDE]
        below = scratch + (sizes.samples if layer == 0 else plan.layers[layer - 1, VALUES])
        input_bits = scratch + line[INPUT_BITS]
        # Inputs as rows of samples: those that lie so, and those of thin batches.
        by_rows = thin or (layer == 0 and sizes.wide != 0)
        lines, line_row, line_index = x, x_row, index
        if layer > 0 and thin:
            lines, line_row, line_index = below, np.int64(0), identity
            if not one:
                lines, line_row = scratch + sizes.lines, columns * 4
                lay_rows(below, row, inputs, n, lines, columns)
        if packing:
            if one:
                pack_samples(delta, 0, identity, 1, units, delta_bits)
            else:
                pack_rows(delta, units, row, padded, delta_bits)
            if by_rows:
                pack_samples(lines, line_row, line_index, n, columns, input_bits)
            else:
                pack_rows(below, columns, row, padded, input_bits)
        bias_gradient = numbers(scratch + sizes.bias_gradient, units)
        for unit in range(units):
            bias_gradient[unit] = _sum(numbers(delta + unit * delta_row, extent))
        if layer > 0:
            weight, sums = weights + line[WEIGHT], scratch + plan.layers[layer - 1, SUMS]
            if one:
                vectors = columns // LANES
                outer(1, vectors, units, delta, 0, 4, weight, columns * 4, identity, other, 0)
                through_activation(sizes.activation, 1, 0, inputs, other, below, sums)
            else:
                vectors, step_down = padded // LANES, columns * 4
                outer(
                    inputs, vectors, units, weight, 4, step_down, delta, row, identity, other, row
                )
                through_activation(sizes.activation, inputs, row, padded, other, below, sums)
        # Whole tiles of rows.
        group = max(4, min(units, GROUP // columns // 4 * 4))
        unit = 0
        while unit <= units:
            is_bias = unit == units
            rows = 1 if is_bias else min(group, units - unit)
            length = units if is_bias else rows * columns
            at = line[BIAS] if is_bias else line[WEIGHT] + unit * columns * 4
            direction = bias_gradient
            if not is_bias:
                direction = numbers(gradient, length)
                top = delta + unit * delta_row
                if by_rows:
                    outer(
                        rows,
                        columns // LANES,
                        n,
                        top,
                        delta_row,
                        4,
                        lines,
                        line_row,
                        line_index,
                        gradient,
                        columns * 4,
                    )
                else:
                    inner(
                        rows,
                        columns,
                        padded // LANES,
                        top,
                        row,
                        below,
                        row,
                        identity,
                        gradient,
                        columns * 4,
                    )
            if compared:
                size, agree = _compare(direction, state.before[replica, at // 4 :])
                size_sum += size
                agreeing += agree
            if counting:
                _count_and_correct(
                    delta_bits,
                    input_bits,
                    unit,
                    rows,
                    units,
                    word_count,
                    scratch + sizes.counts,
                    direction,
                    n,
                    settings,
                    records.batch_sizes[replica, place, at // 4 :] if recorded else nothing,
                )
            descend(
                numbers(weights + at, length),
                direction,
                previous + at,
                moments + at,
                squares + at,
                settings,
                lr,
                step,
            )
            unit += rows
        delta, other = other, delta
    if place >= 0 and options.with_gradients != 0:
        records.gradients[replica, place, 0] = size_sum / options.parameters
        records.gradients[replica, place, 1] = agreeing / options.parameters


@internal
def _count_and_correct(
    delta_bits: Any,
    input_bits: Any,
    unit: Any,
    rows: Any,
    units: Any,
    word_count: Any,
    counts_at: Any,
    gradient: Any,
    n: Any,
    settings: Any,
    kept: Any,
) -> None:
    """Adaptive batch sizes of some rows of a weight, or of the bias, and aSGD's correction by them.

    They are kept where `kept` has places.
    """
    length = len(gradient) // rows
    counts = indices(counts_at, length)
    if n == 1 and len(kept) == 0:
        # Each gradient is the sample's own: counted once, or 0.
        scale = factor(np.float32(1), n, settings)
        for k in range(len(gradient)):
            gradient[k] *= scale
        return
    for row in range(rows):
        if unit < units and len(kept) == 0 and _idle(delta_bits, unit + row, units, word_count):
            continue
        if unit == units:
            _count_outputs(delta_bits, word_count, counts)
        else:
            count(delta_bits, input_bits, unit + row, units, word_count, counts)
        part = gradient[row * length : (row + 1) * length]
        if len(kept) > 0:
            for k in range(length):
                kept[row * length + k] = counts[k]
        if settings[ADAPTIVE] != 0:
            correct(part, counts, n, settings)


@internal(error_model="numpy", fastmath={"reassoc"})
def _sum(line: Any) -> Any:
    total = np.float32(0)
    for s in range(len(line)):
        total += line[s]
    return total


@internal
def _idle(delta_bits: Any, unit: Any, units: Any, word_count: Any) -> Any:
    """Whether no sample reaches a unit: its gradients are 0."""
    together = np.int64(0)
    for word in range(word_count):
        together |= words(delta_bits + 8 * (word * units + unit), 1)[0]
    return together == 0


@internal
def _count_outputs(delta_bits: Any, word_count: Any, counts: Any) -> None:
    counts[:] = 0
    for word in range(word_count):
        on = words(delta_bits + 8 * word * len(counts), len(counts))
        for unit in range(len(counts)):
            counts[unit] += np.int32(count_bits(on[unit]))


@internal(error_model="numpy", fastmath={"reassoc"})
def _compare(gradient: Any, before: Any) -> Any:
    """Sum of the sizes, and how many signs are those of the step before; that is then this one."""
    size, agreeing = 0.0, np.int64(0)
    for k in range(len(gradient)):
        present = gradient[k]
        size += abs(present)
        agreeing += ((present > 0) & (before[k] > 0)) | ((present < 0) & (before[k] < 0))
        before[k] = present
    return size, agreeing
