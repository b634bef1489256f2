"""Multiplying a gradient by a factor of its adaptive batch sizes, counted on the way."""

import torch
from torch import Tensor

from truestep.kernels.dispatch import compiled_loops, loops

__all__ = ["can_scale", "scale_", "scale_rows_"]


def can_scale(gradient: Tensor) -> bool:
    """Whether `scale_` takes this gradient."""
    wide = gradient.dtype in {torch.float32, torch.float64}
    return wide and compiled_loops(gradient) and gradient.is_contiguous()


def scale_(gradient: Tensor, outputs: Tensor | None, inputs: Tensor, factors: Tensor) -> None:
    """Multiplies ``gradient[j, k]`` in place by ``factors[m]``, m the bits on in output j and input k.

    Args:
        gradient: ``[J, K]`` seen through any shape, contiguous.
        outputs: int64 ``[words, J]``; None for one output whose bits are all on.
        inputs: int64 ``[words, K]``.
        factors: ``[samples + 1]``, of the gradient's dtype.
    """
    if outputs is None:
        outputs = inputs.new_full((len(inputs), 1), -1)
    flat = gradient.detach().view(outputs.shape[1], inputs.shape[1])
    loops().scale(flat.numpy(), outputs.numpy(), inputs.numpy(), factors.numpy())


def scale_rows_(
    gradient: Tensor,
    rows: Tensor,
    owners: Tensor,
    outputs: Tensor,
    factors: Tensor,
    *,
    by_entry: bool,
) -> None:
    """Multiplies the rows of an embedding's gradient in place by their factors.

    Args:
        gradient: ``[V, D]``, contiguous.
        rows: int64 ``[entries]``, the row that each entry looks up.
        owners: int64 ``[entries]``, the sample of each entry.
        outputs: int64 ``[words, D]``, the bits of entries or of samples.
        factors: ``[samples + 1]``, of the gradient's dtype.
        by_entry: whether `outputs` are of entries.
    """
    loops().scale_rows(
        gradient.detach().numpy(),
        rows.numpy(),
        owners.numpy(),
        outputs.numpy(),
        by_entry,
        factors.numpy(),
    )
