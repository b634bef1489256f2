"""Tables on the device: how kernels find the line that a program is for, and what it says."""

import contextlib
from array import array
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from truestep.errors import TruestepError

__all__ = [
    "STORED",
    "TYPES",
    "WORD",
    "bits_within",
    "field",
    "launch",
    "line_and_tile",
    "line_of",
    "pointer",
    "probe",
    "setting",
    "starts_of",
]

WORD = tl.constexpr(64)
# The numbers that are reckoned with.
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
# Of parameters of a dtype, what they are stored as and what is reckoned in.
STORED = {dtype: (number, number) for dtype, number in TYPES.items()}
STORED[torch.bfloat16] = tl.bfloat16, tl.float32


def starts_of(tiles: Sequence[int]) -> tuple[list[int], int]:
    """How many tiles come before each line's, and how many there are."""
    starts, total = [], 0
    for count in tiles:
        starts.append(total)
        total += count
    return starts, total


def launch(kernel: Any, programs: int, numbers: Any, device: torch.device, *arguments: Any) -> None:
    """Launches a kernel with a table, without waiting for the device, which need not be the current one.

    Args:
        kernel: its first argument is the table.
        programs: how many; without any nothing is launched.
        numbers: of the table, a list of integers or an array of int64.
        device: where to.
        arguments: the rest.
    """
    if programs == 0:
        return
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise TruestepError(
            "a CUDA graph is being captured, and what truestep's kernels are told would not be part of it; "
            "leave the counted backward pass and the step out of the graph"
        )
    held = array("q", numbers) if isinstance(numbers, list) else numbers
    table = torch.frombuffer(held, dtype=torch.int64).to(device, non_blocking=True)
    elsewhere = table.is_cuda and table.get_device() != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[programs,](table, *arguments)


@triton.jit
def _nothing(table):
    tl.store(table, tl.load(table))


def probe(device: torch.device) -> None:
    """Raises whatever keeps kernels from being compiled and launched on a device."""
    launch(_nothing, 1, [0], device)


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
def line_and_tile(starts, lines, FIELDS: tl.constexpr):
    """The line that a program is for, and which of the line's tiles."""
    tile = tl.program_id(0).to(tl.int64)
    index = line_of(starts, lines, tile)
    return starts + lines + index * FIELDS, tile - tl.load(starts + index)


@triton.jit
def setting(table, index: tl.constexpr, NUMBER: tl.constexpr):
    """A float64 that stands in a table of int64."""
    return tl.load(table + index).to(tl.float64, bitcast=True).to(NUMBER)


@triton.jit
def field(line, index: tl.constexpr):
    """A number of a line."""
    return tl.load(line + index)


@triton.jit
def pointer(address, NUMBER: tl.constexpr):
    """A pointer to numbers at an address."""
    return address.to(tl.pointer_type(NUMBER))


@triton.jit
def bits_within(word, first, last):
    """The bits of a word that stand for rows from one to another; the word is one of those that hold them."""
    one = tl.full([], 1, tl.int64)
    begin = tl.where(word == first // WORD, first % WORD, 0)
    end = tl.where(word == last // WORD, last % WORD, WORD - 1)
    upto = tl.where(end == WORD - 1, -1, (one << ((end + 1) % WORD)) - 1)
    return upto & (-one << begin)
