"""Replicas of a network, trained one after the other from one step to another, all in one call."""

from typing import Any

import numpy as np
from numba import njit

from truestep.kernels.loops.backward import backward
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.losses import score
from truestep.kernels.loops.network import active_units, forward, forward_one
from truestep.kernels.loops.tables import (
    BATCH_LOSS,
    BEST,
    COUNT,
    CURSOR,
    DIVERGED,
    DONE,
    FINISHED,
    FIRST_UNDER,
    LABELS,
    LABELS_STEP,
    LR,
    OUTPUTS,
    RUNNING,
    SCHEDULE,
    STATUS,
    STOPPED,
    SUMMED,
    TARGETS_AT,
    TARGETS_STEP,
    TRAIN,
    WAITED,
    WANTED,
    X_ROW,
    X_STEP,
    X,
    indices,
)

__all__ = ["train"]


@njit(cache=True, nogil=True)
def train(
    first: Any,
    last: Any,
    start: Any,
    stop: Any,
    scratch: Any,
    options: Any,
    plan: Any,
    schedules: Any,
    order: Any,
    order_start: Any,
    state: Any,
    records: Any,
) -> None:
    """Takes replicas from one step to another, and measures on the way; those that have ended stay.

    Args:
        first: the first replica.
        last: the replica to end before.
        start: how many steps they have taken.
        stop: how many they have then.
        scratch: address of this thread's memory.
        options: `Options`.
        plan: `Plan`.
        schedules: float64 ``[schedules, stop - start]``, factors of the learning rates.
        order: int32 ``[replicas, samples of some epochs]``; with full batches the samples once.
        order_start: the step with which the order begins.
        state: `State`.
        records: `Records`.
    """
    hidden = np.int64(0)
    for layer in range(len(plan.layers) - 1):
        hidden += plan.layers[layer, OUTPUTS]
    active = np.zeros(hidden, np.int64)
    samples = plan.splits[TRAIN, COUNT]
    size = min(options.batch_size, samples)
    full = size == samples
    a_pass = (samples + size - 1) // size
    for replica in range(first, last):
        progress, levels = state.progress[replica], state.levels[replica]
        if progress[STATUS] != RUNNING:
            continue
        weights = state.parameters[replica:].ctypes.data
        data = state.data_sets[replica]
        x, labels, targets = _addresses(plan.splits[TRAIN], data)
        for step in range(start, stop + 1):
            final = step == options.steps
            if step == stop and not final:
                break
            cursor = progress[CURSOR]
            due = cursor < len(plan.measured) and plan.measured[cursor] == step
            if due:
                _measure(
                    scratch,
                    options,
                    plan,
                    state,
                    records,
                    active,
                    replica,
                    cursor,
                    final or not full,
                )
                if progress[SUMMED] > 0:
                    records.batch_losses[replica, cursor] = levels[BATCH_LOSS] / progress[SUMMED]
                progress[SUMMED], levels[BATCH_LOSS] = 0, 0.0
            if final:
                progress[STATUS] = FINISHED
            else:
                batch = step % a_pass
                n = min(size, samples - batch * size)
                if full:
                    index = order.ctypes.data
                else:
                    place = (step - order_start) // a_pass * samples + batch * size
                    index = order[replica, place:].ctypes.data
                if plan.sizes.one != 0:
                    sample = x + indices(index, 1)[0] * plan.splits[TRAIN, X_ROW]
                    forward_one(plan.layers, plan.sizes, scratch, weights, sample)
                else:
                    row = plan.splits[TRAIN, X_ROW]
                    forward(plan.layers, plan.sizes, scratch, weights, x, row, index, n)
                total, right = score(
                    plan.layers, plan.sizes, scratch, labels, targets, index, n, True
                )
                if full:
                    _judge_full_batch(
                        scratch,
                        options,
                        plan,
                        state,
                        records,
                        active,
                        replica,
                        step,
                        due,
                        total / n,
                        right / n if right >= 0 else np.nan,
                    )
                if not np.isfinite(total):
                    progress[STATUS] = DIVERGED
            if due:
                _judge(options, records, progress, levels, replica, cursor, step)
                if options.with_parameters != 0:
                    _copy(state.parameters[replica], records.parameters[replica, cursor])
                progress[CURSOR] += 1
            if progress[STATUS] != RUNNING:
                progress[DONE] = step
                _measure_end(scratch, options, plan, state, records, active, replica, cursor, due)
                break
            progress[SUMMED] += n
            levels[BATCH_LOSS] += total
            settings = state.settings[replica]
            lr = settings[LR] * schedules[np.int64(settings[SCHEDULE]), step - start]
            following = progress[CURSOR]
            soon = following < len(plan.measured) and plan.measured[following] == step + 1
            backward(
                scratch,
                options,
                plan,
                state,
                records,
                replica,
                x,
                index,
                n,
                lr,
                step,
                cursor if due else -1,
                options.with_gradients != 0 and (due or soon),
            )


@internal
def _addresses(split: Any, data: Any) -> Any:
    return (
        split[X] + data * split[X_STEP],
        split[LABELS] + data * split[LABELS_STEP],
        split[TARGETS_AT] + data * split[TARGETS_STEP],
    )


@internal
def _measure(
    scratch: Any,
    options: Any,
    plan: Any,
    state: Any,
    records: Any,
    active: Any,
    replica: Any,
    place: Any,
    with_train: Any,
) -> None:
    """Losses and accuracies of the splits that are wanted, and dummy nodes from the training split."""
    for split in range(3):
        line = plan.splits[split]
        nodes = options.with_nodes != 0 and split == TRAIN
        if split == TRAIN and not with_train:
            continue
        if line[WANTED] == 0 and not nodes:
            continue
        x, labels, targets = _addresses(line, state.data_sets[replica])
        weights = state.parameters[replica:].ctypes.data
        active[:] = 0
        total, right = 0.0, np.int64(0)
        begin = np.int64(0)
        while begin < line[COUNT]:
            n = min(plan.sizes.width, line[COUNT] - begin)
            index = scratch + plan.sizes.identity + 4 * begin
            forward(plan.layers, plan.sizes, scratch, weights, x, line[X_ROW], index, n)
            part, found = score(plan.layers, plan.sizes, scratch, labels, targets, index, n, False)
            total += part
            right += found
            if nodes:
                active_units(plan.layers, plan.sizes, scratch, n, active)
            begin += n
        if line[WANTED] != 0:
            records.losses[replica, split, place] = total / line[COUNT]
            if labels != 0:
                records.accuracies[replica, split, place] = right / line[COUNT]
        if nodes:
            _note_nodes(records.nodes[replica, place], active, line[COUNT])


@internal
def _measure_end(
    scratch: Any,
    options: Any,
    plan: Any,
    state: Any,
    records: Any,
    active: Any,
    replica: Any,
    place: Any,
    due: Any,
) -> None:
    """The measurement of the end; where the last step was measured anyway, the same."""
    end = records.losses.shape[2] - 1
    if not due:
        _measure(scratch, options, plan, state, records, active, replica, end, True)
        return
    for measured in (records.losses, records.accuracies):
        for split in range(measured.shape[1]):
            measured[replica, split, end] = measured[replica, split, place]
    if options.with_nodes != 0:
        _copy(records.nodes[replica, place], records.nodes[replica, end])


@internal
def _copy(source: Any, target: Any) -> None:
    for index in range(len(target)):
        target[index] = source[index]


@internal
def _note_nodes(nodes: Any, active: Any, samples: Any) -> None:
    for unit in range(len(active)):
        nodes[unit] = 1 if active[unit] == 0 else 2 if active[unit] == samples else 0


@internal
def _judge_full_batch(
    scratch: Any,
    options: Any,
    plan: Any,
    state: Any,
    records: Any,
    active: Any,
    replica: Any,
    step: Any,
    due: Any,
    loss: Any,
    accuracy: Any,
) -> None:
    """What the forward pass of a step tells, where the batch is the training split."""
    progress = state.progress[replica]
    if due:
        if plan.splits[TRAIN, WANTED] != 0:
            records.losses[replica, TRAIN, progress[CURSOR]] = loss
            records.accuracies[replica, TRAIN, progress[CURSOR]] = accuracy
        if options.with_nodes != 0:
            active[:] = 0
            samples = plan.splits[TRAIN, COUNT]
            active_units(plan.layers, plan.sizes, scratch, samples, active)
            _note_nodes(records.nodes[replica, progress[CURSOR]], active, samples)
    if progress[FIRST_UNDER] < 0 and loss < options.under:
        progress[FIRST_UNDER] = step
    if options.stop_split == TRAIN and loss < options.stop_loss:
        progress[STATUS] = STOPPED


@internal
def _judge(
    options: Any, records: Any, progress: Any, levels: Any, replica: Any, place: Any, step: Any
) -> None:
    """Whether what was just measured is low enough, or has not become lower for too long."""
    if progress[FIRST_UNDER] < 0 and records.losses[replica, TRAIN, place] < options.under:
        progress[FIRST_UNDER] = step
    if options.stop_split < 0:
        return
    loss = records.losses[replica, options.stop_split, place]
    if loss < levels[BEST]:
        levels[BEST], progress[WAITED] = loss, 0
    else:
        progress[WAITED] += 1
    waited = options.patience > 0 and progress[WAITED] >= options.patience
    if progress[STATUS] == RUNNING and (loss < options.stop_loss or waited):
        progress[STATUS] = STOPPED
