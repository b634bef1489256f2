"""Gradient penalties: the samples that reach a parameter through its layer's backward pass.

A penalty on ``torch.autograd.grad(..., create_graph=True)`` goes back through a backward pass. That of a
linear map y = x W^T is a linear map too, dx = delta W: where a further backward pass gives dx the gradient
gg, it gives W the gradient delta^T gg, whatever x is. Sample i reaches weight (j, k) if delta_ij and gg_ik
are not zero at one position, so the layer's rule says which samples count when it is given gg in the place
of the input. Norms have a function of their own for it (`normalization_twice`).
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from truestep.calls import Call, backward_id
from truestep.consumers import Uses
from truestep.graph import parameter_behind, saved_tensors_are_packed, uses_of
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
    uses: Uses,
    layer: Layer,
    layout: Layout,
    call: Call,
    given: Tensor | None,
    deltas: Sequence[Tensor | None],
    shape: Sequence[int],
) -> None:
    """Lets a watch know if a later backward pass goes through that of a layer, which is about to run.

    Args:
        watch: gives the watch, or None once it is gone.
        uses: get what the layer's backward pass uses its weight for, if it runs inside the call.
        layer: the layer.
        layout: of the call of the layer.
        call: of the model.
        given: `input_to_follow`.
        deltas: the gradients of the layer's outputs, as autograd has them.
        shape: of the output, where `given` is not None.
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
    elif deltas[0] is not None:
        noted = uses if uses.counts(call) else None
        _Follow(hook, noted, layer, layout, call, shape).product(given, deltas[0])


class _Follow:
    """The products with the weight of one use of a layer, each of which the backward pass of another makes.

    Args:
        hook: makes hooks that get the watch first.
        uses: see `wait_for_penalty`; None where they are not wanted.
        layer: the layer.
        layout: of its call.
        call: of the model.
        shape: of its output.
    """

    def __init__(
        self,
        hook: Callable[..., Hook],
        uses: Uses | None,
        layer: Layer,
        layout: Layout,
        call: Call,
        shape: Sequence[int],
    ) -> None:
        self._hook, self._uses, self._layer = hook, uses, layer
        self._layout, self._call, self._shape = layout, call, shape

    def product(self, one: Tensor, other: Tensor, *, turned: bool = False) -> None:
        """Waits for a later backward pass that goes through the gradient that the running one gives `one`.

        Args:
            one: a factor of the weight, like the layer's input; where `turned`, like its output.
            other: the gradient of their product, about to be multiplied by the weight for that of `one`.
            turned: which is which.
        """
        if not one.requires_grad:
            return
        numbers = one.detach(), other.detach()
        # Held here, they might hold the graph that this hook hangs at; the product's node keeps them.
        factors = weakref.ref(one), weakref.ref(other) if other.requires_grad else None
        task = backward_id()
        first = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]  # noqa: SLF001

        def see(gradient: Tensor) -> None:
            handle.remove()
            if backward_id() == task and gradient.requires_grad:
                self._note(gradient, factors, first)
                gradient.register_hook(self._hook(self._arrive, *numbers, factors[1], turned))

        handle = one.register_hook(see)

    def _arrive(
        self,
        watch: Any,
        one: Tensor,
        other: Tensor,
        factor: Callable[[], Tensor | None] | None,
        turned: bool,
        gradient: Tensor | None,
    ) -> Tensor | None:
        """Takes the gradient of the gradient of `one`; may return another, which says when it is used."""
        if gradient is None:
            return None
        layer, layout, module = self._layer, self._layout, cast("Any", self._layer.module)
        arrived, normalizes = gradient.detach(), layer.rule is normalization
        if normalizes:
            activity = normalization_twice(layout, module, one, arrived)
        else:
            activity = cast("Given", layer.rule(layout, module, other if turned else arrived))
        found = activity((arrived if turned else other).reshape(self._shape))
        found.pop("bias", None)
        watch.receive(layer, layout, self._call, found)
        if not torch.is_grad_enabled():
            return None
        following = None if factor is None else factor()
        if normalizes or (following is None and factor is not None):
            gradient = gradient if gradient.requires_grad else arrived.requires_grad_()
            gradient.register_hook(self._hook(_refuse, layer))
            return gradient
        if following is not None:
            self.product(following, gradient, turned=not turned)
        return None

    def _note(
        self, gradient: Tensor, factors: Sequence[Callable[[], Tensor | None] | None], first: int
    ) -> None:
        """Notes that a call of the model, which goes back through a layer itself, uses its weight there."""
        if self._uses is None or not self._uses.counts(self._call):
            return
        given = [None if factor is None else factor() for factor in factors]
        names: dict[Tensor, str] = {self._layer.module.get_parameter("weight"): "weight"}
        for node, _ in uses_of([gradient], given, names):
            number = node._sequence_nr()  # noqa: SLF001
            if number >= first:  # not what the forward pass does with it past the layer
                edges = [edge for edge in node.next_functions if edge[0] is not None]
                others = [to for to, nr in edges if parameter_behind(to, nr, names) is None]
                self._uses.add(self._call, [node], others)


def _refuse(watch: Any, layer: Layer, _gradient: Tensor) -> None:
    watch.refuse(
        layer,
        f"a gradient penalty (create_graph=True) goes through the backward pass of {layer.name!r} "
        f"({type(layer.module).__name__}), and which samples reach its parameters that way is known of "
        "linear layers, convolutions and norms alone (of norms for first derivatives): called with one "
        "contiguous tensor, without autocast and activation checkpointing, and not gone back through before. "
        "Freeze its parameters, or keep their plain gradients: rules without its class and "
        "unsupported='mean'",
    )
