"""The slow reference: one backward pass per sample, in float64, nothing but autograd.

Everything fast in truestep is tested against these functions; they ship so that anyone can check.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["counts", "mean_effective_gradients"]


def counts(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    *,
    batch_dim: int = 0,
) -> dict[str, Tensor]:
    """Adaptive batch sizes by testing each sample's own gradient for zeros (aSGD, Algorithm 2, line 4).

    It tests the summed gradient of a sample, where `SampleCounter` asks whether any of its terms is
    non-zero; the two differ only where terms cancel or underflow.

    Args:
        model: left unchanged; a float64 copy is used. It must treat samples independently.
        loss_fn: (output, targets) to a scalar.
        inputs: ``[N, ...]``; or a tuple of arguments or a dict of keyword arguments, which may nest
            such tensors in containers.
        targets: ``[N, ...]``, or containers of such tensors.
        batch_dim: where the inputs hold the samples, if not in their first dimension.

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
    for gradients in _per_sample(model, loss_fn, inputs, targets, batch_dim):
        for name, gradient in gradients.items():
            contributed = (gradient != 0).to(torch.int64)
            found[name] = found[name] + contributed if name in found else contributed
    return found


def mean_effective_gradients(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    eps: float = 1.0,
    *,
    batch_dim: int = 0,
) -> dict[str, Tensor]:
    """The summed gradient over m + eps, from per-sample gradients (aSGD, Algorithm 2, line 5).

    Args:
        model: left unchanged; a float64 copy is used.
        loss_fn: (output, targets) to a scalar, a mean over samples.
        inputs: see `counts`.
        targets: see `counts`.
        eps: the paper's non-zero natural number.
        batch_dim: see `counts`.

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
    for gradients in _per_sample(model, loss_fn, inputs, targets, batch_dim):
        for name, gradient in gradients.items():
            sums[name] = sums[name] + gradient if name in sums else gradient
    sizes = counts(model, loss_fn, inputs, targets, batch_dim=batch_dim)
    return {name: sums[name] / (sizes[name] + eps) for name in sums}


def _per_sample(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    batch_dim: int,
) -> list[dict[str, Tensor]]:
    reference = copy.deepcopy(model).double()
    names = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    rows = []
    for index in range(next(_tensors(inputs)).shape[batch_dim]):
        output = _called(reference, _one(inputs, batch_dim, index))
        loss = loss_fn(output, _one(targets, 0, index))
        gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
        rows.append(
            {
                name: torch.zeros_like(p) if gradient is None else gradient.to_dense()
                for (name, p), gradient in zip(names.items(), gradients, strict=True)
            }
        )
    return rows


def _called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _one(value: Any, batch_dim: int, index: int) -> Any:
    """One sample of all tensors in nested containers, floating-point ones in float64."""
    if isinstance(value, Tensor):
        own = value.narrow(batch_dim, index, 1)
        return own.double() if own.is_floating_point() else own
    if isinstance(value, Mapping):
        return {key: _one(item, batch_dim, index) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_one(item, batch_dim, index) for item in value]
        # a named tuple is made from its fields, not from one iterable
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    return value
