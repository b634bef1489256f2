"""Smaller parameters in the same modules: what a plan does to a model, and to a fresh one.

`operate` carries a plan out on a copy of the model; `shrink_to` gives a freshly built model the sizes of a
compressed state. Both end in the same place: parameters are exchanged, and the sizes that modules keep as
attributes are set to the parameters'.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from truestep.checks import check_kind
from truestep.errors import TruestepError
from truestep.hooks import inert
from truestep.plan import Plan
from truestep.units import Ledger, Use

__all__ = [
    "Cut",
    "bias_of",
    "copied",
    "exchanged",
    "fit",
    "operate",
    "owners",
    "put",
    "shrink_to",
]


@dataclass
class Cut:
    """What stays of one parameter.

    Attributes:
        kept: by dimension, the indices that stay.
        groups: of a grouped convolution, whose inputs are counted over all groups.
        inputs: the inputs that stay, of all groups.
    """

    kept: dict[int, Tensor] = field(default_factory=dict)
    groups: int = 1
    inputs: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """The same cut of the parameter, or of anything of its shape."""
        if self.inputs is not None:
            values = self._cut_groups(values, self.inputs)
        for dim, places in self.kept.items():
            values = values.index_select(dim, places.to(values.device))
        return values

    def _cut_groups(self, values: Tensor, inputs: Tensor) -> Tensor:
        """The columns of each group's rows."""
        size = values.shape[1]
        if size == 1:
            return values  # depthwise: a group goes with its rows
        rows = values.chunk(self.groups)
        mine = [inputs[(inputs // size) == group] % size for group in range(self.groups)]
        cut = [
            part.index_select(1, own.to(part.device)) for part, own in zip(rows, mine, strict=True)
        ]
        return torch.cat(cut)


def operate(model: nn.Module, ledger: Ledger, plan: Plan) -> tuple[nn.Module, dict[str, Cut]]:
    """Carries out a plan.

    Args:
        model: stays as it is.
        ledger: that the plan was made from.
        plan: what goes, and what layers take over.

    Returns:
        A smaller copy, and by name of a parameter or buffer what stays of it.
    """
    small = copied(model)
    cuts = _cuts(ledger, plan)
    changed = _taken_over(ledger, plan)
    for name in cuts.keys() | changed.keys():
        values = changed.get(name, ledger.owned.get(name))
        assert values is not None  # noqa: S101
        _exchange(small, name, cuts[name](values) if name in cuts else values)
    for use in ledger.uses:
        if use.groups > 1 and use.weight in cuts:
            _set_groups(small, use, cuts[use.weight], ledger)
    fit(small)
    return small, cuts


def copied(model: nn.Module) -> nn.Module:
    """A deep copy without the hooks of a counter, which do nothing on a copy but slow fused layers down."""
    copy_of_it = copy.deepcopy(model)
    for module in copy_of_it.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):  # noqa: SLF001
            for key in [key for key, hook in hooks.items() if inert(hook)]:
                del hooks[key]
    return copy_of_it


def exchanged(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with other numbers.

    Args:
        model: stays as it is.
        values: by name of a parameter, in the copy in the type and on the device of its module's.
    """
    copy_of_it = copied(model)
    for name, numbers in values.items():
        module = model.get_submodule(name.rpartition(".")[0])
        _exchange(copy_of_it, name, numbers.to(next(module.parameters())))
    return copy_of_it


def owners(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """Every module, with the attribute, that holds a parameter or buffer."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = module._parameters.get(attribute, module._buffers.get(attribute))  # noqa: SLF001
    if tensor is None:
        yield module, attribute
        return
    for module in model.modules():
        for held in (module._parameters, module._buffers):  # noqa: SLF001
            yield from ((module, key) for key, value in list(held.items()) if value is tensor)


def _cuts(ledger: Ledger, plan: Plan) -> dict[str, Cut]:
    cuts: dict[str, Cut] = {}
    groups = {use.weight: use.groups for use in ledger.uses}
    for name, dim, slots in (*ledger.all_rows(), *_made(ledger, plan)):
        gone = ledger.slots.inside(slots, plan.roots)
        if bool(gone.any()):
            cut = cuts.setdefault(name, Cut())
            places = (~gone).nonzero().squeeze(1)
            if dim == "inputs":
                cut.groups, cut.inputs = groups[name], places
            else:
                cut.kept[dim] = places
    return cuts


def _made(ledger: Ledger, plan: Plan) -> Iterator[tuple[str, int, Tensor]]:
    """Name, dimension and slots of the biases that layers without one get."""
    for number in plan.shifts:
        use = ledger.uses[number]
        if bias_of(use) not in ledger.owned:
            yield bias_of(use), 0, use.outputs.slots


def _taken_over(ledger: Ledger, plan: Plan) -> dict[str, Tensor]:
    """Weights and biases with what they take over, before they are cut."""
    changed: dict[str, Tensor] = {}
    biased: set[tuple[str, str]] = set()
    for number, shift in plan.shifts.items():
        use = ledger.uses[number]
        weight = ledger.owned[use.weight].detach()
        bias = bias_of(use)
        if (use.weight, bias) in biased:
            continue  # the same constants, in another use of the layer
        biased.add((use.weight, bias))
        before = changed.get(bias, ledger.owned.get(bias))
        rows = _shifted(weight.double(), shift.to(weight.device), use)
        total = rows if before is None else before.detach().double() + rows
        changed[bias] = total.to(weight.dtype)
    for number, moves in plan.moves.items():
        use = ledger.uses[number]
        values = ledger.owned[use.weight].detach().double()
        columns = values.movedim(use.in_dim, 0).clone()
        for column, other, factor in moves:
            columns[other] += factor * columns[column]
        weight = columns.movedim(0, use.in_dim).contiguous()
        changed[use.weight] = weight.to(ledger.owned[use.weight].dtype)
    return changed


def bias_of(use: Use) -> str:
    """The name of a map's bias, or that which it would have."""
    return use.bias or (f"{use.module}.bias" if use.module else "bias")


def _shifted(weight: Tensor, shift: Tensor, use: Use) -> Tensor:
    """What constant inputs add to each output: the sum over the kernel, times the constants."""
    weight = (
        weight.movedim((use.out_dim, use.in_dim), (0, 1)).flatten(2).sum(2)
        if (
            weight.dim() > 2  # noqa: PLR2004
        )
        else weight.movedim((use.out_dim, use.in_dim), (0, 1))
    )
    parts = zip(weight.chunk(use.groups), shift.chunk(use.groups), strict=True)
    return torch.cat([rows @ numbers for rows, numbers in parts])


def _exchange(model: nn.Module, name: str, values: Tensor) -> None:
    """Puts other numbers, of any size, in the place of a parameter or buffer, wherever it is held."""
    values = values.detach().clone()
    fresh: Tensor | None = None
    for module, attribute in list(owners(model, name)):
        old = module._parameters.get(attribute)  # noqa: SLF001
        if attribute in module._buffers:  # noqa: SLF001
            module._buffers[attribute] = values  # noqa: SLF001
            continue
        if fresh is None:
            beside = module._parameters.get("weight") if old is None else old  # noqa: SLF001
            trained = beside is None or beside.requires_grad
            fresh = nn.Parameter(values, requires_grad=trained)
        module._parameters[attribute] = fresh  # type: ignore[assignment]  # noqa: SLF001


def _set_groups(model: nn.Module, use: Use, cut: Cut, ledger: Ledger) -> None:
    """A depthwise convolution has as many groups as inputs."""
    if ledger.owned[use.weight].shape[use.in_dim] == 1 and cut.inputs is not None:
        for module, _ in owners(model, use.weight):
            if hasattr(module, "groups"):
                setattr(module, "groups", len(cut.inputs))  # noqa: B010


def fit(model: nn.Module) -> None:
    """Sets the sizes that modules keep as attributes to those of their parameters."""
    for module in model.modules():
        weight = module._parameters.get("weight")  # noqa: SLF001
        if isinstance(module, nn.modules.batchnorm._NormBase):  # noqa: SLF001
            held = module.weight if module.weight is not None else module.running_mean
            if held is not None:
                module.num_features = len(held)
        if weight is None:
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.modules.conv._ConvNd):  # noqa: SLF001
            first, second = weight.shape[0], weight.shape[1] * module.groups
            module.in_channels, module.out_channels = (
                (first, second) if module.transposed else (second, first)
            )
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.embedding_dim = weight.shape[1]
        elif isinstance(module, nn.PReLU):
            module.num_parameters = len(weight)


def shrink_to(model: nn.Module, saved: Mapping[str, Any]) -> nn.Module:
    """Gives a freshly built model the sizes and numbers of a compressed one; no pickled class is needed.

    Args:
        model: built by the same code as the model that was compressed; changed in place.
        saved: `CompressionReport.checkpoint(small)`, as `torch.load(path, weights_only=True)` gives it back,
            or the compressed model's state_dict alone if neither layers were folded into their neighbours
            nor depthwise convolutions made smaller.

    Returns:
        The model.

    Raises:
        TruestepError: the state belongs to another model.

    Example:
        >>> import torch, truestep
        >>> make = lambda: torch.nn.Sequential(
        ...     torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> model = make()
        >>> model[0].bias.data = torch.tensor([0.0, -100.0, 0.0])
        >>> x = torch.randn(50, 2)
        >>> small, report = truestep.compress(model, truestep.find_dummy_nodes(model, [x]), x)
        >>> same = truestep.shrink_to(make(), report.checkpoint(small))
        >>> same[0], bool((same(x) == small(x)).all())
        (Linear(in_features=2, out_features=2, bias=True), True)
    """
    check_kind(model, nn.Module, "model", "a torch.nn.Module")
    check_kind(saved, Mapping, "saved", "report.checkpoint(small), or what torch.load gives of it")
    state = saved.get("state_dict", saved)
    structure = saved.get("structure", {}) if "state_dict" in saved else {}
    try:
        _restructure(model, structure)
        _resize(model, state)
        fit(model)
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, ValueError) as error:
        raise TruestepError(
            f"the state does not belong to this {type(model).__name__}: {error}. Build the model with the "
            "code and the arguments of the one that was compressed, and pass all that "
            "report.checkpoint(small) gave"
        ) from error
    return model


def _restructure(model: nn.Module, structure: Mapping[str, Any]) -> None:
    for first, second, *between in structure.get("folded", ()):
        put(model, second, copy.deepcopy(model.get_submodule(first)))
        for path in (first, *between):
            put(model, path, nn.Identity())
    for name, groups in structure.get("groups", {}).items():
        setattr(model.get_submodule(name), "groups", groups)  # noqa: B010


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in the place of another."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module.train(model.training))


def _resize(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Makes room for the tensors of a state, wherever they are of another size than the model's."""
    held: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    held |= dict(model.named_buffers(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    done: set[int] = set()
    for name, values in state.items():
        old = held.get(name)
        if old is None:
            path, _, attribute = name.rpartition(".")
            owner = modules.get(path)
            if owner is not None and owner._parameters.get(attribute, values) is None:  # noqa: SLF001
                _exchange(model, name, values)
        elif old.shape != values.shape and id(old) not in done:
            done.add(id(old))
            _exchange(model, name, values.to(old))
