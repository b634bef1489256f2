"""A convolution's positions and inputs in bits, laid out so that every tap of its kernel sees one shift.

Along an axis, tap k sees from position o the pixel ``o * stride + k * dilation - padding``: place ``o + q``
of *phase* r, which has every stride-th pixel from r on, where ``k * dilation - padding == q * stride + r``.
Each phase gets a row of bits, *places*, from the smallest q to the last position's largest, zeros where there
is no pixel, and positions lie in such a row too. Whatever the position, a tap's pixel is as many places on.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from truestep.kernels.loops.memory import pointer
from truestep.kernels.loops.moves import move, shift

__all__ = [
    "lay_out",
    "lay_out_positions",
    "pixels_of",
    "room",
    "silent_inputs",
    "sizes",
    "taps_of",
    "unfold",
]

# A window's numbers: three for each of three axes (missing ones in front have size 1) per property.
SIZE, SEEN, KERNEL, STRIDE, DILATION, PADDING = 0, 3, 6, 9, 12, 15
CHANNELS, GROUPS, NUMBERS = 18, 19, 20


@njit(cache=True, nogil=True)
def sizes(address: Any) -> Any:
    """How many groups and taps a window has; one each where there is no window."""
    if address == 0:
        return np.int64(1), np.int64(1)
    window = carray(pointer(address), (NUMBERS,), np.int64)
    return window[GROUPS], window[KERNEL] * window[KERNEL + 1] * window[KERNEL + 2]


@njit(cache=True, nogil=True)
def pixels_of(address: Any) -> Any:
    """How many pixels the inputs have, and how many channels."""
    window = carray(pointer(address), (NUMBERS,), np.int64)
    return window[SIZE] * window[SIZE + 1] * window[SIZE + 2], window[CHANNELS]


@njit(cache=True, nogil=True)
def _places(window: Any, axis: Any) -> Any:
    """The smallest q of an axis, and how many places it has."""
    stride, padding = window[STRIDE + axis], window[PADDING + axis]
    low = -padding // stride
    high = ((window[KERNEL + axis] - 1) * window[DILATION + axis] - padding) // stride
    return low, window[SEEN + axis] + high - low


@njit(cache=True, nogil=True)
def room(address: Any) -> Any:
    """How many phases there are, and the words of each and of the positions."""
    window = carray(pointer(address), (NUMBERS,), np.int64)
    phases = window[STRIDE] * window[STRIDE + 1] * window[STRIDE + 2]
    (_, planes), (_, lines), (_, pixels) = (
        _places(window, 0),
        _places(window, 1),
        _places(window, 2),
    )
    last = ((window[SEEN] - 1) * lines + window[SEEN + 1] - 1) * pixels + window[SEEN + 2]
    # One more: a shifted word is made of two.
    return phases, planes * lines * pixels // 64 + 2, (last + 63) // 64


@njit(cache=True, nogil=True)
def taps_of(address: Any) -> Any:
    """Each tap's phase, and how many places on from a position it sees."""
    window = carray(pointer(address), (NUMBERS,), np.int64)
    count = window[KERNEL] * window[KERNEL + 1] * window[KERNEL + 2]
    phases, shifts = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for tap in range(count):
        left, size = tap, count
        for axis in range(3):
            size //= window[KERNEL + axis]
            index = left // size
            left -= index * size
            stride = window[STRIDE + axis]
            first = index * window[DILATION + axis] - window[PADDING + axis]
            low, places = _places(window, axis)
            phases[tap] = phases[tap] * stride + first % stride
            shifts[tap] = shifts[tap] * places + first // stride - low
    return phases, shifts


@njit(cache=True, nogil=True)
def _sees(window: Any, axis: Any, phase: Any) -> Any:
    """Whether any tap sees a phase of an axis."""
    stride = window[STRIDE + axis]
    for index in range(window[KERNEL + axis]):
        if (index * window[DILATION + axis] - window[PADDING + axis]) % stride == phase:
            return True
    return False


@njit(cache=True, nogil=True)
def _range(window: Any, axis: Any, phase: Any) -> Any:
    """The places of a phase that have a pixel: the first, the one after the last, the first one's pixel."""
    if not _sees(window, axis, phase):
        return 0, 0, 0
    stride = window[STRIDE + axis]
    low, places = _places(window, axis)
    first = max(0, -low)
    last = min(places, (window[SIZE + axis] - 1 - phase) // stride - low + 1)
    return first, last, (first + low) * stride + phase


@njit(cache=True, nogil=True)
def lay_out(words: Any, sample: Any, address: Any, target: Any, count: Any) -> None:
    """Lays the pixels of one sample out as phases.

    Args:
        words: address of packed inputs, int64 ``[words, channels]``.
        sample: which.
        address: of the window's numbers.
        target: address of int64 ``[phases, count, channels]``, zeros.
        count: words of a phase.
    """
    window = carray(pointer(address), (NUMBERS,), np.int64)
    channels, deep = window[CHANNELS], window[STRIDE + 2]
    lines, pixels = _places(window, 1)[1], _places(window, 2)[1]
    for i in range(window[STRIDE]):
        first_plane, last_plane, plane = _range(window, 0, i)
        for j in range(window[STRIDE + 1]):
            first_line, last_line, first_seen = _range(window, 1, j)
            for k in range(deep):
                first, last, pixel = _range(window, 2, k)
                phase = target + 8 * ((i * window[STRIDE + 1] + j) * deep + k) * count * channels
                for a in range(first_plane, last_plane):
                    above = sample * window[SIZE] + plane + (a - first_plane) * window[STRIDE]
                    for b in range(first_line, last_line):
                        line = first_seen + (b - first_line) * window[STRIDE + 1]
                        row = (above * window[SIZE + 1] + line) * window[SIZE + 2] + pixel
                        place = (a * lines + b) * pixels + first
                        _copy(words, row, last - first, deep, phase, place, channels)


@njit(cache=True, nogil=True)
def lay_out_positions(words: Any, sample: Any, units: Any, address: Any, target: Any) -> None:
    """Lays the positions of one sample out as a phase's places.

    Args:
        words: address of packed int64 ``[words, units]``.
        sample: which.
        units: how many.
        address: of the window's numbers.
        target: address of int64 ``[words of the positions, units]``, zeros.
    """
    window = carray(pointer(address), (NUMBERS,), np.int64)
    lines, pixels = _places(window, 1)[1], _places(window, 2)[1]
    length = window[SEEN + 2]
    for a in range(window[SEEN]):
        for b in range(window[SEEN + 1]):
            row = ((sample * window[SEEN] + a) * window[SEEN + 1] + b) * length
            _copy(words, row, length, 1, target, (a * lines + b) * pixels, units)


@njit(cache=True, nogil=True)
def _copy(
    words: Any, row: Any, length: Any, stride: Any, target: Any, place: Any, units: Any
) -> None:
    """Copies `length` bits of all units, every `stride`-th from `row` on, to `place` and the next ones."""
    # Words of up to 64 bits are moved at once; of longer strides, single ones.
    most = 64 if stride == 1 else 32 if stride == 2 else 1
    while length > 0:
        moved = min(most, length, 64 - (place & 63))
        source, goal = words + 8 * units * (row >> 6), target + 8 * units * (place >> 6)
        bits = (moved - 1) * stride + 1
        move(source, row & 63, bits, stride == 2, goal, place & 63, units)
        row += moved * stride
        place += moved
        length -= moved


@njit(cache=True, nogil=True)
def unfold(image: Any, word: Any, phases: Any, shifts: Any, groups: Any, target: Any) -> None:
    """What the kernel sees from places 64 `word` to 64 `word` + 63 of the positions.

    Args:
        image: of one sample, int64 ``[phases, words, channels]``, see `lay_out`.
        word: which.
        phases: see `taps_of`.
        shifts: see `taps_of`.
        groups: of channels.
        target: address of int64 ``[groups, taps, channels of a group]``.
    """
    taps, count, channels = len(phases), image.shape[1], image.shape[2]
    source, width, beyond = image.ctypes.data, channels // groups, 8 * channels
    for tap in range(taps):
        place = 64 * word + shifts[tap]
        line = source + 8 * (phases[tap] * count + (place >> 6)) * channels
        for group in range(groups):
            to = target + 8 * (group * taps + tap) * width
            shift(line + 8 * group * width, place & 63, to, width, beyond)


@njit(cache=True, nogil=True)
def silent_inputs(image: Any, phases: Any, groups: Any, silent: Any) -> None:
    """How many inputs of each group are off at all taps' positions, at least; adds to ``silent[groups]``."""
    width = image.shape[2] // groups
    for phase in range(image.shape[0]):
        taps = 0
        for tap in range(len(phases)):
            taps += phases[tap] == phase
        for channel in range(image.shape[2] if taps > 0 else 0):
            on = False
            for word in range(image.shape[1]):
                on |= image[phase, word, channel] != 0
            silent[channel // width] += 0 if on else taps


@njit(cache=True, nogil=True)
def channels_first(counts: Any, taps: Any, ordered: Any) -> None:
    """From the order of `unfold`, ``[taps, channels]``, to that of a weight, ``[channels, taps]``."""
    channels = len(counts) // taps
    for tap in range(taps):
        for channel in range(channels):
            ordered[channel * taps + tap] = counts[tap * channels + channel]
