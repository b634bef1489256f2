"""One pure function per layer family: inputs and output gradients to activity.

A rule is called as the layer is, ``rule(layout, module, *args, **kwargs)``, in the forward pass; it
returns a function that takes the gradient of the layer's output and returns the activity of each of
the layer's own parameters. What the rule closes over is all that stays in memory between the two, so
it packs the inputs to bits at once. The rules are structural: see `truestep.activity`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from truestep.activity import Activity, Elements, Outer, Rows, Window
from truestep.bits import pack

__all__ = ["RULES", "Layout", "Rule", "Unit", "find_rule", "looks_up_positions"]

Unit = Literal["sample", "position"]
Rule = Callable[..., Callable[[Tensor], dict[str, Activity]]]


@dataclass(frozen=True)
class Layout:
    """Where a layer's tensors hold the samples.

    Attributes:
        batch_dim: the dimension that counts samples; None where there is none.
        unit: "sample": a sample contributes if any of its positions does; "position": each position
            is a sample.
    """

    batch_dim: int | None = 0
    unit: Unit = "sample"

    def arrange(self, mask: Tensor, unit_dims: int = 1) -> Tensor:
        """Reorders a mask, or numbers, to ``[samples, units]`` or ``[samples, positions, units]``.

        Args:
            mask: any shape; its last `unit_dims` dimensions are the units; without a dimension for
                samples it is one sample.
            unit_dims: how many trailing dimensions are the units.
        """
        lead = mask.dim() - unit_dims
        if lead == 0 or self.batch_dim is None:
            mask, lead = mask.unsqueeze(0), lead + 1
        mask = mask.flatten(lead)
        if lead == 1:
            return mask
        mask = mask.movedim(self.batch_dim or 0, 0)
        return mask.flatten(0, lead - 1) if self.unit == "position" else mask.flatten(1, lead - 1)


def _any_position(mask: Tensor) -> Tensor:
    return mask.any(1) if mask.dim() == 3 else mask  # noqa: PLR2004


def linear(
    layout: Layout,
    module: nn.Linear,
    input: Tensor,
) -> Callable[[Tensor], dict[str, Activity]]:
    """`nn.Linear`: weight (j, k) needs output gradient j and input k, bias j output gradient j."""
    inputs = pack(layout.arrange(input)) if module.weight.requires_grad else None

    def activity(delta: Tensor) -> dict[str, Activity]:
        found: dict[str, Activity] = {}
        outputs = pack(layout.arrange(delta))
        if inputs is not None:
            found["weight"] = Outer(module.weight.shape, outputs, inputs)
        if module.bias is not None and module.bias.requires_grad:
            found["bias"] = Elements(module.bias.shape, outputs.any_position())
        return found

    return activity


def convolution(
    layout: Layout,
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    input: Tensor,
) -> Callable[[Tensor], dict[str, Activity]]:
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: a linear map at each output position, any position counts."""
    rank = len(module.kernel_size)
    # Positions are kept apart: the kernel's view of the input is only laid out when counts are wanted.
    apart = Layout(layout.batch_dim)
    inputs, size = None, tuple(input.shape[-rank:])
    if module.weight.requires_grad:
        inputs = pack(apart.arrange(input.movedim(-rank - 1, -1)))

    def activity(delta: Tensor) -> dict[str, Activity]:
        mask = (delta != 0).movedim(-rank - 1, -1)
        found: dict[str, Activity] = {}
        if inputs is not None:
            zeros = module.padding_mode == "zeros"
            window = Window(
                size=size,
                kernel=tuple(module.kernel_size),
                stride=tuple(module.stride),
                dilation=tuple(module.dilation),
                padding=tuple(module._reversed_padding_repeated_twice),  # noqa: SLF001
                padding_mode="constant" if zeros else module.padding_mode,
                groups=module.groups,
                by_position=layout.unit == "position",
            )
            outputs = pack(apart.arrange(mask))
            found["weight"] = Outer(module.weight.shape, outputs, inputs, window)
        if module.bias is not None and module.bias.requires_grad:
            ends = pack(_any_position(layout.arrange(mask)))
            found["bias"] = Elements(module.bias.shape, ends)
        return found

    return activity


def embedding(
    layout: Layout,
    module: nn.Embedding,
    input: Tensor,
) -> Callable[[Tensor], dict[str, Activity]]:
    """`nn.Embedding`: feature d of a row needs output gradient d where the row is looked up."""
    # [samples, positions]; unit "position" makes every look-up a sample
    rows = layout.arrange(input.unsqueeze(-1)).flatten(1)

    def activity(delta: Tensor) -> dict[str, Activity]:
        if not module.weight.requires_grad:
            return {}
        mask = layout.arrange(delta != 0).flatten(0, -2)
        owners = torch.arange(len(rows), device=rows.device).repeat_interleave(rows.shape[1])
        return {"weight": _rows(module, rows.flatten(), owners, mask, len(rows), by_entry=True)}

    return activity


def looks_up_positions(input: Tensor) -> bool:
    """Whether indices are consecutive numbers without samples: ``[T]`` or ``[1, T]``, from `arange`."""
    row = input.squeeze(0) if input.dim() == 2 else input  # noqa: PLR2004
    return row.dim() == 1 and len(row) > 1 and bool((row.diff() == 1).all())


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
        owners = torch.arange(bags, device=input.device).repeat_interleave(length)
        starts = torch.arange(bags, device=input.device) * length
    else:
        if offsets is None:
            raise TypeError("nn.EmbeddingBag needs offsets for a one-dimensional input")
        starts = offsets[:-1] if module.include_last_offset else offsets
        bags = len(starts)
        places = torch.arange(len(input), device=input.device, dtype=starts.dtype)
        owners = torch.searchsorted(starts, places, right=True) - 1
    rows = input.flatten()
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
        mask = delta != 0
        if largest is not None:
            chosen = largest[owners] == rows.unsqueeze(-1)
            mask = mask[owners] & chosen
        entries = (rows, owners) if kept is None else (rows[kept], owners[kept])
        by_entry = largest is not None
        return {"weight": _rows(module, *entries, mask, bags, by_entry=by_entry)}

    return activity


def _rows(
    module: nn.Embedding | nn.EmbeddingBag,
    rows: Tensor,
    owners: Tensor,
    mask: Tensor,
    samples: int,
    *,
    by_entry: bool,
) -> Rows:
    if module.padding_idx is not None:
        kept = rows != module.padding_idx
        rows, owners = rows[kept], owners[kept]
        mask = mask[kept] if by_entry else mask
    outputs = pack(mask)
    return Rows(module.weight.shape, samples, rows.long(), owners.long(), outputs, by_entry)


def normalization(
    layout: Layout,
    module: nn.LayerNorm | nn.GroupNorm | nn.RMSNorm,
    input: Tensor,
) -> Callable[[Tensor], dict[str, Activity]]:
    """`nn.LayerNorm`, `nn.GroupNorm`, `nn.RMSNorm`: weight j needs output gradient and normalised input j."""
    channels = isinstance(module, nn.GroupNorm)
    unit_dims = 1 if isinstance(module, nn.GroupNorm) else len(module.normalized_shape)

    def arrange(mask: Tensor) -> Tensor:
        return layout.arrange(mask.movedim(1, -1) if channels else mask, unit_dims)

    weight, bias = module.weight, getattr(module, "bias", None)
    normalized = None
    if weight is not None and weight.requires_grad:
        with torch.no_grad():
            mask = arrange(_normalize(module, input.detach()) != 0)
        normalized = pack(mask)

    def activity(delta: Tensor) -> dict[str, Activity]:
        mask = arrange(delta != 0)
        found: dict[str, Activity] = {}
        if normalized is not None:
            both = _any_position(mask & normalized.mask())
            found["weight"] = Elements(weight.shape, pack(both))
        if bias is not None and bias.requires_grad:
            found["bias"] = Elements(bias.shape, pack(_any_position(mask)))
        return found

    return activity


def _normalize(module: nn.Module, input: Tensor) -> Tensor:
    match module:
        case nn.GroupNorm():
            return functional.group_norm(input, module.num_groups, eps=module.eps)
        case nn.LayerNorm():
            return functional.layer_norm(input, module.normalized_shape, eps=module.eps)
        case nn.RMSNorm():
            return functional.rms_norm(input, module.normalized_shape, eps=module.eps)
        case _:
            raise TypeError(f"no normalisation is known for {type(module).__name__}")


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.Embedding: embedding,
    nn.EmbeddingBag: embedding_bag,
    nn.LayerNorm: normalization,
    nn.GroupNorm: normalization,
    nn.RMSNorm: normalization,
}
"""The rules that `SampleCounter` uses unless told otherwise: layer class to rule."""


def find_rule(module: nn.Module, rules: Mapping[Any, Rule]) -> Rule | str:  # noqa: PLR0911
    """The rule for a module, or the reason why there is none.

    A subclass inherits the rule of its base only if it inherits `forward` too: with another forward
    pass the rule could be wrong.

    Args:
        module: a module with parameters of its own.
        rules: layer class to rule.
    """
    name = type(module).__name__
    if getattr(module, "scale_grad_by_freq", False):
        return f"{name}(scale_grad_by_freq=True) divides by counts itself; set it to False"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in rules:  # noqa: SLF001
        return f"{name} mixes the samples of a batch, so no sample has a gradient of its own"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"{name} is used by nn.MultiheadAttention without being called"
    if nn.utils.parametrize.is_parametrized(module):
        return f"{name} computes its parameters from others (a parametrization)"
    for base in type(module).__mro__:
        if base in rules:
            if type(module).forward is base.forward:  # type: ignore[attr-defined]
                return rules[base]
            return f"{name} has a forward of its own, so the rule for {base.__name__} may not hold"
    return f"{name} has no rule"
