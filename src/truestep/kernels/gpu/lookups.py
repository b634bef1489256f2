"""Kernels that count the samples that look up each row of an embedding."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from truestep.kernels.gpu.launches import (
    WORD,
    field,
    launch,
    line_and_tile,
    pointer,
    starts_of,
)

__all__ = ["Lookups", "looked_up"]

FIELDS = 8
# How many entries a program gives slots to; how many it looks through at once, for so many columns.
SLOTS, ENTRIES, COLUMN = 256, 64, 128

# Address of rows looked up, of their samples, of the outputs' words, whether those are of entries, how many
# entries; rows and columns of the weight.
Lookups = tuple[int, int, int, int, int, int, int]


@triton.jit(do_not_specialize=["lines"])
def _give_slots(starts, lines, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the entries that look up a row, one gives it its own place."""
    line, local = line_and_tile(starts, lines, FIELDS)
    entry = local * BLOCK + tl.arange(0, BLOCK)
    inside = entry < field(line, 4)
    row = tl.load(pointer(field(line, 0), tl.int32) + entry, mask=inside, other=0)
    tl.store(pointer(field(line, 6), tl.int32) + row, entry.to(tl.int32), mask=inside)


@triton.jit
def _first_from(owners, entries, owner):
    """The first entry of a sample, or of a later one."""
    low, high = entries * 0, entries
    while low < high:
        middle = (low + high) // 2
        before = tl.load(owners + middle) < owner
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["lines"])
def _count(
    starts,
    lines,
    FIELDS: tl.constexpr,
    WORD: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMN: tl.constexpr,
):
    line, local = line_and_tile(starts, lines, FIELDS)
    rows, owners = pointer(field(line, 0), tl.int32), pointer(field(line, 1), tl.int32)
    entries, columns = field(line, 4), field(line, 5)
    across = tl.cdiv(columns, COLUMN)
    entry = local // across
    column = (local - entry * across) * COLUMN + tl.arange(0, COLUMN)
    inside = column < columns
    row, owner = tl.load(rows + entry), tl.load(owners + entry)
    first, last = _first_from(owners, entries, owner), _first_from(owners, entries, owner + 1)
    within = tl.arange(0, ENTRIES).to(tl.int64)
    words, by_entry = field(line, 2), field(line, 3)
    # A sample that looks a row up several times counts once, by its first entry.
    seen = tl.zeros([ENTRIES], tl.int32)
    on = tl.zeros([COLUMN], tl.int32)
    if (words == 0) | (by_entry == 0):
        bit = owner.to(tl.int64)
        at = pointer(words, tl.int64) + (bit // WORD) * columns + column
        met = tl.load(at, mask=inside & (words != 0), other=-1)
        on += ((met >> (bit % WORD)) & 1).to(tl.int32)
        last = entry
    for start in range(first, last, ENTRIES):
        other = start + within
        same = (other < last) & (tl.load(rows + other, mask=other < last, other=-1) == row)
        seen += (same & (other < entry)).to(tl.int32)
        if (words != 0) & (by_entry != 0) & (tl.sum(same.to(tl.int32), axis=0) != 0):
            at = pointer(words, tl.int64) + (other // WORD)[:, None] * columns + column[None, :]
            met = tl.load(at, mask=same[:, None] & inside[None, :], other=0)
            on |= tl.max((met >> (other % WORD)[:, None]) & 1, axis=0).to(tl.int32)
    slot = tl.load(pointer(field(line, 6), tl.int32) + row).to(tl.int64)
    counts = pointer(field(line, 7), tl.int32) + slot * columns + column
    tl.atomic_add(counts, on, mask=inside & (tl.sum(seen, axis=0) == 0))


def looked_up(
    found: Sequence[Lookups], device: torch.device
) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """Counts the samples that look up rows of embeddings.

    Args:
        found: see `Lookups`.
        device: where addresses are.

    Returns:
        For each, the address of the rows' slots, int32, -1 where no sample looks a row up, and of the slots'
        counts, int32 ``[slots, columns]``; and what must live as long as those.
    """
    slots = torch.full((sum(line[5] for line in found),), -1, dtype=torch.int32, device=device)
    counts = torch.zeros(sum(line[4] * line[6] for line in found), dtype=torch.int32, device=device)
    places: list[tuple[int, int]] = []
    table: list[int] = []
    to, by = slots.data_ptr(), counts.data_ptr()
    for *entries, rows, columns in found:
        table += (*entries, columns, to, by)
        places.append((to, by))
        to, by = to + 4 * rows, by + 4 * entries[4] * columns
    for kernel, tiles, known in (
        (_give_slots, [triton.cdiv(line[4], SLOTS) for line in found], (SLOTS,)),
        (
            _count,
            [line[4] * triton.cdiv(line[6], COLUMN) for line in found],
            (WORD, ENTRIES, COLUMN),
        ),
    ):
        starts, programs = starts_of(tiles)
        launch(kernel, programs, starts + table, device, len(found), FIELDS, *known)
    return places, [slots, counts]
