"""One call of a module, taken apart into its samples and run for each of them alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from truestep.layout import Layout, tensors_in

__all__ = ["Use", "use_of"]

# Samples run at once while their gradients, inputs and outputs have this many elements (float32: 16 MB).
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Use:
    """A call of a module, taken apart into samples.

    Attributes:
        module: the module.
        dims: the dimensions of arguments and outputs that count samples; the first one varies slowest.
        count: the number of samples.
        leaves: the tensors and other values in the arguments.
        structure: how they are nested.
        pieces: the leaves that hold samples by their place, ``[count, ...]`` without `dims`.
        versions: of the tensors among the leaves.
        trained: the places, among the outputs, of those that may get gradients.
        chunk: how many samples run at once.
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
    chunk: int
    autocast: tuple[bool, torch.dtype]

    def parameters(self) -> dict[str, Tensor]:
        """The trained parameters by name, without autograd."""
        return {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}

    def forward(
        self, places: list[int], parameters: dict[str, Tensor], pieces: dict[int, Tensor]
    ) -> list[Tensor]:
        """Some of the outputs for one sample alone, without `dims`.

        Args:
            places: of the outputs.
            parameters: the trained parameters by name.
            pieces: the arguments that hold samples by their place, without `dims`.
        """
        leaves = list(self.leaves)
        for place, piece in pieces.items():
            leaves[place] = _lengthen(piece.clone(), self.dims)
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
        for first in range(start, stop, self.chunk):
            yield first, min(first + self.chunk, stop)

    def spread(self, output: Tensor) -> Tensor:
        """An output, or its gradient, as ``[count, ...]`` without `dims`."""
        return _spread(output, self.dims)

    def is_unchanged(self) -> bool:
        """Whether the arguments are what they were in the call."""
        return self.versions == _versions(self.leaves)


class _Forward(nn.Module):
    """The forward pass of a module without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def use_of(layout: Layout, module: nn.Module, args: Any, kwargs: Any, outputs: list[Tensor]) -> Use:
    """Takes a call of a module apart.

    Args:
        layout: where samples are.
        module: the module; its trained parameters are its own.
        args: its arguments.
        kwargs: its keyword arguments.
        outputs: the tensors that it has returned, of which one at least has a gradient to come.

    Raises:
        ValueError: an output, or every argument, is without samples.

    Example:
        >>> layer, x = nn.Linear(3, 2), torch.ones(4, 3)
        >>> use = use_of(Layout(), layer, (x,), {}, [layer(x)])
        >>> use.gradients(0, 4, {0: torch.ones(4, 2)})["weight"].shape
        torch.Size([4, 2, 3])
    """
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
    return Use(
        module=module,
        dims=dims,
        count=count,
        leaves=leaves,
        structure=structure,
        pieces=pieces,
        versions=_versions(leaves),
        trained=trained,
        chunk=max(1, CHUNK_ELEMENTS // max(1, trained_elements, elements // max(1, count))),
        autocast=(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
    )


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


def _versions(leaves: list[Any]) -> list[int]:
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
