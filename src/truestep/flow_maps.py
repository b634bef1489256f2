"""Linear maps, convolutions and norms: where units are made and read, see `truestep.flow_rules`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from truestep.units import Call, Channels, Ledger, Use

__all__ = ["MAPS"]

MATRIX = 2  # dimensions


def linear(ledger: Ledger, call: Call, output: Tensor) -> Channels | None:
    """`F.linear(input, weight, bias)`."""
    return _map(ledger, call, output, _Parts(0, 1, 2))


def product(ledger: Ledger, call: Call, output: Tensor) -> Channels | None:
    """`x @ W` with a parameter W ``[inputs, outputs]``."""
    weight = call.get(1, "other")
    if not isinstance(weight, Tensor) or weight.dim() != MATRIX:
        return ledger.end(call)
    return _map(ledger, call, output, _Parts(0, 1, None, out_dim=1, in_dim=0))


def affine_product(ledger: Ledger, call: Call, output: Tensor) -> Channels | None:
    """`torch.addmm(bias, x, W)`."""
    if call.kwargs.get("beta", 1) != 1 or call.kwargs.get("alpha", 1) != 1:
        return ledger.end(call)
    return _map(ledger, call, output, _Parts(1, 2, 0, out_dim=1, in_dim=0))


def convolution(ledger: Ledger, call: Call, output: Tensor) -> Channels | None:
    """`F.conv1d` to `conv3d`."""
    rank = int(call.name[4])
    stride, padding = call.get(3, "stride", 1), call.get(4, "padding", 0)
    groups, weight = int(call.get(6, "groups", 1)), call.get(1, "weight")
    padded = padding == "same" or (not isinstance(padding, str) and _any(padding))
    kernel = tuple(weight.shape[2:])
    padded = (padded and any(size > 1 for size in kernel)) or (padded and padding != "same")
    local = not padded and set(kernel) == {1} and not _any(stride, above=1)
    parts = _Parts(0, 1, 2, place=-rank - 1, groups=groups, local=local)
    parts.borders = "the zeros around the input" if padded else ""
    return _map(ledger, call, output, parts)


def transposed_convolution(ledger: Ledger, call: Call, output: Tensor) -> Channels | None:
    """`F.conv_transpose1d` to `3d`."""
    rank = int(call.name[-2])
    if int(call.get(6, "groups", 1)) != 1:
        return ledger.end(call)
    parts = _Parts(0, 1, 2, out_dim=1, in_dim=0, place=-rank - 1, local=False)
    parts.borders = "the borders of a transposed convolution"
    return _map(ledger, call, output, parts)


class _Parts:
    """Which argument of a call is what, and how the map lies in its weight."""

    def __init__(
        self,
        data: int,
        weight: int,
        bias: int | None,
        *,
        out_dim: int = 0,
        in_dim: int = 1,
        place: int = -1,
        groups: int = 1,
        local: bool = True,
    ) -> None:
        self.data, self.weight, self.bias = data, weight, bias
        self.out_dim, self.in_dim, self.place = out_dim, in_dim, place
        self.groups, self.local, self.borders = groups, local, ""


def _map(ledger: Ledger, call: Call, output: Tensor, parts: _Parts) -> Channels | None:
    data, weight = call.get(parts.data, "input"), call.get(parts.weight, "weight")
    bias = None if parts.bias is None else call.get(parts.bias, "bias")
    view, shift = ledger.view(weight), ledger.view(bias)
    place = output.dim() + parts.place
    if view is None or (bias is not None and shift is None):
        return _computed(ledger, call, output, place)
    units = ledger.channels(data)
    if units is not None and units.dim != data.dim() + parts.place:
        ledger.stop(data, f"is summed over in {call} along another dimension than its features")
        units = None
    out_dim, in_dim = view.dims[parts.out_dim], view.dims[parts.in_dim]
    rows = ledger.rows(view.name, out_dim)
    outputs = Channels(place, rows, (ledger.layer(call, view.name),))
    if not ledger.whole:
        return outputs
    ledger.count_weight(view.name)
    if shift is not None:
        ledger.count_weight(shift.name)
        ledger.slots.join(rows, ledger.rows(shift.name, 0))
    read = _columns(ledger, view.name, in_dim, weight, parts)
    if units is None:
        ledger.slots.pin(read, f"of {view.name!r} read what no layer makes")
    else:
        ledger.slots.join(units.slots, read)
    if parts.groups > 1 and weight.shape[parts.in_dim] == 1:
        outputs.slots = rows
        each = weight.shape[parts.out_dim] // parts.groups
        ledger.slots.join(rows, read.repeat_interleave(each))
        if units is not None and units.fixed is not None:
            outputs.fixed = units.fixed.repeat_interleave(each)
    outputs.starts = ledger.start("rows", len(ledger.uses), len(rows))
    outputs.scale = torch.ones(len(rows), dtype=torch.float64, device="cpu")
    outputs.shift = torch.zeros_like(outputs.scale)
    use = Use(
        weight=view.name,
        bias=None if shift is None else shift.name,
        out_dim=out_dim,
        in_dim=in_dim,
        groups=parts.groups,
        inputs=units,
        outputs=outputs,
        constants=_constants(data, units, len(read)),
        borders=parts.borders,
        local=parts.local,
        takes_bias=shift is not None or _vacant(ledger, call, view.name, parts),
        module=call.module,
        number=len(ledger.uses),
    )
    ledger.uses.append(use)
    return outputs


def _vacant(ledger: Ledger, call: Call, weight: str, parts: _Parts) -> bool:
    """Whether the call is a module's own, which would pass a bias on if it had one."""
    own = ledger.layer(call, weight) == call.module
    return parts.bias is not None and own and f"{call.module}.bias" in ledger.vacant


def _columns(ledger: Ledger, name: str, in_dim: int, weight: Tensor, parts: _Parts) -> Tensor:
    """The slots of what a weight reads."""
    if parts.groups == 1:
        return ledger.rows(name, in_dim)
    return ledger.named_slots(name, "inputs", weight.shape[parts.in_dim] * parts.groups)


def _constants(data: Tensor, units: Channels | None, number: int) -> Tensor:
    """The numbers of the inputs that are the same at all samples and positions; nan for others."""
    constants = torch.full((number,), torch.nan, dtype=torch.float64, device="cpu")
    if units is not None and units.fixed is not None and data.numel():
        rows = data.detach().movedim(units.dim, -1).reshape(-1, number)
        held = units.fixed & (rows == rows[0]).all(0).cpu()
        constants[held] = rows[0].double().cpu()[held]
    return constants


def _computed(ledger: Ledger, call: Call, output: Tensor, place: int) -> Channels:
    """A map whose weight is no parameter but is computed from some, as parametrizations do."""
    for tensor in call.tensors:
        ledger.stop(tensor, f"meets in {call} a weight that is computed")
    number = output.shape[place]
    slots = ledger.named_slots(str(call), "computed", number)
    if len(slots) != number:  # another call of the same name
        slots = ledger.slots.fresh(number)
    ledger.slots.pin(slots, "is made by a weight that is computed")
    return Channels(place, slots, (call.module.removesuffix(".parametrizations") or call.name,))


def _any(values: Any, above: int = 0) -> bool:
    return any(
        value > above for value in (values if isinstance(values, list | tuple) else [values])
    )


# Norms.


def batch_norm(ledger: Ledger, call: Call, output: Tensor) -> Channels | None:
    """BatchNorm in evaluation: a line for each channel."""
    units = ledger.channels(call.args[0])
    # F.batch_norm and the operator have their arguments in different orders.
    names = ("running_mean", "running_var", "weight", "bias")
    order = names if call.function is functional.batch_norm else (*names[2:], *names[:2])
    own = {name: call.get(1 + place, name) for place, name in enumerate(order)}
    if units is None:
        return ledger.end(call)
    if not ledger.whole:
        return units.but()
    vectors = [tensor for tensor in own.values() if tensor is not None]
    if any(ledger.view(tensor) is None for tensor in vectors):
        return ledger.end(call)
    for tensor in vectors:
        found = ledger.view(tensor)
        assert found is not None  # noqa: S101
        ledger.slots.join(units.slots, ledger.rows(found.name, 0))
    if units.scale is None or units.shift is None:
        return units.but()
    mean, spread, weight, bias = (
        None if own[name] is None else own[name].detach().double().cpu() for name in names
    )
    assert mean is not None and spread is not None  # noqa: S101, PT018
    factor = (spread + float(call.get(7, "eps", 1e-5))).rsqrt()
    factor = factor if weight is None else factor * weight
    shift = (units.shift - mean) * factor
    return units.but(scale=units.scale * factor, shift=shift if bias is None else shift + bias)


def instance_norm(ledger: Ledger, call: Call, output: Tensor) -> Channels | None:
    """InstanceNorm: each channel by itself."""
    units = ledger.channels(call.args[0])
    if units is None:
        return ledger.end(call)
    for tensor in call.tensors[1:]:
        found = ledger.view(tensor)
        if found is None:
            return ledger.end(call)
        ledger.slots.join(units.slots, ledger.rows(found.name, 0))
    return units.bent(fixed=None)


def mixing_norm(ledger: Ledger, call: Call, output: Tensor) -> Channels | None:
    """LayerNorm, RMSNorm, GroupNorm: each unit changes with all others."""
    units = ledger.channels(call.args[0])
    title = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm", "group_norm": "GroupNorm"}[call.name]
    name = f" {call.module!r}" if call.module else ""
    for tensor in call.tensors:
        ledger.stop(tensor, f"is normalised together with the others by {title}{name}")
    return None if units is None else units.bent(fixed=None)


MAPS: dict[str, Callable[[Ledger, Call, Any], Any]] = {
    "linear": linear,
    "matmul": product,
    "mm": product,
    "addmm": affine_product,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), transposed_convolution
    ),
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm"), mixing_norm),
}
