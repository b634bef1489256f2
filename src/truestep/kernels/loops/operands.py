"""What outputs with positions are counted with: their own bits, and those of the inputs that they see."""

from typing import Any, NamedTuple

import numpy as np
from numba import carray

from truestep.kernels.loops.fields import INPUTS, OUTPUTS, POSITIONS, ROWS, SAMPLES
from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.meets import LANES, TOGETHER
from truestep.kernels.loops.memory import aligned, pointer
from truestep.kernels.loops.window import (
    CHANNELS,
    lay_out,
    lay_out_positions,
    lines_of,
    pixels_of,
    ranges_of,
    room,
    taps_of,
)

__all__ = ["BEGUN", "WHOLE", "View", "look", "outputs_of", "view_of"]

# How much of a sample's inputs is laid out: nothing, what its first word of positions sees, or all.
# Numbers of one type: for each literal a function is compiled anew.
BEGUN, WHOLE = np.int64(1), np.int64(2)


class View(NamedTuple):
    """The inputs that outputs see, laid out as they are needed: mostly a sample's first word tells all.

    Where all inputs are on, one image stands for those of all samples.

    Attributes:
        window: numbers of a convolution's window, or of one that sees the position itself.
        packed: the inputs' bits, int64 ``[words, channels]``.
        first: the first channel that is laid out.
        ranges: see `ranges_of`.
        deep: how many words a phase has.
        lines: how many lines of places.
        begun: how many lines the first word of positions sees.
        images: some channels' bits laid out, int64 ``[samples, words of all phases, channels]``.
        state: int64 ``[samples]``, 0, `BEGUN` or `WHOLE`.
        silent: bool ``[samples, channels + 1]``, of whole images the channels that are on nowhere, and last
            whether there are any.
        taps: int64 ``[taps, 2]``, the word and the bit in it that each tap sees from the first position.
    """

    window: Any
    packed: Any
    first: Any
    ranges: Any
    deep: Any
    lines: Any
    begun: Any
    images: Any
    state: Any
    silent: Any
    taps: Any


@internal
def outputs_of(entry: Any, window: Any, first: Any, last: Any) -> Any:
    """Some rows of the outputs, laid out as `lay_out_positions` does.

    Where all outputs are on, there is one row of bits, which says where there are positions.

    Args:
        entry: a line of the table.
        window: see `View`.
        first: the first row.
        last: the row after the last.

    Returns:
        int64 ``[samples, words, lanes]``, begun on a line of the processor's caches, and with room behind it
        for `TOGETHER` more.
    """
    width, units = entry[ROWS], last - first
    if entry[OUTPUTS] == 0:
        first, width, units = 0, 1, 1
    packed, samples = _packed(entry[OUTPUTS], entry[SAMPLES], entry[POSITIONS], width)
    _, _, words = room(window)
    lanes = (units + LANES - 1) // LANES * LANES
    size = samples * words * lanes
    bits = aligned(size + TOGETHER)
    bits[:] = 0
    outputs = bits[:size].reshape((samples, words, lanes))
    for sample in range(samples):
        source = packed.ctypes.data + 8 * first
        target = outputs.ctypes.data + 8 * sample * words * lanes
        lay_out_positions(source, width, sample, units, window, target, lanes)
    return outputs


@internal
def view_of(entry: Any, window: Any, first: Any, last: Any) -> Any:
    """The `View` of channels `first` to `last` of a line of the table."""
    packed, samples = _packed(entry[INPUTS], entry[SAMPLES], pixels_of(window), window[CHANNELS])
    phases, deep, _ = room(window)
    where, shifts = taps_of(window)
    taps = np.empty((len(shifts), 2), np.int64)
    for tap in range(len(shifts)):
        taps[tap, 0] = where[tap] * deep + (shifts[tap] >> 6)
        taps[tap, 1] = shifts[tap] & 63
    lines, pixels = lines_of(window)
    return View(
        window,
        packed,
        first,
        ranges_of(window),
        deep,
        lines,
        min(lines, (shifts[-1] + 63) // pixels + 1),
        np.zeros((samples, phases * deep, last - first), np.int64),
        np.zeros(samples, np.int64),
        np.zeros((samples, last - first + 1), np.bool_),
        taps,
    )


@internal
def look(view: Any, image: Any, state: Any) -> None:
    """Lays out a sample's inputs: for its first word of positions (`BEGUN`), or all (`WHOLE`)."""
    _, words, channels = view.images.shape
    start, stop = 0, view.begun
    if state == WHOLE:
        start, stop = view.begun if view.state[image] == BEGUN else 0, view.lines
    if start < stop:
        target = view.images.ctypes.data + 8 * image * words * channels
        source = view.packed.ctypes.data + 8 * view.first
        lay_out(source, image, view.window, view.ranges, start, stop, target, view.deep, channels)
    view.state[image] = state
    if state == WHOLE:
        found = np.zeros(channels, np.int64)
        for word in range(words):
            line = view.images[image, word]
            for channel in range(channels):
                found[channel] |= line[channel]
        for channel in range(channels):
            view.silent[image, channel] = found[channel] == 0
            view.silent[image, channels] |= found[channel] == 0


@internal
def _packed(address: Any, samples: Any, positions: Any, units: Any) -> Any:
    """Packed words, int64 ``[words, units]``, and of how many samples: of one where all bits are on."""
    if address == 0:
        return np.full(((positions + 63) // 64, units), np.int64(-1)), np.int64(1)
    count = (samples * positions + 63) // 64
    return carray(pointer(address), (count, units), np.int64), samples
