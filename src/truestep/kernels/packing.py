"""Packing the non-zero entries of a tensor to one bit each.

Bits run along samples, and along the positions of each: row ``s * positions + p`` of unit u is bit
``row % 64`` of word ``[row // 64, u]``.
"""

import functools
import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from truestep.kernels.dispatch import (
    LIKE,
    all_plain,
    compiled_loops,
    device_of,
    gpu,
    is_plain,
    loops,
)
from truestep.kernels.threads import spread

__all__ = [
    "ALONE",
    "ASKED",
    "EACH_ROW",
    "PACK_FIELDS",
    "PACK_FULL",
    "PACK_WORDS",
    "REACHED",
    "SIZES",
    "WORD",
    "Join",
    "Lines",
    "PackTable",
    "Rows",
    "full_words",
    "join",
    "join_torch",
    "pack",
    "pack_rows",
    "unpack",
    "without_full",
]

WORD = 64
NONE = array("q", [0])
FEW = 16  # positions, of a sample that reaches a norm's weight
NANOSECONDS = 0.08  # for each byte, which is seldom in the nearest cache
# Of the tables of `truestep.kernels.loops.pack` and `joins`.
PACK_FIELDS, JOIN_FIELDS = 15, 7
PACK_ADDRESS, PACK_MEANS, PACK_WORDS, PACK_FULL, PACK_PAIR = 0, 10, 12, 13, 14
# What two tensors' lines say in `PACK_PAIR`, the second one more.
ALONE, ASKED, REACHED = 0, 1, 3
EACH_ROW = -1
SIZES = {
    torch.float32: 4,
    torch.float64: 8,
    torch.float16: 2,
    torch.bfloat16: 2,
    torch.bool: 1,
}
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
        address, groups = means.data_ptr(), EACH_ROW if by_row else groups
    count = (samples * positions + WORD - 1) // WORD
    line = [values.data_ptr(), size, MAGNITUDE[size], samples, positions, units]
    line += [strides[0] * size, inner * size, strides[-1] * size, by_unit, address, groups, 0, 1, 0]
    table, device = array("q", line), device_of(values)
    if device is not None:
        packed: Tensor = gpu().pack(table, count * units, device)
        return packed.view(count, units)
    words = torch.empty(count, units, dtype=torch.int64, device="cpu")
    _run(table, words.data_ptr(), words.numel(), samples * positions * units * size)
    return None if table[PACK_FULL] else words


class Rows(NamedTuple):
    """How a tensor's numbers lie, as rows of units.

    Attributes:
        samples: how many.
        positions: of each.
        units: how many.
        by_unit: whether they lie ``[samples, units, positions]``, not ``[samples, positions, units]``.
        groups: how many groups of neighbouring units have a mean of their own in each sample; `EACH_ROW`
            where each row has one; 0 where numbers are compared with zero.
    """

    samples: int
    positions: int
    units: int
    by_unit: bool = False
    groups: int = 0


def pack_rows(tensor: Tensor, rows: Rows, means: Tensor | None = None) -> Tensor | None:
    """`pack` of a tensor that need not have the shape of its rows.

    Args:
        tensor: bool or numbers.
        rows: how they lie.
        means: floats of the same type, as many as rows say.
    """
    samples, positions, units, by_unit, groups = rows
    values = tensor.reshape((samples, units, positions) if by_unit else rows[:3])
    if means is not None:
        means = means.reshape(
            (samples, positions, 1) if groups == EACH_ROW else (samples, 1, groups)
        )
    return pack(values.transpose(1, 2) if by_unit else values, means)


class Lines:
    """Two lines of the packing loop's table, for tensors of one type, but for the addresses.

    Of two tensors with positions it may be `ASKED` whether any is on in both. If in each sample the last one
    is, for all units, nothing more is read, and all bits are said to be on. Of a norm's input and its
    output's gradient, which lie in the same way, the samples are found that `REACHED` weights and biases.

    Args:
        first: how the first tensor's numbers lie.
        second: the second's.
        dtype: of both.
        pair: `ALONE`, `ASKED` or `REACHED`.

    Attributes:
        first: the rows of what is packed of the first tensor.
        second: the same of the second.
        words: how many they will take.
        read: about how many bytes are read.
        means: how many the first has.
        table: the lines, int64.
    """

    __slots__ = ("dtype", "first", "means", "pair", "read", "second", "table", "words")

    def __init__(self, first: Rows, second: Rows, dtype: torch.dtype, pair: int = ALONE) -> None:
        self.dtype, self.words, self.pair = dtype, 0, pair
        self.table, size, both = array("q"), SIZES[dtype], (first, second)
        reached = pair == REACHED
        self.first, self.second = (rows._replace(positions=1) if reached else rows for rows in both)
        for number, (samples, positions, units, by_unit, groups) in enumerate(both):
            strides = (size, positions * size) if by_unit else (units * size, size)
            self.table.extend((0, size, MAGNITUDE[size], samples, positions, units))
            self.table.extend((positions * units * size, *strides, by_unit, 0, groups))
            self.table.extend((self.words, 1, pair and pair + number))
            kept = 1 if reached else positions
            self.words += (samples * kept + WORD - 1) // WORD * units
        self.read = self.words * WORD * size * (min(FEW, first.positions) if reached else 1)
        self.means = first.samples * (first.positions if first.groups == EACH_ROW else first.groups)


class PackTable:
    """What one call of the packing loop has to do; addresses hold nothing alive.

    Attributes:
        numbers: int64, of `Lines`, each of which says after the call whether all its bits are on.
        words: how many there will be.
        read: about how many bytes are read.
    """

    __slots__ = ("numbers", "read", "words")

    def __init__(self) -> None:
        self.numbers = array("q")
        self.words = self.read = 0

    def add(self, lines: Lines, first: int, second: int, means: int = 0) -> int:
        """Adds two tensors and returns the place of the first number of their lines.

        Args:
            lines: theirs.
            first: address of the first tensor.
            second: of the second.
            means: of the first one's means, if it has any.
        """
        numbers, place = self.numbers, len(self.numbers)
        numbers += lines.table
        other = place + PACK_FIELDS
        numbers[place + PACK_ADDRESS], numbers[other + PACK_ADDRESS] = first, second
        numbers[place + PACK_MEANS] = means
        numbers[place + PACK_WORDS] += self.words
        numbers[other + PACK_WORDS] += self.words
        self.words += lines.words
        self.read += lines.read
        return place

    def pack(self, device: torch.device | None = None) -> "array[int] | Tensor":
        """Packs what was added.

        Args:
            device: where the tensors are, if not on the CPU; which are on everywhere is not found out there.

        Returns:
            All tensors' words: on the CPU no tensor, whose making would take small ones longer than the
            packing.
        """
        table = self.numbers
        if device is not None:
            for line in range(0, len(table), PACK_FIELDS):
                table[line + PACK_FULL] = 0
            packed: Tensor = gpu().pack(table, self.words, device)
            return packed
        made = NONE * self.words
        _run(table, made.buffer_info()[0], self.words, self.read)
        return made


def full_words(length: int, units: int) -> "array[int]":
    """The words of so many bits for each unit, all on; what follows them in the last word is off."""
    rows, rest = divmod(length, WORD)
    words = array("q", [-1]) * (rows * units)
    return words + array("q", [(1 << rest) - 1]) * units if rest else words


def without_full(words: "array[int]", table: "array[int]") -> "array[int]":
    """The words without those that nobody will read, because all bits of their tensors are on.

    Of more than two tensors, they are left out only where that is so of all.

    Args:
        words: see `PackTable.pack`.
        table: its numbers; where the words lie is changed in it.
    """
    full = table[PACK_FULL::PACK_FIELDS]
    if all(full):
        return words[:0]
    if len(full) > 2 or not any(full):  # noqa: PLR2004
        return words
    second = PACK_FIELDS + PACK_WORDS
    cut = table[second]
    if full[1]:
        return words[:cut]
    table[second] = 0
    return words[cut:]


def _run(table: "array[int]", address: int, words: int, read: int) -> None:
    lines, size = table.buffer_info()
    spread(loops().pack, words, read * NANOSECONDS, lines, size // PACK_FIELDS, address)


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


class Join(NamedTuple):
    """Packed words ``[samples, positions, units]`` whose positions are to be joined.

    Attributes:
        words: their address.
        other: that of others in which bits must be on too; 0 where there are none, and several positions.
        samples: how many.
        positions: of each.
        units: how many.
    """

    words: int
    other: int
    samples: int
    positions: int
    units: int


def join(
    masks: Sequence[Join], device: torch.device | None = None
) -> tuple["array[int] | Tensor", list[int]]:
    """The samples with any position on, of many masks at once, by compiled loops.

    Args:
        masks: see `Join`.
        device: where they are, if not on the CPU.

    Returns:
        Words, one mask's after the other's, and for each mask its first word's place, or -1 where
        all bits are on, if that was found out.
    """
    if device is not None:
        found: tuple[Tensor, list[int]] = gpu().join(masks, device)
        return found
    lines: list[int] = []
    places: list[int] = []
    total = 0
    for mask in masks:
        lines += *mask, total, 1
        places.append(total)
        total += (mask.samples + WORD - 1) // WORD * mask.units
    words, table = NONE * total, array("q", lines)
    loops().join(table.buffer_info()[0], len(masks), words.buffer_info()[0])
    full = table[JOIN_FIELDS - 1 :: JOIN_FIELDS]
    return words, [-1 if on else place for place, on in zip(places, full, strict=True)]


def join_torch(words: Tensor, samples: int, positions: int) -> Tensor | None:
    """The twin of `join` in torch operations, of one mask; None where all are on.

    Args:
        words: int64 ``[words, units]``.
        samples: how many.
        positions: of each.
    """
    mask = unpack(words, samples * positions).reshape(samples, positions, words.shape[1])
    return _packed(mask.any(1))


@functools.cache
def _places(device: torch.device) -> Tensor:
    """The places of eight bits in an octet, uint8 ``[8, 1]``."""
    return torch.tensor([[1 << bit] for bit in range(8)], dtype=torch.uint8, device=device)
