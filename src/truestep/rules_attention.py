"""The rule for `nn.MultiheadAttention`, which uses the parameters of four linear maps by itself.

What its output gradient does not show is read off the autograd graph inside the layer: hooks on the nodes
that use a parameter see the gradient there, dropout included, and the input of the output projection is
what its node has saved.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from truestep.activity import Activity, Elements, Outer
from truestep.bits import Bits, pack
from truestep.blocks import Blocks
from truestep.errors import TruestepError
from truestep.graph import Node, saved_tensors_are_packed, uses_of
from truestep.layout import Inside, Layout

__all__ = ["attention"]

WAY_OUT = (
    "keep its plain gradients: SampleCounter(model, unsupported='mean') and rules without "
    "nn.MultiheadAttention"
)
PACKED = {"in_proj_weight", "in_proj_bias"}
Inner = Callable[..., dict[str, Activity]]
# What the operation behind a linear map calls its input.
SAVED_INPUT = {
    "AddmmBackward0": "_saved_mat1",
    "MmBackward0": "_saved_self",
    "LinearBackward0": "_saved_input",
}


def attention(
    layout: Layout,
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Inside:
    """`nn.MultiheadAttention`: its projections are linear maps, each at the positions it is applied to.

    Weight (j, k) of a projection needs its output gradient j and its input k at one position, bias j its
    output gradient j. The gradients of the key projection's bias add up to 0 over the positions of a
    sample, but its terms do not vanish: it counts like the query's.
    """
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters() if p.requires_grad}
    unbatched = query.dim() == 2  # noqa: PLR2004
    swapped = module.batch_first and not unbatched

    def time_first(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor.unsqueeze(1) if unbatched else tensor.transpose(0, 1) if swapped else tensor

    # Inside the layer, and so below, tensors are [positions, samples, units].
    sources = [time_first(tensor) for tensor in (query, key, value)]
    _, samples, width = sources[0].shape
    place = Place(
        module,
        Layout(None if layout.batch_dim is None else 1, layout.unit),
        samples,
        max(len(source) for source in sources),
    )

    def inputs_of(name: str, piece: int, node: Node) -> Bits | None:
        if not name.endswith("weight"):
            return None
        if name != "out_proj.weight":
            return place.pack(name, sources["qkv".find(name[0]) if name[0] in "qkv" else piece])
        attended = _saved_input(node)
        if attended is None:
            masks = (key_padding_mask, attn_mask, is_causal)
            attended = _attend(module, sources, masks, unbatched=unbatched)
        return place.pack(name, attended.detach())

    def see(outputs: list[Tensor]) -> tuple[None, list[tuple[Node, Inner]]]:
        inner: list[tuple[Node, Inner]] = []
        missing = set(names.values())
        for node, uses in uses_of(outputs, (query, key, value, attn_mask, key_padding_mask), names):
            linear = [(name, piece * width, inputs_of(name, piece, node)) for name, piece in uses]
            inner.append((node, partial(_use, place, linear)))
            missing -= {name for name, _ in uses}
        if missing:
            raise TruestepError(
                f"nn.MultiheadAttention used {', '.join(map(repr, sorted(missing)))} in a way that "
                f"does not show in the autograd graph; {WAY_OUT}"
            )
        return None, inner

    return Inside(see)


@dataclass(frozen=True)
class Place:
    """What a use needs to know of its call.

    Attributes:
        module: the layer.
        layout: of tensors ``[positions, samples, units]``.
        samples: how many there are.
        longest: the largest number of positions among queries and keys.
    """

    module: nn.MultiheadAttention
    layout: Layout
    samples: int
    longest: int

    def pack(self, name: str, values: Tensor) -> Bits:
        """The bits of a parameter's inputs or output gradients, ``[positions * samples, units]``."""
        positions = values[..., 0].numel() // max(self.samples, 1)
        values = values.reshape(positions, self.samples, values.shape[-1])
        if self.layout.unit == "position" and name in PACKED:
            # Queries and keys meet in one parameter: their positions have to be as many.
            values = functional.pad(values, (0, 0, 0, 0, 0, self.longest - len(values)))
        return pack(self.layout.arrange(values))


def _use(
    place: Place, linear: list[tuple[str, int, Bits | None]], delta: Tensor | None
) -> dict[str, Activity]:
    """The activity of one operation's parameters: their names, first rows and inputs."""
    found: dict[str, Activity] = {}
    if delta is None:
        return found
    for name, start, inputs in linear:
        shape = place.module.get_parameter(name).shape
        outputs = place.pack(name, delta)
        units = torch.Size([outputs.units])
        part: Activity
        if inputs is not None:
            units += shape[1:]
            part = Outer(units, outputs, inputs)
        else:
            part = Elements(units, outputs.any_position())
        if units.numel() == shape.numel():
            found[name] = replace(part, shape=shape)
        else:
            found[name] = Blocks(shape, {start: part})
    return found


def _saved_input(node: Node) -> Tensor | None:
    """The input of a linear map, where the node that computed it has it at hand."""
    if saved_tensors_are_packed() or node.name() not in SAVED_INPUT:
        return None
    saved: Tensor = getattr(node, SAVED_INPUT[node.name()])
    return saved


def _attend(
    module: nn.MultiheadAttention,
    sources: list[Tensor],
    masks: tuple[Tensor | None, Tensor | None, bool],
    *,
    unbatched: bool,
) -> Tensor:
    """Computes the input of the output projection once more, ``[positions, samples, units]``."""
    if module.training and module.dropout > 0:
        raise TruestepError(
            "activation checkpointing, or another hook on saved tensors, hides the dropout of "
            "nn.MultiheadAttention; checkpoint with "
            f"use_reentrant=True, set the layer's dropout to 0, or {WAY_OUT}"
        )
    key_padding_mask, attn_mask, is_causal = masks
    if unbatched and key_padding_mask is not None:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    query, key, value = sources
    identity = torch.eye(module.embed_dim, dtype=query.dtype, device=query.device)
    with torch.no_grad():
        attended: Tensor = functional.multi_head_attention_forward(
            query,
            key,
            value,
            module.embed_dim,
            module.num_heads,
            module.in_proj_weight,
            module.in_proj_bias,
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            0.0,
            identity,
            None,
            training=False,
            key_padding_mask=key_padding_mask,
            need_weights=False,
            attn_mask=attn_mask,
            use_separate_proj_weight=module.in_proj_weight is None,
            q_proj_weight=module.q_proj_weight,
            k_proj_weight=module.k_proj_weight,
            v_proj_weight=module.v_proj_weight,
            is_causal=is_causal,
        )[0]
    return attended
