"""The kernels of DA-SGD: all parameters in one pass over their elements."""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from truestep.kernels.gpu.launches import STORED, launch, line_of, pointer, setting

__all__ = ["boost", "boosted_step"]

BLOCK = 1024
# What stands before the table: learning rate, weight decay, whether to ascend.
SETTINGS = tl.constexpr(3)


@triton.jit
def _boosted(gradient, previous):
    """Gradients plus their boosters; two zeros agree too, but theirs is 0."""
    agree = ((gradient > 0) & (previous > 0)) | ((gradient < 0) & (previous < 0))
    return gradient + tl.where(agree, (gradient + previous) * 0.5, 0.0)


@triton.jit(do_not_specialize=["lines"])
def _boost(
    table,
    lines,
    STEPS: tl.constexpr,
    KEPT: tl.constexpr,
    NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    starts = table + SETTINGS
    tile = tl.program_id(0).to(tl.int64)
    line = line_of(starts, lines, tile)
    element = (tile - tl.load(starts + line)) * BLOCK + tl.arange(0, BLOCK)
    kinds = starts + lines + line
    inside = element < tl.load(kinds)
    of = pointer(tl.load(kinds + 2 * lines), KEPT) + element
    before = pointer(tl.load(kinds + 3 * lines), KEPT) + element
    gradient = tl.load(of, mask=inside, other=0.0)
    first = tl.load(kinds + lines) != 0
    previous = tl.load(before, mask=inside & (first == 0), other=0.0)
    direction = _boosted(gradient.to(NUMBER), previous.to(NUMBER))
    tl.store(before, gradient, mask=inside)
    if STEPS:
        to = pointer(tl.load(kinds + 4 * lines), KEPT) + element
        weight = tl.load(to, mask=inside, other=0.0).to(NUMBER)
        if tl.load(table + 2) != 0:
            direction = -direction
        decay = setting(table, 1, NUMBER)
        if decay != 0:
            direction = tl.fma(decay, weight, direction)
        back = -setting(table, 0, NUMBER)
        tl.store(to, tl.fma(back, direction, weight).to(KEPT), mask=inside)
    else:
        tl.store(of, direction.to(KEPT), mask=inside)


def boosted_step(
    rows: Any,
    dtype: torch.dtype,
    device: torch.device,
    lr: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """DA-SGD's step; the previous gradients become the present ones.

    Args:
        rows: see `truestep.kernels.loops.boost.boosted_step`; addresses are the device's.
        dtype: of all tensors.
        device: where they are.
        lr: the learning rate.
        weight_decay: the L2 penalty.
        maximize: whether to ascend.
    """
    settings = np.array([lr, weight_decay, 0.0]).view(np.int64)
    settings[2] = maximize
    _launch(rows, dtype, device, settings)


def boost(rows: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Adds their boosters to the gradients; the previous ones become those there were.

    Args:
        rows: see `boosted_step`, without weights.
        dtype: of all tensors.
        device: where they are.
    """
    _launch(rows, dtype, device, np.zeros(3, np.int64), steps=False)


def _launch(
    rows: Any, dtype: torch.dtype, device: torch.device, settings: Any, *, steps: bool = True
) -> None:
    elements = rows[0] // dtype.itemsize
    elements[1:] -= elements[:-1].copy()
    tiles = -(-elements // BLOCK)
    ends = np.cumsum(tiles)
    table = np.concatenate([settings, ends - tiles, elements, rows[1:].reshape(-1)])
    known = (steps, *STORED[dtype], BLOCK)
    launch(_boost, int(ends[-1]), table, device, rows.shape[1], *known)
