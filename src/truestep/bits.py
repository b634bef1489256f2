"""Boolean masks with one bit per element."""

import math
from dataclasses import dataclass

from torch import Tensor

from truestep.kernels import packing
from truestep.kernels.packing import WORD, unpack

__all__ = ["Bits", "pack"]


@dataclass(frozen=True)
class Bits:
    """A boolean mask with one bit per element, packed along its last axis but one.

    Attributes:
        words: int64, ``[ceil(length / 64), units]`` for a mask ``[samples, units]`` and
            ``[samples, ceil(length / 64), units]`` for a mask ``[samples, positions, units]``.
        length: how many bits of the packed axis are in use.

    Example:
        >>> import torch
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
            return unpack(self.words[start:stop], self.length)
        stop = self.length if stop is None else stop
        first = start // WORD
        words = self.words[first : math.ceil(stop / WORD)]
        return unpack(words, stop - first * WORD)[start - first * WORD :]

    def any_position(self) -> "Bits":
        """Whether any position of a sample is on; the same where there are no positions."""
        return pack((self.words != 0).any(1)) if self.has_positions else self


def pack(mask: Tensor) -> Bits:
    """Packs a mask, or the non-zero entries of numbers, to bits.

    Args:
        mask: ``[samples, units]`` or ``[samples, positions, units]``; samples are packed into words,
            or positions where it has them.
    """
    return Bits(packing.pack(mask), mask.shape[-2])
