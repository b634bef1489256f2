"""Where the units of a model are in its tensors, and the ledger that is kept while it runs.

A *unit* is one feature of a linear map or one channel of a convolution. `Channels` says for one tensor where
its units are; `Ledger` holds what is known of all tensors of one forward call, which parameters they came
through, and, in its `Slots`, which units have to go together.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from truestep.activations import Activation
from truestep.slots import Slots

__all__ = [
    "Call",
    "Channels",
    "Key",
    "Ledger",
    "Site",
    "Use",
    "View",
    "layer_name",
    "tensors_in",
    "values_of",
]

# A layer and an activation function, by their names.
Key = tuple[str, str]


@dataclass(eq=False)
class Channels:
    """Where the units are in a tensor, and what is known about them.

    Attributes:
        dim: the dimension along which they lie.
        slots: int64 ``[units]``.
        layers: the layers whose sum this is, up to the last activation function.
        fixed: bool ``[units]``, units that are the same number whatever the data; None for none.
        starts: int64 ``[units]``, for each the `Ledger.origins` of what `scale` and `shift` are counted
            from, -1 where the way from there to here is no such line; None where it is none for all.
            Units with equal numbers have had the same done to them.
        scale: float64 ``[units]``; a unit here is scale * (what was done to all alike) + shift.
        shift: float64 ``[units]``.
        rising: whether what was done to all alike commutes with positive factors only, as a maximum does.
        even: whether it leaves equal numbers as they are, as a mean does and a sum does not.
    """

    dim: int
    slots: Tensor
    layers: tuple[str, ...] = ()
    fixed: Tensor | None = None
    starts: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    rising: bool = False
    even: bool = True

    def but(self, **changes: Any) -> "Channels":
        """The same with some attributes changed."""
        return replace(self, **changes)

    def bent(self, **changes: Any) -> "Channels":
        """The same units after something that is no line was done to them."""
        return replace(self, starts=None, scale=None, shift=None, **changes)


@dataclass(eq=False)
class Call:
    """One call of a torch function.

    Attributes:
        name: of the function, without what tells its variants apart.
        function: what is called.
        args: positional arguments.
        kwargs: keyword arguments.
        tensors: all tensors among them.
        module: the path of the module whose code makes the call.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    module: str = ""

    def get(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by its place or its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def __str__(self) -> str:
        inside = f" in {self.module!r}" if self.module else ""
        return f"{self.name}{inside}"


@dataclass(eq=False)
class Use:
    """A weight at work, that maps units to units: a linear map or a convolution.

    Attributes:
        weight: the parameter's name.
        bias: the bias's name, or None.
        out_dim: the weight's dimension of the units made.
        in_dim: that of the units read.
        groups: of a convolution.
        inputs: the units read; None where they come from no layer.
        outputs: the units made.
        constants: float64 ``[inputs]``, the numbers of fixed inputs, nan for others.
        borders: why a constant input is not constant for the map, such as zeros around it; or "".
        local: whether each position is mapped by itself.
        takes_bias: whether the call has a place for a bias.
        module: the path of the module whose code makes the call.
        number: counts the uses.
    """

    weight: str
    bias: str | None
    out_dim: int
    in_dim: int
    groups: int
    inputs: Channels | None
    outputs: Channels
    constants: Tensor
    borders: str
    local: bool
    takes_bias: bool
    module: str
    number: int


@dataclass(eq=False)
class Site:
    """An activation function at work: where its units come from and where they go.

    Attributes:
        key: the names of the layer and of the activation function.
        activation: the function.
        inputs: the units of the pre-activation.
        outputs: those of the output.
        module: the path of the module whose code makes the call.
    """

    key: tuple[str, str]
    activation: Activation
    inputs: Channels
    outputs: Channels
    module: str


@dataclass(frozen=True)
class View:
    """A parameter, or its transpose.

    Attributes:
        name: the parameter's.
        dims: which of the parameter's dimensions each dimension of the tensor is.
    """

    name: str
    dims: tuple[int, ...]


@dataclass(eq=False)
class _Known:
    reference: Callable[[], Tensor | None]
    channels: Channels | None
    from_data: bool
    stale: bool = False


class Ledger:
    """What is known of the tensors of a model's forward call.

    Args:
        model: whose parameters are known by name.
        whole: keep also what goes together and what is known of each unit; only names otherwise.

    Attributes:
        slots: the sets of units that go together.
        uses: the maps met, in order.
        sites: the activation functions met, in order.
        readers: by the identity of channels, how many calls read their tensor.
        weights: by name of a parameter, how many calls use it as a weight, a table or a bias.
        owned: parameters and buffers by name; of a tied one, by its first name.
        vacant: parameters for which modules have an empty place, as `Linear(bias=False)` for a bias.
        origins: where units start: ("rows", number of the use) or ("units", number of the site).
        tracked: the units of every tensor that has some, in order.
        moved: results of `truestep.flow_rules` that depend on shapes alone.
    """

    def __init__(self, model: nn.Module, *, whole: bool) -> None:
        self.whole = whole
        self.slots = Slots(joining=whole)
        self.uses: list[Use] = []
        self.sites: list[Site] = []
        self.readers: dict[int, int] = {}
        self.weights: dict[str, int] = {}
        self.origins: list[tuple[str, int]] = []
        self.owned: dict[str, Tensor] = {}
        self.moved: dict[Any, Any] = {}
        self._names: dict[int, str] = {}
        self._aliases: set[tuple[str, str]] = set()
        self._rows: dict[tuple[str, Any], Tensor] = {}
        self._known: dict[int, _Known] = {}
        self._views: dict[int, tuple[Callable[[], Tensor | None], View]] = {}
        self.tracked: list[Channels] = []  # keeps the identities in `readers`
        self.vacant = {
            f"{path}.{name}"
            for path, module in model.named_modules(remove_duplicate=False)
            for name, value in module._parameters.items()  # noqa: SLF001
            if value is None
        }
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                first = self._names.setdefault(id(tensor), name)
                self._aliases.add((name, first))
                if first == name:
                    self.owned[name] = tensor

    def begin(self, inputs: Any) -> None:
        """Forgets the tensors of the last forward call and notes those that hold the data."""
        self._known.clear()
        self._views.clear()
        for tensor in tensors_in(inputs):
            self._known[id(tensor)] = _Known(weakref.ref(tensor), None, from_data=True)

    def channels(self, tensor: Any) -> Channels | None:
        """Where the units are in a tensor; in a parameter that is a vector, its own."""
        if not isinstance(tensor, Tensor):
            return None
        known = self._find(tensor)
        if known is not None:
            if known.stale and known.channels is not None:
                self.slots.pin(known.channels.slots, "is changed in place, in parts")
                return None
            return known.channels
        name = self._names.get(id(tensor))
        long = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        if name is None or len(long) != 1:
            return None
        fixed = None
        if self.whole:
            fixed = torch.ones(tensor.shape[long[0]], dtype=torch.bool, device="cpu")
        return Channels(long[0], self.rows(name, long[0]), fixed=fixed)

    def from_data(self, tensor: Any) -> bool:
        """Whether the numbers of a tensor depend on the data."""
        known = self._find(tensor) if isinstance(tensor, Tensor) else None
        return known is not None and known.from_data

    def rows(self, name: str, dim: int) -> Tensor:
        """The slots of a parameter or buffer along a dimension."""
        return self.named_slots(name, dim, self.owned[name].shape[dim])

    def named_slots(self, name: str, what: Any, number: int) -> Tensor:
        """The slots that stand under a name, made when first asked for."""
        key = (name, what)
        if key not in self._rows:
            self._rows[key] = self.slots.fresh(number)
        return self._rows[key]

    def all_rows(self) -> Iterator[tuple[str, Any, Tensor]]:
        """Name, dimension and slots of parameters and buffers."""
        for (name, dim), slots in self._rows.items():
            if name in self.owned:
                yield name, dim, slots

    def view(self, tensor: Any) -> View | None:
        """Which parameter a tensor is, or is the transpose of."""
        if not isinstance(tensor, Tensor):
            return None
        name = self._names.get(id(tensor))
        if name is not None:
            return View(name, tuple(range(tensor.dim())))
        found = self._views.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def start(self, kind: str, number: int, units: int) -> Tensor:
        """The starts of units that begin here.

        Args:
            kind: "rows" for what a weight makes, "units" for what an activation function returns.
            number: of the use or the site.
            units: how many.
        """
        self.origins.append((kind, number))
        return torch.full((units,), len(self.origins) - 1, device="cpu")

    def onward(self, starts: Tensor | None) -> Tensor | None:
        """The starts of units to all of which the same is done, and to no others."""
        if starts is None:
            return None
        fresh = starts.clone()
        for code in starts.unique().tolist():
            if code >= 0:
                self.origins.append(self.origins[code])
                fresh[starts == code] = len(self.origins) - 1
        return fresh

    def origin(self, units: Channels) -> tuple[str, int] | None:
        """Where all units of a tensor start, if it is one place and the same was done to all."""
        codes = [] if units.starts is None else units.starts.unique().tolist()
        return self.origins[codes[0]] if len(codes) == 1 and codes[0] >= 0 else None

    def layer(self, call: Call, weight: str) -> str:
        """The path of the module whose weight a call uses, under the name that it has there."""
        own = f"{call.module}.weight" if call.module else "weight"
        return call.module if (own, weight) in self._aliases and call.module else layer_name(weight)

    def count_weight(self, name: str) -> None:
        """Counts a call that uses a parameter as a weight, a table or a bias."""
        self.weights[name] = self.weights.get(name, 0) + 1

    def note_view(self, tensor: Tensor, view: View) -> None:
        """Notes that a tensor is the transpose of a parameter."""
        self._views[id(tensor)] = (weakref.ref(tensor), view)

    def freeze(self, tensor: Any, reason: str) -> None:
        """Keeps a parameter as it is in all dimensions."""
        found = self.view(tensor) if self.whole else None
        if found is not None:
            for dim in range(self.owned[found.name].dim()):
                self.slots.pin(self.rows(found.name, dim), reason)

    def stop(self, tensor: Any, reason: str) -> None:
        """Pins the units of a tensor, and the parameter that it may be."""
        if self.whole:
            units = self.channels(tensor)
            if units is not None:
                self.slots.pin(units.slots, reason)
            self.freeze(tensor, reason)

    def end(self, call: Call) -> Channels | None:
        """Ends the way of all units that are given to a call, and returns that its result has none."""
        reason = f"goes through {call}, which mixes units or is not known to keep them apart"
        for tensor in call.tensors:
            self.stop(tensor, reason)
        return None

    def keep(self, tensor: Tensor, channels: Channels | None, *, from_data: bool) -> None:
        """Notes a tensor that a function has returned."""
        if id(tensor) not in self._names:
            self._known[id(tensor)] = _Known(weakref.ref(tensor), channels, from_data)
            if self.whole and channels is not None:
                self.tracked.append(channels)

    def read(self, tensor: Tensor) -> None:
        """Counts a reader of a tensor."""
        known = self._find(tensor)
        if known is not None and known.channels is not None:
            key = id(known.channels)
            self.readers[key] = self.readers.get(key, 0) + 1

    def spoil(self, written: Tensor, *, itself: bool, from_data: bool) -> None:
        """Notes that what shares memory with a tensor was written to, and the tensor too if `itself`."""
        place = written.untyped_storage().data_ptr()
        for known in self._known.values():
            tensor = known.reference()
            if tensor is None or (tensor is written and not itself):
                continue
            if tensor.untyped_storage().data_ptr() == place:
                known.stale = True
                known.from_data |= from_data

    def _find(self, tensor: Tensor) -> _Known | None:
        known = self._known.get(id(tensor))
        return known if known is not None and known.reference() is tensor else None


def layer_name(parameter: str) -> str:
    """What a layer is called after its weight: the module's path, or the parameter's own name.

    Example:
        >>> layer_name("body.0.weight"), layer_name("body.matrix")
        ('body.0', 'body.matrix')
    """
    owner, _, last = parameter.rpartition(".")
    return owner if last == "weight" and owner else parameter


def tensors_in(value: Any, depth: int = 6) -> Iterator[Tensor]:
    """All tensors in nested containers, dataclasses and other objects with attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item, depth)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        yield from tensors_in(vars(value), depth - 1)


def values_of(tensor: Tensor, dim: int) -> Tensor:
    """One number of each unit, float64; for units that are fixed it is theirs.

    Args:
        tensor: with some elements.
        dim: where the units are.
    """
    return tensor.detach().movedim(dim, -1).reshape(-1, tensor.shape[dim])[0].double().cpu()
