"""Arithmetic of two operands, and choices between them, see `truestep.flow_rules`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from truestep.units import Call, Channels, Ledger, values_of

__all__ = ["ARITHMETIC"]


def arithmetic(ledger: Ledger, call: Call, output: Tensor) -> Channels | None:
    """`+`, `-`, `*`, `/`, maximum, minimum of two tensors, or of a tensor and a number."""
    left, right = call.args[0], call.get(1, "other")
    first, second = ledger.channels(left), ledger.channels(right)
    if first is not None and second is not None:
        return _both(ledger, call, (left, first), (right, second), output)
    units, tensor, other = (first, left, right) if second is None else (second, right, left)
    if units is None:
        return ledger.end(call)
    dim = units.dim - tensor.dim() + output.dim()
    if isinstance(other, Tensor):
        ledger.freeze(other, f"is an operand of {call}")
        place = dim - output.dim() + other.dim()
        if place >= 0 and other.shape[place] > 1:
            ledger.slots.pin(
                units.slots,
                f"meets in {call} a tensor with as many features, which no layer makes",
            )
            return units.bent(dim=dim, fixed=None)
    if output.shape[dim] != len(units.slots):
        return ledger.end(call)
    if not ledger.whole:
        return units.but(dim=dim)
    return _with_one(ledger, call, units, tensor, other, dim)


def _with_one(
    ledger: Ledger, call: Call, units: Channels, tensor: Tensor, other: Any, dim: int
) -> Channels:
    """The operand has one number for all units: of every sample, or for all alike."""
    factor = call.name == "mul" or (
        call.name == "div" and other is not tensor and tensor is call.args[0]
    )
    fixed = units.fixed
    if ledger.from_data(other) and fixed is not None:
        # What each sample multiplies with leaves only zeros as they are.
        zero = values_of(tensor, units.dim) == 0 if factor and call.name == "mul" else False
        fixed = fixed & zero
    scale, shift = units.scale, units.shift
    if scale is None or shift is None:
        return units.bent(dim=dim, fixed=fixed)
    plain = call.kwargs.get("alpha", 1) == 1 and call.kwargs.get("rounding_mode") is None
    if isinstance(other, int | float) and plain:
        backwards = tensor is not call.args[0]
        line = _line(call.name, scale, shift, float(other), backwards=backwards)
        if line is not None:
            return units.but(dim=dim, fixed=fixed, scale=line[0], shift=line[1])
    elif isinstance(other, Tensor) and factor and plain and not shift.any():
        rising = units.rising or bool((other < 0).any())
        starts = ledger.onward(units.starts)
        return units.but(dim=dim, fixed=fixed, rising=rising, even=False, starts=starts)
    return units.bent(dim=dim, fixed=fixed)


def _line(
    name: str, scale: Tensor, shift: Tensor, number: float, *, backwards: bool
) -> tuple[Tensor, Tensor] | None:
    if name == "rsub":  # number - x
        return -scale, number - shift
    if name == "sub":
        return (-scale, number - shift) if backwards else (scale, shift - number)
    if name == "add":
        return scale, shift + number
    if name == "mul":
        return scale * number, shift * number
    if name == "div" and not backwards and number:
        return scale / number, shift / number
    return None


def _both(
    ledger: Ledger,
    call: Call,
    left: tuple[Tensor, Channels],
    right: tuple[Tensor, Channels],
    output: Tensor,
) -> Channels | None:
    (one, first), (other, second) = left, right
    dims = [units.dim - t.dim() + output.dim() for t, units in (left, right)]
    if dims[0] != dims[1] or len(first.slots) != len(second.slots):
        return ledger.end(call)
    ledger.slots.join(first.slots, second.slots)
    layers = tuple(dict.fromkeys((*first.layers, *second.layers)))
    slots = first.slots
    if not ledger.whole:
        return Channels(dims[0], slots, layers)
    fixed = None
    if first.fixed is not None or second.fixed is not None:
        nothing = torch.zeros(len(slots), dtype=torch.bool, device="cpu")
        a, b = (nothing if f is None else f for f in (first.fixed, second.fixed))
        fixed = a & b
        if call.name == "mul":
            fixed |= (a & (values_of(one, first.dim) == 0)) | (
                b & (values_of(other, second.dim) == 0)
            )
    made = Channels(dims[0], slots, layers, fixed)
    # A vector of parameters is a line for each unit.
    if _is_vector(ledger, other, second) and first.scale is not None:
        return _by_vector(call.name, first, other, made)
    if _is_vector(ledger, one, first) and second.scale is not None and call.name in {"add", "mul"}:
        return _by_vector(call.name, second, one, made)
    return made


def _is_vector(ledger: Ledger, tensor: Tensor, units: Channels) -> bool:
    """Whether a tensor holds nothing but one number for each unit, made from parameters alone."""
    alone = tensor.numel() == len(units.slots) and not ledger.from_data(tensor)
    return alone and units.scale is None and not units.layers


def _by_vector(name: str, units: Channels, vector: Tensor, made: Channels) -> Channels:
    numbers = vector.detach().double().cpu().flatten()
    assert units.scale is not None and units.shift is not None  # noqa: S101, PT018
    lines = {
        "add": (units.scale, units.shift + numbers),
        "sub": (units.scale, units.shift - numbers),
        "mul": (units.scale * numbers, units.shift * numbers),
        "div": (units.scale / numbers, units.shift / numbers),
    }
    if name in lines:
        made.starts, made.rising, made.even = units.starts, units.rising, units.even
        made.scale, made.shift = lines[name]
    return made


def choose(ledger: Ledger, call: Call, output: Tensor) -> Channels | None:
    """`where(condition, a, b)`, `masked_fill(a, mask, value)`: a choice for whole samples or positions."""
    if call.name == "where":
        condition, operands = call.get(0, "condition"), (call.get(1, "input"), call.get(2, "other"))
    else:
        condition, operands = call.get(1, "mask"), (call.get(0, "input"), call.get(2, "value"))
    tracked = [(t, u) for t in operands if (u := ledger.channels(t)) is not None]
    places = {units.dim - t.dim() + output.dim() for t, units in tracked}
    sizes = {len(units.slots) for _, units in tracked}
    if ledger.channels(condition) is not None or len(places) != 1 or len(sizes) != 1:
        return ledger.end(call)
    dim = places.pop()
    place = dim - output.dim() + condition.dim()
    if place >= 0 and condition.shape[place] > 1:
        return ledger.end(call)
    numbers = [operand for operand in operands if ledger.channels(operand) is None]
    if any(isinstance(number, Tensor) and number.numel() > 1 for number in numbers):
        return ledger.end(call)
    for _, units in tracked[1:]:
        ledger.slots.join(tracked[0][1].slots, units.slots)
    first = tracked[0][1]
    fixed = _zeros(tracked, numbers) if ledger.whole else None
    layers = tuple(dict.fromkeys(name for _, units in tracked for name in units.layers))
    return Channels(dim, first.slots, layers, fixed)


def _zeros(tracked: list[tuple[Tensor, Channels]], numbers: list[Any]) -> Tensor:
    """The units that are 0 whichever is chosen."""
    fixed = torch.ones(len(tracked[0][1].slots), dtype=torch.bool, device="cpu")
    for tensor, units in tracked:
        known = torch.zeros_like(fixed) if units.fixed is None else units.fixed
        fixed &= known & (values_of(tensor, units.dim) == 0)
    return fixed & all(
        bool((number == 0).all()) if isinstance(number, Tensor) else number == 0
        for number in numbers
    )


ARITHMETIC: dict[str, Callable[[Ledger, Call, Any], Any]] = {
    **dict.fromkeys(
        ("add", "sub", "rsub", "mul", "div", "maximum", "minimum", "true_divide", "multiply"),
        arithmetic,
    ),
    **dict.fromkeys(("where", "masked_fill"), choose),
}
