"""Where a layer's tensors hold the samples, and what a rule is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from truestep.activity import Activity

__all__ = [
    "Given",
    "Inside",
    "Layout",
    "Rule",
    "Unit",
    "as_read",
    "outputs_in",
    "tensors_given",
    "tensors_in",
]

Unit = Literal["sample", "position"]
Given = Callable[..., dict[str, Activity]]


@dataclass(frozen=True)
class Inside:
    """What a rule returns where the layer's output gradients alone do not say enough.

    Attributes:
        see: takes the layer's outputs, in the forward pass; returns what any rule returns, a function
            from the gradients of the outputs to activity (or None), and pairs of a node of the
            autograd graph inside the layer and such a function of the gradient of that node's output.
    """

    see: Callable[[list[Tensor]], tuple[Given | None, list[tuple[Any, Given]]]]


Rule = Callable[..., Given | Inside]


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
        if unit_dims != 1:
            mask = mask.flatten(lead)
        if lead == 1:
            return mask
        mask = mask.movedim(self.batch_dim or 0, 0)
        return mask.flatten(0, lead - 1) if self.unit == "position" else mask.flatten(1, lead - 1)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, mappings and dataclasses."""
    found: list[Tensor] = []
    _find(value, found)
    return iter(found)


def _find(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for item in value:
            _find(item, found)
    elif isinstance(value, dict | Mapping):  # the usual kind is found sooner
        for item in value.values():
            _find(item, found)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            _find(getattr(value, field.name), found)


def tensors_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among a module's arguments: mostly one."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return [args[0]]
    return list(tensors_in((args, kwargs)))


def outputs_in(value: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns: as `tensors_in`, and in the attributes of objects of other kinds.

    Args:
        value: what it returns.
    """
    found = list(tensors_in(value))
    yield from found
    if not found:
        yield from _attributes_in(value, set())


def _attributes_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen or isinstance(value, type | nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    items: list[Any] = list(value) if isinstance(value, list | tuple) else []
    items += value.values() if isinstance(value, Mapping) else []
    items += vars(value).values() if hasattr(value, "__dict__") else []
    items += [getattr(value, name, None) for name in getattr(value, "__slots__", ())]
    for item in items:
        yield from _attributes_in(item, seen)


def as_read(given: Tensor) -> Tensor:
    """A layer's input as a linear operation reads it: in 16 bits, as autocast makes it, a number may be zero.

    Args:
        given: what the layer was given, inside the same autocast.
    """
    kind = given.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if given.dtype is not torch.float32 or not casts:
        return given
    return given.to(torch.get_autocast_dtype(kind))
