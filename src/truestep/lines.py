"""Units that are straight lines on the data: combinations of each other, and layers that need not be.

A unit whose pre-activations all lie on one straight piece of its activation function, such as an always-on
unit of a ReLU layer, is an affine function of the layer's inputs. More such units than inputs are
combinations of each other, whatever the weights; and a layer that has no other units is, with the layer
behind it, one linear map.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from truestep.flow import Flow
from truestep.nodes import DummyNodes, LayerNodes
from truestep.plan import Candidate, Kept, Removal
from truestep.surgery import copied, fit, put
from truestep.units import Site, Use

__all__ = ["Fold", "combinations", "fold", "foldable", "straight_rows"]

# Coefficients larger than this would multiply rounding.
LARGEST_COEFFICIENT = 1e3
HARMLESS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"}


def combinations(flow: Flow, nodes: DummyNodes) -> list[Candidate]:
    """The units that are, on the data, combinations of other units of their layer and a constant.

    Args:
        flow: of a forward call of the model.
        nodes: what is known of its units.
    """
    found: list[Candidate] = []
    for site in flow.ledger.sites:
        layer = nodes.find(site.key)
        if layer is None or any(one.site.key == site.key for one in found):
            continue
        rows = straight_rows(flow, site, layer)
        if rows is not None:
            found += _dependent(site, layer, *rows[1:])
    return found


def straight_rows(
    flow: Flow, site: Site, layer: LayerNodes
) -> tuple[Use, Tensor, Tensor, Tensor] | None:
    """The units on a straight piece of their activation function, and the lines that they follow.

    Args:
        flow: of a forward call of the model.
        site: the activation function.
        layer: what is known of its units.

    Returns:
        The layer's map, the units' numbers, and of each what its output is of the layer's inputs: factors
        ``[units, read]`` and a constant, float64; None where other layers are added, or channels grouped.
    """
    start, scale, shift = flow.ledger.origin(site.inputs), site.inputs.scale, site.inputs.shift
    if start is None or start[0] != "rows" or scale is None or shift is None:
        return None
    use = flow.ledger.uses[start[1]]
    if use.groups > 1 or not torch.equal(use.outputs.slots, site.inputs.slots):
        return None
    slopes, intercepts = site.activation.line(layer.lowest, layer.highest)
    straight = (
        (slopes.isfinite() & (slopes != 0) & layer.finite & ~layer.constant).nonzero().squeeze(1)
    )
    weight, bias = _matrix(flow, use)
    factors = slopes * scale
    constants = slopes * (scale * bias + shift) + intercepts
    return use, straight, (factors[:, None] * weight)[straight], constants[straight]


def _matrix(flow: Flow, use: Use) -> tuple[Tensor, Tensor]:
    """A map's weight ``[outputs, everything read]`` and its bias, float64."""
    owned = flow.ledger.owned
    weight = owned[use.weight].detach().double().cpu().movedim(use.out_dim, 0)
    bias = torch.zeros(len(weight), dtype=torch.float64, device="cpu")
    if use.bias is not None:
        bias = owned[use.bias].detach().double().cpu()
    return weight.flatten(1), bias


def _dependent(
    site: Site, layer: LayerNodes, units: Tensor, rows: Tensor, constants: Tensor
) -> list[Candidate]:
    """Those of the rows that are combinations of others."""
    if len(units) < 2:  # noqa: PLR2004
        return []
    basis = _basis(rows, max(layer.tolerance, torch.finfo(torch.float64).eps))
    others = torch.ones(len(units), dtype=torch.bool, device="cpu")
    others[basis] = False
    places = others.nonzero().squeeze(1)
    if not len(places) or not len(basis):
        return []
    solved = torch.linalg.lstsq(rows[basis].T, rows[places].T, driver="gelsd").solution.T
    left = (solved @ rows[basis] - rows[places]).norm(dim=1)
    exact = left <= max(layer.tolerance, torch.finfo(torch.float64).eps) * rows[places].norm(dim=1)
    exact &= solved.abs().amax(1) <= LARGEST_COEFFICIENT
    kinds = layer.kinds()
    made: list[Candidate] = []
    for place, factors, holds in zip(places.tolist(), solved, exact.tolist(), strict=True):
        if holds:
            unit = int(units[place])
            terms = tuple(zip(units[basis].tolist(), factors.tolist(), strict=True))
            constant = float(constants[place] - factors @ constants[basis])
            made.append(Candidate(site, unit, kinds[unit] or "line", terms, constant))
    return made


def _basis(rows: Tensor, tolerance: float) -> Tensor:
    """Rows, the longest first, of which all others are combinations up to a tolerance."""
    left, sizes = rows.clone(), rows.norm(dim=1)
    chosen: list[int] = []
    for _ in range(min(rows.shape)):
        lengths = left.norm(dim=1)
        lengths[lengths <= tolerance * sizes] = 0
        best = int(lengths.argmax())
        if lengths[best] == 0:
            break
        chosen.append(best)
        direction = left[best] / lengths[best]
        for _again in range(2):  # twice is enough against rounding
            left -= (left @ direction)[:, None] * direction
        left[best] = 0
    return torch.tensor(sorted(chosen), dtype=torch.int64, device="cpu")


@dataclass
class Fold:
    """Two layers with nothing but straight lines between them, as one.

    Attributes:
        first: the path of the first layer, which goes.
        second: the path of the second, which becomes both.
        between: paths of modules between them, which go.
        weight: of the joint map, float64.
        bias: of the joint map, float64.
        removals: the units of the first layer.
    """

    first: str
    second: str
    between: list[str]
    weight: Tensor
    bias: Tensor
    removals: list[Removal]


def foldable(model: nn.Module, flow: Flow, nodes: DummyNodes) -> tuple[Fold | None, list[Kept]]:
    """The first layer that is straight on the data and smaller together with the layer behind it.

    Args:
        model: of the flow.
        flow: of a forward call.
        nodes: what is known of its units.

    Returns:
        The fold, or None; and the units of layers that could be folded but for a reason.
    """
    kept: list[Kept] = []
    for number, site in enumerate(flow.ledger.sites):
        layer = nodes.find(site.key)
        if layer is None or not len(layer) or not _is_straight(site, layer):
            continue
        found = _pair(model, flow, number)
        if isinstance(found, str):
            kinds = layer.kinds()
            kept += [
                Kept(layer.layer, unit, kinds[unit] or "line", found) for unit in range(len(layer))
            ]
            continue
        made = _joint(flow, site, layer, *found)
        if made is not None:
            return made, []
    return None, kept


def _is_straight(site: Site, layer: LayerNodes) -> bool:
    slopes, _ = site.activation.line(layer.lowest, layer.highest)
    return bool((slopes.isfinite() & layer.finite).all())


def _pair(model: nn.Module, flow: Flow, number: int) -> tuple[Use, Use, list[str]] | str:
    """The maps before and behind an activation function and the modules between, or why not."""
    ledger, site = flow.ledger, flow.ledger.sites[number]
    start = ledger.origin(site.inputs)
    if start is None or start[0] != "rows":
        return "is a straight line, but other layers are added before the activation function"
    first, ends = ledger.uses[start[1]], {start, ("units", number)}
    seconds = [
        u
        for u in ledger.uses
        if u.inputs is not None and ledger.origin(u.inputs) == ("units", number)
    ]
    chain = [units for units in ledger.tracked if ledger.origin(units) in ends]
    if len(seconds) != 1 or any(ledger.readers.get(id(units), 0) != 1 for units in chain):
        return "is a straight line, but more than one layer reads the outputs"
    second = seconds[0]
    assert second.inputs is not None  # noqa: S101
    steps = [step for step in flow.steps if any(units in chain for units in step.given)]
    names = {"batch_norm", site.activation.name, "relu", "hardtanh", *HARMLESS}
    middle = steps[:-1]
    if any(step.name not in names for step in middle):
        return "is a straight line, but other functions stand between its layer and the next"
    paths = [step.module for step in middle]
    reason = _no_exchange(model, flow, [first.module, *paths, second.module])
    if reason is None and _one_is_frozen(model, first, second):
        reason = "one of the two layers is frozen"
    if reason is None and not torch.equal(second.inputs.slots, site.outputs.slots):
        reason = "the next layer reads the outputs in another order"
    reason = reason or _no_product(model, first, second)
    return f"is a straight line, but {reason}" if reason else (first, second, paths)


def _no_exchange(model: nn.Module, flow: Flow, paths: list[str]) -> str | None:
    """Why modules cannot be exchanged: each must be one call of its own, under one name."""
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    for path in paths:
        if not path or next(model.get_submodule(path).children(), None) is not None:
            return f"{path or 'the model'!r} calls functions in its own code, which cannot be taken out"
        if sum(step.module == path for step in flow.steps) != 1:
            return f"{path!r} is called more than once, or does more than one thing"
        if sum(module is model.get_submodule(path) for module in modules) != 1:
            return f"{path!r} has several names in the model"
    return None


def _one_is_frozen(model: nn.Module, first: Use, second: Use) -> bool:
    modules = (model.get_submodule(use.module) for use in (first, second))
    return len({p.requires_grad for module in modules for p in module.parameters()}) > 1


def _no_product(model: nn.Module, first: Use, second: Use) -> str | None:
    one, other = model.get_submodule(first.module), model.get_submodule(second.module)
    linear = type(one) is nn.Linear and type(other) is nn.Linear
    convolved = (
        isinstance(one, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and type(one) is type(other)
        and first.groups == second.groups == 1
        and second.local
    )
    return (
        None if linear or convolved else "the two layers are not two linear maps at each position"
    )


def _joint(
    flow: Flow, site: Site, layer: LayerNodes, first: Use, second: Use, between: list[str]
) -> Fold | None:
    """The product of two maps, if it has fewer parameters than they have."""
    inputs, outputs = site.inputs, second.inputs
    assert outputs is not None and outputs.scale is not None and outputs.shift is not None  # noqa: S101, PT018
    assert inputs.scale is not None and inputs.shift is not None  # noqa: S101, PT018
    slopes, intercepts = site.activation.line(layer.lowest, layer.highest)
    (one, one_bias), (other, other_bias) = _matrix(flow, first), _matrix(flow, second)
    factors = outputs.scale * slopes * inputs.scale
    constants = (
        outputs.scale * (slopes * (inputs.scale * one_bias + inputs.shift) + intercepts)
        + outputs.shift
    )
    weight, bias = other @ (factors[:, None] * one), other @ constants + other_bias
    if weight.numel() + bias.numel() >= one.numel() + len(one) + other.numel() + len(other):
        return None
    shape = flow.ledger.owned[first.weight].shape
    kinds = layer.kinds()
    removals = [
        Removal(
            layer.layer,
            unit,
            kinds[unit] or "line",
            f"folded with its layer into {second.module!r}",
        )
        for unit in range(len(layer))
    ]
    weight = weight.unflatten(1, shape[1:]) if len(shape) > 2 else weight  # noqa: PLR2004
    return Fold(first.module, second.module, between, weight, bias, removals)


def fold(model: nn.Module, found: Fold) -> nn.Module:
    """A copy of the model with two layers as one.

    Args:
        model: stays as it is.
        found: by `foldable`.
    """
    small = copied(model)
    first, second = (small.get_submodule(path) for path in (found.first, found.second))
    weight, bias = first._parameters["weight"], second._parameters["bias"]  # noqa: SLF001
    assert weight is not None  # noqa: S101
    trained = weight.requires_grad or any(p.requires_grad for p in second.parameters())
    joint = copy.deepcopy(first)
    joint._parameters["weight"] = nn.Parameter(found.weight.to(weight), requires_grad=trained)  # noqa: SLF001
    trained = trained if bias is None else bias.requires_grad or trained
    joint._parameters["bias"] = nn.Parameter(found.bias.to(weight), requires_grad=trained)  # noqa: SLF001
    put(small, found.second, joint)
    for path in (found.first, *found.between):
        put(small, path, nn.Identity())
    fit(small)
    return small
