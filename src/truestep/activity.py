"""Which samples reach which elements of a parameter, and how many they are.

A sample *reaches* an element of a parameter if at one of its positions the product that autograd adds
to the element's gradient has only non-zero factors. Everything here is a pure value: an `Activity` says
for one use of one parameter which samples reach it; `truestep.combine` joins and adds them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from truestep.bits import Bits, pack
from truestep.kernels import dispatch, stepping
from truestep.kernels.dispatch import device_of
from truestep.kernels.stepping import LINEAR, LOOKUPS, POSITIONS, Entry

__all__ = ["Activity", "Elements", "Outer", "Rows", "Window"]

# Per-sample masks are built for as many samples at once as fit this many elements (float32: 64 MB).
CHUNK_ELEMENTS = 1 << 24


class Activity(ABC):
    """Which samples reach which elements of one parameter of shape `shape`."""

    shape: torch.Size
    samples: int

    @abstractmethod
    def masks(self, start: int, stop: int) -> Tensor:
        """One mask per sample, bool ``[stop - start, *shape]``."""

    @abstractmethod
    def reached(self) -> Tensor:
        """Bool ``[samples]``: the samples with any non-zero gradient at the use's output."""

    def reaches(self) -> bool:
        """Whether there is such a sample."""
        return bool(self.reached().any())

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """The tensors held, for their memory."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are; only a CPU holds none."""
        return next((tensor.device for tensor in self.tensors()), torch.device("cpu"))

    def entries(self, device: torch.device | None = None) -> list[Entry] | None:
        """How loops or kernels see this, one entry after the other along the first dimension, or None.

        They hold addresses of what the activity holds.

        Args:
            device: of the kernels (`truestep.kernels.dispatch.device_of`), None for the CPU's loops.
        """
        return None

    def count(self) -> Tensor:
        """The adaptive batch sizes m, int64 ``[*shape]``: how many samples reach each element."""
        first = next(self.tensors(), None)
        device = None if first is None else device_of(first)
        entries = self.entries(device) if device is not None or dispatch.installed() else None
        if entries is not None:
            counts = torch.zeros(self.shape, dtype=torch.int64, device=device or "cpu")
            stepping.count(entries, counts)
            return counts
        return self.count_masks()

    def count_masks(self) -> Tensor:
        """The twin of `count` in torch operations."""
        counts = torch.zeros(self.shape, dtype=torch.int64, device=self.device)
        step = max(1, CHUNK_ELEMENTS // max(1, self.shape.numel()))
        for start in range(0, self.samples, step):
            counts += self.masks(start, min(start + step, self.samples)).sum(0)
        return counts

    def count_rows(self) -> tuple[Tensor | None, Tensor]:
        """The rows that any sample reaches, ascending, and their counts; rows None stands for all rows."""
        return None, self.count()

    def count_at(self, rows: Tensor) -> Tensor:
        """The counts of some rows, int64 ``[rows, ...]``.

        Args:
            rows: their numbers, int64.
        """
        return self.count()[rows]


@dataclass
class Elements(Activity):
    """A parameter whose every element is a unit of its own: biases, norm weights.

    Attributes:
        shape: the parameter's shape.
        bits: ``[samples, units]``, units in the order of the flattened parameter.
    """

    shape: torch.Size
    bits: Bits

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples."""
        return self.bits.samples

    def entries(self, device: torch.device | None = None) -> list[Entry] | None:  # noqa: D102
        words = self.bits.address(device)
        if words is None or self.bits.units != self.shape.numel():
            return None
        return [Entry(1, self.bits.units, 0, words, self.bits.samples)]

    def masks(self, start: int, stop: int) -> Tensor:  # noqa: D102
        mask = self.bits.mask(start, stop)
        return mask.reshape(len(mask), *self.shape)

    def reached(self) -> Tensor:  # noqa: D102
        return self.bits.mask().any(-1)

    def tensors(self) -> Iterator[Tensor]:  # noqa: D102
        if self.bits.words is not None:
            yield self.bits.words


@dataclass(frozen=True)
class Window:
    """How a convolution looks at its input: what turns input bits into the inputs of its weight.

    Attributes:
        size: spatial shape of the input.
        positions: spatial shape of the positions that the kernel is laid on.
        kernel: spatial shape of the kernel.
        stride: one number per spatial dimension.
        dilation: one number per spatial dimension.
        padding: as `torch.nn.functional.pad` takes it.
        padding_mode: as `torch.nn.functional.pad` takes it.
        channels: number of channels of the input.
        groups: number of groups of channels.
        by_position: every position that the kernel is laid on counts as a sample.
    """

    size: tuple[int, ...]
    positions: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    padding_mode: str
    channels: int
    groups: int
    by_position: bool

    @cached_property
    def numbers(self) -> Tensor | None:
        """int64, as compiled loops take it; None where they do not know the padding."""
        if self.padding_mode != "constant" and any(self.padding):
            return None
        lead = 3 - len(self.size)
        before, ones = self.padding[-2::-2], (1,) * lead  # the last axis comes first in `padding`
        sizes = (self.size, self.positions, self.kernel, self.stride, self.dilation)
        axes = [number for values in sizes for number in (*ones, *values)]
        axes += (*(0,) * lead, *before, self.channels, self.groups)
        return torch.tensor(axes, device="cpu")

    def unfold(self, inputs: Tensor) -> Tensor:
        """What the kernel sees at each output position.

        Args:
            inputs: bool ``[samples, positions in, channels]``.

        Returns:
            Float ``[samples, positions out, channels * kernel]``.
        """
        image = inputs.transpose(1, 2).float().unflatten(2, self.size)
        image = torch.nn.functional.pad(image, self.padding, self.padding_mode)
        rank = len(self.kernel)
        for axis, (kernel, stride, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True)
        ):
            image = image.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
            image = image.narrow(2 + axis, 0, self.positions[axis])
        # [samples, channels, *positions out, *kernel]
        image = image.flatten(2 + rank).flatten(2, 1 + rank)
        return image.transpose(1, 2).flatten(2)


@dataclass
class Outer(Activity):
    """A linear map's weight: element (j, k) needs output gradient j and input k at one position.

    Attributes:
        shape: the weight's, ``[outputs, inputs]`` (convolution: ``[outputs, inputs, *kernel]``).
        outputs: non-zero output gradients, ``[samples, outputs]`` or
            ``[samples, positions, outputs]``.
        inputs: non-zero inputs, likewise; a convolution's are not unfolded.
        window: a convolution's geometry.
        transposed: whether the two have changed places, as in a transposed convolution, whose kernel
            is laid on the output gradient.
    """

    shape: torch.Size
    outputs: Bits
    inputs: Bits
    window: Window | None = None
    transposed: bool = False

    @property
    def by_position(self) -> bool:
        """Whether each output position of a convolution counts as a sample."""
        return self.window is not None and self.window.by_position

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples."""
        return self.outputs.samples * (self.outputs.positions if self.by_position else 1)

    def entries(self, device: torch.device | None = None) -> list[Entry] | None:  # noqa: D102
        outputs, inputs, window = self.outputs, self.inputs, self.window
        to, of = outputs.address(device), inputs.address(device)
        if to is None or of is None:
            return None
        rows, samples, positions = outputs.units, outputs.samples, outputs.positions
        if (
            window is None
            and positions == 1 == inputs.positions
            and inputs.samples == samples
            and self.shape == (rows, inputs.units)
        ):
            return [Entry(rows, inputs.units, to, of, samples)]
        columns = self.shape.numel() // rows if rows else 0
        if not self._fits(columns):
            return None
        if window is None:
            kind = LINEAR if positions == 1 or not (to or of) else POSITIONS
            return [Entry(rows, columns, to, of, samples, positions, kind=kind)]
        numbers = window.numbers
        if numbers is None:
            return None
        place, apart = numbers.data_ptr(), int(window.by_position)
        return [Entry(rows, columns, to, of, samples, positions, place, apart, kind=POSITIONS)]

    def _fits(self, columns: int) -> bool:
        """Whether bits and shape belong together; compiled loops would not notice."""
        outputs, inputs, window = self.outputs, self.inputs, self.window
        seen = (outputs.positions, inputs.positions, inputs.units)
        if window is None:
            expected = (inputs.positions, inputs.positions, columns)
        else:
            places = math.prod(window.positions), math.prod(window.size)
            expected = (*places, window.channels)
            if columns * window.groups != window.channels * math.prod(window.kernel):
                return False
        whole = outputs.units * columns == self.shape.numel()
        return whole and seen == expected and outputs.samples == inputs.samples

    def factors(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Float masks ``[samples, groups, positions, outputs]`` and ``[..., inputs of a group]``."""
        groups = 1 if self.window is None else self.window.groups
        outputs, inputs = (
            bits.mask(start, stop) if bits.has_positions else bits.mask(start, stop).unsqueeze(1)
            for bits in (self.outputs, self.inputs)
        )
        if self.window is not None:
            inputs = self.window.unfold(inputs)
        if self.by_position:
            outputs, inputs = (mask.flatten(0, 1).unsqueeze(1) for mask in (outputs, inputs))
        outputs, inputs = (
            mask.float().unflatten(-1, (groups, mask.shape[-1] // groups)).transpose(1, 2)
            for mask in (outputs, inputs)
        )
        return outputs, inputs

    def masks(self, start: int, stop: int) -> Tensor:  # noqa: D102
        if self.by_position:
            outputs, inputs = (factor[start:stop] for factor in self.factors())
        else:
            outputs, inputs = self.factors(start, stop)
        return (outputs.transpose(-1, -2) @ inputs > 0).reshape(len(outputs), *self.shape)

    def count_masks(self) -> Tensor:  # noqa: D102
        if self.outputs.has_positions and not self.by_position:
            return super().count_masks()
        # One position per sample: the sum over samples is one product, exact up to 2**24 samples.
        outputs, inputs = (factor.squeeze(2).transpose(0, 1) for factor in self.factors())
        with torch.autocast(outputs.device.type, enabled=False):  # 16-bit sums would be rounded
            return (outputs.transpose(-1, -2) @ inputs).to(torch.int64).reshape(self.shape)

    def reaches(self) -> bool:  # noqa: D102
        return bool(self.count().any())

    def reached(self) -> Tensor:  # noqa: D102
        bits = self.outputs
        if self.transposed:
            bits = self.inputs
            if self.window is not None:
                images = bits.mask().reshape(-1, bits.positions, bits.units)
                bits = pack(self.window.unfold(images))
        mask = bits.mask().any(-1)
        if self.by_position:
            return mask.flatten()
        return mask.any(-1) if mask.dim() > 1 else mask

    def tensors(self) -> Iterator[Tensor]:  # noqa: D102
        for bits in (self.outputs, self.inputs):
            if bits.words is not None:
                yield bits.words


@dataclass(frozen=True)
class Rows(Activity):
    """An embedding's weight: entry e says that sample ``owners[e]`` uses row ``rows[e]``.

    Attributes:
        shape: ``[rows, features]``.
        samples: number of samples.
        rows: int32 ``[entries]``.
        owners: int32 ``[entries]``, in ascending order.
        outputs: non-zero output gradients, ``[entries, features]``, or ``[samples, features]``
            where all entries of a sample share one output (a bag).
        by_entry: which of the two.
    """

    shape: torch.Size
    samples: int
    rows: Tensor
    owners: Tensor
    outputs: Bits
    by_entry: bool

    def spread(self) -> "Rows":
        """The same with one output mask per entry."""
        if self.by_entry:
            return self
        return replace(self, outputs=pack(self.outputs.mask()[self.owners]), by_entry=True)

    def entries(self, device: torch.device | None = None) -> list[Entry] | None:  # noqa: D102
        if not self._fits():
            return None
        if len(self.rows) == 0:
            return [Entry(self.shape[0], self.shape[1])]
        words = self.outputs.address(device)
        if words is None or device_of(self.rows) != device:
            return None
        return [
            Entry(
                self.shape[0],
                self.shape[1],
                outputs=words,
                samples=self.samples,
                entries=len(self.rows),
                looked_up=self.rows.data_ptr(),
                owners=self.owners.data_ptr(),
                by_entry=int(self.by_entry),
                kind=LOOKUPS,
            )
        ]

    def entry_of(self, rows: Tensor) -> Entry | None:
        """How the CPU's loops see this where a gradient has values for some rows alone, or None.

        Args:
            rows: their numbers, int64, in one piece.
        """
        entries = self.entries()
        if entries is None or entries[0].kind != LOOKUPS or not len(rows):
            return None
        return entries[0]._replace(rows=1, stored=rows.data_ptr(), values=len(rows))

    def _fits(self) -> bool:
        """Whether tensors, bits and shape belong together; compiled loops would not notice."""
        length = len(self.rows) if self.by_entry else self.samples
        return (
            self.outputs.length == length
            and self.outputs.units == self.shape[1]
            and len(self.owners) == len(self.rows)
            and all(
                each.dtype is torch.int32 and each.is_contiguous()
                for each in (self.rows, self.owners)
            )
        )

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each (sample, row) once: samples, rows, and mask ``[pairs, features]``."""
        keys = self.owners.long() * self.shape[0] + self.rows
        keys, index = torch.unique(keys, return_inverse=True)
        owners, rows = keys // self.shape[0], keys % self.shape[0]
        mask = self.outputs.mask()
        if not self.by_entry:
            return owners, rows, mask[owners]
        if len(keys) == len(index):
            return owners, rows, torch.empty_like(mask).index_copy_(0, index, mask)
        hits = torch.zeros(len(keys), self.shape[1], device=mask.device)
        return owners, rows, hits.index_add_(0, index, mask.float()) > 0

    def masks(self, start: int, stop: int) -> Tensor:  # noqa: D102
        owners, rows, mask = self.pairs
        chosen = (owners >= start) & (owners < stop)
        dense = mask.new_zeros(stop - start, *self.shape)
        dense[owners[chosen] - start, rows[chosen]] = mask[chosen]
        return dense

    def count_masks(self) -> Tensor:  # noqa: D102
        _, rows, mask = self.pairs
        # float32 sums of ones are exact up to 2**24 samples, and faster than integer ones
        counts = torch.zeros(self.shape, device=mask.device)
        return counts.index_add_(0, rows, mask.float()).to(torch.int64)

    def count_rows(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        used, _, counts = self._count_used()
        return used, counts

    def count_at(self, rows: Tensor) -> Tensor:  # noqa: D102
        used, index, counts = self._count_used()
        if not len(used):
            return counts.new_zeros(len(rows), self.shape[1])
        # A sparse gradient mostly has just these.
        if rows.is_cpu and torch.equal(rows, self.rows.to(rows.dtype)):
            return counts[index]
        place = torch.searchsorted(used, rows).clamp_(max=len(used) - 1)
        return counts[place].masked_fill_((used[place] != rows).unsqueeze(1), 0)

    def _count_used(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that are looked up, for each entry its place among them, and their counts.

        What it takes does not grow with the table.
        """
        used, index = torch.unique(self.rows.long(), return_inverse=True)
        shape = torch.Size((len(used), self.shape[1]))
        return used, index, replace(self, shape=shape, rows=index.int()).count()

    def reached(self) -> Tensor:  # noqa: D102
        mask = self.outputs.mask().any(-1)
        if not self.by_entry:
            return mask
        hits = torch.zeros(self.samples, device=mask.device)
        return hits.index_add_(0, self.owners, mask.float()) > 0

    def tensors(self) -> Iterator[Tensor]:  # noqa: D102
        yield self.rows
        yield self.owners
        if self.outputs.words is not None:
            yield self.outputs.words
