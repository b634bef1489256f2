"""What a linear map's counts are made of: the bits of its outputs and of what it sees of its inputs."""

from typing import Any, NamedTuple

import numpy as np
from numba import carray

from truestep.kernels.loops.fields import COLUMNS, INPUTS, OUTPUTS, POSITIONS, ROWS, SAMPLES, WINDOW
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import aligned, pointer
from truestep.kernels.loops.pack import align, gather
from truestep.kernels.loops.window import (
    lay_out,
    lay_out_positions,
    lines_of,
    pixels_of,
    ranges_of,
    room,
    sizes,
    taps_of,
    unfold,
)

__all__ = ["View", "find_silent", "look", "operands"]


class View(NamedTuple):
    """The inputs that outputs see, made as they are needed, since a sample's first words mostly suffice.

    Where all inputs of a window are on, one image stands for those of all samples.

    Attributes:
        inputs: int64 ``[samples, words, groups, K]``.
        ready: bool ``[samples, words]``, whether they are there.
        silent: int64 ``[samples, groups]``, how many inputs are on nowhere, at least; -1 until it is asked.
        window: address of a convolution's numbers; 0 where all inputs are there.
        packed: a window's bits, int64 ``[words, channels]``.
        images: the same laid out, int64 ``[samples, phases, words, channels]``.
        laid: int64 ``[samples]``, how many lines are.
        phases: of each tap.
        shifts: of each tap.
        ranges: see `ranges_of`.
    """

    inputs: Any
    ready: Any
    silent: Any
    window: Any
    packed: Any
    images: Any
    laid: Any
    phases: Any
    shifts: Any
    ranges: Any


@internal
def operands(entry: Any) -> Any:
    """Outputs ``[samples, words, J]``, and the `View` of inputs.

    Where all outputs are on, there is one row of bits, which says where there are positions.

    Args:
        entry: a line of the table.
    """
    samples, positions, window = entry[SAMPLES], entry[POSITIONS], entry[WINDOW]
    units = 1 if entry[OUTPUTS] == 0 else entry[ROWS]
    if window == 0:
        outputs = _words(entry[OUTPUTS], samples, positions, units)
        inputs = _words(entry[INPUTS], samples, positions, entry[COLUMNS])
        return outputs, _there(
            inputs.reshape((inputs.shape[0], inputs.shape[1], 1, inputs.shape[2]))
        )
    groups, _ = sizes(window)
    pixels, channels = pixels_of(window)
    phases, deep, wide = room(window)
    packed, samples = _packed(entry[OUTPUTS], samples, positions, units)
    outputs = np.zeros((samples, wide, units), np.int64)
    for sample in range(samples):
        target = outputs.ctypes.data + 8 * sample * wide * units
        lay_out_positions(packed.ctypes.data, sample, units, window, target)
    packed, samples = _packed(entry[INPUTS], entry[SAMPLES], pixels, channels)
    shape = samples, wide, groups, entry[COLUMNS]
    where, shifts = taps_of(window)
    return outputs, View(
        aligned(samples * wide * groups * entry[COLUMNS]).reshape(shape),
        np.zeros((samples, wide), np.bool_),
        np.full((samples, groups), np.int64(-1)),
        window,
        packed,
        np.zeros((samples, phases, deep, channels), np.int64),
        np.zeros(samples, np.int64),
        where,
        shifts,
        ranges_of(window),
    )


@internal
def _there(inputs: Any) -> Any:
    """The view of inputs that are all there."""
    numbers = np.empty(0, np.int64)
    return View(
        inputs,
        np.ones(inputs.shape[:2], np.bool_),
        np.full((inputs.shape[0], 1), np.int64(-1)),
        np.int64(0),
        np.empty((0, 0), np.int64),
        np.empty((0, 0, 0, 0), np.int64),
        numbers,
        numbers,
        numbers,
        np.empty((0, 0, 0), np.int64),
    )


@internal
def look(view: Any, sample: Any, word: Any) -> None:
    """Makes one word of a sample's inputs."""
    _, words, groups, columns = view.inputs.shape
    _, phases, deep, channels = view.images.shape
    lines, pixels = lines_of(view.window)
    last = 64 * word + 63 + view.shifts[-1]
    laid, needed = view.laid[sample], min(lines, last // pixels + 1)
    if laid < needed:
        target = view.images.ctypes.data + 8 * sample * phases * deep * channels
        source = view.packed.ctypes.data
        lay_out(source, sample, view.window, view.ranges, laid, needed, target, deep)
        view.laid[sample] = needed
    place = view.inputs.ctypes.data + 8 * (sample * words + word) * groups * columns
    unfold(view.images[sample], word, view.phases, view.shifts, groups, place)
    view.ready[sample, word] = True


@internal
def find_silent(view: Any, sample: Any) -> None:
    """Finds how many inputs of a sample are on nowhere: when all others were seen, no more need be."""
    if view.window == 0:
        _, words, _, columns = view.inputs.shape
        place = view.inputs.ctypes.data + 8 * sample * words * columns
        view.silent[sample, 0] = gather(place, 0, 0, 64 * words, np.zeros(columns, np.int64))
        return
    _, taps = sizes(view.window)
    pixels, channels = pixels_of(view.window)
    found = np.zeros(channels, np.int64)
    gather(view.packed.ctypes.data, 0, sample * pixels, (sample + 1) * pixels, found)
    view.silent[sample] = 0
    width = channels // view.silent.shape[1]
    for channel in range(channels):
        view.silent[sample, channel // width] += 0 if found[channel] != 0 else taps


@internal
def _packed(address: Any, samples: Any, positions: Any, units: Any) -> Any:
    """Packed words, int64 ``[words, units]``, and of how many samples: of one where all bits are on."""
    if address == 0:
        return np.full(((positions + 63) // 64, units), np.int64(-1)), np.int64(1)
    count = (samples * positions + 63) // 64
    return carray(pointer(address), (count, units), np.int64), samples


@internal
def _words(address: Any, samples: Any, positions: Any, units: Any) -> Any:
    """Aligned words ``[samples, words, units]``."""
    count = (samples * positions + 63) // 64
    if address == 0:
        return align(np.full((count, units), np.int64(-1)), samples, positions)
    return align(carray(pointer(address), (count, units), np.int64), samples, positions)
