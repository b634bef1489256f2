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
    planes, lines, pixels = window[SIZE], window[SIZE + 1], window[SIZE + 2]
    wide, length = window[SEEN + 1], window[SEEN + 2]
    stride, groups = window[STRIDE + 2], window[GROUPS]
    channels = window[CHANNELS] // groups
    stretch = len(target) // groups
    # Words of up to 64 pixels are moved at once; of longer strides, single ones.
    most = 64 // stride if stride < 3 else 1
    position, end = 64 * word, min(64 * word + 64, window[SEEN] * wide * length)
    while position < end:
        a = position // (wide * length)
        b = position // length - a * wide
        c = position % length
        count = min(end - position, length - c)
        place = position - 64 * word
        tap = 0
        for i in range(window[KERNEL]):
            plane = a * window[STRIDE] + i * window[DILATION] - window[PADDING]
            for j in range(window[KERNEL + 1]):
                line = b * window[STRIDE + 1] + j * window[DILATION + 1] - window[PADDING + 1]
                if plane < 0 or plane >= planes or line < 0 or line >= lines:
                    tap += window[KERNEL + 2]
                    continue
                row = ((sample * planes + plane) * lines + line) * pixels
                for k in range(window[KERNEL + 2]):
                    first = c * stride + k * window[DILATION + 2] - window[PADDING + 2]
                    # The steps that lie inside the line.
                    low = 0 if first >= 0 else (stride - 1 - first) // stride
                    high = count
                    if first + (count - 1) * stride >= pixels:
                        high = (pixels - 1 - first) // stride + 1
                    step = low
                    while step < high:
                        moved = min(most, high - step)
                        _copy(
                            words,
                            row + first + step * stride,
                            moved,
                            stride,
                            place + step,
                            tap * channels,
                            channels,
                            groups,
                            stretch,
                            target,
                        )
                        step += moved
                    tap += 1
        position += count


@njit(cache=True, nogil=True)
def _copy(
    words: Any,
    row: Any,
    moved: Any,
    stride: Any,
    place: Any,
    first: Any,
    channels: Any,
    groups: Any,
    stretch: Any,
    target: Any,
) -> None:
    """Copies `moved` bits, every `stride`-th from `row` on, to bit `place` of all channels of one tap.

    Args:
        words: see `unfold`.
        row: the first bit's.
        moved: how many.
        stride: 1, 2, or any for one bit.
        place: of the first bit in the words of `target`.
        first: where the tap's channels begin in each group of `target`.
        channels: of a group.
        groups: of channels.
        stretch: how far apart they lie in `target`.
        target: see `unfold`.
    """
    count = (moved - 1) * stride + 1
    # Unsigned places: a check for negative ones would keep the loops from being vectorised.
    width, all_channels = np.uint64(channels), np.uint64(channels * groups)
    low, right = np.uint64(row >> 6) * all_channels, np.uint64(row & 63)
    two = (row & 63) + count > 64
    high = low + all_channels if two else low
    left = np.uint64(64) - right if two else np.uint64(0)
    kept, up = ALL >> np.uint64(64 - count), np.uint64(place)
    for group in range(groups):
        source = np.uint64(group) * width
        to = np.uint64(group * stretch) + np.uint64(first)
        if stride == 2 and moved > 1:
            for channel in range(width):
                bits = words[low + source + channel] >> right
                if two:
                    bits |= words[high + source + channel] << left
                target[to + channel] |= _every_second(bits & kept) << up
        else:
            for channel in range(width):
                bits = words[low + source + channel] >> right
                if two:
                    bits |= words[high + source + channel] << left
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
