"""Which samples reach which elements of a parameter, and how many they are.

A sample *reaches* an element of a parameter if at one of its positions the product that autograd adds
to the element's gradient has only non-zero factors. Everything here is a pure value: an `Activity` says
for one use of one parameter which samples reach it; `truestep.combine` joins and adds them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from truestep.bits import Bits, pack

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

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """The tensors held, for their memory."""

    def count(self) -> Tensor:
        """The adaptive batch sizes m, int64 ``[*shape]``: how many samples reach each element."""
        counts = torch.zeros(self.shape, dtype=torch.int64, device=next(self.tensors()).device)
        step = max(1, CHUNK_ELEMENTS // max(1, self.shape.numel()))
        for start in range(0, self.samples, step):
            counts += self.masks(start, min(start + step, self.samples)).sum(0)
        return counts

    def count_rows(self) -> tuple[Tensor | None, Tensor]:
        """The rows that any sample reaches and their counts; rows None stands for all rows."""
        return None, self.count()


@dataclass(frozen=True)
class Elements(Activity):
    """A parameter whose every element is a unit of its own: biases, norm weights.

    Attributes:
        shape: the parameter's shape.
        bits: ``[samples, units]``, units in the order of the flattened parameter.
    """

    shape: torch.Size
    bits: Bits

    @property
    def flat(self) -> bool:
        """Whether the count is the bits on in `words`: always."""
        return True

    @property
    def words(self) -> tuple[Tensor | None, Tensor]:
        """Output and input words, as `truestep.kernels.scaling.scale_` takes them."""
        return None, self.bits.words

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples."""
        return self.bits.samples

    def masks(self, start: int, stop: int) -> Tensor:  # noqa: D102
        return self.bits.mask(start, stop).reshape(-1, *self.shape)

    def reached(self) -> Tensor:  # noqa: D102
        return self.bits.mask().any(-1)

    def tensors(self) -> Iterator[Tensor]:  # noqa: D102
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
    groups: int
    by_position: bool

    def unfold(self, inputs: Tensor) -> Tensor:
        """What the kernel sees at each output position.

        Args:
            inputs: bool ``[samples, positions in, channels]``.

        Returns:
            Float ``[samples, positions out, channels * kernel]``.
        """
        image = inputs.transpose(1, 2).float().reshape(len(inputs), -1, *self.size)
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


@dataclass(frozen=True)
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
    def flat(self) -> bool:
        """Whether the count is the bits on in both `words`: no positions are to be joined."""
        return self.window is None and not self.outputs.has_positions

    @property
    def words(self) -> tuple[Tensor | None, Tensor]:
        """Output and input words, as `truestep.kernels.scaling.scale_` takes them."""
        return self.outputs.words, self.inputs.words

    @property
    def by_position(self) -> bool:
        """Whether each output position of a convolution counts as a sample."""
        return self.window is not None and self.window.by_position

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples."""
        return self.outputs.samples * (self.outputs.length if self.by_position else 1)

    def factors(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Float masks ``[samples, groups, positions, outputs]`` and ``[..., inputs of a group]``."""
        groups = 1 if self.window is None else self.window.groups
        outputs, inputs = self.outputs.mask(start, stop), self.inputs.mask(start, stop)
        if self.window is not None:
            inputs = self.window.unfold(inputs)
        if self.by_position:
            outputs, inputs = outputs.flatten(0, 1), inputs.flatten(0, 1)
        if outputs.dim() == 2:  # noqa: PLR2004
            outputs, inputs = outputs.unsqueeze(1), inputs.unsqueeze(1)
        return (
            outputs.float().unflatten(-1, (groups, -1)).transpose(1, 2),
            inputs.float().unflatten(-1, (groups, -1)).transpose(1, 2),
        )

    def masks(self, start: int, stop: int) -> Tensor:  # noqa: D102
        if self.by_position:
            outputs, inputs = (factor[start:stop] for factor in self.factors())
        else:
            outputs, inputs = self.factors(start, stop)
        return (outputs.transpose(-1, -2) @ inputs > 0).reshape(-1, *self.shape)

    def count(self) -> Tensor:  # noqa: D102
        if self.outputs.has_positions and not self.by_position:
            return super().count()
        # One position per sample: the sum over samples is one product, exact up to 2**24 samples.
        outputs, inputs = (factor.squeeze(2).transpose(0, 1) for factor in self.factors())
        return (outputs.transpose(-1, -2) @ inputs).to(torch.int64).reshape(self.shape)

    def reached(self) -> Tensor:  # noqa: D102
        mask = self.outputs.mask().any(-1)
        if self.transposed:
            inputs = self.inputs.mask()
            mask = (inputs if self.window is None else self.window.unfold(inputs) > 0).any(-1)
        if self.by_position:
            return mask.flatten()
        return mask.any(-1) if mask.dim() > 1 else mask

    def tensors(self) -> Iterator[Tensor]:  # noqa: D102
        yield self.outputs.words
        yield self.inputs.words


@dataclass(frozen=True)
class Rows(Activity):
    """An embedding's weight: entry e says that sample ``owners[e]`` uses row ``rows[e]``.

    Attributes:
        shape: ``[rows, features]``.
        samples: number of samples.
        rows: int64 ``[entries]``.
        owners: int64 ``[entries]``.
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

    def in_order(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, owners and output words, the entries of one sample next to each other."""
        if len(self.owners) < 2 or bool((self.owners[1:] >= self.owners[:-1]).all()):  # noqa: PLR2004
            return self.rows, self.owners, self.outputs.words
        order = self.owners.argsort(stable=True)
        outputs = pack(self.outputs.mask()[order]) if self.by_entry else self.outputs
        return self.rows[order], self.owners[order], outputs.words

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each (sample, row) once: samples, rows, and mask ``[pairs, features]``."""
        keys, index = torch.unique(self.owners * self.shape[0] + self.rows, return_inverse=True)
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

    def count(self) -> Tensor:  # noqa: D102
        rows, counts = self.count_rows()
        dense = torch.zeros(self.shape, dtype=torch.int64, device=counts.device)
        return dense.index_copy_(0, rows, counts)

    def count_rows(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        _, rows, mask = self.pairs
        used, index = torch.unique(rows, return_inverse=True)
        # float32 sums of ones are exact up to 2**24 samples, and faster than integer ones
        counts = torch.zeros(len(used), self.shape[1], device=mask.device)
        return used, counts.index_add_(0, index, mask.float()).to(torch.int64)

    def reached(self) -> Tensor:  # noqa: D102
        mask = self.outputs.mask().any(-1)
        if not self.by_entry:
            return mask
        hits = torch.zeros(self.samples, device=mask.device)
        return hits.index_add_(0, self.owners, mask.float()) > 0

    def tensors(self) -> Iterator[Tensor]:  # noqa: D102
        yield self.rows
        yield self.owners
        yield self.outputs.words
