"""Boolean masks with one bit per element."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Bits", "pack"]

WORD = 64


@dataclass(frozen=True)
class Bits:
    """A boolean mask with one bit per element, packed along its last axis but one.

    Attributes:
        words: int64, ``[ceil(length / 64), units]`` for a mask ``[samples, units]`` and
            ``[samples, ceil(length / 64), units]`` for a mask ``[samples, positions, units]``.
        length: how many bits of the packed axis are in use.

    Example:
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> bits = pack(mask)
        >>> bits.words.tolist(), bits.mask().tolist() == mask.tolist()
        ([[3, 2]], True)
    """

    words: Tensor
    length: int

    @property
    def samples(self) -> int:
        """The number of samples."""
        return self.length if self.words.dim() == 2 else self.words.shape[0]  # noqa: PLR2004

    @property
    def units(self) -> int:
        """The size of the last axis."""
        return self.words.shape[-1]

    @property
    def has_positions(self) -> bool:
        """Whether the mask has a positions axis."""
        return self.words.dim() == 3  # noqa: PLR2004

    def mask(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The mask of some samples.

        Args:
            start: the first sample.
            stop: the sample after the last.

        Returns:
            Bool, ``[samples, units]`` or ``[samples, positions, units]``.
        """
        if self.has_positions:
            return _unpack(self.words[start:stop], self.length)
        stop = self.length if stop is None else stop
        first = start // WORD
        words = self.words[first : math.ceil(stop / WORD)]
        return _unpack(words, stop - first * WORD)[start - first * WORD :]


def pack(mask: Tensor) -> Bits:
    """Packs a boolean mask ``[samples, units]`` or ``[samples, positions, units]``.

    Args:
        mask: bool; samples are packed into words, or positions where the mask has them.
    """
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
    return Bits(adjacent.view(torch.int64).squeeze(-1), length)


def _unpack(words: Tensor, length: int) -> Tensor:
    *lead, count, units = words.shape
    octets = words.unsqueeze(-1).view(torch.uint8)
    octets = octets.transpose(-1, -2).reshape(*lead, count * 8, 1, units)
    bits = torch.bitwise_and(octets, _places(words.device)).ne_(0).view(torch.bool)
    return bits.reshape(*lead, count * WORD, units)[..., :length, :]


@functools.cache
def _places(device: torch.device) -> Tensor:
    """The places of eight bits in an octet, uint8 ``[8, 1]``."""
    return torch.tensor([[1 << bit] for bit in range(8)], dtype=torch.uint8, device=device)
