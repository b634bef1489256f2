"""A convolution's inputs in bits: what its kernel sees at 64 positions, without unfolded numbers."""

from typing import Any

import numpy as np
from numba import carray, njit

from truestep.kernels.loops.memory import pointer

__all__ = ["channels_first", "positions_seen", "sizes", "unfold"]

# A window's numbers: three for each of three axes (missing ones in front have size 1) per property.
SIZE, SEEN, KERNEL, STRIDE, DILATION, PADDING = 0, 3, 6, 9, 12, 15
CHANNELS, GROUPS, NUMBERS = 18, 19, 20

ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


@njit(cache=True, nogil=True)
def sizes(address: Any) -> Any:
    """How many groups and taps a window has; one each where there is no window."""
    if address == 0:
        return np.int64(1), np.int64(1)
    window = carray(pointer(address), (NUMBERS,), np.int64)
    return window[GROUPS], window[KERNEL] * window[KERNEL + 1] * window[KERNEL + 2]


@njit(cache=True, nogil=True)
def positions_seen(address: Any) -> Any:
    """How many pixels the inputs have, and how many channels."""
    window = carray(pointer(address), (NUMBERS,), np.int64)
    return window[SIZE] * window[SIZE + 1] * window[SIZE + 2], window[CHANNELS]


@njit(cache=True, nogil=True)
def unfold(words: Any, sample: Any, word: Any, address: Any, target: Any) -> None:
    """What the kernel sees at positions 64 `word` to 64 `word` + 63 of a sample.

    Args:
        words: packed inputs, uint64 ``[words * channels]``.
        sample: which.
        word: which.
        address: of the window's numbers.
        target: uint64 ``[groups * taps of the kernel * channels of a group]``, zeros.
    """
    window = carray(pointer(address), (NUMBERS,), np.int64)
    size, seen, kernel = window[SIZE:SEEN], window[SEEN:KERNEL], window[KERNEL:STRIDE]
    stride, dilation = window[STRIDE:DILATION], window[DILATION:PADDING]
    padding = window[PADDING:CHANNELS]
    position, end = 64 * word, min(64 * word + 64, seen[0] * seen[1] * seen[2])
    while position < end:
        a = position // (seen[1] * seen[2])
        b = position // seen[2] - a * seen[1]
        c = position % seen[2]
        count = min(end - position, seen[2] - c)
        tap = 0
        for i in range(kernel[0]):
            plane = a * stride[0] + i * dilation[0] - padding[0]
            for j in range(kernel[1]):
                line = b * stride[1] + j * dilation[1] - padding[1]
                if plane < 0 or plane >= size[0] or line < 0 or line >= size[1]:
                    tap += kernel[2]
                    continue
                row = ((sample * size[0] + plane) * size[1] + line) * size[2]
                for k in range(kernel[2]):
                    first = c * stride[2] + k * dilation[2] - padding[2]
                    place = position - 64 * word
                    # The steps that lie inside the line.
                    low = max(0, -(first // stride[2]))
                    high = min(count, (size[2] - 1 - first) // stride[2] + 1)
                    # Words of up to 64 pixels are moved at once; of longer strides, single ones.
                    most = 64 // stride[2] if stride[2] < 3 else 1
                    for step in range(low, high, most):
                        moved = min(most, high - step)
                        pixel = row + first + step * stride[2]
                        _copy(words, pixel, moved, stride[2], place + step, tap, window, target)
                    tap += 1
        position += count


@njit(cache=True, nogil=True)
def _copy(
    words: Any, row: Any, moved: Any, stride: Any, place: Any, tap: Any, window: Any, target: Any
) -> None:
    """Copies `moved` bits, every `stride`-th from `row` on, to bit `place` of all channels of one tap."""
    groups = np.uint64(window[GROUPS])
    channels = np.uint64(window[CHANNELS]) // groups
    stretch = np.uint64(len(target)) // groups
    count = (moved - 1) * stride + 1
    # Unsigned places: a check for negative ones would keep the loops from being vectorised.
    low, right = np.uint64(row // 64) * channels * groups, np.uint64(row % 64)
    two = row % 64 + count > 64
    high = low + channels * groups if two else low
    # Twice by half, since a shift by all 64 bits is undefined.
    left = (np.uint64(63) - right) if two else np.uint64(0)
    kept, up = ALL >> np.uint64(64 - count), np.uint64(place)
    first = np.uint64(tap) * channels
    for group in range(groups):
        source = np.uint64(group) * channels
        to = np.uint64(group) * stretch + first
        if stride == 2 and moved > 1:
            for channel in range(channels):
                one, other = words[low + source + channel], words[high + source + channel]
                bits = one >> right
                if two:
                    bits |= (other << left) << np.uint64(1)
                target[to + channel] |= _every_second(bits & kept) << up
        else:
            for channel in range(channels):
                one, other = words[low + source + channel], words[high + source + channel]
                bits = one >> right
                if two:
                    bits |= (other << left) << np.uint64(1)
                target[to + channel] |= (bits & kept) << up


@njit(cache=True, nogil=True)
def _every_second(bits: Any) -> Any:
    """The even bits of a word, side by side."""
    bits &= np.uint64(0x5555555555555555)
    bits = (bits | (bits >> np.uint64(1))) & np.uint64(0x3333333333333333)
    bits = (bits | (bits >> np.uint64(2))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    bits = (bits | (bits >> np.uint64(4))) & np.uint64(0x00FF00FF00FF00FF)
    bits = (bits | (bits >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
    return (bits | (bits >> np.uint64(16))) & np.uint64(0x00000000FFFFFFFF)


@njit(cache=True, nogil=True)
def channels_first(counts: Any, taps: Any, ordered: Any) -> None:
    """From the order of `unfold`, ``[taps, channels]``, to that of a weight, ``[channels, taps]``."""
    channels = len(counts) // taps
    for tap in range(taps):
        for channel in range(channels):
            ordered[channel * taps + tap] = counts[tap * channels + channel]
