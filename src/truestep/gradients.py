"""What waits for gradients: in the autograd graph for those of a layer's use, at parameters for theirs."""

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from truestep.activity import Activity
from truestep.calls import Call
from truestep.hooks import on_gradients, uncompiled
from truestep.kernels.dispatch import is_wrapped
from truestep.layout import Layout

if TYPE_CHECKING:
    from truestep.layers import Layer

__all__ = ["Gradients", "landing", "wait_at"]


class Gradients:
    """Waits for the gradients of one use of a layer, and hands them to the watch.

    Args:
        watch: gives who is told, or None once it is gone.
        layer: the layer.
        layout: of this call.
        call: of the model.
        activity: takes the gradients; what the layer's rule has returned.

    Attributes:
        place: which of the gradients at its node is wanted; None for all that it is called with.
        views: what to do to gradients of bases for those of the outputs that are their views, by place.
        given: the layer's input until its first backward pass, where gradient penalties can be followed.
    """

    __slots__ = ("_activity", "_call", "_layer", "_layout", "_watch", "given", "place", "views")

    def __init__(
        self,
        watch: Callable[[], Any],
        layer: "Layer",
        layout: Layout,
        call: Call,
        activity: Callable[..., dict[str, Activity]],
    ) -> None:
        self._watch, self._layer, self._layout = watch, layer, layout
        self._call, self._activity = call, activity
        self.place: int | None = None
        self.views: dict[int, Callable[[Tensor], Tensor]] = {}
        self.given: Tensor | None = None

    def __call__(self, *deltas: Any) -> Any:
        """Takes the gradients; in their place it may return others, which say when they are used."""
        watch, passed = self._watch(), None
        if watch is None:
            return None
        use, differentiable = (self._layer, self._layout, self._call), torch.is_grad_enabled()
        if self.place is not None:
            gradients = deltas[0]
            delta = gradients[self.place]
            if delta is None or is_wrapped(delta):  # see Use
                return None
            if not differentiable:
                self.given = None
            elif self.given is None and not delta.requires_grad:
                delta = delta.detach().requires_grad_()
                passed = (*gradients[: self.place], delta, *gradients[self.place + 1 :])
            deltas = (delta,)
        shaped = deltas
        if self.views:
            shaped = tuple(
                delta if delta is None or place not in self.views else self.views[place](delta)
                for place, delta in enumerate(deltas)
            )
        if differentiable:  # create_graph=True
            watch.on_differentiable(
                *use, self.given, deltas, () if self.given is None else shaped[0].shape
            )
        watch.on_gradients(*use, self._activity, *shaped)
        return passed

    uncompiled(__call__, inside=False)


def wait_at(outputs: Sequence[Tensor], gradients: Gradients, *, builtin: bool) -> None:
    """Hands the gradients of a layer's outputs on.

    Writing into a view in place, as an activation function may, replaces its node, not its base's.

    Args:
        outputs: of the layer.
        gradients: waits for them.
        builtin: whether the layer is torch's own, which returns no view of anything else.
    """
    owners = list(outputs)
    for place, output in enumerate(outputs):
        base = output._base if builtin and output._is_view() else None  # noqa: SLF001
        view = None if base is None else _view_of_all(output, base)
        if base is not None and view is not None:
            gradients.views[place], owners[place] = view, base
    if len(owners) != 1:
        on_gradients(owners, gradients)
        return
    node: Any = owners[0].grad_fn
    gradients.place = owners[0].output_nr
    node.register_prehook(gradients)


def _view_of_all(output: Tensor, base: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What makes a view of its base, where it shows all of it: as it is, or with samples and time turned."""
    if base.grad_fn is None or base.numel() != output.numel() or not base.is_contiguous():
        return None
    if output.is_contiguous():
        shape = output.shape
        return lambda delta: delta.reshape(shape)
    turned = base.transpose(0, 1) if base.dim() > 1 else base
    if turned.shape == output.shape and turned.stride() == output.stride():
        return lambda delta: delta.transpose(0, 1)
    return None


def landing(records: Any) -> Callable[[Tensor], None]:
    """A parameter's hook that notes when its gradient has reached `.grad`.

    Args:
        records: are told, as long as they live.
    """
    reference = weakref.ref(records)

    def land(parameter: Tensor) -> None:
        living, gradient = reference(), parameter.grad
        if living is not None and gradient is not None:
            living.land(parameter, gradient)

    return uncompiled(land, inside=False)
