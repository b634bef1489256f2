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
from truestep.kernels.loops.moves import move

__all__ = [
    "CHANNELS",
    "GROUPS",
    "lay_out",
    "lay_out_positions",
    "lines_of",
    "pixels_of",
    "ranges_of",
    "room",
    "taps_of",
    "window_of",
]

# A window's numbers: three for each of three axes (missing ones in front have size 1) per property.
SIZE, SEEN, KERNEL, STRIDE, DILATION, PADDING = 0, 3, 6, 9, 12, 15
CHANNELS, GROUPS, NUMBERS = 18, 19, 20


@internal
def window_of(address: Any, positions: Any, channels: Any) -> Any:
    """A window's numbers; where there is none, those of one that sees the position itself."""
    window = np.ones(NUMBERS, np.int64)
    if address != 0:
        numbers = carray(pointer(address), (NUMBERS,), np.int64)
        for number in range(NUMBERS):
            window[number] = numbers[number]
        return window
    for axis in range(3):
        window[PADDING + axis] = 0
    window[SIZE + 2] = window[SEEN + 2] = positions
    window[CHANNELS] = channels
    return window


@internal
def pixels_of(window: Any) -> Any:
    """How many pixels the inputs have."""
    return window[SIZE] * window[SIZE + 1] * window[SIZE + 2]


@internal
def _places(window: Any, axis: Any) -> Any:
    """The smallest q of an axis, and how many places it has."""
    stride, padding = window[STRIDE + axis], window[PADDING + axis]
    low = -padding // stride
    high = ((window[KERNEL + axis] - 1) * window[DILATION + axis] - padding) // stride
    return low, window[SEEN + axis] + high - low


@internal
def _sees(window: Any, axis: Any, phase: Any) -> Any:
    """Whether any tap sees a phase of an axis."""
    stride = window[STRIDE + axis]
    for index in range(window[KERNEL + axis]):
        if (index * window[DILATION + axis] - window[PADDING + axis]) % stride == phase:
            return True
    return False


@internal
def _rank(window: Any, axis: Any, phase: Any) -> Any:
    """How many phases of an axis before this one any tap sees."""
    rank = np.int64(0)
    for earlier in range(phase):
        rank += np.int64(_sees(window, axis, earlier))
    return rank


@internal
def room(window: Any) -> Any:
    """How many phases any tap sees, and the words of each and of the positions."""
    phases = np.int64(1)
    for axis in range(3):
        phases *= _rank(window, axis, window[STRIDE + axis])
    (_, planes), (_, lines), (_, pixels) = (
        _places(window, 0),
        _places(window, 1),
        _places(window, 2),
    )
    last = ((window[SEEN] - 1) * lines + window[SEEN + 1] - 1) * pixels + window[SEEN + 2]
    # One more: a shifted word is made of two.
    return phases, planes * lines * pixels // 64 + 2, (last + 63) // 64


@internal
def taps_of(window: Any) -> Any:
    """Each tap's phase, and how many places on from a position it sees."""
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
            seen = _rank(window, axis, stride)
            phases[tap] = phases[tap] * seen + _rank(window, axis, first % stride)
            shifts[tap] = shifts[tap] * places + first // stride - low
    return phases, shifts


@internal
def ranges_of(window: Any) -> Any:
    """The places of each axis' phases that have pixels: the first, with pixel r, and the one after the last.

    Returns:
        int64 ``[axes, phases + 1, 3]``: these, zeros for a phase that no tap sees; and how many phases before
        it any tap sees.
    """
    most = max(window[STRIDE], window[STRIDE + 1], window[STRIDE + 2])
    ranges = np.zeros((3, most + 1, 3), np.int64)
    for axis in range(3):
        stride = window[STRIDE + axis]
        low, places = _places(window, axis)
        for phase in range(stride):
            if _sees(window, axis, phase):
                last = (window[SIZE + axis] - 1 - phase) // stride - low + 1
                ranges[axis, phase, 0], ranges[axis, phase, 1] = -low, min(places, last)
                ranges[axis, phase + 1, 2] = 1
            ranges[axis, phase + 1, 2] += ranges[axis, phase, 2]
    return ranges


@internal
def lines_of(window: Any) -> Any:
    """How many lines of places a phase has, and how many places are in each."""
    return _places(window, 0)[1] * _places(window, 1)[1], _places(window, 2)[1]


@internal
def lay_out(
    words: Any,
    sample: Any,
    window: Any,
    ranges: Any,
    start: Any,
    stop: Any,
    target: Any,
    count: Any,
    units: Any,
) -> None:
    """Lays the pixels of one sample out as the phases that any tap sees, so many lines of places.

    Args:
        words: address of the first channel's packed words, int64 ``[words, channels]``.
        sample: which.
        window: its numbers.
        ranges: see `ranges_of`.
        start: the first line.
        stop: the line after the last.
        target: address of int64 ``[phases, count, units]``, zeros.
        count: words of a phase.
        units: how many channels are laid out.
    """
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
                        phase = ranges[0, i, 2] * ranges[1, wide, 2] + ranges[1, j, 2]
                        phase = phase * ranges[2, deep, 2] + ranges[2, k, 2]
                        there = target + 8 * phase * count * units
                        place = (a * lines + b) * pixels + first
                        _copy(
                            words,
                            channels,
                            row + k,
                            last - first,
                            deep,
                            there,
                            units,
                            place,
                            units,
                        )


@internal
def lay_out_positions(
    words: Any, width: Any, sample: Any, units: Any, window: Any, target: Any, lanes: Any
) -> None:
    """Lays the positions of one sample out as a phase's places.

    Args:
        words: address of the first unit's packed words, int64 ``[words, width]``.
        width: how many units there are.
        sample: which.
        units: how many are laid out.
        window: its numbers.
        target: address of int64 ``[words of the positions, lanes]``, zeros.
        lanes: at least as many as units.
    """
    lines, pixels = _places(window, 1)[1], _places(window, 2)[1]
    seen, length = window[SEEN + 1], window[SEEN + 2]
    one = np.int64(1)
    # Lines without room between them are one.
    step = seen if pixels == length else 1
    for a in range(window[SEEN]):
        for b in range(0, seen, step):
            row, place = ((sample * window[SEEN] + a) * seen + b) * length, (a * lines + b) * pixels
            _copy(words, width, row, step * length, one, target, lanes, place, units)


@internal
def _copy(
    words: Any,
    width: Any,
    row: Any,
    length: Any,
    stride: Any,
    target: Any,
    lanes: Any,
    place: Any,
    units: Any,
) -> None:
    """Copies `length` bits of some units, every `stride`-th from `row` on, to `place` and the next ones.

    Args:
        words: address of the first unit's words, of which there are `width` side by side.
        width: see `words`.
        row: the first bit.
        length: how many.
        stride: see above.
        target: address of where they go, of which there are `lanes` side by side.
        lanes: see `target`.
        place: of the first bit there.
        units: how many.
    """
    # Words of up to 64 bits are moved at once; of longer strides, single ones.
    most = 64 if stride == 1 else 32 if stride == 2 else 1
    while length > 0:
        moved = min(most, length, 64 - (place & 63))
        source, goal = words + 8 * width * (row >> 6), target + 8 * lanes * (place >> 6)
        bits = (moved - 1) * stride + 1
        beyond = 8 * width if (row & 63) + bits > 64 else 0
        move(source, beyond, row & 63, bits, stride == 2, goal, place & 63, units)
        row += moved * stride
        place += moved
        length -= moved
