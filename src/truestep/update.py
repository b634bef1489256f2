"""The two papers' formulas on plain tensors.

aSGD: Shi, Yang, Tang, Yang: "aSGD: Stochastic Gradient Descent with Adaptive Batch Size for Every
Parameter", Mathematics 10 (2022) 863, Algorithm 2. DA-SGD: Ahn: "A Directional Gradient Acceleration
Method In Mini-Batch Gradient Descent", equation 1.
"""

import torch
from torch import Tensor

from truestep.activity import Activity, Rows
from truestep.distributed import local
from truestep.fused import Pass
from truestep.kernels.dispatch import compiled_loops
from truestep.kernels.stepping import Options

__all__ = ["adaptive_factor", "boosted", "booster", "mean_effective", "scale_"]


def adaptive_factor(
    counts: Tensor,
    batch_size: int | Tensor,
    eps: float = 1.0,
    factor_limit: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What turns a gradient into the mean effective gradient: N / (m + eps), 1 where m = 0.

    The summed gradient over N samples is g * N for a mean loss; dividing it by the m samples that
    contributed (plus eps) gives g * N / (m + eps) (aSGD, Algorithm 2, lines 4 and 5).

    Args:
        counts: adaptive batch sizes m, any shape, integers.
        batch_size: N, the loss's denominator.
        eps: the paper's non-zero natural number; 0 gives the exact mean.
        factor_limit: the largest factor allowed.
        dtype: of the result.

    Example:
        >>> adaptive_factor(torch.tensor([0, 1, 4, 7]), batch_size=8).tolist()
        [1.0, 4.0, 1.600000023841858, 1.0]
    """
    # Not N / counts, which torch computes as N times the rounded 1 / counts.
    size = torch.as_tensor(batch_size, dtype=dtype, device=counts.device)
    factor = size / (counts.to(dtype) + eps)
    if factor_limit is not None:
        factor.clamp_(max=factor_limit)
    return factor.masked_fill_(counts == 0, 1.0)


def scale_(
    gradient: Tensor,
    activity: Activity,
    batch_size: int | Tensor,
    eps: float = 1.0,
    factor_limit: float | None = None,
) -> Tensor:
    """Multiplies a gradient in place by N / (m + eps), m counted from `activity`.

    Args:
        gradient: dense, or sparse over its first dimension, shaped like the parameter.
        activity: the samples that contributed to it.
        batch_size: N, the loss's denominator.
        eps: see `adaptive_factor`.
        factor_limit: see `adaptive_factor`.

    Returns:
        `gradient`.
    """
    if Pass.takes(gradient):
        whole = Pass(Options(eps=eps, limit=factor_limit))
        whole.add(gradient, (activity, batch_size))
        whole.run()
        return gradient
    wide = _wide(gradient, activity)
    if wide is not None:
        return gradient.copy_(scale_(wide, activity, batch_size, eps, factor_limit))
    options = (eps, factor_limit, _real(gradient))
    if gradient.is_sparse:
        # Each stored value is scaled by its row's factor; coalescing or not makes no difference.
        counts = activity.count_at(gradient._indices()[0])  # noqa: SLF001
        factor = adaptive_factor(counts, batch_size, *options)
        gradient._values().mul_(factor)  # noqa: SLF001
        return gradient
    used, counts = activity.count_rows()
    factor = adaptive_factor(counts, batch_size, *options)
    if used is None:
        return gradient.mul_(factor)
    return gradient.index_copy_(0, used, (gradient[used] * factor).to(gradient.dtype))


def mean_effective(
    gradient: Tensor,
    found: tuple[Activity, int | Tensor] | None,
    eps: float = 1.0,
    factor_limit: float | None = None,
) -> Tensor:
    """The mean effective gradient as a new tensor; the gradient itself where nothing was `found`.

    Args:
        gradient: as for `scale_`, or sharded: a rank's rows are corrected.
        found: the samples that contributed to it, and N.
        eps: see `adaptive_factor`.
        factor_limit: see `adaptive_factor`.
    """
    if found is None:
        return gradient
    wide = _wide(gradient, found[0])
    if wide is not None:
        return torch.empty_like(gradient).copy_(scale_(wide, *found, eps, factor_limit))
    corrected = gradient.clone()
    scale_(local(corrected), *found, eps, factor_limit)
    return corrected


def _wide(gradient: Tensor, activity: Activity) -> Tensor | None:
    """A copy of at least 32 bits that loops or kernels go over where they do not go over the gradient.

    The product is rounded once, as torch rounds it. Of an embedding only the rows in use are looked at.
    """
    if isinstance(activity, Rows) or not compiled_loops(gradient) or Pass.takes(gradient):
        return None
    wide = gradient.to(_real(gradient), memory_format=torch.contiguous_format, copy=True)
    return wide if Pass.takes(wide) else None


def _real(gradient: Tensor) -> torch.dtype:
    """What factors are computed in."""
    return torch.promote_types(gradient.dtype, torch.float32).to_real()


def booster(gradient: Tensor, previous: Tensor) -> Tensor:
    """DA-SGD's rho: the average of two gradients where their signs agree, else 0 (equation 1).

    Args:
        gradient: the present gradient, any shape, real.
        previous: the gradient one step before, same shape.

    Example:
        >>> booster(torch.tensor([1.0, -1.0, 2.0]), torch.tensor([3.0, -2.0, -2.0])).tolist()
        [2.0, -1.5, 0.0]
    """
    agree = torch.sign(gradient) == torch.sign(previous)
    return torch.where(agree, (gradient + previous) / 2, torch.zeros_like(gradient))


def boosted(gradient: Tensor, previous: Tensor) -> Tensor:
    """The gradient plus its `booster`; complex gradients part by part.

    Args:
        gradient: the present gradient, any shape.
        previous: the gradient one step before, same shape.

    Example:
        >>> boosted(torch.tensor([1.0, 1.0]), torch.tensor([3.0, -3.0])).tolist()
        [3.0, 1.0]
    """
    if gradient.is_complex():
        parts = boosted(torch.view_as_real(gradient), torch.view_as_real(previous))
        return torch.view_as_complex(parts)
    return gradient + booster(gradient, previous)
