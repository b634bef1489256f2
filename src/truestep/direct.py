"""The short way of the layers that most models are made of, where the batch comes first.

It leads to the very records of the long way by rule, layout and `Watch`. What it leaves out is what these
layers are known not to need: other layouts, several outputs, gathered parameters. They see the input late,
in the backward pass, where the weight's gradient reads it again anyway; until then autograd holds it and
guards it against changes. A small model's step is made of such calls and feels each of them, most of all
those of `nn.Linear`, which has a way of its own to many layers' bits at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from truestep.activity import Activity, Elements, Outer
from truestep.bits import Bits, pack
from truestep.calls import Call
from truestep.errors import TruestepError
from truestep.gradients import Gradients
from truestep.graph import saved_tensors_are_packed
from truestep.hooks import Hook, uncompiled
from truestep.kernels.dispatch import LIKE
from truestep.layout import Layout, Rule
from truestep.rules import RULES, linear
from truestep.rules_norm import normalization

__all__ = ["Direct", "ShortHook", "Use", "goes_directly"]

# What layers add to the autograd graph whose backward pass reads the input that they were given.
NODES = {
    nn.Linear: {"AddmmBackward0", "MmBackward0"},  # for rows, with and without a bias
    nn.Conv1d: {"ConvolutionBackward0"},
    nn.Conv2d: {"ConvolutionBackward0"},
    nn.Conv3d: {"ConvolutionBackward0"},
    nn.LayerNorm: {"NativeLayerNormBackward0"},
    nn.GroupNorm: {"NativeGroupNormBackward0"},
}


def goes_directly(module: nn.Module, rule: Rule, layout: Layout) -> bool:
    """Whether a layer's usual calls can go the short way."""
    return (
        type(module) in NODES
        and rule is RULES[type(module)]
        and layout.batch_dim == 0
        and not _pads_its_input(module)
    )


def _pads_its_input(module: Any) -> bool:
    """Whether autograd holds a padded copy instead of what a convolution is given."""
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return True
    if getattr(module, "padding", None) != "same":
        return False
    sides = zip(module.dilation, module.kernel_size, strict=True)
    return any(dilation * (kernel - 1) % 2 for dilation, kernel in sides)


class Direct:
    """A layer's parameters as they were in a call that went the long way, which gave them their hooks.

    Args:
        module: the layer.
    """

    __slots__ = ("_dims", "_names", "bias", "weight")

    def __init__(self, module: nn.Module) -> None:
        self.weight: Any = None
        self.bias: Any = None
        self._names = NODES[type(module)]
        kernel = getattr(module, "kernel_size", None)
        # The input's dimensions, where others have no batch among them.
        self._dims = None if kernel is None else len(kernel) + 2

    def know(self, module: nn.Module) -> None:
        """Notes the parameters if all are trained: those have their hooks now."""
        trained = all(parameter.requires_grad for parameter in module.parameters())
        self.weight, self.bias = (module.weight, module.bias) if trained else (None, None)

    def node(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The autograd node to wait at, or None where anything about the call is unusual."""
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
            and len(args) == 1
            and (given := args[0]).dtype is output.dtype  # autocast keeps a copy of its own
            and not saved_tensors_are_packed()  # checkpointing would not hold the input
        ):
            return None
        if type(module) is nn.Linear:
            if len(given.shape) != 2:  # noqa: PLR2004 - with positions: a view of their rows' product
                node = _behind_view(given, output, node)
        elif self._dims is None and not (given.is_contiguous() and given.dtype in LIKE):
            return None  # autograd keeps a copy, or rounded means
        elif self._dims is not None and len(given.shape) != self._dims:
            return None
        return node if type(node).__name__ in self._names else None


def _behind_view(given: Tensor, output: Tensor, node: Any) -> Any:
    """The node of the product of rows that an output with positions is a view of, or None."""
    usual = len(given.shape) > 2 and given.is_contiguous() and output.is_contiguous()  # noqa: PLR2004
    if not usual or output.numel() == 0:
        return None
    if type(node).__name__ == "UnsafeViewBackward0":  # without a bias
        return node.next_functions[0][0]
    rows, width = output._base, output.shape[-1]  # noqa: SLF001
    if rows is None or rows.shape != (output.numel() // width, width):
        return None
    return rows.grad_fn


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
        if torch.compiler.is_compiling():
            return self._other(module, args, kwargs, output)
        watch: Any = self.counter()
        call, direct = None if watch is None else watch.usual, self._layer.direct
        if call is None or direct is None or watch.in_backward():
            return self._other(module, args, kwargs, output)
        node = direct.node(module, args, output)
        if node is None:
            return self._other(module, args, kwargs, output)
        layer, given = self._layer, args[0]
        if layer.rule is linear:
            node.register_prehook(Use(self.counter, layer, call, given))
            return None
        seen = {}
        if layer.rule is normalization:
            # Detached: GroupNorm's would keep the node alive that this is hung on.
            seen["means"] = node._saved_result1.detach()  # noqa: SLF001
        gradients = Gradients(self.counter, layer, layer.layout, call, Late(layer, given, seen))
        gradients.place, gradients.given = 0, given
        node.register_prehook(gradients)
        return None

    uncompiled(__call__, inside=False)


class Late:
    """A rule's function from the gradient of a layer's output to activity, made when it is first called.

    Args:
        layer: the layer.
        given: its input.
        seen: what else the rule is given.
    """

    __slots__ = ("_activity", "_given", "_layer", "_seen")

    def __init__(self, layer: Any, given: Tensor, seen: dict[str, Tensor]) -> None:
        self._layer, self._seen = layer, seen
        self._given: Tensor | None = given
        self._activity: Any = None

    def __call__(self, delta: Tensor) -> dict[str, Activity]:
        """The activity of the layer's parameters."""
        layer, given = self._layer, self._given
        if given is not None:
            self._activity = layer.rule(layer.layout, layer.module, given.detach(), **self._seen)
            self._given, self._seen = None, {}
        found: dict[str, Activity] = self._activity(delta)
        return found


class Use:
    """Waits at the node of a layer's output for its gradient; what it holds of the input is bits after that.

    Args:
        watch: gives who is told, or None once it is gone.
        layer: the layer.
        call: of the model.
        given: the layer's input.
    """

    __slots__ = (
        "_bias",
        "_call",
        "_delta",
        "_given",
        "_layer",
        "_positions",
        "_versions",
        "_watch",
        "_weight",
    )

    def __init__(self, watch: Callable[[], Any], layer: Any, call: Call, given: Tensor) -> None:
        self._watch, self._layer, self._call = watch, layer, call
        self._given: Tensor | Bits = given
        shape = given.shape
        apart = len(shape) == 2 or layer.layout.unit == "position"  # noqa: PLR2004
        self._positions = 1 if apart else shape[1:-1].numel()
        self._delta: Tensor | None = None
        self._versions = 0
        self._weight, self._bias = layer.direct.weight, layer.direct.bias

    def __call__(self, gradients: Any) -> Any:
        """Takes the output's gradient; in its place it may return another, which says when it is used."""
        watch, delta, passed = self._watch(), gradients[0], None
        if watch is None or delta is None:
            return None
        if torch.is_grad_enabled():  # create_graph=True
            given = self._given if isinstance(self._given, Tensor) else None
            if given is None and not delta.requires_grad:
                delta = delta.detach().requires_grad_()
                passed = (delta,)
            shaped = delta if given is None else delta.reshape(*given.shape[:-1], delta.shape[-1])
            watch.on_differentiable(self._layer, self._layer.layout, self._call, given, [shaped])
        self._delta = delta
        watch.on_samples(self, self._layer, self._call, delta.shape[0] // self._positions)
        return passed

    uncompiled(__call__, inside=False)

    def begin(self) -> int | None:
        """The bytes of input and output gradient, which are both kept as they are now for a while.

        A batch, which needs no gradient, is its owner's and kept anyway.

        None where a gradient or bits are there of an earlier backward pass.
        """
        given, delta = self._given, self._delta
        if (
            self._weight.grad is not None
            or (self._bias is not None and self._bias.grad is not None)
            or not isinstance(given, Tensor)
            or delta is None
        ):
            return None
        self._versions = given._version + delta._version  # noqa: SLF001
        return delta.nbytes + (given.nbytes if given.requires_grad else 0)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """What is to be packed in the first backward pass, as rows: input and output gradient."""
        given, delta = self._given, self._delta
        assert isinstance(given, Tensor)  # noqa: S101
        assert delta is not None  # noqa: S101
        return given if len(given.shape) == 2 else given.flatten(0, -2), delta  # noqa: PLR2004

    def is_unchanged(self, *, strict: bool) -> bool:
        """Whether both are as they were at `begin`.

        Raises:
            TruestepError: where `strict`, if they are not.
        """
        given: Any = self._given
        delta: Any = self._delta
        unchanged: bool = given._version + delta._version == self._versions  # noqa: SLF001
        if strict and not unchanged:
            raise TruestepError(
                f"the input of {self._layer.name!r} or the gradient of its output was changed in place "
                "during the backward pass; let hooks on gradients return new tensors"
            )
        return unchanged

    def deliver(self, inputs: Bits, outputs: Bits) -> tuple[Call, list[tuple[Tensor, Activity]]]:
        """The call of the model, and the parameters with their activity; takes the bits of rows."""
        self._given, self._delta = inputs, None
        weight, bias = self._weight, self._bias
        if self._positions != 1:
            inputs, outputs = (bits.with_positions(self._positions) for bits in (inputs, outputs))
        found: list[tuple[Tensor, Activity]] = [(weight, Outer(weight.shape, outputs, inputs))]
        if bias is not None:
            found.append((bias, Elements(bias.shape, outputs.any_position())))
        return self._call, found

    def deliver_now(self) -> tuple[Call, list[tuple[Tensor, Activity]]]:
        """`deliver`, after packing."""
        if isinstance(self._given, Bits):
            assert self._delta is not None  # noqa: S101
            return self.deliver(self._given, pack(self._delta))
        given, delta = self.tensors()
        return self.deliver(pack(given), pack(delta))
