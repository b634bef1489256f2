"""The slow reference: one backward pass per sample, in float64, nothing but autograd.

Everything fast in truestep is tested against these functions; they ship so that anyone can check.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["counts", "mean_effective_gradients"]


def counts(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Adaptive batch sizes by testing each sample's own gradient for zeros (aSGD, Algorithm 2, line 4).

    It tests the summed gradient of a sample, where `SampleCounter` asks whether any of its terms is
    non-zero; the two differ only where terms cancel or underflow.

    Args:
        model: left unchanged; a float64 copy is used. It must treat samples independently.
        loss_fn: (output, targets) to a scalar.
        inputs: ``[N, ...]``.
        targets: ``[N, ...]``.

    Returns:
        Parameter name to int64 tensor shaped like the parameter.

    Example:
        >>> import torch, truestep
        >>> model = torch.nn.Linear(2, 1)
        >>> inputs, targets = torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.full((2, 1), 9.0)
        >>> truestep.oracle.counts(model, torch.nn.functional.mse_loss, inputs, targets)
        {'weight': tensor([[2, 1]]), 'bias': tensor([2])}
    """
    found: dict[str, Tensor] = {}
    for gradients in _per_sample(model, loss_fn, inputs, targets):
        for name, gradient in gradients.items():
            contributed = (gradient != 0).to(torch.int64)
            found[name] = found[name] + contributed if name in found else contributed
    return found


def mean_effective_gradients(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Tensor,
    targets: Tensor,
    eps: float = 1.0,
) -> dict[str, Tensor]:
    """The summed gradient over m + eps, from per-sample gradients (aSGD, Algorithm 2, line 5).

    Args:
        model: left unchanged; a float64 copy is used.
        loss_fn: (output, targets) to a scalar, a mean over samples.
        inputs: ``[N, ...]``.
        targets: ``[N, ...]``.
        eps: the paper's non-zero natural number.

    Returns:
        Parameter name to float64 tensor shaped like the parameter.

    Example:
        >>> import torch, truestep
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> nn_init = torch.nn.init.ones_(model.weight)
        >>> inputs, targets = torch.tensor([[0.0], [2.0]]), torch.zeros(2, 1)
        >>> truestep.oracle.mean_effective_gradients(
        ...     model, torch.nn.functional.mse_loss, inputs, targets)
        {'weight': tensor([[4.]], dtype=torch.float64)}
    """
    sums: dict[str, Tensor] = {}
    for gradients in _per_sample(model, loss_fn, inputs, targets):
        for name, gradient in gradients.items():
            sums[name] = sums[name] + gradient if name in sums else gradient
    sizes = counts(model, loss_fn, inputs, targets)
    return {name: sums[name] / (sizes[name] + eps) for name in sums}


def _per_sample(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Tensor, targets: Tensor
) -> list[dict[str, Tensor]]:
    reference = copy.deepcopy(model).double()
    names = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    wide = inputs.double() if inputs.is_floating_point() else inputs
    goals = targets.double() if targets.is_floating_point() else targets
    rows = []
    for index in range(len(inputs)):
        loss = loss_fn(reference(wide[index : index + 1]), goals[index : index + 1])
        gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
        rows.append(
            {
                name: torch.zeros_like(p) if gradient is None else gradient.to_dense()
                for (name, p), gradient in zip(names.items(), gradients, strict=True)
            }
        )
    return rows
