"""The short ways of linear layers, convolutions and norms, and who takes one."""

from abc import abstractmethod
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from truestep.activity import Elements, Outer, Window
from truestep.bits import Bits
from truestep.kernels.dispatch import LIKE, channels_last
from truestep.kernels.packing import ALONE, ASKED, EACH_ROW, REACHED, Lines, Rows
from truestep.layout import Layout, Rule
from truestep.rules import RULES
from truestep.rules_convolution import window_of
from truestep.rules_norm import BATCH_NORM
from truestep.way import Direct, Found, Seen
from truestep.ways_embedding import DirectBag, DirectEmbedding

__all__ = ["direct_way"]


class DirectMap(Direct):
    """Linear maps: a weight's element needs an output and an input, a bias's an output."""

    def __init__(self, module: Any, layout: Layout) -> None:
        super().__init__(module, layout)
        # Of the latest call: how its input and gradient were packed, whether there is anything to count, how
        # the input was looked at, and what a step's table says of the parameters.
        self._known: tuple[tuple[Lines, bool, Window | None], list[Any]] | None = None

    def window(self, use: Any) -> Window | None:
        """How it looks at its input, if it is a convolution."""
        del use
        return None

    def found(self, use: Any, joined: Iterator[Bits]) -> Found:
        """As `truestep.rules.linear` and `truestep.rules_convolution.convolution`."""
        weight, bias, outputs = use.weight, use.bias, use.outputs
        outer = weight, Outer(weight.shape, outputs, use.inputs, self.window(use))
        if bias is None:
            return [outer]
        return [outer, (bias, Elements(bias.shape, self.ends(outputs, joined)))]

    def seen(
        self, use: Any, joined: Iterator[Bits], device: torch.device | None
    ) -> list[Seen] | None:
        """As `found`, whose objects are not made where the latest call was like this one."""
        made, known = use.made, self._known
        if made is None or made.device != device:
            return super().seen(use, joined, device)
        of, to = use.addresses()
        like, count = (use.lines, bool(of or to), self.window(use)), 1 if use.bias is None else 2
        if known is None or known[0] != like or len(known[1]) != count:
            found = super().seen(use, joined, device)
            self._known = None if found is None else (like, [each[1] for each in found])
            return found
        of_weight, *of_bias = known[1]
        weight = use.weight, of_weight, (to, of)
        if not of_bias:
            return [weight]
        ends = to
        if use.positions != 1 and not self.apart:
            there = next(joined).address(device)
            assert there is not None  # noqa: S101
            ends = there
        return [weight, (use.bias, of_bias[0], (0, ends))]


class DirectLinear(DirectMap):
    """`nn.Linear`."""

    NODES = MappingProxyType({"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"})
    casts = True

    def reader(self, given: Tensor, output: Tensor, node: Any) -> Any:
        """For inputs with positions autograd has a product of rows, of which the output is a view."""
        dims = len(given.shape)
        if dims == 2:  # noqa: PLR2004
            return node
        usual = dims > 2 and given.is_contiguous() and output.is_contiguous()  # noqa: PLR2004
        if not usual or output.numel() == 0:
            return None
        if type(node).__name__ == "UnsafeViewBackward0":  # without a bias
            return node.next_functions[0][0]
        rows, width = output._base, output.shape[-1]  # noqa: SLF001
        if rows is None or rows.shape != (output.numel() // width, width):
            return None
        return rows.grad_fn

    def rows(self, shape: torch.Size) -> int:
        """The positions of a sample, unless each is one."""
        return 1 if self.apart or len(shape) == 2 else shape[1:-1].numel()  # noqa: PLR2004

    def arranged(self, shape: torch.Size, rows: int) -> Rows:
        """Rows of units."""
        count = shape[0] if len(shape) == 2 else shape[:-1].numel()  # noqa: PLR2004
        return Rows(count // rows, rows, shape[-1])

    def pair(self, first: Rows, *, whole: bool) -> int | None:
        """Of samples with positions most weights are reached at the last."""
        return ALONE if whole or first.positions == 1 else ASKED


class DirectConvolution(DirectMap):
    """Convolutions."""

    NODES = MappingProxyType({"ConvolutionBackward0": "_saved_input"})
    images = casts = True

    def __init__(self, module: Any, layout: Layout) -> None:
        super().__init__(module, layout)
        self._module, self._layout = module, layout
        self._dims = len(module.kernel_size) + 2

    def reader(self, given: Tensor, output: Tensor, node: Any) -> Any:
        """Images that have a batch among their dimensions."""
        del output
        return node if len(given.shape) == self._dims else None

    def arranged(self, shape: torch.Size, rows: int) -> Rows:
        """Channels come first."""
        del rows
        positions = shape[2:].numel()
        return Rows(shape[0], positions, shape[1], positions > 1)

    def window(self, use: Any) -> Window:
        """For the shapes of its input and output."""
        given, made = (tuple(size[2:]) for size in use.sizes)
        return window_of(self._module, given, made, self._layout)


class DirectNorm(Direct):
    """Norms of whose input autograd keeps the means: what is equal to its mean is normalised to zero."""

    keeps_more = True

    def reader(self, given: Tensor, output: Tensor, node: Any) -> Any:
        """Of others, autograd keeps a copy, or rounded means."""
        del output
        return node if given.dtype in LIKE and self.keeps(given) else None

    @abstractmethod
    def keeps(self, given: Tensor) -> bool:
        """Whether autograd keeps an input itself."""

    def kept(self, node: Any, given: Tensor) -> Tensor:
        """Detached: they would keep the node alive that this is hung on."""
        del given
        found: Tensor = node._saved_result1.detach()  # noqa: SLF001
        return found

    def pair(self, first: Rows, *, whole: bool) -> int | None:
        """A few positions tell which samples reach the weights."""
        if not (whole or (self.apart and first.positions > 1)):
            return REACHED
        return ALONE if first.by_unit or first.groups == EACH_ROW else None

    def masks(self, use: Any) -> list[tuple[Bits, Bits | None]]:
        """Of the weight too."""
        if use.reached:
            return []
        outputs, inputs = use.outputs, use.inputs
        if self.apart:
            outputs, inputs = outputs.apart(), inputs.apart()
        both: list[tuple[Bits, Bits | None]] = [(outputs, inputs), (outputs, None)]
        return both[:1] if use.bias is None else both

    def found(self, use: Any, joined: Iterator[Bits]) -> Found:
        """As `truestep.rules_norm.normalization`."""
        parameters = [use.weight] if use.bias is None else [use.weight, use.bias]
        bits = iter((use.inputs, use.outputs)) if use.reached else joined
        return [(each, Elements(each.shape, next(bits))) for each in parameters]


class DirectLayerNorm(DirectNorm):
    """`nn.LayerNorm`."""

    NODES = MappingProxyType({"NativeLayerNormBackward0": "_saved_input"})
    groups = EACH_ROW

    def __init__(self, module: Any, layout: Layout) -> None:
        super().__init__(module, layout)
        self._dims = len(module.normalized_shape)

    def keeps(self, given: Tensor) -> bool:
        """What lies in order, and has samples."""
        return len(given.shape) > self._dims and given.is_contiguous()

    def arranged(self, shape: torch.Size, rows: int) -> Rows:
        """Rows of all normalised numbers."""
        del rows
        lead, units = shape[: -self._dims], shape[-self._dims :].numel()
        if self.apart:
            return Rows(lead.numel(), 1, units)
        return Rows(lead[0], lead[1:].numel(), units)


class DirectGroupNorm(DirectNorm):
    """`nn.GroupNorm`."""

    NODES = MappingProxyType({"NativeGroupNormBackward0": "_saved_input"})
    GROUPS = "num_groups"  # the module's attribute
    images = True

    def __init__(self, module: Any, layout: Layout) -> None:
        super().__init__(module, layout)
        self.groups = getattr(module, self.GROUPS)

    def keeps(self, given: Tensor) -> bool:
        """With channels last only a CPU's operation does."""
        return given.is_contiguous() or (given.is_cpu and channels_last(given))

    def arranged(self, shape: torch.Size, rows: int) -> Rows:
        """Channels come first."""
        del rows
        positions = shape[2:].numel()
        return Rows(shape[0], positions, shape[1], positions > 1)


class DirectBatchNorm(DirectGroupNorm):
    """Batch norms: each channel has one mean, of the batch or of earlier ones."""

    NODES = MappingProxyType({"NativeBatchNormBackward0": "_saved_input"})
    GROUPS = "num_features"

    def kept(self, node: Any, given: Tensor) -> Tensor:
        """The same for each sample."""
        of_batch = node._saved_training  # noqa: SLF001
        means = node._saved_result1 if of_batch else node._saved_running_mean  # noqa: SLF001
        found: Tensor = means.detach().repeat(given.shape[0], 1)
        return found


# The rules to which the short ways are equal.
KNOWN = RULES | BATCH_NORM
KINDS: dict[type[nn.Module], type[Direct]] = {
    nn.Linear: DirectLinear,
    nn.Conv1d: DirectConvolution,
    nn.Conv2d: DirectConvolution,
    nn.Conv3d: DirectConvolution,
    nn.LayerNorm: DirectLayerNorm,
    nn.GroupNorm: DirectGroupNorm,
    nn.BatchNorm1d: DirectBatchNorm,
    nn.BatchNorm2d: DirectBatchNorm,
    nn.BatchNorm3d: DirectBatchNorm,
    nn.Embedding: DirectEmbedding,
    nn.EmbeddingBag: DirectBag,
}


def direct_way(module: nn.Module, rule: Rule, layout: Layout) -> Direct | None:
    """The short way of a layer's usual calls, if there is one.

    Args:
        module: the layer.
        rule: its rule.
        layout: of its calls.
    """
    kind = KINDS.get(type(module))
    usual = kind is not None and rule is KNOWN[type(module)] and layout.batch_dim == 0
    return kind(module, layout) if kind and usual and not _pads_its_input(module) else None


def _pads_its_input(module: Any) -> bool:
    """Whether autograd holds a padded copy instead of what a convolution is given."""
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return True
    if getattr(module, "padding", None) != "same":
        return False
    sides = zip(module.dilation, module.kernel_size, strict=True)
    return any(dilation * (kernel - 1) % 2 for dilation, kernel in sides)
