"""The short ways of tables whose rows are looked up."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from truestep.activity import Rows
from truestep.bits import Bits
from truestep.calls import Call, memory_of
from truestep.kernels import packing
from truestep.layout import Layout
from truestep.rules_embedding import entries_of, owners_in_bags, owners_of
from truestep.way import Direct, Found

__all__ = ["DirectBag", "DirectEmbedding"]

# About as many bytes as caches hold.
CACHED = 1 << 22


class DirectEmbedding(Direct):
    """`nn.Embedding` of some of the model's inputs."""

    NODES = MappingProxyType({"EmbeddingBackward0": "_saved_indices"})
    casts = True  # or copies: it does not guard the caller's indices
    numbers = False
    by_entry = True

    def node(self, module: Any, args: Any, output: Any, call: Call) -> Any:
        """Indices that the model has made may be positions, and padding is taken out by the rule."""
        usual = module.padding_idx is None and args and self.usual(module, args[0], call)
        return super().node(module, args, output, call) if usual else None

    def know(self, module: Any) -> None:
        """A large table's gradient, where it is dense, takes all else out of the caches."""
        super().know(module)
        self.waits = module.sparse or self.weight is None or self.weight.nbytes <= CACHED

    def usual(self, module: nn.Module, given: Tensor, call: Call) -> bool:
        """Whether a sample's indices are all that there can be."""
        del module
        return (
            0 < len(given.shape) < 3  # noqa: PLR2004
            and given.shape[0] in call.sizes
            and (place := memory_of(given)) is not None
            and place in call.inputs
        )

    def reader(self, given: Tensor, output: Tensor, node: Any) -> Any:
        """The look-up itself."""
        del given, output
        return node

    def arranged(self, shape: torch.Size, rows: int) -> packing.Rows:
        """Of the output: each entry has a row."""
        del rows
        return packing.Rows(shape[:-1].numel(), 1, shape[-1])

    def packed(self, given: Tensor, rows: int, kept: Any) -> tuple[Tensor, Tensor]:
        """The rows, and the samples that look them up."""
        del rows, kept
        samples = self.samples(given.shape)
        length = given.numel() // max(1, samples)
        return entries_of(given), owners_of(samples, length, given.device)

    def samples(self, shape: torch.Size) -> int:
        """How many samples indices of a shape are of."""
        return shape.numel() if self.apart else shape[0]

    def found(self, use: Any, joined: Iterator[Bits]) -> Found:
        """As `truestep.rules_embedding`."""
        del joined
        weight, (rows, owners) = use.weight, use.inputs
        samples = self.samples(use.sizes[0]) if self.by_entry else use.sizes[1][0]
        return [(weight, Rows(weight.shape, samples, rows, owners, use.outputs, self.by_entry))]


class DirectBag(DirectEmbedding):
    """`nn.EmbeddingBag` of sums or means, each a sample's one output."""

    NODES = MappingProxyType({"EmbeddingBagBackward0": "_saved_indices"})
    keeps_more = True
    by_entry = False

    def __init__(self, module: nn.EmbeddingBag, layout: Layout) -> None:
        super().__init__(module, layout)
        self._module = module

    def usual(self, module: Any, given: Tensor, call: Call) -> bool:
        """Of maxima, one entry has a feature's gradient."""
        del given, call
        return bool(module.mode != "max")

    def reader(self, given: Tensor, output: Tensor, node: Any) -> Any:
        """Entries whose weight is zero are taken out by the rule."""
        del given, output
        weights = getattr(node, "_saved_per_sample_weights", None)
        return node if weights is None else None

    def kept(self, node: Any, given: Tensor) -> Tensor | torch.Size:
        """Where bags begin, or the shape of those that are equally long."""
        if len(given.shape) == 2:  # noqa: PLR2004
            return given.shape
        offsets: Tensor = node._saved_offsets  # noqa: SLF001
        return offsets[:-1] if self._module.include_last_offset else offsets

    def packed(self, given: Tensor, rows: int, kept: Any) -> tuple[Tensor, Tensor]:
        """The rows, and the bags that they are in."""
        del rows
        if isinstance(kept, torch.Size):
            return entries_of(given), owners_of(kept[0], kept[1], given.device)
        return entries_of(given), owners_in_bags(kept, given.numel())
