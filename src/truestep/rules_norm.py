"""The rule for normalisations with weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from truestep.activity import Activity, Elements
from truestep.bits import Bits, pack
from truestep.layout import Layout, Rule

__all__ = ["BATCH_NORM", "normalization", "normalization_twice"]

Norm = (
    nn.LayerNorm
    | nn.RMSNorm
    | nn.GroupNorm
    | nn.InstanceNorm1d
    | nn.InstanceNorm2d
    | nn.InstanceNorm3d
    | nn.BatchNorm1d
    | nn.BatchNorm2d
    | nn.BatchNorm3d
)


def normalization(
    layout: Layout,
    module: Norm,
    input: Tensor,
) -> Callable[[Tensor], dict[str, Activity]]:
    """Norms with weights: weight j needs output gradient and normalised input j, bias j the former."""
    if module.weight is None or not module.weight.requires_grad:
        return _activity(layout, module, None)
    factors = input.detach()
    # RMSNorm divides each row by one number.
    if not isinstance(module, nn.RMSNorm):
        with torch.no_grad():
            factors = _normalize(module, factors)
    return _activity(layout, module, factors)


def normalization_twice(
    layout: Layout, module: Norm, input: Tensor, gradient: Tensor
) -> Callable[[Tensor], dict[str, Activity]]:
    """Norms in a backward pass through their backward pass, dx = J (weight * delta).

    J, the derivative of the normalisation, is symmetric: where dx gets the gradient gg, weight j gets
    delta_j (J gg)_j.

    Args:
        layout: of the call.
        module: the norm.
        input: of the call.
        gradient: gg.
    """
    with torch.enable_grad():
        given = input.detach().requires_grad_()
        (turned,) = torch.autograd.grad(_normalize(module, given), given, gradient)
    return _activity(layout, module, turned)


def _activity(
    layout: Layout, module: Norm, factors: Tensor | None
) -> Callable[[Tensor], dict[str, Activity]]:
    """From output gradients to activity; what the weight's are multiplied with is `factors`."""
    channels = not isinstance(module, nn.LayerNorm | nn.RMSNorm)
    unit_dims = len(module.normalized_shape) if isinstance(module, nn.LayerNorm | nn.RMSNorm) else 1
    together = Layout(layout.batch_dim)

    def arrange(numbers: Tensor) -> Tensor:
        return together.arrange(numbers.movedim(1, -1) if channels else numbers, unit_dims)

    def samples(bits: Bits) -> Bits:
        return bits.apart() if layout.unit == "position" else bits.any_position()

    weight, bias = module.weight, getattr(module, "bias", None)
    met = None if factors is None else pack(arrange(factors))

    def activity(delta: Tensor) -> dict[str, Activity]:
        outputs = pack(arrange(delta))
        found: dict[str, Activity] = {}
        if met is not None:
            found["weight"] = Elements(weight.shape, samples(outputs & met))
        if bias is not None and bias.requires_grad:
            found["bias"] = Elements(bias.shape, samples(outputs))
        return found

    return activity


def _normalize(module: Norm, input: Tensor) -> Tensor:  # noqa: PLR0911 - one for each kind
    match module:
        case nn.GroupNorm():
            return functional.group_norm(input, module.num_groups, eps=module.eps)
        case nn.LayerNorm():
            return functional.layer_norm(input, module.normalized_shape, eps=module.eps)
        case nn.RMSNorm():
            return functional.rms_norm(input, module.normalized_shape, eps=module.eps)
    mean, variance = module.running_mean, module.running_var
    batch_statistics = module.training or mean is None or variance is None
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):  # noqa: SLF001
        if batch_statistics:
            return functional.instance_norm(input, eps=module.eps)
        return functional.instance_norm(
            input, mean, variance, use_input_stats=False, eps=module.eps
        )
    # Without momentum: this second look must not move the running statistics.
    if batch_statistics:
        return functional.batch_norm(input, None, None, training=True, eps=module.eps)
    return functional.batch_norm(input, mean, variance, training=False, eps=module.eps)


BATCH_NORM: dict[type[nn.Module], Rule] = {
    nn.BatchNorm1d: normalization,
    nn.BatchNorm2d: normalization,
    nn.BatchNorm3d: normalization,
}
"""Rules that count contributions *given the batch's statistics*, for those who accept that:
``SampleCounter(model, rules=truestep.RULES | truestep.rules.BATCH_NORM)``. No oracle exists for them,
since BatchNorm mixes the samples and no sample has a gradient of its own."""
