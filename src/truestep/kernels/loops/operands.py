"""What a linear map's counts are made of: the bits of its outputs and of what it sees of its inputs."""

from typing import Any

import numpy as np
from numba import carray, njit

from truestep.kernels.loops.fields import COLUMNS, INPUTS, OUTPUTS, POSITIONS, ROWS, SAMPLES, WINDOW
from truestep.kernels.loops.memory import aligned, pointer
from truestep.kernels.loops.pack import align
from truestep.kernels.loops.window import (
    lay_out,
    lay_out_positions,
    pixels_of,
    room,
    silent_inputs,
    sizes,
    taps_of,
    unfold,
)

__all__ = ["look", "nothing", "operands"]


@njit(cache=True, nogil=True)
def operands(entry: Any, everything: Any) -> Any:
    """Outputs ``[samples, words, J]``, and inputs ``[samples, words, groups, K]`` with what belongs to them.

    A window's inputs are unfolded word by word as they are needed, since the first few mostly suffice:
    with them come bool ``[samples, words]``, whether they are there; what to unfold, with each tap's phase
    and shift; and how many inputs of a sample are never on, ``[samples, groups]``: when all others were
    seen, no more need be looked at. Where all its inputs are on, one image stands for those of all samples;
    where all its outputs are, one row of bits, which says where there are positions, for all of them.

    Args:
        entry: a line of the table.
        everything: whether all inputs will be looked at.
    """
    if entry[WINDOW] != 0:
        return _windowed(entry, everything)
    samples, apart = entry[SAMPLES], entry[POSITIONS] > 1
    units = 1 if entry[OUTPUTS] == 0 else entry[ROWS]
    outputs = _words(entry[OUTPUTS], samples, entry[POSITIONS], units, apart)
    packed = _words(entry[INPUTS], samples, entry[POSITIONS], entry[COLUMNS], apart)
    inputs = packed.reshape((packed.shape[0], packed.shape[1], 1, packed.shape[2]))
    ready, silent = np.ones(inputs.shape[:2], np.bool_), np.zeros((samples, 1), np.int64)
    if not everything:
        for sample in range(samples):
            silent[sample, 0] = _silent(inputs[sample, :, 0])
    nowhere = np.empty(0, np.int64)
    return outputs, (inputs, ready, np.empty((0, 0, 0, 0), np.int64), nowhere, nowhere, silent)


@njit(cache=True, nogil=True)
def nothing() -> Any:
    """What `operands` returns, empty."""
    nowhere, images = np.empty(0, np.int64), np.empty((0, 0, 0, 0), np.int64)
    inputs, ready = np.empty((0, 0, 0, 0), np.int64), np.empty((0, 0), np.bool_)
    view = (inputs, ready, images, nowhere, nowhere, np.empty((0, 0), np.int64))
    return np.empty((0, 0, 0), np.int64), view


@njit(cache=True, nogil=True)
def look(view: Any, sample: Any, word: Any) -> None:
    """Unfolds one word of a sample's inputs."""
    inputs, ready, images, phases, shifts, _ = view
    _, words, groups, columns = inputs.shape
    place = inputs.ctypes.data + 8 * (sample * words + word) * groups * columns
    unfold(images[sample], word, phases, shifts, groups, place)
    ready[sample, word] = True


@njit(cache=True, nogil=True)
def _windowed(entry: Any, everything: Any) -> Any:
    window = entry[WINDOW]
    groups, _ = sizes(window)
    pixels, channels = pixels_of(window)
    phases, deep, wide = room(window)
    units = 1 if entry[OUTPUTS] == 0 else entry[ROWS]
    packed, samples = _packed(entry[OUTPUTS], entry[SAMPLES], entry[POSITIONS], units)
    outputs = np.zeros((samples, wide, units), np.int64)
    for sample in range(samples):
        target = outputs.ctypes.data + 8 * sample * wide * units
        lay_out_positions(packed.ctypes.data, sample, units, window, target)
    packed, samples = _packed(entry[INPUTS], entry[SAMPLES], pixels, channels)
    images = np.zeros((samples, phases, deep, channels), np.int64)
    where, shifts = taps_of(window)
    shape = samples, wide, groups, entry[COLUMNS]
    inputs = aligned(samples * wide * groups * entry[COLUMNS]).reshape(shape)
    ready, silent = np.zeros((samples, wide), np.bool_), np.zeros((samples, groups), np.int64)
    view = inputs, ready, images, where, shifts, silent
    for sample in range(samples):
        target = images.ctypes.data + 8 * sample * phases * deep * channels
        lay_out(packed.ctypes.data, sample, window, target, deep)
        if everything:
            for word in range(wide):
                look(view, sample, word)
        else:
            silent_inputs(images[sample], where, groups, silent[sample])
    return outputs, view


@njit(cache=True, nogil=True)
def _packed(address: Any, samples: Any, positions: Any, units: Any) -> Any:
    """Packed words, int64 ``[words, units]``, and of how many samples: of one where all bits are on."""
    if address == 0:
        return np.full(((positions + 63) // 64, units), np.int64(-1)), np.int64(1)
    count = (samples * positions + 63) // 64
    return carray(pointer(address), (count, units), np.int64), samples


@njit(cache=True, nogil=True)
def _words(address: Any, samples: Any, positions: Any, units: Any, apart: Any) -> Any:
    """Aligned words ``[samples, words, units]``; samples that need not be apart are one's positions."""
    count = (samples * positions + 63) // 64
    if address == 0:
        words = np.full((count, units), np.int64(-1))
        return align(words, samples, positions) if apart else align(words, 1, samples)
    words = carray(pointer(address), (count, units), np.int64)
    return align(words, samples, positions) if apart else words.reshape((1, count, units))


@njit(cache=True, nogil=True)
def _silent(words: Any) -> Any:
    """The units that are off in all of ``[words, units]``."""
    total = 0
    for unit in range(words.shape[1]):
        on = False
        for word in range(words.shape[0]):
            on |= words[word, unit] != 0
        total += not on
    return total
