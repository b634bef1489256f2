"""Dummy nodes: hidden units that data never, or always, switch on, and others that are redundant on it.

The aSGD paper (Shi et al. 2022, section 2.2.3) calls a node that is suppressed for every sample a *true
dummy node* and one that is activated for every sample a *pseudo dummy node*. `find_dummy_nodes` looks for
both in one pass over data, and for units that are constant or multiples of another unit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from truestep.checks import check_kind, require_at_least_zero
from truestep.errors import TruestepError
from truestep.flow import Flow
from truestep.layer_nodes import LayerNodes, Statistics, table_of
from truestep.layers import uncompiled_model
from truestep.units import Key, tensors_in

__all__ = ["DummyNodes", "LayerNodes", "call_model", "dummy_masks", "find_dummy_nodes", "size_of"]

Forward = Callable[[nn.Module, Any], Any]


def find_dummy_nodes(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    batch_dim: int = 0,
    tolerance: float | None = None,
) -> "DummyNodes":
    """Looks, in one pass over data, for hidden units that are redundant on it.

    A hidden unit is a feature of a linear map or a channel of a convolution whose values go through an
    activation function, as a module or as a function called in `forward`. With z its pre-activation and y
    its output, over all samples and positions (Shi et al. 2022, section 2.2.3, read on z)::

        true dummy    z <= 0 everywhere        pseudo dummy    z > 0 everywhere
        constant      max y - min y <= tolerance * max |y|
        duplicate     |y - r * y'| <= tolerance * (s + |r| * s') for another unit's y', everywhere,
                      with s the smaller of max |z| and max |y|

    Nothing is hooked on the model or changed, and its mode stays as it is. Memory beyond the forward pass:
    a few numbers for each unit, and a copy of a batch of one layer's outputs.

    Args:
        model: any module; hidden units behind calls of torch functions are found.
        loader: batches: a tensor is the model's argument, the first item of a tuple or list is, and a
            dict holds keyword arguments.
        forward: called as ``forward(model, batch)`` instead.
        batch_dim: where the data's first tensor holds the samples.
        tolerance: relative rounding allowed for in constants and duplicates; by default 64 units in the
            last place, and 0 for 16-bit types.

    Returns:
        What was found, by layer.

    Raises:
        TruestepError: the loader is empty, a batch is of no known kind, the tolerance is no number of at
            least 0, or the model draws random numbers or normalises by batch, as dropout and BatchNorm do in
            training mode.

    Example:
        >>> import torch, truestep
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> model[0].bias.data = torch.tensor([0.0, 100.0, -100.0])
        >>> nodes = truestep.find_dummy_nodes(model, [torch.randn(50, 2)])
        >>> nodes["0"].true.tolist(), nodes["0"].pseudo.tolist()
        ([False, False, True], [False, True, False])
    """
    check_kind(model, nn.Module, "model", "a torch.nn.Module")
    if not hasattr(loader, "__getitem__"):  # or it is a sequence, as a Dataset may be
        check_kind(loader, Iterable, "loader", "batches, such as a DataLoader or a list")
    if tolerance is not None:
        require_at_least_zero(tolerance=tolerance)
    model = uncompiled_model(model)
    found = Statistics(tolerance)
    flow = Flow(model, found)
    samples = 0
    for batch in loader:
        flow.ledger.begin(batch)
        with torch.no_grad(), flow:
            call_model(model, batch, forward)
        samples += size_of(batch, batch_dim)
    if not samples:
        raise TruestepError(
            "the loader gave no samples; pass one that has some, such as a list of batches"
        )
    layers = [total.result(key, samples) for key, total in found.totals.items()]
    skipped = [f"{place}: its input comes from no layer's units" for place in flow.unknown]
    return DummyNodes(layers, samples, skipped, loader, forward, batch_dim)


def dummy_masks(z: Tensor) -> tuple[Tensor, Tensor]:
    """Which units are true and pseudo dummies, from their pre-activations.

    Args:
        z: ``[..., samples, units]``; leading dimensions, such as many networks, stay.

    Returns:
        Two bool tensors ``[..., units]``: never positive, always positive. A unit with nan is neither.

    Example:
        >>> dummy_masks(torch.tensor([[1.0, -1.0, 0.0], [2.0, 3.0, -1.0]]))
        (tensor([False, False,  True]), tensor([ True, False, False]))
    """
    return (z <= 0).all(-2), (z > 0).all(-2)


@dataclass(eq=False)
class DummyNodes:
    """What `find_dummy_nodes` found.

    Attributes:
        layers: in the order of the forward pass.
        samples: how many were seen.
        skipped: activation functions that belong to no layer's units, with the reason.
        loader: the data, for `compress` to compare outputs on.
        forward: how the model is called on a batch.
        batch_dim: where the data's first tensor holds the samples.
    """

    layers: list[LayerNodes]
    samples: int
    skipped: list[str] = field(default_factory=list)
    loader: Iterable[Any] = ()
    forward: Forward | None = None
    batch_dim: int = 0

    def __iter__(self) -> Iterator[LayerNodes]:
        return iter(self.layers)

    def __getitem__(self, layer: str) -> LayerNodes:
        for found in self.layers:
            if found.layer == layer:
                return found
        names = ", ".join(repr(found.layer) for found in self.layers) or "none"
        raise TruestepError(
            f"no hidden units were found in layer {layer!r}; layers with units: {names}"
        )

    def find(self, key: Key) -> LayerNodes | None:
        """The units of a layer and an activation function, if there are any."""
        found = [layer for layer in self.layers if (layer.layer, layer.activation) == key]
        return found[0] if found else None

    def count(self, kind: str) -> int:
        """How many units are of a kind."""
        return sum(layer.kinds().count(kind) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        return {
            "samples": self.samples,
            "skipped": self.skipped,
            "layers": [
                layer.summary()
                | {
                    "kinds": layer.kinds(),
                    "rates": layer.rate.tolist(),
                    "constants": layer.value.tolist(),
                    "twins": layer.twin.tolist(),
                    "ratios": layer.ratio.tolist(),
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        lines = table_of(self.layers)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                [
                    *(cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)),
                    *(cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)),
                ]
            )
            for line in lines
        )


def call_model(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """The model's output on a batch.

    Args:
        model: the model.
        batch: a tensor, a tuple or list whose first item is the argument, or a dict of keywords.
        forward: called as ``forward(model, batch)`` instead.

    Raises:
        TruestepError: the batch is of another kind.
    """
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return model(batch)
    raise TruestepError(
        f"a batch is of type {type(batch).__name__}; pass forward=lambda model, batch: model(...) to say "
        "how the model is called on it"
    )


def size_of(batch: Any, batch_dim: int) -> int:
    """How many samples a batch has.

    Args:
        batch: as the loader gives it.
        batch_dim: where its first tensor holds the samples.
    """
    first = next((tensor for tensor in tensors_in(batch) if tensor.dim() > batch_dim), None)
    return 1 if first is None else first.shape[batch_dim]
