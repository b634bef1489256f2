"""Boolean masks with one bit per element."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truestep.kernels import packing
from truestep.kernels.packing import WORD, unpack

__all__ = ["Bits", "appended", "pack", "pack_all"]


@dataclass(slots=True)
class Bits:
    """A boolean mask ``[samples, units]`` or ``[samples, positions, units]``, one bit per element; a value.

    Attributes:
        words: int64 ``[ceil(samples * positions / 64), units]``, packed along samples and positions;
            None where all bits are on.
        samples: number of samples.
        positions: of each sample; 1 where there are none.
        units: size of the last axis.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> bits = pack(mask)
        >>> bits.words.tolist(), bits.mask().tolist() == mask.tolist()
        ([[3, 2]], True)
    """

    words: Tensor | None
    samples: int
    positions: int
    units: int

    @property
    def length(self) -> int:
        """How many bits there are for each unit."""
        return self.samples * self.positions

    @property
    def has_positions(self) -> bool:
        """Whether samples have several positions."""
        return self.positions != 1

    def address(self) -> int | None:
        """Where compiled loops find the words: 0 where all bits are on, None where they cannot go."""
        words = self.words
        if words is None:
            return 0
        # Words that are none have no address: 0 would say that all bits are on.
        return (words.data_ptr() or None) if words.is_cpu and words.is_contiguous() else None

    def dense(self) -> Tensor:
        """The words, also where all bits are on."""
        if self.words is not None:
            return self.words
        return packing.pack_torch(torch.ones(self.length, self.units, dtype=torch.bool))

    def mask(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The mask of some samples.

        Args:
            start: the first sample.
            stop: the sample after the last.

        Returns:
            Bool, ``[samples, units]`` or ``[samples, positions, units]``.
        """
        start, stop, _ = slice(start, stop).indices(self.samples)
        stop = max(start, stop)
        rows, first = (stop - start) * self.positions, start * self.positions
        if self.words is None:
            mask = torch.ones(rows, self.units, dtype=torch.bool)
        else:
            words = self.words[first // WORD : -(-(first + rows) // WORD)]
            mask = unpack(words, first % WORD + rows)[first % WORD :]
        if self.positions == 1:
            return mask
        return mask.reshape(stop - start, self.positions, self.units)

    def any_position(self) -> "Bits":
        """Whether any position of a sample is on; the same where there are no positions."""
        if self.positions == 1:
            return self
        words = self.words
        if words is not None:
            words = packing.join(words, self.samples, self.positions)
        return Bits(words, self.samples, 1, self.units)

    def apart(self) -> "Bits":
        """Each position as a sample of its own."""
        return Bits(self.words, self.length, 1, self.units)

    def with_positions(self, positions: int) -> "Bits":
        """So many samples in a row as the positions of one: the inverse of `apart`."""
        return Bits(self.words, self.samples // positions, positions, self.units)

    def __and__(self, other: "Bits") -> "Bits":
        if self.words is None or other.words is None:
            return other if self.words is None else self
        return Bits(self.words & other.words, self.samples, self.positions, self.units)

    def __or__(self, other: "Bits") -> "Bits":
        if self.words is None or other.words is None:
            return self if self.words is None else other
        return Bits(self.words | other.words, self.samples, self.positions, self.units)


def pack(mask: Tensor, means: Tensor | None = None) -> Bits:
    """Packs a mask, or the entries of numbers that are not zero, or not their mean, to bits.

    Args:
        mask: ``[samples, units]`` or ``[samples, positions, units]``.
        means: see `truestep.kernels.packing.pack`.
    """
    shape = mask.shape
    positions = 1 if len(shape) == 2 else shape[1]  # noqa: PLR2004
    return Bits(packing.pack(mask, means), shape[0], positions, shape[-1])


class _Slice(Bits):
    """Bits ``[samples, units]`` whose words lie among others' in one tensor."""

    __slots__ = ("_address", "_all", "_place")

    def __init__(self, words: Tensor, start: int, place: int, shape: torch.Size) -> None:
        self._all, self._place, self._address = words, place, start + 8 * place
        self.positions = 1
        self.samples, self.units = shape

    @property
    def words(self) -> Tensor:  # type: ignore[override]
        """See `Bits`."""
        count = (self.samples + WORD - 1) // WORD
        return self._all[self._place : self._place + count * self.units].view(count, self.units)

    def address(self) -> int | None:
        return self._address


def pack_all(masks: Sequence[Tensor]) -> list[Bits]:
    """`pack` of many masks ``[samples, units]``, or of their non-zero entries, at once."""
    packed = packing.pack_rows(masks)
    if packed is None:
        return [pack(mask) for mask in masks]
    words, places = packed
    start = words.data_ptr()
    return [
        _Slice(words, start, place, mask.shape)
        if place >= 0
        else Bits(None, len(mask), 1, mask.shape[1])
        for mask, place in zip(masks, places, strict=True)
    ]


def appended(parts: Sequence[Bits]) -> Bits:
    """Masks ``[samples, units]`` one after the other.

    Args:
        parts: of the same units; all but the last hold a multiple of 64 samples.

    Example:
        >>> import torch
        >>> mask = torch.rand(70, 3) < 0.5
        >>> appended([pack(mask[:64]), pack(mask[64:])]).mask().equal(mask)
        True
    """
    if len(parts) == 1:
        return parts[0]
    length, units = sum(part.length for part in parts), parts[0].units
    if all(part.words is None for part in parts):
        return Bits(None, length, 1, units)
    return Bits(torch.cat([part.dense() for part in parts]), length, 1, units)
