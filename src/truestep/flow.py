"""Follows the units of a model through its forward calls, function by function.

`Flow` is a `torch.overrides.TorchFunctionMode`: while it is on, every torch function that the model's code
calls passes through it, out of modules and functional calls alike, on plain tensors and with nothing hooked
or changed on the model. For each tensor it notes where the units are; a rule of `truestep.flow_rules` says
what a function does to them. A function without a rule is where the way of its units ends: they are pinned,
with its name.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from truestep import flow_rules
from truestep.activations import Activation, find_activation
from truestep.errors import TruestepError
from truestep.units import Call, Channels, Key, Ledger, Site, tensors_in

__all__ = ["Flow", "Observer", "Step"]


class Step(NamedTuple):
    """One call in the course of a forward pass.

    Attributes:
        name: of the function.
        module: the path of the module whose code makes the call.
        given: the units of the tensors it was given.
        shapes: of the tensors it returned.
        units: where their units are.
    """

    name: str
    module: str
    given: list[Channels]
    shapes: list[tuple[int, ...]]
    units: list[Channels | None]


class Observer(Protocol):
    """What is shown activation functions at work; a key names the layer and the function."""

    def before(
        self, key: Key, z: Tensor, units: Channels, ends: Callable[[Tensor], Tensor] | None
    ) -> None:
        """Sees a pre-activation and where its units are; `ends` is the function, if it never falls."""

    def after(self, key: Key, output: Tensor, units: Channels) -> Tensor:
        """Sees the output, and returns it or another one for the model to go on with."""


class Flow(TorchFunctionMode):
    """Follows units through the forward calls that are made while it is on.

    Args:
        model: whose parameters are known by name.
        observer: is shown the activation functions.
        whole: keep also what goes together and what is known of each unit; only names otherwise.

    Attributes:
        ledger: what is known.
        steps: the calls made, each with the units it was given and what it returned, if `whole`.
        reads: where the model's code reads numbers that depend on the data.
        unknown: activation functions on units of no layer.
    """

    def __init__(self, model: nn.Module, observer: Observer, *, whole: bool = False) -> None:
        super().__init__()
        self.ledger = Ledger(model, whole=whole)
        self.steps: list[Step] = []
        self.reads: dict[str, None] = {}
        self.unknown: dict[str, None] = {}
        self._observer = observer
        self._whole = whole
        self._stack: list[str] = []
        self._hooks: list[Any] = []
        self._paths: dict[int, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), name)

    def finish(self, outputs: Any) -> None:
        """Pins the units that the model returns."""
        for tensor in tensors_in(outputs):
            self.ledger.stop(tensor, "is an output of the model")
            self.ledger.read(tensor)

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        # For all modules, and for as long as this is on: nothing is hung on the model's own.
        on = nn.modules.module
        self._hooks = [
            on.register_module_forward_pre_hook(self._enter_module),
            on.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        return self

    def __exit__(self, *raised: object) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def _enter_module(self, module: nn.Module, _args: Any) -> None:
        self._stack.append(self._paths.get(id(module), type(module).__name__))

    def _leave_module(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._stack.pop()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        full = _name_of(func)
        if full in flow_rules.PLAIN:
            return func(*args, **kwargs)
        call = Call(_plain_name(full), func, args, kwargs, list(tensors_in((args, kwargs))))
        if self._stack:
            call.module = self._stack[-1]
        flow_rules.refuse_chance(call)
        if not call.tensors:
            return func(*args, **kwargs)
        if full.partition(".")[0] in flow_rules.READS and any(
            map(self.ledger.from_data, call.tensors)
        ):
            self.reads.setdefault(str(call))
        if any(tensor.is_inference() for tensor in call.tensors):
            raise TruestepError(
                "tensors of torch.inference_mode() do not show what is written into them; look for dummy "
                "nodes, compress and watch units outside of it, on data that were made outside"
            )
        versions = [tensor._version for tensor in call.tensors]  # noqa: SLF001
        return self._pass_on(call, versions)

    def _pass_on(self, call: Call, versions: Sequence[int]) -> Any:
        """Calls the function, and notes where the units are in what it returns."""
        ledger = self.ledger
        given: list[Channels] = []
        if self._whole:
            for tensor in call.tensors:
                ledger.read(tensor)
            given = [u for tensor in call.tensors if (u := ledger.channels(tensor)) is not None]
        first, found = call.args[0] if call.args else None, None
        activation = None
        if isinstance(first, Tensor) and first.is_floating_point():
            activation = find_activation(call.name, call.args[1:], call.kwargs)
        if activation is not None:
            output, found = self._activate(call, activation)
        else:
            output = call.function(*call.args, **call.kwargs)
            if flow_rules.is_transpose(ledger, call, output):
                return output
            found = flow_rules.apply(ledger, call, output)
        from_data = any(map(ledger.from_data, call.tensors))
        results = list(tensors_in(output))
        for tensor, version in zip(call.tensors, versions, strict=True):
            if tensor._version != version:  # noqa: SLF001
                itself = not any(tensor is result for result in results)
                ledger.spoil(tensor, itself=itself, from_data=from_data)
        several = found if isinstance(found, list) else [found] * len(results)
        for tensor, channels in zip(results, several, strict=True):
            ledger.keep(tensor, channels, from_data=from_data)
        if self._whole:
            shapes = [tuple(tensor.shape) for tensor in results]
            self.steps.append(Step(call.name, call.module, given, shapes, several))
        return output

    def _activate(self, call: Call, activation: Activation) -> tuple[Any, Channels | None]:
        z, ledger = call.args[0], self.ledger
        units = ledger.channels(z)
        if units is None:
            if z.dim() > 1:
                self.unknown.setdefault(str(call))
            return call.function(*call.args, **call.kwargs), None
        layer = "+".join(units.layers) or call.module or call.name
        key = (layer, activation.name)
        ends = partial(_again, call) if activation.rising else None
        self._observer.before(key, z, units, ends)
        output = call.function(*call.args, **call.kwargs)
        made = Channels(units.dim, units.slots, fixed=units.fixed)
        if self._whole:
            made.starts = ledger.start("units", len(ledger.sites), len(units.slots))
            made.scale = torch.ones(len(units.slots), dtype=torch.float64, device="cpu")
            made.shift = torch.zeros_like(made.scale)
            if call.name == "prelu":
                flow_rules.join_slopes(ledger, call, units)
            ledger.sites.append(Site(key, activation, units, made, call.module))
        return self._observer.after(key, output, made), made


def _again(call: Call, values: Tensor) -> Tensor:
    result: Tensor = call.function(values, *call.args[1:], **call.kwargs)
    return result


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", "")
    if name == "__get__":
        # A property of tensors, such as Tensor.T.
        name = "." + getattr(getattr(function, "__self__", None), "__name__", name)
    return name or type(function).__name__


def _plain_name(name: str) -> str:
    """Without what tells variants apart: ``add.Tensor``, ``add_`` and ``__iadd__`` are add."""
    name = name.lstrip(".").partition(".")[0]
    if name.startswith("__") and name.endswith("__"):
        inner = name.strip("_")
        return flow_rules.OPERATORS.get(inner, inner)
    return name.rstrip("_")
