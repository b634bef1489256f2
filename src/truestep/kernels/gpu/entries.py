"""From entries of parameters to lines that kernels count by, and counts that are made before.

A line is rows, columns, outputs, inputs, samples, positions, groups, mode, address of counts, and in how
many parts its samples are counted.
"""

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from truestep.kernels.gpu.counts import (
    COLUMN,
    COUNTED,
    EVERY,
    LOOKED_UP,
    ROW,
    SAMPLES,
    SUMMED,
    WORDS,
    tile_of,
    tiles_of,
)
from truestep.kernels.gpu.launches import (
    field,
    launch,
    line_and_tile,
    pointer,
    starts_of,
)
from truestep.kernels.gpu.lookups import looked_up
from truestep.kernels.gpu.packs import unfolded
from truestep.kernels.stepping import LOOKUPS, Entry

__all__ = ["FIELDS", "count", "lines_of", "tiles_of_line"]

# Of a line with the five numbers before it: see `truestep.kernels.gpu.steps`. The second belongs to
# `truestep.activity.Window.numbers`.
FIELDS, NUMBERS_OF_WINDOW = 15, 20
# A line's samples are counted in parts where it has so few tiles that processors would be idle: so many
# words are worth a program of their own, and so many programs keep a device busy.
LOOKS, PROGRAMS = 32, 512

Line = list[int]


@triton.jit(do_not_specialize=["lines"])
def _sum(starts, lines, FIELDS: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr):
    line, local = line_and_tile(starts, lines, FIELDS)
    place, inside, counts = tile_of(line, local, ROW, COLUMN)
    tl.atomic_add(pointer(field(line, 0), tl.int32) + place, counts, mask=inside)


def count(entries: Sequence[Entry], counts: Tensor) -> None:
    """Counts the samples that reach each element.

    Args:
        entries: see `truestep.kernels.stepping.Entry`, of one parameter.
        counts: int64, shaped like the parameter, contiguous, on the device; is written to.
    """
    lines, held = lines_of(entries, counts.device)
    found = torch.zeros(counts.numel(), dtype=torch.int32, device=counts.device)
    _add_counts(lines, found)
    counts.copy_(found.view(counts.shape))
    del held


def lines_of(entries: Sequence[Entry], device: torch.device) -> tuple[list[Line], list[Tensor]]:
    """The entries' lines, and what must live until a kernel has been launched on them.

    Args:
        entries: see `truestep.kernels.stepping.Entry`; addresses but windows' are the device's.
        device: where all of it is.
    """
    lines = [_line_of(entry) for entry in entries]
    return lines, [
        *_look_up(entries, lines, device),
        *_unfold(entries, lines, device),
        *_count_in_parts(lines, device),
    ]


def tiles_of_line(line: Line) -> int:
    """How many programs a line takes."""
    return tiles_of(line[0], line[1], line[6], line[9])


def _line_of(entry: Entry) -> Line:
    """A line as far as the entry tells it."""
    mode, samples = EVERY, entry.samples
    if entry.counts:
        mode = COUNTED
    elif entry.kind == LOOKUPS:
        mode = LOOKED_UP
    elif entry.outputs or entry.inputs or entry.window:
        mode = WORDS if entry.apart or entry.positions == 1 else SAMPLES
    if entry.apart:
        samples *= entry.positions
    return [*entry[:4], samples, entry.positions, 1, mode.value, entry.counts, 1]


def _look_up(entries: Sequence[Entry], lines: Sequence[Line], device: torch.device) -> list[Tensor]:
    """Counts the samples that look up embeddings' rows."""
    chosen = [pair for pair in zip(entries, lines, strict=True) if pair[1][7] == LOOKED_UP.value]
    if not chosen:
        return []
    places, held = looked_up(
        [
            (e.looked_up, e.owners, e.outputs, e.by_entry, e.entries, e.rows, e.columns)
            for e, _ in chosen
        ],
        device,
    )
    for (_, line), (slots, counts) in zip(chosen, places, strict=True):
        line[2], line[8] = slots, counts
    return held


def _unfold(entries: Sequence[Entry], lines: Sequence[Line], device: torch.device) -> list[Tensor]:
    """Lays out what convolutions' weights see."""
    windows: list[tuple[Line, Any]] = []
    for entry, line in zip(entries, lines, strict=True):
        if entry.window and not entry.counts:
            numbers = (ctypes.c_int64 * NUMBERS_OF_WINDOW).from_address(entry.window)[:]
            line[6] = numbers[-1]
            if not (entry.inputs and _sees_itself(numbers)):
                windows.append((line, (entry.inputs, entry.samples, entry.positions, numbers)))
    if not windows:
        return []
    words, places = unfolded([seen for _, seen in windows], device)
    for (line, _), place in zip(windows, places, strict=True):
        line[3] = words.data_ptr() + 8 * place
    return [words]


def _sees_itself(window: Sequence[int]) -> bool:
    """Whether each position of a convolution sees the input at this position alone."""
    size, seen, kernel, stride, _, padding = (window[at : at + 3] for at in range(0, 18, 3))
    return size == seen and kernel == stride == [1, 1, 1] and padding == [0, 0, 0]


def _count_in_parts(lines: Sequence[Line], device: torch.device) -> list[Tensor]:
    """Counts the lines that are better counted in parts."""
    split = [(line, parts) for line in lines if (parts := _parts(line)) > 1]
    if not split:
        return []
    size = sum(line[0] * line[1] for line, _ in split)
    sums = torch.zeros(size, dtype=torch.int32, device=device)
    _add_counts([[*line[:9], parts] for line, parts in split], sums)
    address = sums.data_ptr()
    for line, _ in split:
        line[7:9] = SUMMED.value, address
        address += line[0] * line[1] * sums.element_size()
    return [sums]


def _parts(line: Line) -> int:
    """In how many parts the samples of a line are counted."""
    samples, positions, mode = line[4], line[5], line[7]
    if mode == WORDS.value:
        looks = triton.cdiv(samples, 64)
    elif mode == SAMPLES.value:
        looks = samples * triton.cdiv(positions + 63, 64)
    else:
        return 1
    if looks <= LOOKS:
        return 1
    tiles = max(1, tiles_of_line(line))
    return max(1, min(triton.cdiv(looks, LOOKS), triton.cdiv(PROGRAMS, tiles)))


def _add_counts(lines: Sequence[Line], sums: Tensor) -> None:
    """Adds the counts of lines to sums, int32, one line's after the other's."""
    starts, programs = starts_of([tiles_of_line(line) for line in lines])
    table, address = array("q", starts), sums.data_ptr()
    for line in lines:
        table.extend((address, 0, 0, 0, 0, *line))
        address += line[0] * line[1] * sums.element_size()
    launch(_sum, programs, table, sums.device, len(lines), FIELDS, ROW, COLUMN)
