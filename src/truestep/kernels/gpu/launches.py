"""Tables on the device: how kernels find the line that a program is for, and what it says."""

from array import array
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["WORD", "bits_from", "blocks", "field", "line_of", "pointer", "starts_of", "uploaded"]

WORD = tl.constexpr(64)


def blocks(size: int, block: int) -> int:
    """How many blocks cover so many."""
    return -(-size // block)


def starts_of(tiles: Sequence[int]) -> tuple[list[int], int]:
    """How many tiles come before each line's, and how many there are."""
    starts, total = [], 0
    for count in tiles:
        starts.append(total)
        total += count
    return starts, total


def uploaded(numbers: Any, device: torch.device) -> Tensor:
    """int64 on the device, without waiting for it.

    Args:
        numbers: a sequence of integers, or an array of int64.
        device: where to.
    """
    held = array("q", numbers) if isinstance(numbers, list) else numbers
    return torch.frombuffer(held, dtype=torch.int64).to(device, non_blocking=True)


@triton.jit
def line_of(starts, lines, tile):
    """The last line with no more tiles before it than a number; lines without tiles are never it."""
    low = 0
    high = lines
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def field(line, index: tl.constexpr):
    """A number of a line."""
    return tl.load(line + index)


@triton.jit
def pointer(address, NUMBER: tl.constexpr):
    """A pointer to numbers at an address."""
    return address.to(tl.pointer_type(NUMBER))


@triton.jit
def bits_from(first, last):
    """A word whose bits from one place to another, both at most 63, are on."""
    one = tl.full([], 1, tl.int64)
    upto = tl.where(last == WORD - 1, -1, (one << ((last + 1) % WORD)) - 1)
    return upto & (-one << first)
