"""Where something computed from a parameter meets data: from the gradient there to activity.

Two kinds: operations on elements, which broadcast the parameter to the data, and products of matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from truestep.activity import Activity, Elements, Outer, Rows
from truestep.bits import Bits, pack
from truestep.derived import Part, ordered
from truestep.layout import Layout
from truestep.placed import Placed, everything, scatter

__all__ = ["Use", "elements", "matrix"]


@dataclass(frozen=True)
class Use:
    """One use of a parameter, waiting for the gradient of an operation's output.

    Attributes:
        name: the parameter's.
        activity: from that gradient.
        others: the operation's other operands, as tensors or nodes of the autograd graph.
    """

    name: str
    activity: Callable[[Tensor], Activity]
    others: list[Any]

    def __call__(self, delta: Tensor | None) -> dict[str, Activity]:
        """The activity of the parameter, if the operation got a gradient."""
        return {} if delta is None else {self.name: self.activity(delta)}


def elements(
    layout: Layout,
    part: Part,
    shape: torch.Size,
    factor: Tensor | None,
    region: Callable[[Tensor], Tensor],
) -> Callable[[Tensor], Activity]:
    """An operation that broadcasts `part` to its output's shape.

    Args:
        layout: where the output holds the samples.
        part: what meets data.
        shape: the output's.
        factor: broadcasts to the output, not zero where the gradient is passed on; None for everywhere.
        region: what part of the output's gradient the operand gets.
    """
    units = _units(layout, part)
    lead = region(torch.empty(shape, device="meta")).dim() - (units or 0)
    if units is not None and lead > 0 and (factor is None or factor.shape == shape):
        passing = None if factor is None else pack(_apart(factor, units))
        return lambda delta: _joined(part, pack(_apart(region(delta), units)), passing)
    passed = None
    if factor is not None:
        passed = factor.shape, pack((factor != 0).reshape(len(factor), factor.shape[1:].numel()))

    def activity(delta: Tensor) -> Activity:
        mask = region(delta) != 0
        if passed is not None:
            whole, bits = passed
            mask = mask & bits.mask().reshape(whole)
        aligned = [1] * (mask.dim() - len(part.shape)) + list(part.shape)
        dim = layout.batch_dim
        if dim is None or mask.dim() <= dim:
            mask, aligned, dim = mask.unsqueeze(0), [1, *aligned], 0
        if layout.unit == "position":
            return _by_position(part, mask, aligned, dim)
        joined = [d for d, size in enumerate(aligned) if size == 1 and d != dim]
        mask = mask.any(joined, keepdim=True) if joined else mask
        mask = mask.movedim(dim, 0).flatten(1)
        if part.mixed:
            return everything(part.origin, mask.any(1))
        if aligned[dim] == 1 and part.in_order():
            return Elements(part.origin, pack(mask))
        places = part.places(mask.device).reshape(aligned).movedim(dim, 0).flatten(1)
        return Elements(part.origin, pack(scatter(mask, places, part.origin).flatten(1)))

    return activity


def _units(layout: Layout, part: Part) -> int | None:
    """How many trailing dimensions of the data are the elements of a part in order; None for other parts."""
    sizes = list(part.shape)
    while sizes[:1] == [1]:
        del sizes[0]
    plain = layout.unit == "sample" and layout.batch_dim == 0 and 1 not in sizes
    return len(sizes) if plain and not part.mixed and part.in_order() else None


def _apart(values: Tensor, units: int) -> Tensor:
    """Values as ``[samples, units]`` or ``[samples, positions, units]``."""
    values = values.detach().flatten(values.dim() - units) if units else values.unsqueeze(-1)
    return values.flatten(1, -2) if values.dim() > 2 else values  # noqa: PLR2004


def _joined(part: Part, outputs: Bits, passing: Bits | None) -> Activity:
    """Elements that are units of the data, at any position."""
    if passing is not None:
        outputs = outputs & passing
    return Elements(part.origin, outputs.any_position())


def _by_position(part: Part, mask: Tensor, aligned: list[int], dim: int) -> Activity:
    """The same where every position, all of the output's dimensions but the features, is a sample."""
    channels_first = mask.dim() > 3 and aligned[-1] == 1 and aligned[1] > 1  # noqa: PLR2004
    features = 1 if channels_first else mask.dim() - 1
    if features == dim:  # a number for each sample
        mask, aligned = mask.unsqueeze(-1), [*aligned, 1]
        features = mask.dim() - 1
    order = [dim, *(d for d in range(mask.dim()) if d not in {dim, features}), features]
    mask, sizes = mask.permute(order), [aligned[d] for d in order]
    lead = mask.shape[:-1]
    mask = mask.flatten(0, -2)
    if sizes[-1] == 1:
        mask = mask.any(1, keepdim=True)
    if part.mixed:
        return everything(part.origin, mask.any(1))
    count = torch.Size(sizes[:-1]).numel()
    rows = torch.arange(count, device=mask.device).reshape(sizes[:-1]).expand(lead).flatten()
    owners = torch.arange(len(mask), device=mask.device)
    shape = torch.Size([count, sizes[-1]])
    in_order = part.in_order() and (features == len(aligned) - 1 or count == 1) and dim == 0
    if in_order and count == 1:
        return Elements(part.origin, pack(mask))
    places = None
    if not in_order:
        places = part.places(mask.device).reshape(aligned).permute(order).flatten()
    use = Rows(shape, len(mask), rows.int(), owners.int(), pack(mask), by_entry=True)
    return Placed(part.origin, use, places)


def matrix(
    layout: Layout, part: Part, inputs: Tensor, arrange: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Activity]:
    """A product ``inputs @ part``; element (k, j) needs input k and output gradient j at one position.

    Args:
        layout: where the product holds the samples.
        part: what the data is multiplied by, ``[inputs, outputs]``.
        inputs: the data, ``[..., inputs]``, samples and positions apart.
        arrange: brings the product's gradient to ``[..., outputs]`` like `inputs`.
    """
    packed = pack(layout.arrange(inputs))

    def activity(delta: Tensor) -> Activity:
        mask = layout.arrange(arrange(delta) != 0)
        if part.mixed:
            any_input = pack(packed.mask().any(-1, keepdim=True))
            both = pack(mask.any(-1, keepdim=True)) & any_input
            return everything(part.origin, both.any_position().mask().squeeze(-1))
        outputs, strides = pack(mask), part.strides()
        if strides is not None and part.shape.numel() == part.origin.numel():
            if ordered(part.shape, strides):
                return Outer(part.origin, packed, outputs, transposed=True)
            if ordered(part.shape[::-1], strides[::-1]):
                return Outer(part.origin, outputs, packed)
        use = Outer(part.shape, packed, outputs, transposed=True)
        return Placed(part.origin, use, part.places(mask.device).flatten())

    return activity
