"""The layers that a counter watches, and where their tensors hold the samples."""

import sys
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from truestep.calls import Call, memory_of
from truestep.checks import check_batch_dim, check_kind, check_rules
from truestep.distributed import is_sharded
from truestep.errors import TruestepError
from truestep.graph import Recording
from truestep.hooks import Hook
from truestep.kernels.dispatch import is_wrapped
from truestep.layout import Given, Inside, Layout, Rule, tensors_in
from truestep.rules import backward_is_known, find_rule, refused
from truestep.rules_bare import LEAVE_OUT, UncountableError, bare, holders_in, own_parameters
from truestep.rules_embedding import looks_up_positions
from truestep.rules_func import AloneError, PerSample, unusable
from truestep.way import Direct
from truestep.ways import direct_way

__all__ = [
    "Layer",
    "batch_of",
    "check_batch",
    "check_options",
    "check_shape",
    "find_layers",
    "fused_in_evaluation",
    "layout_of",
    "make_layer",
    "parameter_names",
    "sizes_of",
    "uncompiled_model",
]


class _Seen:
    """What was seen of a layer's parameters, good as long as its modules hold the very same ones."""

    def __init__(self) -> None:
        self.names: dict[str, Tensor] = {}
        self.trained: list[tuple[Tensor, Tensor]] = []
        self._places: list[tuple[dict[str, Any], str, Any, bool]] = []
        self._sizes: list[tuple[dict[str, Any], int]] = []

    def note(
        self, module: nn.Module, names: dict[str, Tensor], trained: list[tuple[Tensor, Tensor]]
    ) -> None:
        """Keeps what was seen."""
        self.names, self.trained = names, trained
        held: list[dict[str, Any]] = [inner._parameters for inner in module.modules()]  # noqa: SLF001
        self._sizes = [(parameters, len(parameters)) for parameters in held]
        self._places = [
            (parameters, name, parameter, parameter is not None and parameter.requires_grad)
            for parameters in held
            for name, parameter in parameters.items()
        ]

    def holds(self) -> bool:
        """Whether it is still so."""
        for parameters, name, parameter, trains in self._places:
            present = parameters.get(name)
            if present is not parameter or (
                trains is not (present is not None and present.requires_grad)
            ):
                return False
        for held, size in self._sizes:
            if len(held) != size:
                return False
        return bool(self._sizes)


@dataclass(frozen=True)
class Layer:
    """A module with a rule: its dotted name, the module, its rule and its layout.

    Attributes:
        sharded: its parameters that `fully_shard` has divided among ranks, by their names in it. During
            its calls and their backward passes, the module has gathered ones in their place.
        bare: whether only the module's own parameters are counted here, whatever modules it has in it.
        lenient: whether such a module may keep its plain gradients.
        holds_layers: whether it has modules in it that are called.
        began: of such a module, the calls that have not returned.
        builtin: whether its forward pass is torch's own.
        direct: where calls may go the short way.
        followed: whether gradient penalties that go through its backward pass can be counted.
        lookups: of a table, what the indices that the model made have shown themselves to be until now.
    """

    name: str
    module: nn.Module
    rule: Rule
    layout: Layout
    sharded: Mapping[str, Tensor]
    bare: bool = False
    lenient: bool = False
    holds_layers: bool = False
    began: list[Recording] = field(default_factory=list)
    builtin: bool = False
    direct: Direct | None = None
    followed: bool = False
    lookups: set[str] = field(default_factory=set)
    _seen: _Seen = field(default_factory=_Seen)

    def begin(self) -> None:
        """Notes that a call begins."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.began.append(Recording())

    def rule_of_call(self) -> Rule:
        """The rule, for the call that has just returned.

        Raises:
            TruestepError: parameters were spread over ranks while it ran.
        """
        for name, spread in self.sharded.items():
            if self.module._parameters.get(name) is spread:  # noqa: SLF001 - not those of modules in it
                raise TruestepError(
                    f"{name!r} of {self.name!r} is spread over ranks while the layer runs (tensor "
                    "parallelism); only rows that are gathered for each call can be counted: use fully_shard"
                )
        if not self.began:
            return self.rule
        recording = self.began.pop()
        recording.stop()
        return partial(_own, self.name, recording, self.lenient)

    def see(
        self, activity: Given | Inside, outputs: list[Tensor], plain: set[Tensor]
    ) -> tuple[Given | None, list[tuple[Any, Any]]]:
        """What a rule returned, taken apart; see `Inside`.

        Args:
            activity: what the rule returned.
            outputs: of the layer.
            plain: where `lenient`, gets the parameters that the rule cannot count.
        """
        if not isinstance(activity, Inside):
            return activity, []
        try:
            given, inner = activity.see(outputs)
        except UncountableError:
            if not self.lenient:
                raise
            plain.update(self.owner(name, parameter) for name, parameter in self._own())
            return None, []
        return given, list(inner)

    def owner(self, name: str, present: Tensor) -> Tensor:
        """The parameter of the counter's model that the module's present one stands for."""
        return self.sharded.get(name, present)

    def trains(self) -> bool:
        """Whether any of the layer's present parameters gets a gradient."""
        return any(parameter.requires_grad for _, parameter in self._own())

    def traced(self) -> bool:
        """Whether any of the layer's present parameters gets a gradient, where it is compiled.

        Raises:
            TruestepError: the layer would have to run once more, with the layers in it.
        """
        trains = self.trains()
        if self.bare and trains and self.holds_layers:
            raise TruestepError(
                f"{self.name or 'the model'!r} has parameters of its own and modules in it, and a "
                f"compiled graph does not show how it uses them; leave it out, {LEAVE_OUT}"
            )
        return trains

    def _own(self) -> Iterable[tuple[str, Tensor]]:
        return own_parameters(self.module).items() if self.bare else self.module.named_parameters()

    def trained(self, known: Container[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The layer's present parameters that get a gradient, each after its `owner`.

        Raises:
            TruestepError: an owner is not among the `known` ones, the counter's, or a parameter has become
                something that is computed.
        """
        if self._seen.holds():
            return self._seen.trained
        found: list[tuple[Tensor, Tensor]] = []
        names = dict(self._own())
        for name in self._seen.names.keys() - names.keys():
            if isinstance(reduce(_attribute, name.split("."), self.module), Tensor):
                raise TruestepError(
                    f"{name!r} of {self.name!r} is computed from others since the SampleCounter was made "
                    "(pruning, spectral_norm, a parametrization); make that permanent, with "
                    "prune.remove() and the like, or make the counter afterwards"
                )
        for name, parameter in names.items():
            # What torch.func's transforms put there gets no gradient in `.grad`.
            if parameter.requires_grad and parameter.is_leaf and not is_wrapped(parameter):
                owner = self.owner(name, parameter)
                if owner not in known:
                    raise TruestepError(
                        f"{name!r} of {self.name!r} is another parameter than when the SampleCounter "
                        "was made (fully_shard, or an assignment, put it there); make the counter "
                        "afterwards"
                    )
                found.append((owner, parameter))
        self._seen.note(self.module, names, found)
        return found

    def present(self, name: str) -> Tensor:
        """The module's present parameter of that name."""
        parameter = self._seen.names.get(name)
        return self.module.get_parameter(name) if parameter is None else parameter


def _attribute(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)


def make_layer(
    name: str, module: nn.Module, rule: Rule, layout: Layout, unsupported: str = "error"
) -> Layer:
    """A layer, with the parameters that it has now."""
    named = module.named_parameters(remove_duplicate=False)
    sharded = {own: parameter for own, parameter in named if is_sharded(parameter)}
    if rule is bare:
        lenient = unsupported == "mean"
        rule = partial(_own, name, None, lenient)
        holds = any(
            True for child in module.modules() if child not in {module, *holders_in(module)}
        )
        return Layer(name, module, rule, layout, sharded, True, lenient, holds)
    builtin = type(module).forward.__module__.startswith("torch.nn.")
    direct = None if sharded else direct_way(module, rule, layout)
    followed = backward_is_known(module, rule)
    return Layer(
        name, module, rule, layout, sharded, builtin=builtin, direct=direct, followed=followed
    )


def _own(
    path: str,
    recording: Recording | None,
    lenient: bool,
    layout: Layout,
    module: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> Inside:
    """`bare`, or, where it does not know an operation, each sample's own gradient."""
    inside = bare(path, recording, layout, module, *args, **kwargs)

    def see(outputs: list[Tensor]) -> tuple[Given | None, list[tuple[Any, Given]]]:
        try:
            return inside.see(outputs)
        except UncountableError as error:
            if lenient or not error.alone:
                raise
            try:
                return PerSample(path)(layout, module, *args, **kwargs).see(outputs)
            except AloneError as other:
                raise UncountableError(
                    f"{error}. Nor can its samples be run one by one: {other.reason}"
                ) from other

    return Inside(see)


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Parameter to name, as in `model.named_parameters()` without DistributedDataParallel's prefix."""
    return {parameter: name for name, parameter in _wrapped(model).named_parameters()}


def _wrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return uncompiled_model(model.module)
    return model


def uncompiled_model(model: nn.Module) -> nn.Module:
    """The model that `torch.compile(model)` wraps; other models as they are."""
    dynamo = sys.modules.get("torch._dynamo")  # imported by whoever has compiled a model
    wrapped = dynamo is not None and isinstance(model, dynamo.OptimizedModule)
    return model._orig_mod if wrapped else model  # type: ignore[return-value]  # noqa: SLF001


def check_options(
    model: nn.Module, unit: str, unsupported: str, rules: Any, batch_dim: Any
) -> None:
    """Raises `TruestepError` for what a counter cannot be made of."""
    check_kind(model, nn.Module, "model", "a torch.nn.Module")
    check_rules(rules)
    check_batch_dim(batch_dim, (name for name, _ in _wrapped(model).named_modules()))
    if unit not in {"sample", "position"}:
        raise TruestepError(f"unit is {unit!r}; use 'sample' or 'position'")
    if unsupported not in {"error", "mean"}:
        raise TruestepError(f"unsupported is {unsupported!r}; use 'error' or 'mean'")
    scripted = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        name = repr(scripted[0]) if scripted[0] else "the model"
        raise TruestepError(
            f"{name} is a TorchScript module, whose layers do not show what they are given; make the "
            "counter on the module that it was scripted from, and use torch.compile"
        )
    if isinstance(model, nn.DataParallel):
        raise TruestepError(
            "nn.DataParallel runs copies of the model in threads, which cannot be counted; "
            "use torch.nn.parallel.DistributedDataParallel"
        )


def find_layers(
    model: nn.Module, rules: Mapping[Any, Rule], unsupported: str
) -> tuple[list[tuple[str, nn.Module, Rule]], set[Tensor]]:
    """The modules that have a rule, and the parameters that keep their plain gradient.

    Raises:
        TruestepError: A module with trained parameters has no rule (all are named) and
            `unsupported` is "error", or another counter watches the model.
    """
    layers, plain, reasons = [], set(), []
    inside: set[nn.Module] = set()  # modules that another uses without calling them
    _refuse_second_counter("", model)
    for name, module in _wrapped(model).named_modules():
        own = list(own_parameters(module).values())
        _refuse_second_counter(name, module)
        if nn.utils.parametrize.is_parametrized(module) and module not in inside:
            lists: Any = module.parametrizations
            own += [parameter for parameter in lists.parameters() if parameter not in set(own)]
            inside.update(lists.modules())
        if not own or module in inside:
            continue
        rule = _choose(name, module, rules, unsupported)
        if not isinstance(rule, str):
            layers.append((name, module, rule))
            if isinstance(module, nn.MultiheadAttention):
                inside.add(module.out_proj)
            if rule is bare:
                inside.update(holders_in(module))
        elif unsupported == "mean":
            plain.update(own)
        elif any(parameter.requires_grad for parameter in own):
            reasons.append(f"  {name or 'the model itself'}: {rule}")
    if reasons:
        raise TruestepError(
            "the samples of these modules cannot be counted:\n"
            + "\n".join(reasons)
            + "\nGive each a rule, SampleCounter(model, rules=truestep.RULES | {MyLayer: my_rule}), "
            "or keep their plain gradients with unsupported='mean'"
        )
    return layers, plain


def _choose(
    name: str, module: nn.Module, rules: Mapping[Any, Rule], unsupported: str
) -> Rule | str:
    """A module's rule, else its own samples' gradients where they can be had; or why there is neither."""
    found = find_rule(module, rules)
    if not isinstance(found, str) or unsupported == "mean" or refused(module, rules) is not None:
        return found
    hindrance = unusable(module)
    if hindrance is None:
        return PerSample(name)
    return f"{found}, and its samples cannot be run one by one: {hindrance}"


def _refuse_second_counter(name: str, module: nn.Module) -> None:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]  # noqa: SLF001
    if any(isinstance(hook, Hook) and hook.counter() is not None for hook in hooks):
        raise TruestepError(
            f"another SampleCounter watches {name or 'this model'!r}; use that one, or close() it"
        )


def fused_in_evaluation(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Modules to the one that replaces them all by one operation in evaluation, if they have no hooks."""
    return {
        inner: outer
        for outer in model.modules()
        if isinstance(outer, nn.TransformerEncoderLayer)
        for inner in outer.modules()
    }


def check_shape(layer: Layer, name: str, shape: torch.Size, parameter: Tensor) -> None:
    """Raises `TruestepError` unless a rule's activity has the shape of the parameter."""
    if shape != parameter.shape:
        raise TruestepError(
            f"the rule for {layer.name!r} gives {name!r} the shape {tuple(shape)}, but "
            f"the parameter has {tuple(parameter.shape)}; correct the rule"
        )


def layout_of(layer: Layer, call: Call, args: Any, kwargs: Any) -> Layout:
    """The layer's layout; a table of positions looked up once for all samples has no samples."""
    if layer.layout.batch_dim is None or not isinstance(layer.module, nn.Embedding):
        return layer.layout
    indices, dim = next(tensors_in((args, kwargs))), layer.layout.batch_dim
    if not call.sizes or indices.dim() > 2 or indices.dim() <= dim:  # noqa: PLR2004
        return layer.layout
    seen, apart = layer.lookups, indices.shape[dim] not in call.sizes
    if not apart and (len(indices) == 1 < indices.dim() or memory_of(indices) in call.inputs):
        return layer.layout
    consecutive = looks_up_positions(indices)
    if consecutive is apart and len(indices) > 1:
        seen.add("positions" if apart else "samples")
    # Samples may be consecutive by chance, and positions as many as there are samples.
    if not consecutive or (not apart and seen == {"samples"}):
        return layer.layout
    if apart or seen == {"positions"}:
        return replace(layer.layout, batch_dim=None)
    what = f"{len(indices)} consecutive rows" if indices.dim() == 1 else "rows by distances"
    raise TruestepError(
        f"{layer.name!r} looks up {what} in a batch of {len(indices)}: for each sample, or for positions "
        f"that all samples share? Say batch_dim={{{layer.name!r}: None}} (shared) or 0; consecutive "
        f"positions may be looked up with the shape [1, {len(indices)}] as well"
    )


def batch_of(layer: Layer, call: Call) -> int:
    """How many samples share a layer without samples of its own."""
    size = call.batch_size or next(iter(call.sizes), None)
    if size is None:
        raise TruestepError(
            f"how many samples share {layer.name!r} is unknown, since no tensor of the model's call "
            "shows a batch size; set counter.batch_size and leave the module without a rule"
        )
    return size


def check_batch(layer: Layer, call: Call, samples: int) -> None:
    """Raises `TruestepError` unless the layer sees as many samples as the model does."""
    known = set(call.sizes) if call.batch_size is None else {call.batch_size}
    if known and samples not in known:
        raise TruestepError(
            f"{layer.name!r} sees a batch of {samples}, the model one of "
            f"{' or '.join(map(str, sorted(known)))}. Say where its samples are with "
            f"SampleCounter(model, batch_dim={{{layer.name!r}: ...}}), None where all samples share "
            "its inputs, count positions with unit='position', leave its inputs unflattened, give a layer "
            "that gets some of the samples a rule that puts them in their places (see the reference on "
            "experts), or give a single sample its batch dimension, x.unsqueeze(0)"
        )
    call.batch_size = samples


def sizes_of(tensors: Iterable[Tensor], batch_dim: int) -> list[int]:
    """The sizes that tensors have in their batch dimension."""
    return [shape[batch_dim] for tensor in tensors if len(shape := tensor.shape) > batch_dim]
