"""The ends of each unit's numbers, and how many are positive."""

import torch
from torch import Tensor

from truestep.kernels.dispatch import LIKE, all_plain, device_of, loops
from truestep.kernels.threads import spread

__all__ = ["scan", "scan_torch"]

NANOSECONDS = 0.25  # for each number
AT_ONCE = 1 << 17  # numbers


def scan(values: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest and the largest number of each unit, and how many are positive.

    Args:
        values: numbers, at least one of each unit.
        dim: where the units are, from 0 on.

    Returns:
        Two tensors ``[units]`` of the numbers' type, nan where any is nan, and int64 ``[units]`` on the CPU.

    Example:
        >>> scan(torch.tensor([[1.0, -1.0], [3.0, 0.0]]), 1)
        (tensor([ 1., -1.]), tensor([3., 0.]), tensor([2, 0]))
    """
    usual = dim == values.dim() - 1 and values.dtype in LIKE and device_of(values) is None
    if not (usual and all_plain([values])):
        return scan_torch(values, dim)
    units = values.shape[-1]
    low, high = values.new_empty(units), values.new_empty(units)
    positive = torch.empty(units, dtype=torch.int64, device="cpu")
    spread(
        loops().scan,
        units,
        values.numel() * NANOSECONDS,
        values.data_ptr(),
        values.numel() // units,
        units,
        LIKE[values.dtype],
        low.data_ptr(),
        high.data_ptr(),
        positive.data_ptr(),
    )
    return low, high, positive


def scan_torch(values: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of `scan` in torch operations.

    A few samples at a time, so that all three look at numbers that are still in the cache.
    """
    others = [other for other in range(values.dim()) if other != dim]
    if not others:
        return values, values, (values > 0).long().cpu()
    # Numbers are added many times faster than bools; so few are exact in any type.
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    step = len(values) if dim == 0 else max(1, AT_ONCE * len(values) // values.numel())
    positive = torch.empty((step, *values.shape[1:]), dtype=wide, device=values.device)
    lows, highs, counts = [], [], []
    for part in values.split(step):
        lows.append(part.amin(others))
        highs.append(part.amax(others))
        counts.append(torch.gt(part, 0, out=positive[: len(part)]).sum(others))
    on = torch.stack(counts).double().sum(0).long().cpu()
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0), on
