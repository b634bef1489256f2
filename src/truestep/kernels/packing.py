"""Packing the non-zero entries of a tensor to one bit each.

Bits run along samples, and along the positions of each: row ``s * positions + p`` of unit u is bit
``row % 64`` of word ``[row // 64, u]``.
"""

import functools
import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from truestep.kernels.dispatch import LIKE, all_plain, compiled_loops, is_plain, loops
from truestep.kernels.threads import spread

__all__ = ["WORD", "join", "pack", "pack_rows", "unpack"]

WORD = 64
NANOSECONDS = 0.08  # for each byte, which is seldom in the nearest cache
PACK_FIELDS = 14  # of the table of `truestep.kernels.loops.pack`
# The bits that tell a number of so many bytes from zero: all but a float's sign.
MAGNITUDE = {1: 0xFF, 2: 0x7FFF, 4: 0x7FFF_FFFF, 8: 0x7FFF_FFFF_FFFF_FFFF}


def pack(values: Tensor, means: Tensor | None = None) -> Tensor | None:
    """One bit for each entry, on where it is not zero, or not the mean.

    Args:
        values: ``[samples, units]`` or ``[samples, positions, units]``, bool or numbers.
        means: floats of the same type, of rows, ``[samples, 1]`` or ``[samples, positions, 1]``, or of
            groups of neighbouring units, ``[samples, groups]`` or ``[samples, 1, groups]``.

    Returns:
        int64 ``[ceil(samples * positions / 64), units]``; None where all bits are on. On other devices than
        the CPU, which would have to wait for the answer, the words are there all the same.

    Example:
        >>> pack(torch.tensor([[0.0, 2.0], [3.0, 1.0]])).tolist()
        [[2, 3]]
        >>> pack(torch.tensor([[0.0, 2.0], [3.0, 1.0]]), torch.tensor([[2.0], [2.0]])).tolist()
        [[3, 2]]
    """
    if not compiled_loops(values):
        return _packed(values, means)
    shape, strides, size = values.shape, values.stride(), values.element_size()
    samples, units = shape[0], shape[-1]
    positions, inner = (1, 0) if len(shape) == 2 else (shape[1], strides[1])  # noqa: PLR2004
    by_unit = positions > 1 and inner == 1 and (units == 1 or strides[-1] != 1)
    if values.data_ptr() == 0:  # no elements, or zeros that autograd makes up
        return pack_torch(values, means)
    if not (by_unit or units == 1 or strides[-1] == 1):
        return pack(values.contiguous(), means)
    address = groups = 0
    if means is not None:
        groups = means.shape[-1]
        by_row = groups == 1 and means.numel() == samples * positions
        usual = means.dtype is values.dtype and all_plain([means]) and values.dtype in LIKE
        if not usual or by_row == by_unit:
            return pack(off_mean(values, means))
        address = means.data_ptr()
    words = torch.empty((samples * positions + WORD - 1) // WORD, units, dtype=torch.int64)
    line = [values.data_ptr(), size, MAGNITUDE[size], samples, positions, units]
    line += [strides[0] * size, inner * size, strides[-1] * size, by_unit, address, groups, 0, 1]
    (full,) = _run(line, words, samples * positions * units * size)
    return None if full else words


def pack_rows(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]] | None:
    """`pack` of many tensors ``[samples, units]`` at once, or None where it has to be one by one.

    Args:
        tensors: of bools or numbers.

    Returns:
        int64 words, one tensor's after the other's, and for each tensor its first word's place, or -1
        where all bits are on.
    """
    if not all_plain(tensors):
        return None
    lines: list[int] = []
    places: list[int] = []
    total = read = 0
    for tensor in tensors:
        samples, units = tensor.shape
        size = tensor.element_size()
        lines += tensor.data_ptr(), size, MAGNITUDE[size], samples, 1, units
        lines += units * size, 0, size, 0, 0, 0, total, 1
        places.append(total)
        count = (samples + WORD - 1) // WORD * units
        total += count
        read += count * WORD * size
    words = torch.empty(total, dtype=torch.int64)
    full = _run(lines, words, read)
    return words, [-1 if on else place for place, on in zip(places, full, strict=True)]


def _run(lines: list[int], words: Tensor, read: int) -> "array[int]":
    """Packs what the lines of a table say; returns for each whether all its bits are on.

    Args:
        lines: see `truestep.kernels.loops.pack`.
        words: where the bits go.
        read: bytes.
    """
    table = array("q", lines)
    arguments = table.buffer_info()[0], len(lines) // PACK_FIELDS, words.data_ptr()
    spread(loops().pack, words.numel(), read * NANOSECONDS, *arguments)
    return table[PACK_FIELDS - 1 :: PACK_FIELDS]


def off_mean(values: Tensor, means: Tensor) -> Tensor:
    """Where values are not equal to the means of their rows or groups, bool; see `pack`."""
    groups = means.shape[-1]
    each = means if groups == 1 else means.repeat_interleave(values.shape[-1] // groups, -1)
    return values != each


def _packed(values: Tensor, means: Tensor | None = None) -> Tensor | None:
    """`pack` in torch operations."""
    values = values if means is None else off_mean(values, means)
    readable = values.is_cpu and values.numel() and is_plain(values)
    return None if readable and bool((values != 0).all()) else pack_torch(values)


def pack_torch(values: Tensor, means: Tensor | None = None) -> Tensor:
    """The words of `pack` in torch operations, also where all bits are on."""
    values = values if means is None else off_mean(values, means)
    mask = values if values.dtype == torch.bool else values != 0
    mask = mask.flatten(0, -2)
    length, units = mask.shape
    words = math.ceil(length / WORD)
    octets = mask.view(torch.uint8)
    if length != words * WORD:
        octets = torch.nn.functional.pad(octets, (0, 0, 0, words * WORD - length))
    octets = octets.reshape(words * 8, 8, units)
    packed = (octets * _places(mask.device)).sum(-2, dtype=torch.uint8)
    packed = packed.reshape(words, 8, units).transpose(-1, -2)
    adjacent = octets.new_empty(words, units, 8).copy_(packed)
    return adjacent.view(torch.int64).squeeze(-1)


def unpack(words: Tensor, length: int) -> Tensor:
    """The rows that were packed, bool ``[length, units]``."""
    count, units = words.shape
    octets = words.unsqueeze(-1).view(torch.uint8)
    octets = octets.transpose(-1, -2).reshape(count * 8, 1, units)
    bits = torch.bitwise_and(octets, _places(words.device)).ne_(0).view(torch.bool)
    return bits.reshape(count * WORD, units)[:length]


def join(words: Tensor, samples: int, positions: int) -> Tensor | None:
    """The samples with any position on: packed like `pack` does, None where all are on.

    Args:
        words: int64 ``[words, units]``.
        samples: how many.
        positions: of each.
    """
    units = words.shape[1]
    if not (words.is_cpu and compiled_loops(words.new_empty(0, dtype=torch.bool))) or samples == 0:
        mask = unpack(words, samples * positions).reshape(samples, positions, units)
        return _packed(mask.any(1))
    joined = torch.empty((samples + WORD - 1) // WORD, units, dtype=torch.int64)
    full = loops().join(words.data_ptr(), samples, positions, units, joined.data_ptr())
    return None if full else joined


@functools.cache
def _places(device: torch.device) -> Tensor:
    """The places of eight bits in an octet, uint8 ``[8, 1]``."""
    return torch.tensor([[1 << bit] for bit in range(8)], dtype=torch.uint8, device=device)
