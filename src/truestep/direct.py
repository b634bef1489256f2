"""The short way of the layers that most models are made of, where the batch comes first.

It leads to the very records of the long way by rule, layout and `Watch`. What it leaves out is what these
layers are known not to need: other layouts, several outputs, gathered parameters. They see the input late,
in the backward pass, where the weight's gradient reads it again anyway; until then autograd holds it and
guards it against changes. A small model's step is made of such calls and feels each of them: what can wait
until the backward pass ends is done there, for all layers at once.
"""

import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from truestep.bits import Bits, Packed, join, pack_rows
from truestep.calls import Call
from truestep.errors import TruestepError
from truestep.hooks import Hook, uncompiled
from truestep.kernels.dispatch import (
    CHANNELS_LAST,
    address_of,
    channels_last,
    device_of,
    finds_addresses,
    is_wrapped,
)
from truestep.kernels.packing import (
    ALONE,
    PACK_FIELDS,
    REACHED,
    SIZES,
    Lines,
    PackTable,
    without_full,
)

if TYPE_CHECKING:
    from truestep.way import Sizes

__all__ = ["ShortHook", "Use", "join_all", "pack_all"]


class ShortHook(Hook):
    """The forward hook of a layer whose usual calls go the short way.

    Args:
        watch: gives the `Watch`, or None once it is gone.
        layer: the layer.
        other: the hook for other calls.
    """

    def __init__(self, watch: Callable[[], Any], layer: Any, other: Hook) -> None:
        super().__init__(watch)
        self._layer, self._other = layer, other

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Lets the use wait for its gradient, or passes the call on."""
        # Compiled code would be guarded by whatever is looked at here.
        if is_compiling():
            return self._other(module, args, kwargs, output)
        watch: Any = self.counter()
        call = None if watch is None else watch.usual
        if call is None or watch.in_backward():
            return self._other(module, args, kwargs, output)
        layer = self._layer
        node = layer.direct.node(module, args, output, call)
        if node is None:
            return self._other(module, args, kwargs, output)
        given = args[0]
        held = given if given.dtype is output.dtype else layer.direct.held(node, given)
        node.register_prehook(Use(self.counter, layer, call, given, node, held))
        return None

    uncompiled(__call__, inside=False)


class Use:
    """Waits at the node of a layer's output for its gradient; what it holds of the input is bits after that.

    Bits that one gradient made needless to find are not there for another, which comes where the graph is
    retained: then the input is packed once more. Autograd holds it as long.

    Args:
        watch: gives who is told, or None once it is gone.
        layer: the layer.
        call: of the model.
        given: the layer's input.
        node: see `truestep.way.Direct.node`.
        held: the input as autograd holds it.

    Attributes:
        call: of the model.
        adds: whether its gradients are added to those of an earlier backward pass.
        direct: the layer's short way.
        weight: the layer's in this call.
        bias: the same.
        copied: whether what autograd holds is a copy of the input, which has to be packed whole.
        given: the layer's input, until it is packed.
        kept: what else autograd keeps, see `truestep.way.Direct.kept`; as long as it may be asked for.
        delta: the gradient of the node's output, from its arrival until it is packed.
        rows: how many rows of that are one sample's.
        sizes: shapes of input and node's output.
        lines: how both were packed together, if they were.
        made: by which call.
    """

    __slots__ = (
        "_again",
        "_first",
        "_followed",
        "_inputs",
        "_layer",
        "_outputs",
        "_versions",
        "_watch",
        "adds",
        "bias",
        "call",
        "copied",
        "delta",
        "direct",
        "given",
        "kept",
        "lines",
        "made",
        "rows",
        "sizes",
        "weight",
    )

    def __init__(
        self,
        watch: Callable[[], Any],
        layer: Any,
        call: Call,
        given: Tensor,
        node: Any,
        held: Tensor,
    ) -> None:
        self._watch, self._layer, self.call = watch, layer, call
        self.adds = False
        direct = self.direct = layer.direct
        self.given: Tensor | None = held
        self.copied = held is not given
        self._again: Callable[[], Tensor | None] | None = None
        self._followed = held if layer.followed and not self.copied else None
        self.sizes: Sizes
        self.delta: Tensor | None = None
        self.weight, self.bias = direct.weight, direct.bias
        self.kept = direct.kept(node, given) if direct.keeps_more else None
        self.rows = direct.rows(given.shape)
        self._inputs: Any
        self._outputs: Bits
        self.lines: Lines
        self.made: Packed | None = None

    def __call__(self, gradients: Any) -> Any:
        """Takes the output's gradient; in its place it may return another, which says when it is used."""
        watch, delta, passed = self._watch(), gradients[0], None
        if watch is None or delta is None:
            return None
        # Those of is_grads_batched and torch.func.vjp never reach `.grad`.
        if is_wrapped(delta) or (self.given is not None and is_wrapped(self.given)):
            return None
        if not is_grad_enabled():
            self._followed = None
        else:  # create_graph=True
            given, layer = self._followed, self._layer
            if given is None and not delta.requires_grad:
                delta = delta.detach().requires_grad_()
                passed = (delta, *gradients[1:])
            # Of rows with positions, the layer's own shape.
            rows = given is not None and len(given.shape) > 2 == len(delta.shape)  # noqa: PLR2004
            shape = (
                (*given.shape[:-1], delta.shape[-1]) if given is not None and rows else delta.shape
            )
            watch.on_differentiable(layer, layer.layout, self.call, given, [delta], shape)
        watch.on_samples(self, delta, self._layer, self.call, delta.shape[0] // self.rows)
        return passed

    uncompiled(__call__, inside=False)

    def take(self, delta: Tensor) -> None:
        """Takes the output's gradient; where an earlier one left out bits, the input is packed once more.

        Raises:
            TruestepError: it is gone.
        """
        self.delta = delta
        if self._again is not None:
            self.given = self._again()
            if self.given is None:
                raise TruestepError(
                    f"the output of {self._layer.name!r} gets another gradient, but its input is gone; "
                    "call the model again"
                )

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The weight, and the bias if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def begins(self) -> bool:
        """Whether the parameters have no gradient yet."""
        return self.weight.grad is None and (self.bias is None or self.bias.grad is None)

    def wait(self, most: int) -> int | None:
        """Keeps input and output gradient as they are now for a while; returns how many bytes that takes.

        A batch, which needs no gradient, is its owner's and kept anyway.

        Args:
            most: so many; if it takes more, or the layer does not wait, nothing is kept and None is returned.
        """
        given, delta = self.given, self.delta
        assert given is not None  # noqa: S101
        assert delta is not None  # noqa: S101
        if not self.direct.waits:
            return None
        kept_anyway = not (given.requires_grad or self.copied)
        size = delta.nbytes + (0 if kept_anyway else given.nbytes)
        if size > most:
            return None
        self._versions = given._version + delta._version  # noqa: SLF001
        return size

    def is_unchanged(self, *, strict: bool) -> bool:
        """Whether both are as they were at `wait`, or packed.

        Raises:
            TruestepError: where `strict`, if they are not.
        """
        given, delta = self.given, self.delta
        if given is None or delta is None:
            return True
        unchanged: bool = given._version + delta._version == self._versions  # noqa: SLF001
        if strict and not unchanged:
            raise TruestepError(
                f"the input of {self._layer.name!r} or the gradient of its output was changed in place "
                "during the backward pass; let hooks on gradients return new tensors"
            )
        return unchanged

    def pack(self) -> None:
        """Packs input and output gradient by themselves, of whatever kind the tensors are."""
        given, delta, direct, rows = self.given, self.delta, self.direct, self.rows
        assert delta is not None  # noqa: S101
        self._outputs = pack_rows(delta, direct.arranged(delta.shape, rows))
        if given is not None:
            self._inputs = direct.packed(given, rows, self.kept)
            self.sizes = given.shape, delta.shape
        elif self.made is not None:
            self._inputs = self.inputs
        self.given = self.delta = self.kept = self._again = self.made = None

    def packed(self, made: Packed, first: int, lines: Lines) -> None:
        """Notes that both are packed.

        Args:
            made: has their words.
            first: the place in its table of the first number of the input's line.
            lines: theirs.
        """
        self.made, self._first, self.lines = made, first, lines
        if lines.pair == ALONE:
            self.kept = None
        elif self._again is None and self.given is not None:
            self._again = _weakly(self.given)
        self.given = self.delta = None

    def release(self) -> None:
        """Lets go of what autograd kept of a graph that is gone."""
        if self._again is None or self._again() is None:
            self.kept = None

    @property
    def reached(self) -> bool:
        """Whether `inputs` and `outputs` are the samples that reach a norm's weight and bias."""
        return self.made is not None and self.lines.pair == REACHED

    @property
    def inputs(self) -> Any:
        """The bits of the input, or what `truestep.way.Direct.packed` makes of it."""
        made = self.made
        return self._inputs if made is None else made.bits(self._first, self.lines.first)

    @property
    def outputs(self) -> Bits:
        """The bits of the latest gradient."""
        made = self.made
        if made is None:
            return self._outputs
        return made.bits(self._first + PACK_FIELDS, self.lines.second)

    @property
    def positions(self) -> int:
        """Of each sample, in `outputs`."""
        return self._outputs.positions if self.made is None else self.lines.second.positions

    def addresses(self) -> tuple[int, int]:
        """Where the words of input and gradient are that were packed together; 0 where all bits are on."""
        made, first = self.made, self._first
        assert made is not None  # noqa: S101
        return made.address(first), made.address(first + PACK_FIELDS)


def _weakly(tensor: Tensor) -> Callable[[], Tensor | None]:
    """Gives a tensor for as long as autograd holds it, which may hold another view of the same memory."""
    base = tensor._base  # noqa: SLF001
    if base is None:
        return weakref.ref(tensor)
    reference, place = weakref.ref(base), (tensor.shape, tensor.stride(), tensor.storage_offset())

    def again() -> Tensor | None:
        living = reference()
        return None if living is None else living.detach().as_strided(*place)

    return again


def join_all(uses: Iterable[Use]) -> list[Bits]:
    """The masks that packed uses need with their positions joined, one use's after the other's.

    They are what `truestep.way.Direct.found` and `seen` take, as an iterator.
    """
    masks: list[tuple[Bits, Bits | None]] = []
    for use in uses:
        masks += use.direct.masks(use)
    return join(masks)


def pack_all(uses: Sequence[Use], *, whole: bool) -> None:
    """`Use.pack` of several at once, by as few calls as possible; those that are packed already stay so.

    Args:
        uses: of layers.
        whole: whether somebody looks at the bits of one tensor alone, so that all have to be read.
    """
    together: list[tuple[Use, int, Lines]] = []
    table, reads = PackTable(), finds_addresses()
    device: torch.device | None = None
    for use in uses:
        given, delta, means = use.given, use.delta, use.kept
        if delta is None:
            continue
        direct, dtype, of, to, by = use.direct, delta.dtype, 0, 0, 0
        there, lines = device_of(delta), None
        if reads and given is not None and given.dtype is dtype and dtype in SIZES:
            of, last = address_of(given), False
            if not of and direct.images and channels_last(given):
                of, last = address_of(given, CHANNELS_LAST), True
            to = address_of(delta, CHANNELS_LAST) if last else address_of(delta)
            use.sizes = given.shape, delta.shape
            every = whole or there is not None or use.copied
            lines = direct.lines(use.sizes, dtype, use.rows, last=last, whole=every)
            if lines and means is not None and means.dtype is dtype:
                by = address_of(means) if means.numel() == lines.means else 0
        readable = lines is not None and of and to and (by or means is None)
        if not readable or (together and there != device):
            use.pack()
            continue
        assert lines is not None  # noqa: S101
        device = there
        together.append((use, table.add(lines, of, to, by), lines))
    if not together:
        return
    words = table.pack(device)
    if isinstance(words, array):
        words = without_full(words, table.numbers)
    made = Packed(words, table.numbers, device)
    for use, first, lines in together:
        use.packed(made, first, lines)
