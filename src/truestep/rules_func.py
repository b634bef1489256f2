"""The rule for modules that have none: each sample's own gradient, through torch.func.

The module runs once more for each sample alone, forward and backward from that sample's output gradient,
many samples at once under `torch.func.vmap`. That is right for a module that computes a sample's output
from that sample alone and in the same way each time, so its first use is compared with the batch's own
output. `vmap` itself refuses random numbers and values that are read into Python.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils import _pytree as pytree

from truestep.activity import Activity, Elements
from truestep.bits import pack
from truestep.combine import Total
from truestep.errors import TruestepError
from truestep.graph import saved_tensors_are_packed
from truestep.layout import Inside, Layout, tensors_in

__all__ = ["PerSample", "unusable"]

# Samples run at once while their gradients, inputs and outputs have this many elements (float32: 64 MB).
CHUNK_ELEMENTS = 1 << 24
# Masks are packed for at least this many samples at once: bits come in words of 64.
WORD = 64


def unusable(module: nn.Module) -> str | None:
    """Why a module cannot be counted by each sample's own gradient; None where it may be.

    Args:
        module: one with parameters of its own.

    Example:
        >>> unusable(nn.ParameterList([torch.ones(2)]))
        'it has no forward pass'
    """
    if getattr(module.forward, "__func__", None) is nn.Module.forward:
        return "it has no forward pass"
    if isinstance(module, ParametrizationList):
        return "it computes a parameter, not samples"
    for name, child in module.named_modules():
        trained = any(p is not None and p.requires_grad for p in child._parameters.values())  # noqa: SLF001
        if name and trained:
            return f"it has parameters beside those of its {name!r}, which is counted by itself"
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0:  # noqa: SLF001
            return f"its {name!r} draws random numbers"
    return None


class PerSample:
    """Counts a module by each sample's own gradient: m = number of samples with g_i != 0.

    A sample's summed gradient is tested, in the module's dtype, as the oracle does it in float64; other
    rules ask whether any of its terms is non-zero. Tensors among the arguments whose batch dimension has
    the output's size hold samples; others are shared by all. With ``unit="position"``, dimensions of the
    output other than its features must be positions that the module computes one by one.

    A step takes one more forward pass of the module, and a backward pass with per-sample gradients in
    chunks of `CHUNK_ELEMENTS`; one bit per sample and parameter element is kept, and the arguments until
    the backward pass.

    Args:
        name: the module's, for errors.

    Raises:
        TruestepError: from the rule, where the module mixes samples, changes its buffers, draws random
            numbers, or does what `torch.func` cannot.

    Example:
        >>> class Gain(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gain = nn.Parameter(torch.ones(2))
        ...
        ...     def forward(self, x):
        ...         return x * self.gain.exp()
        >>> gain, x = Gain(), torch.tensor([[1.0, 0.0], [2.0, 3.0]])
        >>> activity, _ = PerSample("gain")(Layout(), gain, x).see([gain(x)])
        >>> activity(torch.ones(2, 2))["gain"].count()
        tensor([2, 1])
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # How the module was used where its output was compared: modes, arguments with samples.
        self._compared: set[tuple[Any, ...]] = set()

    def __call__(self, layout: Layout, module: nn.Module, *args: Any, **kwargs: Any) -> Inside:
        """A rule: see `truestep.rules`."""
        return Inside(partial(self._see, layout, module, args, kwargs))

    def _see(
        self, layout: Layout, module: nn.Module, args: Any, kwargs: Any, outputs: list[Tensor]
    ) -> tuple[Callable[..., dict[str, Activity]], list[Any]]:
        with self._refusing(module):
            use = _use_of(layout, module, args, kwargs, outputs)
            how = (tuple(m.training for m in module.modules()), *use.pieces, use.count > 1)
            if how not in self._compared and use.count:
                _compare(use, outputs)
                self._compared.add(how)
        return partial(self._activity, use), []

    def _activity(self, use: "_Use", *deltas: Tensor | None) -> dict[str, Activity]:
        with self._refusing(use.module):
            return _activity(use, deltas)

    @contextmanager
    def _refusing(self, module: nn.Module) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            kind = type(module).__name__
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise TruestepError(
                f"{self._name or 'the model'!r} ({kind}) has no rule, and its samples cannot be run one "
                f"by one: {reason}. Give it a rule, SampleCounter(model, rules=truestep.RULES | "
                f"{{{kind}: my_rule}}), or keep its plain gradient with unsupported='mean'"
            ) from error


@dataclass(frozen=True)
class _Use:
    """A call of a module, taken apart into samples.

    Attributes:
        dims: the dimensions of arguments and outputs that count samples; the first one varies slowest.
        count: the number of samples.
        leaves: the tensors and other values in the arguments.
        structure: how they are nested.
        pieces: the leaves that hold samples by their place, ``[count, ...]`` without `dims`.
        versions: of the tensors among the leaves.
        trained: the places of the outputs that get gradients.
        per_sample: how many elements of gradients, inputs and outputs a sample has.
        autocast: whether the call was under autocast, and its dtype.
    """

    module: nn.Module
    dims: tuple[int, ...]
    count: int
    leaves: list[Any]
    structure: Any
    pieces: dict[int, Tensor]
    versions: list[int]
    trained: list[int]
    per_sample: int
    autocast: tuple[bool, torch.dtype]

    def parameters(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}

    def forward(
        self, places: Sequence[int], parameters: dict[str, Tensor], pieces: dict[int, Tensor]
    ) -> list[Tensor]:
        """Some of the outputs for one sample alone, without `dims`."""
        leaves = list(self.leaves)
        for place, piece in pieces.items():
            leaves[place] = _lengthen(piece, self.dims)
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        # On copies of the buffers: the module has moved its own already.
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        state = {f"module.{name}": tensor for name, tensor in (parameters | buffers).items()}
        with _untouched(self.module), torch.autocast(*self._autocast(), cache_enabled=False):
            output = torch.func.functional_call(_Forward(self.module), state, args, kwargs)
        for name, buffer in buffers.items():
            if state[f"module.{name}"] is not buffer or buffer._version:  # noqa: SLF001
                raise ValueError(f"it changes its buffer {name!r}")
        found = list(tensors_in(output))
        return [_shorten(found[place], self.dims) for place in places]

    def _autocast(self) -> tuple[str, torch.dtype, bool]:
        enabled, dtype = self.autocast
        return next(self.module.parameters()).device.type, dtype, enabled

    def forwards(self, start: int, stop: int) -> list[Tensor]:
        """The trained outputs of some samples, each alone, ``[stop - start, ...]``."""
        parameters = self.parameters()

        def one(_index: Tensor, pieces: dict[int, Tensor]) -> list[Tensor]:
            return self.forward(self.trained, parameters, pieces)

        return self._mapped(one, start, stop, {})  # type: ignore[no-any-return]

    def gradients(self, start: int, stop: int, deltas: dict[int, Tensor]) -> dict[str, Tensor]:
        """The own gradients of some samples, ``[stop - start, *parameter.shape]``.

        Args:
            start: the first sample.
            stop: the sample after the last.
            deltas: the gradients of outputs by their place, ``[count, ...]`` without `dims`.
        """
        places = list(deltas)

        def one(
            _index: Tensor, pieces: dict[int, Tensor], given: dict[int, Tensor]
        ) -> dict[str, Tensor]:
            def forward(parameters: dict[str, Tensor]) -> list[Tensor]:
                return self.forward(places, parameters, pieces)

            outputs, back = torch.func.vjp(forward, self.parameters())  # type: ignore[misc]
            (found,) = back(
                [given[p].to(output.dtype) for p, output in zip(places, outputs, strict=True)]
            )
            return found  # type: ignore[no-any-return]

        return self._mapped(one, start, stop, deltas)  # type: ignore[no-any-return]

    def _mapped(self, one: Any, start: int, stop: int, deltas: dict[int, Tensor]) -> Any:
        pieces, given = (
            {place: tensor[start:stop] for place, tensor in tensors.items()}
            for tensors in (self.pieces, deltas)
        )
        # The numbers of the samples: where all arguments are shared, vmap would have nothing to map.
        index = torch.arange(start, stop, device=next(self.module.parameters()).device)
        mapped = [index, pieces, given] if deltas else [index, pieces]
        with torch.no_grad():
            return torch.func.vmap(one, randomness="error")(*mapped)

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The samples from `start` to `stop` in chunks that run at once."""
        step = max(1, CHUNK_ELEMENTS // self.per_sample)
        for first in range(start, stop, step):
            yield first, min(first + step, stop)


class _Forward(nn.Module):
    """The forward pass of a module without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def _use_of(
    layout: Layout, module: nn.Module, args: Any, kwargs: Any, outputs: list[Tensor]
) -> _Use:
    if unusable(module) is not None:
        raise ValueError(f"{unusable(module)}, other than when the SampleCounter was made")
    trained = [place for place, output in enumerate(outputs) if output.requires_grad]
    dims = _sample_dims(layout, outputs[trained[0]])
    sizes = _sizes(outputs[trained[0]], dims)
    for place in trained:
        if sizes is None or _sizes(outputs[place], dims) != sizes:
            raise ValueError(
                f"its output of shape {tuple(outputs[place].shape)} has no samples in dimension "
                f"{', '.join(map(str, dims))}"
            )
    leaves, structure = pytree.tree_flatten((args, kwargs))
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    pieces = {
        place: _spread(leaf, dims)
        for place, leaf in enumerate(leaves)
        if dims and isinstance(leaf, Tensor) and _sizes(leaf, dims) == sizes
    }
    count = torch.Size(sizes or ()).numel()
    if dims and not pieces:
        raise ValueError(
            f"none of its arguments holds the {count} samples of its output (where all samples "
            "share them, batch_dim={name: None} says so)"
        )
    elements = sum(t.numel() for t in [*pieces.values(), *(outputs[place] for place in trained)])
    trained_elements = sum(p.numel() for p in module.parameters() if p.requires_grad)
    device = next(module.parameters()).device.type
    return _Use(
        module=module,
        dims=dims,
        count=count,
        leaves=leaves,
        structure=structure,
        pieces=pieces,
        versions=_versions(leaves),
        trained=trained,
        per_sample=max(1, trained_elements, elements // max(1, count)),
        autocast=(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
    )


def _compare(use: _Use, outputs: list[Tensor]) -> None:
    """Raises `ValueError` where samples alone give other outputs than in the batch."""
    for start, stop in use.ranges(0, use.count):
        for place, alone in zip(use.trained, use.forwards(start, stop), strict=True):
            together = _spread(outputs[place].detach(), use.dims)[start:stop]
            if not _close(alone.to(together.dtype), together):
                raise ValueError(
                    "alone they give another output than in their batch, so the module mixes samples "
                    "or changes from call to call"
                )
    # What only a backward pass refuses is refused here, except where checkpointing leaves no place.
    if not saved_tensors_are_packed():
        zeros = {place: torch.zeros_like(outputs[place]) for place in use.trained}
        spread = {place: _spread(zero, use.dims) for place, zero in zeros.items()}
        use.gradients(0, 1, spread)


def _activity(use: _Use, deltas: Sequence[Tensor | None]) -> dict[str, Activity]:
    if use.versions != _versions(use.leaves):
        raise ValueError("an argument was changed in place after the call")
    parameters = use.parameters()
    given = {
        place: _spread(delta, use.dims)
        for place, delta in enumerate(deltas)
        if delta is not None and place in use.trained
    }
    parts: dict[str, list[Activity]] = {name: [] for name in parameters}
    step = max(WORD, CHUNK_ELEMENTS // use.per_sample)
    for start in range(0, max(1, use.count), step):
        masks = {name: [p.new_zeros(0, p.numel()) != 0] for name, p in parameters.items()}
        for first, last in use.ranges(start, min(start + step, use.count)):
            for name, gradient in use.gradients(first, last, given).items():
                masks[name].append((gradient != 0).reshape(last - first, -1))
        for name, found in masks.items():
            parts[name].append(Elements(parameters[name].shape, pack(torch.cat(found))))
    return {
        name: found[0] if len(found) == 1 else Total(tuple(found)) for name, found in parts.items()
    }


def _sample_dims(layout: Layout, output: Tensor) -> tuple[int, ...]:
    """The dimensions of an output that count samples."""
    if layout.unit == "sample":
        return () if layout.batch_dim is None else (layout.batch_dim,)
    # As at the model's output: features are the last dimension, of images the second.
    features = 1 if output.dim() > 3 else max(1, output.dim() - 1)  # noqa: PLR2004
    first = layout.batch_dim or 0
    return (first, *(d for d in range(output.dim()) if d not in {first, features}))


def _sizes(tensor: Tensor, dims: tuple[int, ...]) -> list[int] | None:
    if tensor.dim() <= max(dims, default=-1):
        return None
    return [tensor.shape[dim] for dim in dims]


def _spread(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``[samples, ...]`` without `dims`."""
    if not dims:
        return tensor.unsqueeze(0)
    return tensor.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1)


def _lengthen(piece: Tensor, dims: tuple[int, ...]) -> Tensor:
    for dim in sorted(dims):
        piece = piece.unsqueeze(dim)
    return piece


def _shorten(output: Tensor, dims: tuple[int, ...]) -> Tensor:
    if _sizes(output, dims) != [1] * len(dims):
        raise ValueError(f"one alone gives an output of shape {tuple(output.shape)}")
    for dim in sorted(dims, reverse=True):
        output = output.squeeze(dim)
    return output


def _close(alone: Tensor, together: Tensor) -> bool:
    """Whether two outputs differ by rounding at most, that of sums taken in another order included."""
    finite = together[together.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    tolerance = torch.finfo(together.dtype).eps ** 0.5
    return torch.allclose(alone, together, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


def _versions(leaves: Sequence[Any]) -> list[int]:
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
    return [tensor._version for tensor in tensors if not tensor.is_inference()]  # noqa: SLF001


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Takes back what a forward pass sets on the module: tensors that live inside `vmap` alone."""
    before = [(vars(each), dict(vars(each))) for each in module.modules()]
    try:
        yield
    finally:
        for attributes, values in before:
            for added in attributes.keys() - values.keys():
                del attributes[added]
            attributes.update(values)
