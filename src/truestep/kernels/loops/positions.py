"""Rows of weights whose samples have positions, or whose inputs are seen through a convolution's window."""

from typing import Any

import numpy as np

from truestep.kernels.loops.fields import (
    APART,
    COLUMNS,
    INPUTS,
    OUTPUTS,
    POSITIONS,
    ROWS,
    SAMPLES,
    WINDOW,
)  # fmt: skip
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import aligned, count_bits
from truestep.kernels.loops.operands import find_silent, look, operands
from truestep.kernels.loops.pairs import BLOCK, count_pairs, join_pairs
from truestep.kernels.loops.update import finish
from truestep.kernels.loops.window import channels_first, sizes

__all__ = ["positions"]


@internal
def positions(entry: Any, first: Any, last: Any, options: Any, counted: Any) -> None:
    """As `linear`, of rows whose samples have positions, or whose inputs a window sees."""
    rows, columns = entry[ROWS], entry[COLUMNS]
    joined = entry[POSITIONS] > 1 and entry[APART] == 0
    counts, hits = np.empty(columns, np.int32), aligned(columns)
    block, block_start, block_stop = np.empty((BLOCK, columns), np.int32), first, first
    groups, taps = sizes(entry[WINDOW])
    ordered = np.empty(columns, np.int32) if taps > 1 else counts
    by_row = entry[INPUTS] == 0 and entry[WINDOW] == 0
    by_column = entry[OUTPUTS] == 0
    known = -1
    outputs, view = operands(entry)
    for row in range(first, last):
        group = row // (rows // groups)
        if by_row:
            counts[:] = _count_on(outputs, row)
        elif not by_column and joined:
            _count_joined(outputs, view, row, group, hits, counts)
        elif not by_column:
            if row == block_stop:
                left = min(last, (group + 1) * (rows // groups)) - row
                block_start, block_stop = row, row + (BLOCK if left >= BLOCK else 1)
                _count_samples(outputs, view, row, block_stop - row, group, block)
            counts = block[row - block_start]
            if taps == 1:
                ordered = counts
        elif known != group:
            _count_columns(outputs, view, group, joined, counts)
            if entry[WINDOW] != 0:
                counts *= np.int32(entry[SAMPLES] // len(view.inputs))
        if taps > 1 and (not by_column or known != group):
            channels_first(counts, taps, ordered)
        known = group
        finish(entry, row, ordered, options, counted)


@internal
def _count_samples(outputs: Any, view: Any, row: Any, rows: Any, group: Any, counts: Any) -> None:
    """The bits that are on in both ``outputs[:, :, row : row + rows]`` and the inputs of a group."""
    inputs = view.inputs
    counts[:rows] = 0
    columns, words = counts.shape[1], outputs.shape[1]
    width = inputs.shape[2] * columns
    for sample in range(outputs.shape[0]):
        image = sample % inputs.shape[0]
        for word in range(words):
            if not view.ready[image, word]:
                look(view, image, word)
        count_pairs(
            outputs.ctypes.data + 8 * (sample * words * outputs.shape[2] + row),
            8 * outputs.shape[2],
            inputs.ctypes.data + 8 * (image * words * width + group * columns),
            8 * width,
            words,
            rows,
            columns,
            counts.ctypes.data,
        )


@internal
def _count_joined(outputs: Any, view: Any, row: Any, group: Any, hits: Any, counts: Any) -> None:
    """The samples with any position where both are on."""
    inputs, ready, silent = view.inputs, view.ready, view.silent
    counts[:] = 0
    # Samples that hit every column.
    whole = np.int32(0)
    columns, words = len(counts), outputs.shape[1]
    for sample in range(outputs.shape[0]):
        seen, missing, image = False, columns, sample % inputs.shape[0]
        for word in range(words):
            output = outputs[sample, word, row]
            if output == 0:
                continue
            if not ready[image, word]:
                look(view, image, word)
            line = (image * words + word) * inputs.shape[2] + group
            source = inputs.ctypes.data + 8 * line * columns
            missing = join_pairs(output, source, columns, hits.ctypes.data, not seen)
            seen = True
            if missing == 0:
                break
            if silent[image, group] < 0:
                find_silent(view, image)
            if missing <= silent[image, group]:
                break
        if missing == 0:
            whole += np.int32(1)
        elif seen:
            for column in range(columns):
                counts[column] += np.int32(hits[column] != 0)
    for column in range(columns):
        counts[column] += whole


@internal
def _count_on(words: Any, unit: Any) -> Any:
    """The samples in which one unit is on anywhere, of ``[samples, words, units]``."""
    total = 0
    for sample in range(words.shape[0]):
        for word in range(words.shape[1]):
            if words[sample, word, unit] != 0:
                total += 1
                break
    return total


@internal
def _count_columns(outputs: Any, view: Any, group: Any, joined: Any, counts: Any) -> None:
    """The samples that each input is on in, of outputs that are on wherever there is a position."""
    counts[:] = 0
    hits = np.empty(len(counts), np.int64)
    for sample in range(view.inputs.shape[0]):
        hits[:] = 0
        for word in range(view.inputs.shape[1]):
            if not view.ready[sample, word]:
                look(view, sample, word)
            source = view.inputs[sample, word, group]
            output = outputs[sample % len(outputs), word, 0]
            for column in range(len(counts)):
                if joined:
                    hits[column] |= source[column] & output
                else:
                    counts[column] += count_bits(source[column] & output)
        if joined:
            for column in range(len(counts)):
                counts[column] += hits[column] != 0
