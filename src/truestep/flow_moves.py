"""Functions that move numbers, see `truestep.flow_rules`: called once more, on the units' indices."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from truestep.units import Call, Channels, Ledger, tensors_in

__all__ = ["MOVES"]


def move(ledger: Ledger, call: Call, output: Any) -> Any:
    """Reshapes, slices, concatenates: the function is called on the indices of the units."""
    tracked = [(tensor, ledger.channels(tensor)) for tensor in call.tensors]
    if call.name in {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"}:
        return _joined(ledger, call, output)
    if any(units is not None for _, units in tracked[1:]):
        return ledger.end(call)
    tensor, units = tracked[0]
    if units is None:
        return ledger.end(call)
    key = (call.name, tuple(tensor.shape), units.dim, len(units.slots), repr(call.args[1:]),
           repr(call.kwargs))  # fmt: skip
    cacheable = len(call.tensors) == 1
    places = ledger.moved.get(key) if cacheable else None
    windows = call.function is nn.functional.unfold  # not the method of that name
    if windows or any(isinstance(argument, torch.dtype) for argument in call.args[1:]):
        return ledger.end(call)
    if places is None:
        labels = _labels(tensor, units.dim)
        if "view" in call.name:  # a view has the strides of its tensor, which labels don't
            labels = labels.contiguous()
        moved = call.function(labels, *call.args[1:], **call.kwargs)
        places = [_places(piece) for piece in tensors_in(moved)]
        if cacheable:
            ledger.moved[key] = places
    found = [None if place is None else _taken(ledger, units, *place) for place in places]
    by_index = len(call.tensors) > 1 and any(
        f is not None and f.slots.tolist() != units.slots.tolist() for f in found
    )
    apart = call.name in _PICKING and any(
        place is not None and _apart(place[1]) for place in places
    )
    if any(f is None for f in found) or by_index or apart:
        ledger.slots.pin(units.slots, f"is spread or picked out by {call}")
    return found if isinstance(output, list | tuple) else found[0]


def _joined(ledger: Ledger, call: Call, output: Tensor) -> Channels | None:
    """Concatenation, along the units or beside them."""
    pieces = list(call.get(0, "tensors"))
    known = [ledger.channels(piece) for piece in pieces]
    depth = output.dim() - pieces[0].dim()
    dims = {units.dim for units in known if units is not None}
    arg = call.get(1, "dim", 0) if call.name in {"cat", "concat", "concatenate", "stack"} else None
    if len(dims) != 1 or arg is None:
        return ledger.end(call)
    dim, along = dims.pop(), arg % output.dim()
    if depth == 0 and along == dim:
        return _side_by_side(ledger, call, pieces, known, output)
    if any(units is None for units in known):
        return ledger.end(call)
    whole = [units for units in known if units is not None]
    for units in whole[1:]:
        ledger.slots.join(whole[0].slots, units.slots)
    layers = tuple(dict.fromkeys(name for units in whole for name in units.layers))
    fixed = whole[0].fixed
    for units in whole[1:]:
        fixed = None if fixed is None or units.fixed is None else fixed & units.fixed
    place = dim + (depth if along <= dim else 0)
    return Channels(place, whole[0].slots, layers, fixed)


def _side_by_side(
    ledger: Ledger,
    call: Call,
    pieces: list[Tensor],
    known: list[Channels | None],
    output: Tensor,
) -> Channels:
    dim = next(units.dim for units in known if units is not None)
    parts: list[Channels] = []
    for index, (piece, found) in enumerate(zip(pieces, known, strict=True)):
        units = found
        if units is None:
            ledger.freeze(piece, f"is an operand of {call}")
            name = f"{call}, operand {index}"
            slots = ledger.named_slots(name, piece.shape[dim], piece.shape[dim])
            ledger.slots.pin(slots, "comes from no layer")
            units = Channels(dim, slots)
        parts.append(units)
    key = ("cat", *(id(part.slots) for part in parts))
    slots, _ = ledger.moved.setdefault(
        key, (torch.cat([part.slots for part in parts]), [part.slots for part in parts])
    )
    layers = tuple(dict.fromkeys(name for part in parts for name in part.layers))
    if not ledger.whole:
        return Channels(dim, slots, layers)
    fixed = torch.cat([_or_none(part.fixed, part.slots, torch.bool) for part in parts])
    made = Channels(dim, slots, layers, fixed)
    if any(part.starts is not None for part in parts):
        made.rising = any(part.rising for part in parts)
        made.even = all(part.even for part in parts)
        made.starts = torch.cat(
            [torch.full_like(p.slots, -1) if p.starts is None else p.starts for p in parts]
        )
        made.scale = torch.cat([_or_none(part.scale, part.slots, torch.float64) for part in parts])
        made.shift = torch.cat([_or_none(part.shift, part.slots, torch.float64) for part in parts])
    return made


def _or_none(values: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(len(slots), dtype=dtype, device="cpu") if values is None else values


def _labels(tensor: Tensor, dim: int) -> Tensor:
    """The index of each element's unit, in the shape of a tensor and without its memory."""
    shape = [1] * tensor.dim()
    shape[dim] = tensor.shape[dim]
    numbers = torch.arange(tensor.shape[dim], device=tensor.device)
    return numbers.view(shape).expand(tensor.shape)


def _places(labels: Tensor) -> tuple[int, Tensor] | None:
    """The dimension along which labels vary, and the labels along it; None where that is not one."""
    if labels.numel() == 0:
        return None
    strides = zip(labels.shape, labels.stride(), strict=True)
    long = [dim for dim, (size, stride) in enumerate(strides) if size > 1 and stride != 0]
    if len(long) == 1:
        return long[0], _along(labels, long[0])
    for dim in long:
        numbers = _along(labels, dim)
        shape = [1] * labels.dim()
        shape[dim] = len(numbers)
        if bool((labels == numbers.view(shape)).all()):
            return dim, numbers
    return None


def _apart(places: Tensor) -> bool:
    """Whether units that were neighbours are none, so that the same call on fewer units takes others."""
    return bool((places.diff().abs() > 1).any())


def _along(labels: Tensor, dim: int) -> Tensor:
    index: list[Any] = [0] * labels.dim()
    index[dim] = slice(None)
    return labels[tuple(index)].clone().cpu()


def _taken(ledger: Ledger, units: Channels, dim: int, places: Tensor) -> Channels:
    """Those of the units that are at some places, in their order."""
    starts = ledger.onward(units.starts)
    if torch.equal(places, torch.arange(len(units.slots), device="cpu")):
        return units.but(dim=dim, starts=starts)
    key = ("taken", id(units.slots), id(places))
    slots, *_ = ledger.moved.setdefault(key, (units.slots[places], units.slots, places))

    def take(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[places]

    return units.but(
        dim=dim,
        slots=slots,
        fixed=take(units.fixed),
        starts=take(starts),
        scale=take(units.scale),
        shift=take(units.shift),
    )


def pad(ledger: Ledger, call: Call, output: Tensor) -> Channels | None:
    """`F.pad` beside the units; zeros at the borders leave a line only where it goes through zero."""
    units = ledger.channels(call.args[0])
    padded = len(call.get(1, "pad")) // 2
    if units is None or units.dim >= output.dim() - padded:
        return ledger.end(call)
    mode, value = call.get(2, "mode", "constant"), call.get(3, "value", None)
    if mode != "constant" or (units.shift is not None and not units.shift.any() and not value):
        even = units.even and mode != "constant"
        return units.but(even=even, starts=ledger.onward(units.starts))
    return units.bent()


_MOVES = (
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose"),
    *("t", "T", "mT", "movedim", "moveaxis", "swapaxes", "swapdims", "expand", "expand_as", "tile"),
    *("repeat", "repeat_interleave", "flip", "roll", "getitem", "select", "narrow", "slice"),
    *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "index_select", "unfold"),
    *("cat", "concat", "concatenate", "stack", "pixel_shuffle", "pixel_unshuffle", "view_as"),
    *("channel_shuffle", "broadcast_to", "_unsafe_view"),
)
# What picks units by their numbers, as a slice with a step does, or turns them around.
_PICKING = ("getitem", "slice", "roll")

MOVES: dict[str, Callable[[Ledger, Call, Any], Any]] = {**dict.fromkeys(_MOVES, move), "pad": pad}
