"""Kernels that turn numbers into bits, join positions, and lay out what a convolution sees."""

from array import array
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from truestep.kernels.gpu.launches import (
    TYPES,
    WORD,
    bits_within,
    field,
    launch,
    line_and_tile,
    pointer,
    starts_of,
)
from truestep.kernels.packing import JOIN_FIELDS, PACK_FIELDS

__all__ = ["join", "pack", "unfolded"]

# Columns of a tile: units of numbers that lie by row, or by unit; of masks; of a convolution's weight.
BY_ROW, BY_UNIT, JOINED, UNFOLDED = 128, 32, 32, 64
UNFOLD_FIELDS = 26
NUMBERS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
FLOATS = {dtype.itemsize: number for dtype, number in TYPES.items()}


@triton.jit
def _numbers_on(
    line, row, unit, inside, MEANS: tl.constexpr, NUMBER: tl.constexpr, FLOAT: tl.constexpr
):
    """Whether numbers are not zero, or not their mean."""
    positions = field(line, 4)
    sample = row // positions
    place = sample * field(line, 6) + (row - sample * positions) * field(line, 7)
    address = field(line, 0) + place + unit * field(line, 8)
    value = tl.load(address.to(tl.pointer_type(NUMBER)), mask=inside, other=0)
    on = (value & field(line, 2).to(NUMBER)) != 0
    if MEANS:
        means = field(line, 10)
        if means != 0:
            groups = field(line, 11)
            of_group = sample * groups + unit // (field(line, 5) // groups)
            index = tl.where(groups > 0, of_group, row)
            mean = tl.load(pointer(means, FLOAT) + index, mask=inside, other=0.0)
            on = inside & (value.to(FLOAT, bitcast=True) != mean)
    return on


@triton.jit
def _pack_tile(
    line,
    local,
    words,
    AXIS: tl.constexpr,
    MEANS: tl.constexpr,
    NUMBER: tl.constexpr,
    FLOAT: tl.constexpr,
    UNIT: tl.constexpr,
):
    """A word of each of some units.

    The rows are along the axis `AXIS` of a tile; numbers that lie side by side are along axis 1.
    """
    rows, units = field(line, 3) * field(line, 4), field(line, 5)
    across = tl.cdiv(units, UNIT)
    word = local // across
    unit = (local - word * across) * UNIT + tl.arange(0, UNIT)
    bit = tl.expand_dims(tl.arange(0, WORD).to(tl.int64), 1 - AXIS)
    row, of_unit = word * WORD + bit, tl.expand_dims(unit, AXIS)
    inside = (row < rows) & (of_unit < units)
    on = _numbers_on(line, row, of_unit, inside, MEANS, NUMBER, FLOAT)
    packed = tl.sum(on.to(tl.int64) << bit, axis=AXIS)
    tl.store(words + word * units + unit, packed, mask=unit < units)


@triton.jit(do_not_specialize=["lines"])
def _pack(
    starts, lines, words,
    FIELDS: tl.constexpr, MEANS: tl.constexpr, NUMBER: tl.constexpr, FLOAT: tl.constexpr,
    ROW: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    line, local = line_and_tile(starts, lines, FIELDS)
    out = words + field(line, 12)
    if field(line, 9) != 0:
        _pack_tile(line, local, out, 1, MEANS, NUMBER, FLOAT, UNIT)
    else:
        _pack_tile(line, local, out, 0, MEANS, NUMBER, FLOAT, ROW)


def pack(table: "array[int]", words: int, device: torch.device) -> Tensor:
    """Packs what the lines of a table say; which tensors are on everywhere is not found out.

    Args:
        table: see `truestep.kernels.packing.PackTable`; addresses are the device's.
        words: how many there will be.
        device: where all of it is.

    Returns:
        The words, int64 ``[words]``.
    """
    packed = torch.empty(words, dtype=torch.int64, device=device)
    lines = len(table) // PACK_FIELDS
    for size in set(table[1::PACK_FIELDS]):
        tiles = []
        for place in range(0, len(table), PACK_FIELDS):
            block = BY_UNIT if table[place + 9] else BY_ROW
            rows = triton.cdiv(table[place + 3] * table[place + 4], 64)
            tiles.append(
                rows * triton.cdiv(table[place + 5], block) if table[place + 1] == size else 0
            )
        starts, programs = starts_of(tiles)
        pairs = zip(table[1::PACK_FIELDS], table[10::PACK_FIELDS], strict=True)
        means = any(address for of_size, address in pairs if of_size == size)
        known = (PACK_FIELDS, means, NUMBERS[size], FLOATS.get(size))
        numbers = array("q", starts) + table
        launch(_pack, programs, numbers, device, lines, packed, *known, BY_ROW, BY_UNIT)
    return packed


@triton.jit(do_not_specialize=["lines"])
def _join(starts, lines, joined, FIELDS: tl.constexpr, UNIT: tl.constexpr):
    line, local = line_and_tile(starts, lines, FIELDS)
    one, other = pointer(field(line, 0), tl.int64), field(line, 1)
    samples, positions, units = field(line, 2), field(line, 3), field(line, 4)
    across = tl.cdiv(units, UNIT)
    group = local // across
    unit = (local - group * across) * UNIT + tl.arange(0, UNIT)
    within = tl.arange(0, WORD).to(tl.int64)
    sample = group * WORD + within
    first, last = sample * positions, sample * positions + positions - 1
    found = tl.zeros([WORD, UNIT], tl.int64)
    for step in range(tl.cdiv(positions + WORD - 1, WORD)):
        word = first // WORD + step
        wanted = (sample < samples) & (word <= last // WORD)
        inside = wanted[:, None] & (unit < units)[None, :]
        place = word[:, None] * units + unit[None, :]
        seen = tl.load(one + place, mask=inside, other=0)
        if other != 0:
            seen &= tl.load(pointer(other, tl.int64) + place, mask=inside, other=0)
        found |= seen & bits_within(word, first, last)[:, None]
    packed = tl.sum((found != 0).to(tl.int64) << within[:, None], axis=0)
    out = joined + field(line, 5)
    tl.store(out + group * units + unit, packed, mask=unit < units)


def join(masks: Sequence[Any], device: torch.device) -> tuple[Tensor, list[int]]:
    """The samples with any position on, of many masks at once.

    Args:
        masks: see `truestep.kernels.packing.Join`; addresses are the device's.
        device: where they are.

    Returns:
        Words, one mask's after the other's, and for each mask its first word's place.
    """
    lines: list[int] = []
    places: list[int] = []
    tiles: list[int] = []
    total = 0
    for mask in masks:
        lines += *mask, total, 0
        places.append(total)
        words = triton.cdiv(mask.samples, 64)
        tiles.append(words * triton.cdiv(mask.units, JOINED))
        total += words * mask.units
    joined = torch.empty(total, dtype=torch.int64, device=device)
    starts, programs = starts_of(tiles)
    known = (JOIN_FIELDS, JOINED)
    launch(_join, programs, starts + lines, device, len(masks), joined, *known)
    return joined, places


@triton.jit
def _along(place, column, line, AXIS: tl.constexpr):
    """Where a convolution's tap sees along an axis of the input, and whether that is inside."""
    kernel, position = column % field(line, 14 + AXIS), place % field(line, 11 + AXIS)
    stride, dilation = field(line, 17 + AXIS), field(line, 20 + AXIS)
    seen = position * stride - field(line, 23 + AXIS) + kernel * dilation
    return seen, (seen >= 0) & (seen < field(line, 8 + AXIS))


@triton.jit(do_not_specialize=["lines"])
def _unfold(starts, lines, unfolded, FIELDS: tl.constexpr, COLUMN: tl.constexpr):
    line, local = line_and_tile(starts, lines, FIELDS)
    address, samples, positions = field(line, 0), field(line, 2), field(line, 3)
    columns, taps, channels = field(line, 4), field(line, 5), field(line, 6)
    across = tl.cdiv(columns, COLUMN)
    word = local // across
    column = ((local - word * across) * COLUMN + tl.arange(0, COLUMN))[:, None]
    within = tl.arange(0, WORD).to(tl.int64)
    row = (word * WORD + within)[None, :]
    sample = row // positions
    place = row - sample * positions
    tap = column % taps
    x, in_x = _along(place, tap, line, 2)
    place, tap = place // field(line, 13), tap // field(line, 16)
    y, in_y = _along(place, tap, line, 1)
    place, tap = place // field(line, 12), tap // field(line, 15)
    z, in_z = _along(place, tap, line, 0)
    inside = (column < columns) & (row < samples * positions) & in_x & in_y & in_z
    on = inside.to(tl.int64)
    if address != 0:
        height, width = field(line, 9), field(line, 10)
        pixel = ((sample * field(line, 8) + z) * height + y) * width + x
        at = pointer(address, tl.int64) + (pixel // WORD) * channels + column // taps
        seen = tl.load(at, mask=inside, other=0)
        on = (seen >> (pixel % WORD)) & 1 & on
    packed = tl.sum(on << within[None, :], axis=1)
    out = unfolded + field(line, 1) + word * columns
    column = (local - word * across) * COLUMN + tl.arange(0, COLUMN)
    tl.store(out + column, packed, mask=column < columns)


def unfolded(
    seen: Sequence[tuple[int, int, int, Sequence[int]]], device: torch.device
) -> tuple[Tensor, list[int]]:
    """The bits that convolutions' weights see, at the outputs' positions.

    Args:
        seen: of each, the input words' address, 0 where all are on; samples; positions of each at the
            output; and the window's numbers, see `truestep.activity.Window.numbers`.
        device: where they are.

    Returns:
        The words, and for each convolution the place of its first, ``[words, channels * kernel]``.
    """
    lines: list[int] = []
    places: list[int] = []
    tiles: list[int] = []
    total = 0
    for address, samples, positions, window in seen:
        sizes, channels = window[:18], window[18]
        taps = window[6] * window[7] * window[8]
        columns, words = channels * taps, triton.cdiv(samples * positions, 64)
        lines += (address, total, samples, positions, columns, taps, channels, 0, *sizes)
        places.append(total)
        tiles.append(words * triton.cdiv(columns, UNFOLDED))
        total += words * columns
    made = torch.empty(total, dtype=torch.int64, device=device)
    starts, programs = starts_of(tiles)
    known = (UNFOLD_FIELDS, UNFOLDED)
    launch(_unfold, programs, starts + lines, device, len(seen), made, *known)
    return made, places
