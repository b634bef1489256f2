"""Activity of several uses and batches: `joint`, `total`, and what they are made of."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from truestep.activity import Activity, Elements, Outer, Rows
from truestep.bits import Bits, appended, pack
from truestep.blocks import Blocks
from truestep.kernels.packing import WORD
from truestep.kernels.stepping import Entry

__all__ = ["Counts", "Joint", "Shared", "Total", "joint", "nbytes", "one_batch", "total"]


# So many bytes of bits are kept even where counts would take fewer: it takes long to count small things, and
# most biases' bits are held for the weights anyway.
LITTLE = 1 << 16


@dataclass(frozen=True)
class Joint(Activity):
    """Several uses of one parameter by the same samples: a sample counts once."""

    uses: tuple[Activity, ...]

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The parameter's shape."""
        return self.uses[0].shape

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples."""
        return self.uses[0].samples

    def masks(self, start: int, stop: int) -> Tensor:  # noqa: D102
        mask = self.uses[0].masks(start, stop)
        for use in self.uses[1:]:
            mask = mask | use.masks(start, stop)
        return mask

    def reached(self) -> Tensor:  # noqa: D102
        return torch.stack([use.reached() for use in self.uses]).any(0)

    def tensors(self) -> Iterator[Tensor]:  # noqa: D102
        for use in self.uses:
            yield from use.tensors()


@dataclass(frozen=True)
class Total(Activity):
    """Separate batches: their counts add.

    Attributes:
        parts: of each batch.
        held: the memory of all, in bytes.
    """

    parts: tuple[Activity, ...]
    held: int

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The parameter's shape."""
        return self.parts[0].shape

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples."""
        return sum(part.samples for part in self.parts)

    def masks(self, start: int, stop: int) -> Tensor:  # noqa: D102
        pieces, first = [], 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, part.samples)
            if low < high:
                pieces.append(part.masks(low, high))
            first += part.samples
        return torch.cat(pieces)

    @cached_property
    def as_one(self) -> Activity | None:
        """See `one_batch`."""
        return one_batch(self.parts)

    def entries(self, device: torch.device | None = None) -> list[Entry] | None:  # noqa: D102
        return None if self.as_one is None else self.as_one.entries(device)

    def count(self) -> Tensor:  # noqa: D102
        if self.as_one is not None:
            return self.as_one.count()
        counts = self.parts[0].count()
        for part in self.parts[1:]:
            counts = counts + part.count()
        return counts

    def reached(self) -> Tensor:  # noqa: D102
        return torch.cat([part.reached() for part in self.parts])

    def reaches(self) -> bool:  # noqa: D102
        return any(part.reaches() for part in self.parts)

    def tensors(self) -> Iterator[Tensor]:  # noqa: D102
        for part in self.parts:
            yield from part.tensors()


@dataclass(frozen=True)
class Shared(Activity):
    """A use without samples of its own, such as a table of positions: each of several samples repeats it.

    Its gradient reaches it summed over those samples, so that this is an upper bound.
    """

    use: Activity
    times: int

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The parameter's shape."""
        return self.use.shape

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples."""
        return self.times * self.use.samples

    def masks(self, start: int, stop: int) -> Tensor:  # noqa: D102
        index = torch.arange(start, stop, device=self.device) % self.use.samples
        return self.use.masks(0, self.use.samples)[index]

    def count(self) -> Tensor:  # noqa: D102
        return self.times * self.use.count()

    def reached(self) -> Tensor:  # noqa: D102
        return self.use.reached().repeat(self.times)

    def tensors(self) -> Iterator[Tensor]:  # noqa: D102
        return self.use.tensors()


@dataclass(frozen=True)
class Counts(Activity):
    """Counts that took the place of bits which would have outgrown them.

    Attributes:
        counts: int64, shaped like the parameter.
        samples: number of samples they were taken over.
    """

    counts: Tensor
    samples: int

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The parameter's shape."""
        return self.counts.shape

    def masks(self, start: int, stop: int) -> Tensor:  # noqa: D102
        raise TypeError(
            f"counts of {self.samples} samples hold no mask of samples {start} to {stop}"
        )

    def reached(self) -> Tensor:  # noqa: D102
        raise TypeError(f"counts of {self.samples} samples do not say which samples they were")

    def reaches(self) -> bool:  # noqa: D102
        return bool(self.counts.any())

    def entries(self, device: torch.device | None = None) -> list[Entry] | None:  # noqa: D102
        counts = self.counts
        there = counts.is_cpu if device is None else counts.device == device
        if not (there and counts.dtype == torch.int64 and counts.is_contiguous()):
            return None
        rows = self.shape[0] if self.shape else 1
        columns = self.shape.numel() // max(1, rows)
        return [Entry(rows, columns, counts=counts.data_ptr())]

    def count(self) -> Tensor:  # noqa: D102
        return self.counts.clone()  # the caller's own

    def tensors(self) -> Iterator[Tensor]:  # noqa: D102
        yield self.counts


def joint(uses: Sequence[Activity]) -> Activity:
    """Joins the uses of one parameter in one forward call: a sample counts once.

    Args:
        uses: at least one, of the same parameter and the same samples.
    """
    first = uses[0]
    if len(uses) == 1:
        return first
    if all(isinstance(use, Elements) for use in uses):
        bits = first.bits  # type: ignore[attr-defined]
        for use in uses[1:]:
            bits = bits | use.bits  # type: ignore[attr-defined]
        return Elements(first.shape, bits)
    if all(isinstance(use, Rows) for use in uses):
        return _append([use.spread() for use in uses], [0] * len(uses), first.samples)  # type: ignore[attr-defined]
    maps = [_as_outer(use) for use in uses]
    # Which side the output gradients are on, all must say alike.
    if None not in maps and len({use.transposed for use in maps if use is not None}) == 1:
        # Further positions of the same samples.
        outputs = _side_by_side([use.outputs for use in maps if use is not None])
        inputs = _side_by_side([use.inputs for use in maps if use is not None])
        turned = any(use.transposed for use in maps if use is not None)
        return Outer(first.shape, outputs, inputs, transposed=turned)
    if all(isinstance(use, Blocks) for use in uses):
        blocks: dict[int, list[Activity]] = {}
        for use in uses:
            for start, part in use.parts.items():  # type: ignore[attr-defined]
                blocks.setdefault(start, []).append(part)
        return Blocks(first.shape, {start: joint(parts) for start, parts in blocks.items()})
    return Joint(tuple(uses))


def total(parts: Sequence[Activity]) -> Activity:
    """Adds the activity of separate batches; bits that would outgrow their counts become counts.

    Args:
        parts: at least one, of the same parameter.
    """
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Rows) for part in parts):
        offsets, samples = [], 0
        for part in parts:
            offsets.append(samples)
            samples += part.samples
        return _append([part.spread() for part in parts], offsets, samples)  # type: ignore[attr-defined]
    held = sum(map(nbytes, parts))
    whole = Total(tuple(flat for part in parts for flat in _parts(part)), held)
    if held <= max(LITTLE, 8 * whole.shape.numel()):
        return whole
    return Counts(whole.count(), whole.samples)


def nbytes(activity: Activity) -> int:
    """The memory that it takes, in bytes."""
    if isinstance(activity, Total):
        return activity.held
    if isinstance(activity, Outer):
        return activity.outputs.nbytes + activity.inputs.nbytes
    if isinstance(activity, Elements):
        return activity.bits.nbytes
    return sum(tensor.nbytes for tensor in activity.tensors())


def _parts(activity: Activity) -> tuple[Activity, ...]:
    return activity.parts if isinstance(activity, Total) else (activity,)


def one_batch(parts: Sequence[Activity]) -> Activity | None:
    """Separate batches as one, for counting: there may be gaps between its samples, which reach nothing.

    Words of bits are put one after the other, which compiled loops count in one go.

    Args:
        parts: at least two, of the same parameter.

    Returns:
        None where there is no such activity.
    """
    shape = parts[0].shape
    elements = [part for part in parts if isinstance(part, Elements)]
    if len(elements) == len(parts):
        bits = _on_end([part.bits for part in elements])
        return None if bits is None else Elements(shape, *bits)
    maps = [part for part in parts if isinstance(part, Outer)]
    if len(maps) != len(parts) or len({(part.window, part.transposed) for part in maps}) > 1:
        return None
    masks = _on_end([part.outputs for part in maps], [part.inputs for part in maps])
    return None if masks is None else replace(maps[0], outputs=masks[0], inputs=masks[1])


def _on_end(*masks: Sequence[Bits]) -> list[Bits] | None:
    """Masks of one batch after the other, each as one mask; None where words cannot just follow each other.

    Args:
        masks: of all batches each, of the same samples. Samples without positions may end within a word: the
            rest of it is taken for samples that are off in each mask that has words.
    """
    if any((b.positions, b.units) != (m[0].positions, m[0].units) for m in masks for b in m):
        return None
    samples = sum(bits.samples for bits in masks[0])
    if any(bits.nbytes for mask in masks for bits in mask):
        whole = all(bits.length % WORD == 0 for mask in masks for bits in mask[:-1])
        if not whole:
            if any(mask[0].positions != 1 for mask in masks):
                return None
            samples += sum(-bits.samples % WORD for bits in masks[0][:-1])
    return [appended(mask).shaped(samples, mask[0].positions) for mask in masks]


def _as_outer(use: Activity) -> Outer | None:
    """A linear map without a window; an embedding is one, of rows that are on where they are looked up."""
    if isinstance(use, Outer):
        return use if use.window is None else None
    if not isinstance(use, Rows):
        return None
    entries, owners = use.spread(), use.owners.long()
    lookups = torch.bincount(owners, minlength=use.samples)
    positions = max(1, int(lookups.max())) if len(lookups) else 1
    # The place of each entry among all samples' positions, some of which may hold none.
    place = torch.arange(len(owners), device=owners.device) - (lookups.cumsum(0) - lookups)[owners]
    place += owners * positions
    length, (rows, features) = use.samples * positions, use.shape
    words = torch.zeros(-(-length // WORD), rows, dtype=torch.int64, device=owners.device)
    found = entries.outputs.mask()
    # Without an output gradient a look-up reaches nothing, and is no position that was reached.
    bits = found.any(-1).long() << place % WORD
    # Adding is joining: no two entries have the same place.
    words.view(-1).index_add_(0, place // WORD * rows + use.rows, bits)
    inputs = torch.zeros(length, features, dtype=torch.bool, device=owners.device)
    inputs[place] = found
    return Outer(
        use.shape,
        Bits(words, use.samples, positions, rows),
        pack(inputs.reshape(use.samples, positions, features)),
    )


def _side_by_side(parts: Sequence[Bits]) -> Bits:
    """The positions of each sample one after the other."""
    samples, units = parts[0].samples, parts[0].units
    positions = sum(part.positions for part in parts)
    if samples == 0:
        return parts[0].shaped(0, positions)
    # So many samples at once fill whole words.
    step = WORD // math.gcd(WORD, positions)
    found = []
    for start in range(0, samples, step):
        stop = min(start + step, samples)
        masks = [part.mask(start, stop).reshape(stop - start, -1, units) for part in parts]
        found.append(pack(torch.cat(masks, 1)).apart())
    return appended(found).shaped(samples, positions)


def _append(parts: Sequence[Rows], offsets: Sequence[int], samples: int) -> Rows:
    rows = torch.cat([part.rows for part in parts])
    owners = torch.cat([p.owners + offset for p, offset in zip(parts, offsets, strict=True)])
    outputs = torch.cat([part.outputs.mask() for part in parts])
    if not any(offsets):
        owners, order = owners.sort(stable=True)
        rows, outputs = rows[order], outputs[order]
    return Rows(parts[0].shape, samples, rows, owners, pack(outputs), by_entry=True)
