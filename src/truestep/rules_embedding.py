"""The rules for tables whose rows are looked up."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from truestep.activity import Activity, Rows
from truestep.bits import pack
from truestep.layout import Layout

__all__ = [
    "embedding",
    "embedding_bag",
    "entries_of",
    "looks_up_positions",
    "owners_in_bags",
    "owners_of",
]


def embedding(
    layout: Layout,
    module: nn.Embedding,
    input: Tensor,
) -> Callable[[Tensor], dict[str, Activity]]:
    """`nn.Embedding`: feature d of a row needs output gradient d where the row is looked up."""
    # [samples, positions]; unit "position" makes every look-up a sample
    rows = layout.arrange(_held(input).unsqueeze(-1)).flatten(1)

    def activity(delta: Tensor) -> dict[str, Activity]:
        if not module.weight.requires_grad:
            return {}
        values = layout.arrange(delta).flatten(0, -2)
        owners = owners_of(len(rows), rows.shape[1], rows.device)
        return {"weight": _rows(module, rows.flatten(), owners, values, len(rows), by_entry=True)}

    return activity


def looks_up_positions(input: Tensor) -> bool:
    """Whether indices hold positions and no samples.

    Args:
        input: ``[T]`` or ``[1, T]`` of consecutive numbers, as from `arange`; or ``[T, S]`` of numbers for
            the distance of two positions, as in relative position biases.
    """
    if input.dim() == 2 and len(input) > 1:  # noqa: PLR2004
        # Fewer than three of either could look so by chance.
        if min(input.shape) < 3:  # noqa: PLR2004
            return False
        along = bool((input[1:, 1:] == input[:-1, :-1]).all())
        return along and bool((input != input[0, 0]).any())
    row = input.flatten()
    return len(row) > 1 and bool((row.diff() == 1).all())


def embedding_bag(
    layout: Layout,
    module: nn.EmbeddingBag,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Callable[[Tensor], dict[str, Activity]]:
    """`nn.EmbeddingBag`: a bag is a sample's one output; its rows share the output gradient."""
    del layout
    if input.dim() == 2:  # noqa: PLR2004
        bags, length = input.shape
        owners = owners_of(bags, length, input.device)
        starts = torch.arange(bags, device=input.device) * length
    else:
        if offsets is None:
            raise TypeError("nn.EmbeddingBag needs offsets for a one-dimensional input")
        starts = offsets[:-1] if module.include_last_offset else offsets
        bags = len(starts)
        owners = owners_in_bags(starts, len(input))
    rows = _held(input).flatten()
    largest = None
    if module.mode == "max" and module.weight.requires_grad:
        # Only the row that holds the maximum gets feature d's gradient; torch breaks ties, so ask it.
        # (scale_grad_by_freq=False, mode=2, sparse=False, per_sample_weights=None, last offset=False)
        options = (False, 2, False, None, False, module.padding_idx)
        largest = torch.embedding_bag(module.weight.detach(), rows, starts, *options)[3]
    kept = None if per_sample_weights is None else per_sample_weights.detach().flatten() != 0

    def activity(delta: Tensor) -> dict[str, Activity]:
        if not module.weight.requires_grad:
            return {}
        values = delta
        if largest is not None:
            values = (delta[owners] != 0) & (largest[owners] == rows.unsqueeze(-1))
        entries = (rows, owners) if kept is None else (rows[kept], owners[kept])
        by_entry = largest is not None
        return {"weight": _rows(module, *entries, values, bags, by_entry=by_entry)}

    return activity


def owners_of(samples: int, length: int, device: torch.device) -> Tensor:
    """For each entry its sample, int32, where all samples have as many entries."""
    owners = torch.arange(samples, dtype=torch.int32, device=device)
    return owners if length == 1 else owners.repeat_interleave(length)


def owners_in_bags(starts: Tensor, entries: int) -> Tensor:
    """For each entry its bag, int32.

    Args:
        starts: the first entry of each bag, ascending from 0.
        entries: how many there are.
    """
    lengths = starts.diff(append=starts.new_tensor([entries]))
    return torch.repeat_interleave(lengths, output_size=entries).int()


def entries_of(rows: Tensor) -> Tensor:
    """Indices in one piece, int32: a copy, since the caller may fill his own anew before the step."""
    return rows.flatten().to(torch.int32, copy=True, memory_format=torch.contiguous_format)


def _held(indices: Tensor) -> Tensor:
    """Indices as autograd may hold them: of such as do not lie in one piece, a copy that nobody guards."""
    return indices.contiguous()


def _rows(
    module: nn.Embedding | nn.EmbeddingBag,
    rows: Tensor,
    owners: Tensor,
    values: Tensor,
    samples: int,
    *,
    by_entry: bool,
) -> Rows:
    if module.padding_idx is not None:
        kept = rows != module.padding_idx
        rows, owners = rows[kept], owners[kept]
        values = values[kept] if by_entry else values
    outputs = pack(values)
    return Rows(module.weight.shape, samples, entries_of(rows), owners, outputs, by_entry)
