"""What waits for gradients: in the autograd graph for those of a layer's use, at parameters for theirs."""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from truestep.activity import Activity
from truestep.calls import Call
from truestep.hooks import uncompiled
from truestep.kernels.dispatch import is_wrapped
from truestep.layout import Layout

if TYPE_CHECKING:
    from truestep.layers import Layer

__all__ = ["Gradients", "landing"]


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
        shape: of the layer's output, where the node's is another.
        given: the layer's input until its first backward pass, where gradient penalties can be followed.
    """

    __slots__ = ("_activity", "_call", "_layer", "_layout", "_watch", "given", "place", "shape")

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
        self.shape: torch.Size | None = None
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
        shaped = deltas if self.shape is None else (deltas[0].reshape(self.shape),)
        if differentiable:  # create_graph=True
            watch.on_differentiable(*use, self.given, deltas if self.given is None else shaped)
        watch.on_gradients(*use, self._activity, *shaped)
        return passed

    uncompiled(__call__, inside=False)


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
