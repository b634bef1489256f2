"""Packing the non-zero entries of a tensor to one bit each, along its last axis but one."""

import functools
import math

import torch
from torch import Tensor

from truestep.kernels.dispatch import compiled_loops, loops

__all__ = ["WORD", "pack", "unpack"]

WORD = 64


def pack(values: Tensor) -> Tensor:
    """One bit for each entry, on where it is not zero.

    Args:
        values: ``[..., length, units]``, bool or numbers.

    Returns:
        int64 ``[..., ceil(length / 64), units]``; entry i is bit ``i % 64`` of word ``i // 64``.

    Example:
        >>> pack(torch.tensor([[0.0, 2.0], [3.0, 1.0]])).tolist()
        [[2, 3]]
    """
    if not compiled_loops(values) or values.numel() == 0:
        return pack_torch(values)
    *lead, length, units = values.shape
    rows = values.detach().reshape(-1, length, units)
    words = torch.empty(len(rows), math.ceil(length / WORD), units, dtype=torch.int64)
    if values.dtype in {torch.float16, torch.bfloat16}:
        loops().pack_halves(rows.view(torch.int16).numpy(), words.numpy())
    else:
        loops().pack(rows.numpy(), words.numpy())
    return words.reshape(*lead, -1, units)


def pack_torch(values: Tensor) -> Tensor:
    """The twin of `pack` in torch operations."""
    mask = values if values.dtype == torch.bool else values != 0
    *lead, length, units = mask.shape
    words = math.ceil(length / WORD)
    octets = mask.view(torch.uint8)
    if length != words * WORD:
        padded = octets.new_zeros(*lead, words * WORD, units)
        padded[..., :length, :] = octets
        octets = padded
    octets = octets.reshape(*lead, words * 8, 8, units)
    packed = (octets * _places(mask.device)).sum(-2, dtype=torch.uint8)
    packed = packed.reshape(*lead, words, 8, units).transpose(-1, -2)
    adjacent = octets.new_empty(*lead, words, units, 8).copy_(packed)
    return adjacent.view(torch.int64).squeeze(-1)


def unpack(words: Tensor, length: int) -> Tensor:
    """The mask that was packed, bool ``[..., length, units]``."""
    *lead, count, units = words.shape
    octets = words.unsqueeze(-1).view(torch.uint8)
    octets = octets.transpose(-1, -2).reshape(*lead, count * 8, 1, units)
    bits = torch.bitwise_and(octets, _places(words.device)).ne_(0).view(torch.bool)
    return bits.reshape(*lead, count * WORD, units)[..., :length, :]


@functools.cache
def _places(device: torch.device) -> Tensor:
    """The places of eight bits in an octet, uint8 ``[8, 1]``."""
    return torch.tensor([[1 << bit] for bit in range(8)], dtype=torch.uint8, device=device)
