"""How a tile of a weight counts the samples that reach its elements."""

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

from truestep.kernels.gpu.launches import WORD, bits_within, field, pointer

__all__ = [
    "COLUMN",
    "COUNTED",
    "EVERY",
    "LOOKED_UP",
    "ROW",
    "SAMPLES",
    "SUMMED",
    "WORDS",
    "tile_of",
    "tiles_of",
]

# A tile's rows and columns.
ROW, COLUMN = 32, 64
# Where counts come from: all samples; one bit for each sample, or for each of its positions; counts made
# before, int64 or int32; those of an embedding's rows.
EVERY, WORDS, SAMPLES, COUNTED, SUMMED, LOOKED_UP = (tl.constexpr(number) for number in range(6))
# So many words are looked at in a row, so that none waits for another.
AHEAD = tl.constexpr(4)
# Triton's interpreter, which tests use, knows no instructions of the device.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def tiles_of(rows: int, columns: int, groups: int, parts: int) -> int:
    """How many tiles `tile_of` sees in a line."""
    if rows == 1:
        return triton.cdiv(columns, ROW * COLUMN) * parts
    return triton.cdiv(rows // groups, ROW) * triton.cdiv(columns, COLUMN) * groups * parts


@triton.jit
def tile_of(line, local, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """A tile's elements, by their places in the parameter, whether each is one, and its samples' number.

    Tiles of all groups, one after the other, are there once for each part of the samples. Parameters of one
    row are taken as if they had many.
    """
    rows, columns, groups = field(line, 5), field(line, 6), field(line, 11)
    down, across = tl.arange(0, ROW)[:, None], tl.arange(0, COLUMN)[None, :]
    if rows == 1:
        each = tl.cdiv(columns, ROW * COLUMN)
        part = local // each
        place = (local - part * each) * (ROW * COLUMN) + down * COLUMN + across
        inside = place < columns
        zero = tl.zeros([1, 1], tl.int64)
        counts = _counted(line, part, zero, zero == 0, place, inside, place, inside, ROW, COLUMN)
    else:
        wide, of_group = tl.cdiv(columns, COLUMN), rows // groups
        high = tl.cdiv(of_group, ROW)
        left = local // wide
        column = (local - left * wide) * COLUMN + across
        group = left // high
        row = (left - group * high) * ROW + down
        rows_in, columns_in = row < of_group, column < columns
        part = group // groups
        group = group - part * groups
        row += group * of_group
        place, inside = row * columns + column, rows_in & columns_in
        seen = group * columns + column
        counts = _counted(line, part, row, rows_in, seen, columns_in, place, inside, ROW, COLUMN)
    return place, inside, counts


@triton.jit
def _counted(
    line,
    part,
    row,
    rows_in,
    column,
    columns_in,
    place,
    inside,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
):
    """int32 ``[ROW, COLUMN]``, of one part of the samples."""
    mode, samples, parts = field(line, 12), field(line, 9), field(line, 14)
    counts = tl.zeros([ROW, COLUMN], tl.int32)
    if mode == EVERY:
        counts += samples.to(tl.int32)
    elif mode == COUNTED:
        at = pointer(field(line, 13), tl.int64) + place
        counts += tl.load(at, mask=inside, other=0).to(tl.int32)
    elif mode == SUMMED:
        at = pointer(field(line, 13), tl.int32) + place
        counts += tl.load(at, mask=inside, other=0)
    elif mode == LOOKED_UP:
        slot = tl.load(pointer(field(line, 7), tl.int32) + row, mask=rows_in, other=-1)
        at = pointer(field(line, 13), tl.int32) + slot.to(tl.int64) * field(line, 6) + column
        counts += tl.load(at, mask=inside & (slot >= 0), other=0)
    elif mode == WORDS:
        words = tl.cdiv(samples, WORD)
        share = tl.cdiv(words, parts)
        first, stop = part * share, tl.minimum(words, part * share + share)
        for word in range(first, stop, AHEAD):
            for ahead in tl.static_range(AHEAD):
                wanted = word + ahead < stop
                met = _met(line, word + ahead, row, rows_in, column, columns_in, wanted)
                counts += _ones(met)
    else:
        positions = field(line, 10)
        each, share = tl.cdiv(positions + WORD - 1, WORD), tl.cdiv(samples, parts)
        begin, stop = part * share * each, tl.minimum(samples, part * share + share) * each
        found = tl.zeros([ROW, COLUMN], tl.int64)
        for look in range(begin, stop, AHEAD):
            for ahead in tl.static_range(AHEAD):
                sample = (look + ahead) // each
                step = look + ahead - sample * each
                first, last = sample * positions, sample * positions + positions - 1
                word = first // WORD + step
                wanted = (word <= last // WORD) & (look + ahead < stop)
                met = _met(line, word, row, rows_in, column, columns_in, wanted)
                found |= met & bits_within(word, first, last)
                ends = step == each - 1
                counts += (ends & (found != 0)).to(tl.int32)
                found = tl.where(ends, 0, found)
    return counts


@triton.jit
def _met(line, word, row, rows_in, column, columns_in, wanted):
    """The bits that are on in a word at output and input; none where it is not wanted."""
    outputs, inputs = field(line, 7), field(line, 8)
    of_row = tl.where(wanted & rows_in, tl.full(row.shape, -1, tl.int64), 0)
    of_column = tl.where(wanted & columns_in, tl.full(column.shape, -1, tl.int64), 0)
    if outputs != 0:
        at = pointer(outputs, tl.int64) + word * field(line, 5) + row
        of_row = tl.load(at, mask=wanted & rows_in, other=0)
    if inputs != 0:
        at = pointer(inputs, tl.int64) + word * field(line, 6) * field(line, 11) + column
        of_column = tl.load(at, mask=wanted & columns_in, other=0)
    return of_row & of_column


@triton.jit
def _ones(words):
    """How many bits of each word are on."""
    if INTERPRETED:
        words = words - ((words >> 1) & 0x5555555555555555)
        words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
        words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
        return ((words * 0x0101010101010101) >> 56).to(tl.int32)
    return libdevice.popc(words)
