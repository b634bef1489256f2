"""Boolean masks with one bit per element."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from truestep.kernels import dispatch, packing
from truestep.kernels.dispatch import device_of, finds_addresses
from truestep.kernels.packing import PACK_FULL, PACK_WORDS, WORD, Join, Rows, unpack

__all__ = ["Bits", "Packed", "appended", "join", "pack", "pack_rows"]


@dataclass(slots=True)
class Bits:
    """A boolean mask ``[samples, units]`` or ``[samples, positions, units]``, one bit per element; a value.

    Attributes:
        words: int64 ``[ceil(samples * positions / 64), units]``, packed along samples and positions;
            None where all bits are on, or taken to be (`truestep.kernels.packing.Lines`).
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

    @property
    def nbytes(self) -> int:
        """The memory of the words, in bytes."""
        return 0 if self.words is None else self.words.nbytes

    @property
    def device(self) -> torch.device | None:
        """Where kernels go over the words; None for the CPU, and where all bits are on."""
        return None if self.words is None else device_of(self.words)

    def address(self, device: torch.device | None = None) -> int | None:
        """Where loops or kernels find the words: 0 where all bits are on, None where they cannot go.

        Args:
            device: of the kernels, None for the CPU's loops.
        """
        words = self.words
        if words is None:
            return 0
        there = words.is_cpu if device is None else words.device == device
        # Words that are none have no address: 0 would say that all bits are on.
        return (words.data_ptr() or None) if there and words.is_contiguous() else None

    def dense(self) -> Tensor:
        """The words, also where all bits are on."""
        if self.words is not None:
            return self.words
        return packing.pack_torch(
            torch.ones(self.length, self.units, dtype=torch.bool, device="cpu")
        )

    def add_to(self, words: "array[int]") -> bool:
        """Appends the words to others, and says whether they are where that can be done, on a CPU."""
        held = self.words
        if held is None:
            words.extend(packing.full_words(self.length, self.units))
        elif not (held.is_cpu and dispatch.is_plain(held)):
            return False
        elif held.numel():
            numbers: Any = held.contiguous().numpy()
            words.frombytes(memoryview(numbers).cast("B"))
        return True

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
            mask = torch.ones(rows, self.units, dtype=torch.bool, device="cpu")
        else:
            words = self.words[first // WORD : -(-(first + rows) // WORD)]
            mask = unpack(words, first % WORD + rows)[first % WORD :]
        if self.positions == 1:
            return mask
        return mask.reshape(stop - start, self.positions, self.units)

    def any_position(self) -> "Bits":
        """Whether any position of a sample is on; the same where there are no positions."""
        return self if self.positions == 1 else join([(self, None)])[0]

    def apart(self) -> "Bits":
        """Each position as a sample of its own."""
        return self if self.positions == 1 else self.shaped(self.length, 1)

    def shaped(self, samples: int, positions: int) -> "Bits":
        """The same rows as those of other samples."""
        return Bits(self.words, samples, positions, self.units)

    def __and__(self, other: "Bits") -> "Bits":
        if self.words is None or other.words is None:
            return other if self.words is None else self
        return Bits(self.words & other.words, self.samples, self.positions, self.units)

    def __or__(self, other: "Bits") -> "Bits":
        if self.words is None or other.words is None:
            return self if self.words is None else other
        return Bits(self.words | other.words, self.samples, self.positions, self.units)


def pack(mask: Tensor) -> Bits:
    """Packs a mask, or the entries of numbers that are not zero, to bits.

    Args:
        mask: ``[samples, units]`` or ``[samples, positions, units]``.
    """
    shape = mask.shape
    positions = 1 if len(shape) == 2 else shape[1]  # noqa: PLR2004
    return Bits(packing.pack(mask), shape[0], positions, shape[-1])


class _Slice(Bits):
    """Bits whose words lie among others' in one piece of memory; they are a tensor when somebody asks."""

    __slots__ = ("_address", "_all", "_device", "_place")

    def __init__(
        self,
        words: "array[int] | Tensor",
        start: int,
        place: int,
        samples: int,
        positions: int,
        units: int,
        device: torch.device | None,
    ) -> None:
        self._all, self._place, self._address = words, place, start + 8 * place
        self._device = device
        self.samples, self.positions, self.units = samples, positions, units

    @property
    def words(self) -> Tensor:  # type: ignore[override]
        """See `Bits`."""
        count = (self.length + WORD - 1) // WORD
        held = self._all
        whole = held if isinstance(held, Tensor) else torch.frombuffer(held, dtype=torch.int64)
        return whole[self._place : self._place + count * self.units].view(count, self.units)

    def add_to(self, words: "array[int]") -> bool:
        held = self._all
        if isinstance(held, Tensor) and not held.is_cpu:
            return False
        size = self.nbytes // 8
        if size:
            numbers: Any = held.numpy() if isinstance(held, Tensor) else held
            words.frombytes(memoryview(numbers)[self._place : self._place + size].cast("B"))
        return True

    @property
    def nbytes(self) -> int:
        return 8 * ((self.length + WORD - 1) // WORD) * self.units

    @property
    def device(self) -> torch.device | None:
        return self._device

    def address(self, device: torch.device | None = None) -> int | None:
        return self._address if device is self._device or device == self._device else None

    def shaped(self, samples: int, positions: int) -> Bits:
        start = self._address - 8 * self._place
        return _Slice(self._all, start, self._place, samples, positions, self.units, self._device)


def pack_rows(tensor: Tensor, rows: Rows, means: Tensor | None = None) -> Bits:
    """`pack` of a tensor of any shape; see `truestep.kernels.packing.pack_rows`."""
    return Bits(packing.pack_rows(tensor, rows, means), rows.samples, rows.positions, rows.units)


class Packed:
    """What one call of the packing loop has made of many tensors.

    Args:
        words: of all of them.
        table: see `truestep.kernels.packing.PackTable`.
        device: where the words are, if not on the CPU.
    """

    __slots__ = ("_start", "_table", "_words", "device")

    def __init__(
        self, words: "array[int] | Tensor", table: "array[int]", device: torch.device | None
    ) -> None:
        self._words, self._table, self.device = words, table, device
        self._start = start_of(words)

    @property
    def nbytes(self) -> int:
        """The memory of the words, in bytes."""
        return 8 * len(self._words)

    def address(self, first: int) -> int:
        """Where loops or kernels find a tensor's words; 0 where all bits are on.

        Args:
            first: the place in the table of its line's first number.
        """
        table = self._table
        return 0 if table[first + PACK_FULL] else self._start + 8 * table[first + PACK_WORDS]

    def bits(self, first: int, rows: Rows) -> Bits:
        """What has been packed of a tensor.

        Args:
            first: see `address`.
            rows: how its bits lie.
        """
        samples, positions, units = rows[:3]
        if self._table[first + PACK_FULL]:
            return Bits(None, samples, positions, units)
        place = self._table[first + PACK_WORDS]
        return _Slice(self._words, self._start, place, samples, positions, units, self.device)


def start_of(words: "array[int] | Tensor") -> int:
    """The address of words in one piece of memory."""
    return words.data_ptr() if isinstance(words, Tensor) else words.buffer_info()[0]


def join(pairs: Sequence[tuple[Bits, Bits | None]]) -> list[Bits]:
    """Whether any position of a sample is on, in both where there are two masks, of many at once.

    Args:
        pairs: of the same samples, positions and units.

    Example:
        >>> one, other = pack(torch.tensor([[1, 0], [1, 1]])), pack(torch.tensor([[1, 1], [0, 1]]))
        >>> [bits.mask().tolist() for bits in join([(one, other)])]
        [[[True, False], [False, True]]]
    """
    if not pairs:
        return []
    device = next((device for one, _ in pairs if (device := one.device) is not None), None)
    if not finds_addresses() or (device is None and not dispatch.installed()):
        return [_joined(one, other) for one, other in pairs]
    found: list[Bits | None] = []
    masks: list[Join] = []
    for one, other in pairs:
        first, second = one.address(device), 0 if other is None else other.address(device)
        if first == 0 and other is not None:
            one, first, second = other, second, 0  # noqa: PLW2901
        if second == 0 and (first == 0 or one.positions == 1):
            found.append(one if first != 0 else Bits(None, one.samples, 1, one.units))
        elif first is None or second is None:
            found.append(_joined(one, other))
        else:
            found.append(None)
            masks.append(Join(first, second, one.samples, one.positions, one.units))
    if not masks:
        return [bits for bits in found if bits is not None]
    words, places = packing.join(masks, device)
    start = start_of(words)
    made = iter(
        _Slice(words, start, place, mask.samples, 1, mask.units, device)
        if place >= 0
        else Bits(None, mask.samples, 1, mask.units)
        for mask, place in zip(masks, places, strict=True)
    )
    return [next(made) if bits is None else bits for bits in found]


def _joined(one: Bits, other: Bits | None) -> Bits:
    """`join` of one pair in torch operations."""
    both = one if other is None else one & other
    words = both.words
    if words is not None and both.positions != 1:
        words = packing.join_torch(words, both.samples, both.positions)
    return Bits(words, both.samples, 1, both.units)


def appended(parts: Sequence[Bits]) -> Bits:
    """Masks ``[samples, units]`` one after the other.

    Args:
        parts: of the same units; all but the last hold a multiple of 64 samples, or words that are not full
            are taken for gaps.

    Example:
        >>> import torch
        >>> mask = torch.rand(70, 3) < 0.5
        >>> appended([pack(mask[:64]), pack(mask[64:])]).mask().equal(mask)
        True
    """
    if len(parts) == 1:
        return parts[0]
    length, units = sum(part.length for part in parts), parts[0].units
    if not any(part.nbytes for part in parts):
        return Bits(None, length, 1, units)
    words = array("q")
    if finds_addresses() and all(part.add_to(words) for part in parts):
        return _Slice(words, start_of(words), 0, length, 1, units, None)
    device = next(part.words.device for part in parts if part.words is not None)
    return Bits(torch.cat([part.dense().to(device) for part in parts]), length, 1, units)
