"""What the short way of a layer asks of its kind.

That is: which node of the autograd graph reads its input, where its tensors hold samples, positions and
units, and what their bits say about its parameters.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from truestep.activity import Activity
from truestep.bits import Bits, pack_rows
from truestep.calls import Call
from truestep.graph import saved_tensors_are_packed
from truestep.kernels.dispatch import PLAIN
from truestep.kernels.packing import ALONE, Lines, Rows
from truestep.kernels.stepping import Line
from truestep.layout import Layout

__all__ = ["Direct", "Found", "Seen", "Sizes"]

Found = list[tuple[Tensor, Activity]]
Sizes = tuple[torch.Size, torch.Size]
# A parameter, its line in the table of a compiled step, and where the bits of its outputs and inputs are.
Seen = tuple[Tensor, Line, tuple[int, int]]


class Direct(ABC):
    """The short way of one layer.

    It knows the parameters as they were in the latest call that went the long way, which gave them hooks.

    Args:
        module: the layer.
        layout: of its calls.

    Attributes:
        weight: its weight, None as long as there is no short way.
        bias: its bias, if it has one.
        waits: whether small tensors may wait for the end of the backward pass.
        groups: see `truestep.kernels.packing.Rows`, of its input.
        apart: whether each position counts as a sample.
    """

    # What the layer adds to the autograd graph, whose backward pass reads the input that it was given, and
    # what that calls the input.
    NODES: Mapping[str, str]
    # Whether autograd may hold a copy, of the output's type (autocast), of what it was given.
    casts = False
    groups = 0
    # Whether input and output may lie with their channels last.
    images = False
    # Whether the input is numbers, not indices.
    numbers = True
    # Whether autograd keeps more that is asked for.
    keeps_more = False

    def __init__(self, module: Any, layout: Layout) -> None:
        del module
        self.weight: Any = None
        self.bias: Any = None
        self.waits = True
        self.apart = layout.unit == "position"
        # Of the latest calls: those to come are likely to have the same.
        self._kind: type | None = None
        self._lines: tuple[Sizes, bool, bool, Lines | None] | None = None

    def know(self, module: nn.Module) -> None:
        """Notes the parameters if all are trained: those have their hooks now."""
        trained = all(parameter.requires_grad for parameter in module.parameters())
        held = module._parameters if trained else {}  # noqa: SLF001
        self.weight, self.bias = held.get("weight"), held.get("bias")
        if type(self.weight) not in PLAIN:
            self.weight = None

    def node(self, module: nn.Module, args: Any, output: Any, call: Call) -> Any:
        """The autograd node to wait at, or None where anything about the call is unusual.

        Args:
            module: the layer.
            args: its arguments.
            output: its output.
            call: of the model.
        """
        del call
        held = module._parameters  # noqa: SLF001
        weight, bias = held.get("weight"), held.get("bias")
        if not (
            weight is self.weight
            and bias is self.bias
            and weight is not None
            and weight.requires_grad
            and (bias is None or bias.requires_grad)
            and type(output) is Tensor
            and (node := output.grad_fn) is not None
            and args
            and (len(args) == 1 or not self.numbers)
            and ((given := args[0]).dtype is output.dtype or self.casts)
            and not saved_tensors_are_packed()  # checkpointing would not hold the input
        ):
            return None
        node = self.reader(given, output, node)
        kind = type(node)
        if kind is not self._kind:
            if kind.__name__ not in self.NODES:
                return None
            self._kind = kind
        return node

    def held(self, node: Any, given: Tensor) -> Tensor:
        """What autograd holds in the place of an input of another type than the output's."""
        found: Tensor = getattr(node, self.NODES[type(node).__name__])
        return found.detach().view(given.shape)

    @abstractmethod
    def reader(self, given: Tensor, output: Tensor, node: Any) -> Any:
        """The node that reads the input, or None; takes the one that made the output."""

    def rows(self, shape: torch.Size) -> int:
        """How many rows of the node's output are one sample's, for an input of a shape."""
        del shape
        return 1

    def kept(self, node: Any, given: Tensor) -> Any:
        """What else autograd keeps: a norm's means of the input, a bag's offsets."""
        del node, given
        return None

    @abstractmethod
    def arranged(self, shape: torch.Size, rows: int) -> Rows:
        """How numbers lie in the input, or in the node's output.

        Args:
            shape: of it.
            rows: see `rows`.
        """

    def of_input(self, shape: torch.Size, rows: int) -> Rows:
        """`arranged` of the input, with its means."""
        return self.arranged(shape, rows)._replace(groups=self.groups)

    def packed(self, given: Tensor, rows: int, kept: Any) -> Any:
        """The input as `found` takes it: its bits.

        Args:
            given: the input.
            rows: see `rows`.
            kept: see `kept`.
        """
        return pack_rows(given, self.of_input(given.shape, rows), kept)

    def pair(self, first: Rows, *, whole: bool) -> int | None:
        """What is asked of input and output together, see `truestep.kernels.packing.Lines`; None for neither.

        Args:
            first: of the input.
            whole: see `lines`.
        """
        del first, whole
        return ALONE

    def lines(
        self, sizes: Sizes, dtype: torch.dtype, rows: int, *, last: bool, whole: bool
    ) -> Lines | None:
        """How input and output gradient are packed together; None where they cannot be.

        Args:
            sizes: shapes of the input and of the node's output.
            dtype: of both.
            rows: see `rows`.
            last: whether their channels lie last.
            whole: whether all bits are wanted, or kernels are to find them.
        """
        known = self._lines
        if known is not None and known[:3] == (sizes, last, whole):
            lines = known[3]
            if lines is None or lines.dtype is dtype:
                return lines
        first, second = self.of_input(sizes[0], rows), self.arranged(sizes[1], rows)
        if last:
            first, second = first._replace(by_unit=False), second._replace(by_unit=False)
        pair = self.pair(first, whole=whole)
        lines = None if pair is None else Lines(first, second, dtype, pair)
        self._lines = sizes, last, whole, lines
        return lines

    def masks(self, use: Any) -> list[tuple[Bits, Bits | None]]:
        """The masks whose positions are to be joined, as `truestep.bits.join` takes them.

        Args:
            use: see `truestep.direct.Use`.
        """
        joins = use.bias is not None and not self.apart and use.positions != 1
        return [(use.outputs, None)] if joins else []

    def ends(self, outputs: Bits, joined: Iterator[Bits]) -> Bits:
        """The samples in which a unit has a gradient: `outputs` alone, or what `masks` has become."""
        if self.apart:
            return outputs.apart()
        return outputs if outputs.positions == 1 else next(joined)

    @abstractmethod
    def found(self, use: Any, joined: Iterator[Bits]) -> Found:
        """The activity of the parameters.

        Args:
            use: see `truestep.direct.Use`.
            joined: `masks`, joined.
        """

    def seen(
        self, use: Any, joined: Iterator[Bits], device: torch.device | None
    ) -> list[Seen] | None:
        """How a compiled step sees the parameters; None where it cannot, or in several lines.

        Args:
            use: see `truestep.direct.Use`, which keeps alive what the addresses lead to.
            joined: `masks`, joined.
            device: of the kernels, None for the CPU's loops.
        """
        found = []
        for parameter, activity in self.found(use, joined):
            entries = activity.entries(device)
            if entries is None or len(entries) != 1:
                return None
            (entry,) = entries
            window = getattr(activity, "window", None)
            line = Line(activity.shape, activity.samples, entry, window)
            found.append((parameter, line, (entry.outputs, entry.inputs)))
        return found
