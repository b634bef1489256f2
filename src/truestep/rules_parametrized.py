"""The rule for layers that compute a parameter from others: `torch.nn.utils.parametrize`.

The layer's own rule gives the activity of what is computed, whose gradient flows on to the originals.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

from truestep.activity import CHUNK_ELEMENTS, Activity, Elements, Outer, Rows
from truestep.bits import pack
from truestep.layout import Given, Inside, Layout, Rule
from truestep.placed import everything

__all__ = ["parametrized", "slices"]


def parametrized(rule: Rule, module: nn.Module) -> Rule:
    """The rule for a parametrized layer.

    A weight norm gives a sample that reaches an element of the weight all elements of the slice that the
    norm is taken of, and the slice's length. Of other parametrizations nothing is known: a sample that
    reaches any element of what is computed reaches all of what it is computed from, an upper bound.

    Args:
        rule: the layer's without parametrization; all that it may read of parameters is their shapes.
        module: the layer.
    """
    lists: Any = module.parametrizations
    shapes = {name: _computed_shape(lists[name]) for name in lists}
    return partial(_parametrized, rule, shapes)


def _computed_shape(chain: nn.Module) -> torch.Size:
    """The shape of what is computed, by a run without numbers, which moves no buffers (spectral_norm)."""
    tensors = [*chain.named_parameters(), *chain.named_buffers()]
    empty = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors}
    computed: Tensor = torch.func.functional_call(chain, empty, ())
    return computed.shape


def _parametrized(
    rule: Rule,
    shapes: dict[str, torch.Size],
    layout: Layout,
    module: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> Given | Inside:
    whole = is_parametrized(module)
    given = rule(layout, _stand_in(module, shapes) if whole else module, *args, **kwargs)
    if not whole:  # any more
        return given
    lists: Any = module.parametrizations

    def activity(*deltas: Tensor | None) -> dict[str, Activity]:
        found: dict[str, Activity] = {}
        for name, use in given(*deltas).items():  # type: ignore[operator]
            if name not in shapes:
                found[name] = use
                continue
            originals = {key: p for key, p in lists[name].named_parameters() if p.requires_grad}
            dim = _normed(lists[name])
            reached = slices(use, dim)
            for key, parameter in originals.items():
                shape = parameter.shape
                if shape.numel() == reached.shape[1]:
                    original: Activity = Elements(shape, pack(reached))
                else:
                    original = _spread(shape, reached, dim)
                found[f"parametrizations.{name}.{key}"] = original
        return found

    return activity


def _normed(chain: nn.ModuleList) -> int | None:
    """Along which dimension the slices lie that a weight norm is taken of; None for one slice, all of it."""
    dim: int = chain[0].dim if isinstance(chain[0], parametrizations._WeightNorm) else -1  # noqa: SLF001
    return dim if len(chain) == 1 and dim >= 0 else None


def _stand_in(module: nn.Module, shapes: dict[str, torch.Size]) -> nn.Module:
    """The layer without its parametrization: reading what is computed would compute it once more."""
    base: Any = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    result: nn.Module = base.__new__(base)
    vars(result).update(vars(module))
    lists: Any = module.parametrizations
    computed = {
        name: nn.Parameter(
            torch.empty(shape, device="meta"),
            requires_grad=any(p.requires_grad for p in lists[name].parameters()),
        )
        for name, shape in shapes.items()
    }
    vars(result)["_parameters"] = {**module._parameters, **computed}  # noqa: SLF001
    return result


def slices(activity: Activity, dim: int | None) -> Tensor:
    """Which samples reach any element of each slice of a parameter.

    Args:
        activity: of the parameter.
        dim: the dimension that numbers the slices; None where the whole parameter is one.

    Returns:
        Bool ``[samples, slices]``.

    Example:
        >>> outputs, inputs = pack(torch.tensor([[1, 0]])), pack(torch.tensor([[0, 1, 0]]))
        >>> slices(Outer(torch.Size([2, 3]), outputs, inputs), 0)
        tensor([[ True, False]])
    """
    if isinstance(activity, Outer) and dim in {0, None}:
        reached = _outputs(activity)
        return reached if dim == 0 else reached.any(1, keepdim=True)
    if isinstance(activity, Rows) and dim in {0, None}:
        owners, rows, mask = activity.pairs
        reached = mask.new_zeros(activity.samples, activity.shape[0])
        reached[owners, rows] = mask.any(-1)
        return reached if dim == 0 else reached.any(1, keepdim=True)
    step = max(1, CHUNK_ELEMENTS // max(1, activity.shape.numel()))
    found = []
    for start in range(0, activity.samples, step):
        mask = activity.masks(start, min(start + step, activity.samples))
        mask = mask.unsqueeze(1) if dim is None else mask.movedim(1 + dim, 1)
        found.append(mask.flatten(2).any(2) if mask.dim() > 2 else mask)  # noqa: PLR2004
    return torch.cat(found)


def _outputs(activity: Outer) -> Tensor:
    """The samples that reach any element of each row of a linear map's weight."""
    outputs, inputs = activity.outputs, activity.inputs
    groups = 1 if activity.window is None else activity.window.groups
    # Which of a group's inputs is on does not matter, so that a convolution unfolds one for each group.
    any_input = pack(inputs.mask().unflatten(-1, (groups, -1)).any(-1))
    rows, columns = Outer(activity.shape, outputs, any_input, activity.window).factors()
    both = (rows > 0) & (columns > 0).any(-1, keepdim=True)
    return both.any(2).flatten(1)


def _spread(shape: torch.Size, reached: Tensor, dim: int | None) -> Activity:
    """Every element of the slices of a parameter that a sample reaches."""
    if dim is None:
        return everything(shape, reached.squeeze(1))
    if dim == 0:
        return Outer(shape, pack(reached), pack(reached.new_ones(len(reached), shape[1:].numel())))
    sizes = [len(reached), *(size if axis == dim else 1 for axis, size in enumerate(shape))]
    mask = reached.reshape(sizes).expand(-1, *shape)
    return Elements(shape, pack(mask.flatten(1)))
