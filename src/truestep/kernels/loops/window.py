"""A convolution's positions and inputs in bits, laid out so that every tap of its kernel sees one shift.

Along an axis, tap k sees from position o the pixel ``o * stride + k * dilation - padding``: place ``o + q``
of *phase* r, which has every stride-th pixel from r on, where ``k * dilation - padding == q * stride + r``.
Each phase gets a row of bits, *places*, from the smallest q to the last position's largest, zeros where there
is no pixel, and positions lie in such a row too. Whatever the position, a tap's pixel is as many places on.
"""

from typing import Any

import numpy as np
from numba import carray

from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import pointer
from truestep.kernels.loops.moves import move, shift

__all__ = [
    "channels_first",
    "lay_out",
    "lay_out_positions",
    "lines_of",
    "pixels_of",
    "ranges_of",
    "room",
    "sizes",
    "taps_of",
    "unfold",
]

# A window's numbers: three for each of three axes (missing ones in front have size 1) per property.
SIZE, SEEN, KERNEL, STRIDE, DILATION, PADDING = 0, 3, 6, 9, 12, 15
CHANNELS, GROUPS, NUMBERS = 18, 19, 20


@internal
def sizes(address: Any) -> Any:
    """How many groups and taps a window has; one each where there is no window."""
    if address == 0:
        return np.int64(1), np.int64(1)
    window = carray(pointer(address), (NUMBERS,), np.int64)
    return window[GROUPS], window[KERNEL] * window[KERNEL + 1] * window[KERNEL + 2]


@internal
def pixels_of(address: Any) -> Any:
    """How many pixels the inputs have, and how many channels."""
    window = carray(pointer(address), (NUMBERS,), np.int64)
    return window[SIZE] * window[SIZE + 1] * window[SIZE + 2], window[CHANNELS]


@internal
def _places(window: Any, axis: Any) -> Any:
    """The smallest q of an axis, and how many places it has."""
    stride, padding = window[STRIDE + axis], window[PADDING + axis]
    low = -padding // stride
    high = ((window[KERNEL + axis] - 1) * window[DILATION + axis] - padding) // stride
    return low, window[SEEN + axis] + high - low


@internal
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


@internal
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


@internal
def _sees(window: Any, axis: Any, phase: Any) -> Any:
    """Whether any tap sees a phase of an axis."""
    stride = window[STRIDE + axis]
    for index in range(window[KERNEL + axis]):
        if (index * window[DILATION + axis] - window[PADDING + axis]) % stride == phase:
            return True
    return False


@internal
def ranges_of(address: Any) -> Any:
    """The places of each axis' phases that have pixels: the first, with pixel r, and the one after the last.

    Returns:
        int64 ``[axes, phases, 2]``; zeros for a phase that no tap sees.
    """
    window = carray(pointer(address), (NUMBERS,), np.int64)
    most = max(window[STRIDE], window[STRIDE + 1], window[STRIDE + 2])
    ranges = np.zeros((3, most, 2), np.int64)
    for axis in range(3):
        stride = window[STRIDE + axis]
        low, places = _places(window, axis)
        for phase in range(stride):
            if _sees(window, axis, phase):
                last = (window[SIZE + axis] - 1 - phase) // stride - low + 1
                ranges[axis, phase, 0], ranges[axis, phase, 1] = -low, min(places, last)
    return ranges


@internal
def lines_of(address: Any) -> Any:
    """How many lines of places a phase has, and how many places are in each."""
    window = carray(pointer(address), (NUMBERS,), np.int64)
    return _places(window, 0)[1] * _places(window, 1)[1], _places(window, 2)[1]


@internal
def lay_out(
    words: Any,
    sample: Any,
    address: Any,
    ranges: Any,
    start: Any,
    stop: Any,
    target: Any,
    count: Any,
) -> None:
    """Lays the pixels of one sample out as phases, so many lines of places.

    Args:
        words: address of packed inputs, int64 ``[words, channels]``.
        sample: which.
        address: of the window's numbers.
        ranges: see `ranges_of`.
        start: the first line.
        stop: the line after the last.
        target: address of int64 ``[phases, count, channels]``, zeros.
        count: words of a phase.
    """
    window = carray(pointer(address), (NUMBERS,), np.int64)
    channels = window[CHANNELS]
    high, wide, deep = window[STRIDE], window[STRIDE + 1], window[STRIDE + 2]
    lines, pixels = _places(window, 1)[1], _places(window, 2)[1]
    for a in range(start // lines, (stop - 1) // lines + 1):
        for i in range(high):
            if a < ranges[0, i, 0] or a >= ranges[0, i, 1]:
                continue
            plane = i + (a - ranges[0, i, 0]) * high
            above = (sample * window[SIZE] + plane) * window[SIZE + 1]
            for j in range(wide):
                first_line = max(ranges[1, j, 0], start - a * lines)
                for b in range(first_line, min(ranges[1, j, 1], stop - a * lines)):
                    line = j + (b - ranges[1, j, 0]) * wide
                    row = (above + line) * window[SIZE + 2]
                    for k in range(deep):
                        first, last = ranges[2, k, 0], ranges[2, k, 1]
                        phase = target + 8 * ((i * wide + j) * deep + k) * count * channels
                        place = (a * lines + b) * pixels + first
                        _copy(words, row + k, last - first, deep, phase, place, channels)


@internal
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
    seen, length = window[SEEN + 1], window[SEEN + 2]
    # Lines without room between them are one.
    step = seen if pixels == length else 1
    for a in range(window[SEEN]):
        for b in range(0, seen, step):
            row = ((sample * window[SEEN] + a) * seen + b) * length
            _copy(words, row, step * length, 1, target, (a * lines + b) * pixels, units)


@internal
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


@internal
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


@internal
def channels_first(counts: Any, taps: Any, ordered: Any) -> None:
    """From the order of `unfold`, ``[taps, channels]``, to that of a weight, ``[channels, taps]``."""
    channels = len(counts) // taps
    for tap in range(taps):
        for channel in range(channels):
            ordered[channel * taps + tap] = counts[tap * channels + channel]
