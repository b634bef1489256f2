"""Gradient penalties: the samples that reach a parameter through its layer's backward pass.

A penalty on ``torch.autograd.grad(..., create_graph=True)`` goes back through a backward pass. That of a
linear map y = x W^T is a linear map too, dx = delta W: where a further backward pass gives dx the gradient
gg, it gives W the gradient delta^T gg, whatever x is. Sample i reaches weight (j, k) if delta_ij and gg_ik
are not zero at one position, so the layer's rule says which samples count when it is given gg in the place
of the input. Norms have a function of their own for it (`normalization_twice`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor

from truestep.calls import Call, backward_id
from truestep.graph import saved_tensors_are_packed
from truestep.hooks import Hook
from truestep.layers import Layer
from truestep.layout import Given, Layout
from truestep.rules_convolution import CONVOLUTIONS
from truestep.rules_embedding import embedding
from truestep.rules_norm import normalization, normalization_twice

__all__ = ["input_to_follow", "wait_for_penalty"]


def input_to_follow(layer: Layer, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
    """The input of a linear map or a norm, where autograd keeps it until the backward pass anyway.

    Args:
        layer: the layer that was called.
        args: its arguments.
        kwargs: its keyword arguments.
        output: its output.
    """
    if not layer.followed or len(args) != 1 or kwargs:
        return None
    given, weight = args[0], layer.module._parameters["weight"]  # noqa: SLF001
    kept = (
        weight is not None
        and weight.requires_grad
        # Of what autocast casts or other layers lay out anew, autograd keeps a copy.
        and given.dtype is output.dtype
        and (given.is_contiguous() or layer.rule in CONVOLUTIONS)
        and not saved_tensors_are_packed()
    )
    return given if kept else None


def wait_for_penalty(
    watch: Callable[[], Any],
    layer: Layer,
    layout: Layout,
    call: Call,
    given: Tensor | None,
    deltas: Sequence[Tensor | None],
) -> None:
    """Lets a watch know if a later backward pass goes through that of a layer, which is about to run.

    Args:
        watch: gives the watch, or None once it is gone.
        layer: the layer.
        layout: of the call of the layer.
        call: of the model.
        given: `input_to_follow`.
        deltas: the gradients of the layer's outputs, as autograd has them.
    """
    if layer.rule is embedding:
        return  # indices have no gradient that a table could be in
    if layer.followed and not layer.module.get_parameter("weight").requires_grad:
        return  # a bias is no part of the backward pass
    hook = partial(Hook, watch)
    if given is None:
        for delta in deltas:
            if delta is not None and delta.requires_grad:
                delta.register_hook(hook(_refuse, layer))
    elif given.requires_grad and deltas[0] is not None:
        delta, kept = deltas[0].detach(), given.detach()
        _when_differentiated(given, hook(_count, layer, layout, call, kept, delta))


def _when_differentiated(tensor: Tensor, hook: Callable[[Tensor], Any]) -> None:
    """Calls a hook if a later backward pass goes through the gradient that the running one gives a tensor."""
    task = backward_id()

    def see(gradient: Tensor) -> None:
        handle.remove()
        if backward_id() == task and gradient.requires_grad:
            gradient.register_hook(hook)

    handle = tensor.register_hook(see)


def _count(
    watch: Any,
    layer: Layer,
    layout: Layout,
    call: Call,
    given: Tensor,
    delta: Tensor,
    gradient: Tensor | None,
) -> None:
    if gradient is None:
        return
    arrived, module = gradient.detach(), cast("Any", layer.module)
    if layer.rule is normalization:
        activity = normalization_twice(layout, module, given, arrived)
    else:
        activity = cast("Given", layer.rule(layout, module, arrived))
    found = activity(delta)
    found.pop("bias", None)
    watch.receive(layer, layout, call, found)


def _refuse(watch: Any, layer: Layer, _gradient: Tensor) -> None:
    watch.refuse(
        layer,
        f"a gradient penalty (create_graph=True) goes through the backward pass of {layer.name!r} "
        f"({type(layer.module).__name__}), and which samples reach its parameters that way is known of "
        "linear layers, convolutions and norms alone: called with one contiguous tensor, without autocast "
        "and activation checkpointing, and not gone back through before. Freeze its parameters, or keep "
        "their plain gradients: rules without its class and unsupported='mean'",
    )
