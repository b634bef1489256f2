"""Activations, losses and update rules of stacked replicas, in torch operations."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from truestep.ensemble.settings import RMSPROP_SMOOTHING, Network, Optimizer

__all__ = ["ACTIVATIONS", "SLOPES", "descend", "loss_and_gradient"]

SLOPE = 0.01


def _gelu_slope(delta: Tensor, z: Tensor) -> Tensor:
    below = 0.5 * (1 + torch.erf(z * 0.5**0.5))
    density = torch.exp(-0.5 * z * z) * (2 * torch.pi) ** -0.5
    slope: Tensor = delta * (below + z * density)
    return slope


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
}
# From the gradient by an activation's output, and its argument, to that by the argument.
SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda delta, z: torch.where(z > 0, delta, 0.0),
    "leaky_relu": lambda delta, z: torch.where(z > 0, delta, delta * SLOPE),
    "tanh": lambda delta, z: delta * (1 - torch.tanh(z).square()),
    "sigmoid": lambda delta, z: delta * (1 - torch.sigmoid(z)) * torch.sigmoid(z),
    "gelu": _gelu_slope,
}
OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda z: z,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: z.softmax(2),
}


def loss_and_gradient(network: Network, z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each replica's summed loss, and its gradient by the last layer's sums.

    Args:
        network: whose loss it is.
        z: those sums, ``[replicas, n, outputs]``.
        targets: likewise.
    """
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        if network.loss == "cross_entropy":
            each = -(targets * z.log_softmax(2)).sum(2)
        elif network.loss == "binary_cross_entropy":
            cross = functional.binary_cross_entropy_with_logits
            each = cross(z, targets, reduction="none").mean(2)
        else:
            squares = (OUTPUTS[network.output](z) - targets).square()
            each = squares.sum(2) if network.loss == "squared_error" else squares.mean(2)
        losses = each.sum(1)
        (delta,) = torch.autograd.grad(losses.sum(), z)
    return losses.detach(), delta


def descend(
    optimizer: Optimizer,
    weights: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    lr: float,
    step: int,
) -> None:
    """The step of torch's optimizer of that name, in place.

    Args:
        optimizer: the settings.
        weights: ``[parameters]``.
        gradient: corrected, boosted and with weight decay.
        first: momentum, first moment or squares.
        second: second moment.
        lr: of this step.
        step: how many there were before.
    """
    eps = optimizer.eps or 0.0
    if optimizer.name == "sgd":
        if optimizer.momentum:
            first.mul_(optimizer.momentum if step else 0.0).add_(gradient)
            nesterov = optimizer.nesterov
            gradient = gradient.add(first, alpha=optimizer.momentum) if nesterov else first
        weights.add_(gradient, alpha=-lr)
    elif optimizer.name == "adagrad":
        first.addcmul_(gradient, gradient)
        weights.addcdiv_(gradient, first.sqrt().add_(eps), value=-lr)
    elif optimizer.name == "rmsprop":
        first.mul_(RMSPROP_SMOOTHING).addcmul_(gradient, gradient, value=1 - RMSPROP_SMOOTHING)
        weights.addcdiv_(gradient, first.sqrt().add_(eps), value=-lr)
    else:
        beta_1, beta_2 = optimizer.betas
        first.lerp_(gradient, 1 - beta_1)
        second.mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
        root = (1 - beta_2 ** (step + 1)) ** 0.5
        size = lr / (1 - beta_1 ** (step + 1))
        weights.addcdiv_(first, second.sqrt().div_(root).add_(eps), value=-size)
