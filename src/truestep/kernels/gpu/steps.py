"""The kernel that corrects gradients, or takes whole steps, for all parameters in one launch."""

import struct
from array import array
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from truestep.kernels.gpu.counts import COLUMN, ROW, tile_of
from truestep.kernels.gpu.entries import FIELDS, lines_of, tiles_of_line
from truestep.kernels.gpu.launches import (
    STORED,
    field,
    launch,
    line_and_tile,
    pointer,
    setting,
    starts_of,
)
from truestep.kernels.stepping import FIELDS as TABLE_FIELDS
from truestep.kernels.stepping import Entry

__all__ = ["step"]

OPTIONS = tl.constexpr(8)
ENTRY = TABLE_FIELDS - len(Entry._fields)  # where an entry begins in a table's line


@triton.jit(do_not_specialize=["lines"])
def _step(
    table,
    lines,
    FIELDS: tl.constexpr,
    KEPT: tl.constexpr,
    NUMBER: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
):
    line, local = line_and_tile(table + OPTIONS, lines, FIELDS)
    place, inside, counts = tile_of(line, local, ROW, COLUMN)
    size = field(line, 4)
    if size < 0:  # it is on the device
        size = tl.load(pointer(-size, tl.int64))
    adaptive = counts.to(NUMBER)
    least, wanted = adaptive + setting(table, 6, NUMBER), counts != 0
    if NUMBER == tl.float32:
        factor = tl.math.div_rn(size.to(NUMBER), least)
    else:
        factor = size.to(NUMBER) / least
    factor = tl.where(wanted, tl.minimum(factor, setting(table, 7, NUMBER)), 1.0)
    of = pointer(field(line, 0), KEPT) + place
    direction = tl.load(of, mask=inside, other=0.0).to(NUMBER) * factor
    if field(line, 1) == 0:
        tl.store(of, direction.to(KEPT), mask=inside)
    else:
        to = pointer(field(line, 1), KEPT) + place
        weight = tl.load(to, mask=inside, other=0.0).to(NUMBER)
        # In the order of torch's SGD, and with its roundings.
        if setting(table, 5, NUMBER) != 0:
            direction = -direction
        decay = setting(table, 1, NUMBER)
        if decay != 0:
            direction = tl.fma(decay, weight, direction)
        buffer = field(line, 2)
        if buffer != 0:
            momentum = setting(table, 2, NUMBER)
            by = pointer(buffer, KEPT) + place
            speed = direction
            if field(line, 3) == 0:
                kept = setting(table, 3, NUMBER)
                before = tl.load(by, mask=inside, other=0.0).to(NUMBER)
                speed = tl.fma(kept, direction, momentum * before)
            tl.store(by, speed.to(KEPT), mask=inside)
            if setting(table, 4, NUMBER) != 0:
                speed = tl.fma(momentum, speed, direction)
            direction = speed
        back = -setting(table, 0, NUMBER)
        tl.store(to, tl.fma(back, direction, weight).to(KEPT), mask=inside)


def step(
    numbers: Sequence[int], options: Sequence[float], dtype: torch.dtype, device: torch.device
) -> None:
    """Takes a step, or corrects gradients, for all lines of a table.

    Args:
        numbers: of a `truestep.kernels.stepping.Table`; addresses but windows' are the device's, and a
            negative batch size is the address of one.
        options: see `truestep.kernels.stepping.Options`, in the order of the loops.
        dtype: of parameters, gradients and buffers.
        device: where all of it is.
    """
    whole = [numbers[at : at + TABLE_FIELDS] for at in range(0, len(numbers), TABLE_FIELDS)]
    lines, held = lines_of([Entry(*line[ENTRY:]) for line in whole], device)
    starts, programs = starts_of([tiles_of_line(line) for line in lines])
    table = array("q", struct.pack(f"{OPTIONS.value}d", *options)) + array("q", starts)
    for line, counted in zip(whole, lines, strict=True):
        table.extend((*line[:5], *counted))
    launch(_step, programs, table, device, len(lines), FIELDS, *STORED[dtype], ROW, COLUMN)
    del held
