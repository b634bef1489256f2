"""SampleCounter: watches a model's backward passes and knows each parameter's adaptive batch sizes.

The only file that hooks modules: a layer's forward hook lets the layer's rule pack the inputs, a hook on
the layer's output lets it turn the output gradient into activity, and a hook on each parameter commits
the activity when the gradient has reached `.grad`. What becomes of it is `Records`' matter.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from truestep import compiled
from truestep.activity import Activity
from truestep.batch import Batch
from truestep.combine import Shared
from truestep.compiled import Receiver
from truestep.consumers import Uses
from truestep.distributed import local
from truestep.errors import TruestepError
from truestep.fused import Pass
from truestep.hooks import Hook, Pausable, on_backward, uncompiled
from truestep.kernels.stepping import Options
from truestep.layers import (
    Layer,
    batch_of,
    check_batch,
    check_options,
    check_shape,
    find_layers,
    fused_in_evaluation,
    layout_of,
    make_layer,
    parameter_names,
    sizes_of,
    uncompiled_model,
)
from truestep.layout import Layout, Rule, Unit, tensors_in
from truestep.records import FORWARD, Call, Records
from truestep.rules import RULES
from truestep.update import mean_effective, scale_

__all__ = ["SampleCounter"]


class SampleCounter:
    """Counts, for each element of each parameter, the samples of the batch that contributed to it.

    The counts m are aSGD's adaptive batch sizes (Shi et al. 2022, Algorithm 2, line 4), without
    per-sample gradients: layers record one bit per sample and unit. The model stays as it is:
    nothing is wrapped, keys and methods are untouched, and evaluation under `torch.no_grad` leaves
    nothing behind.

    Args:
        model: the module that is called on whole batches.
        unit: what counts as a sample: "sample", or "position" (each time step or pixel).
        rules: layer class to rule, usually ``truestep.RULES | {MyLayer: my_rule}``.
        batch_dim: where layers' tensors hold the samples; or a mapping from module name (as in
            `model.named_modules()`) to it for modules that differ from 0, None for a module whose
            tensors hold no samples and are shared by all.
        unsupported: "error", or "mean" to keep the plain gradient in all modules without a rule.
        process_group: the ranks that train the model together, where you add up gradients by hand;
            those of DistributedDataParallel and `fully_shard` are found without it.

    Raises:
        TruestepError: a module with parameters has no rule and cannot be run sample by sample (all
            such modules are named), or another counter watches the model already.

    Example:
        >>> import torch, truestep
        >>> model = torch.nn.Linear(2, 1)
        >>> counter = truestep.SampleCounter(model)
        >>> model(torch.tensor([[1.0, 0.0], [2.0, 3.0]])).sum().backward()
        >>> counter.batch_size, counter.counts()
        (2, {'weight': tensor([[2, 1]]), 'bias': tensor([2])})
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        unit: Unit = "sample",
        rules: Mapping[Any, Rule] = RULES,
        batch_dim: int | Mapping[str, int | None] = 0,
        unsupported: Literal["error", "mean"] = "error",
        process_group: Any = None,
    ) -> None:
        check_options(model, unit, unsupported)
        model = uncompiled_model(model)
        self._unit = unit
        self._records = Records(parameter_names(model), unit)
        self._batch = Batch(model, self._records, process_group)
        self._handles: list[Any] = []
        # A call that began in a compiled graph is here by its key.
        self._calls: list[Call | Tensor | None] = []
        self._hooked: dict[Tensor, Tensor] = {}
        self._uses = Uses()
        dims = {"": batch_dim} if isinstance(batch_dim, int) else batch_dim
        everywhere = batch_dim if isinstance(batch_dim, int) else 0
        self._batch_dim = dims.get("") or 0
        layers, self._plain = find_layers(model, rules, unsupported)
        hook = partial(Hook, weakref.ref(self))
        if isinstance(model, nn.parallel.DistributedDataParallel):
            self._watch(model)
        begins = Receiver(hook(SampleCounter._find_wrapper), begins=True)
        on_call = hook(SampleCounter._on_call, begins)
        self._handles.append(
            model.register_forward_pre_hook(on_call, with_kwargs=True, prepend=True)
        )
        fused = fused_in_evaluation(model)
        self._fused: list[tuple[nn.Module, Pausable]] = []
        for name, module, rule in layers:
            place = Layout(dims.get(name, everywhere), unit)
            layer = make_layer(name, module, rule, place, unsupported)
            taps = Receiver(hook(SampleCounter._on_delivered_layer, layer))
            on_layer = hook(SampleCounter._on_layer, layer, taps)
            # fully_shard's own hook takes the gathered parameters away after the call: go before it.
            first = bool(layer.sharded)
            if layer.bare:
                on_begin = hook(SampleCounter._on_begin, layer)
                self._handles.append(module.register_forward_pre_hook(on_begin))
            options = {"with_kwargs": True, "prepend": first, "always_call": layer.bare}
            handle = Pausable(partial(module.register_forward_hook, on_layer, **options))
            self._handles.append(handle)
            if module in fused:
                self._fused.append((fused[module], handle))
        taps = Receiver(hook(SampleCounter._on_delivered_output))
        on_return = hook(SampleCounter._on_return, taps)
        # After the layers' hooks: the model may be a layer itself.
        self._handles.append(model.register_forward_hook(on_return, always_call=True))

    @property
    def batch_size(self) -> int:
        """N, the number of samples of the batch that the gradients describe; 0 before any.

        Set it to the loss's denominator where that is not the batch size of the model's calls; it
        holds until it is set again, and None returns to counting.
        """
        return self._batch.size()

    @batch_size.setter
    def batch_size(self, value: int | None) -> None:
        if value is not None and value < 1:
            raise TruestepError(f"batch_size is {value}; set a positive number, or None to count")
        self._batch.override = value

    @property
    def nbytes(self) -> int:
        """The memory that the records hold, in bytes."""
        return self._records.nbytes()

    def counts(self, *, reduce: bool = False) -> dict[str, Tensor]:
        """The adaptive batch sizes m of the batch that the gradients describe.

        Args:
            reduce: count the samples of all ranks; every rank must call it. The counts of a sharded
                parameter are a DTensor sharded like it. By default those of this rank's samples.

        Returns:
            Parameter name, as in `model.named_parameters()`, to an int64 tensor shaped like the
            parameter, for the parameters with a record. They stay readable after the step, until
            the next batch's gradient replaces them.
        """
        return self._batch.counts(reduce=reduce)

    def statistics(self, *, eps: float = 1.0) -> dict[str, dict[str, float]]:
        """What is worth logging after a step, for each parameter with a record.

        Args:
            eps: as the optimizer's, for the factor.

        Returns:
            Parameter name to ``batch_size`` (N), ``smallest``, ``mean`` and ``largest`` (adaptive
            batch sizes m of its elements), ``unreached`` (the share of elements with m = 0) and
            ``largest_factor`` (of N / (m + eps) over elements with m > 0, 1 where there is none).

        Example:
            >>> import torch, truestep
            >>> model = torch.nn.Linear(2, 1)
            >>> counter = truestep.SampleCounter(model)
            >>> model(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).sum().backward()
            >>> counter.statistics()["weight"]["unreached"]
            0.5
        """
        return self._batch.statistics(eps)

    def nonfinite(self) -> list[str]:
        """The names of the parameters whose gradient has a NaN or an infinity."""
        return self._records.nonfinite()

    @uncompiled
    def correct_gradients(
        self,
        parameters: Iterable[Tensor] | None = None,
        *,
        eps: float = 1.0,
        factor_limit: float | None = None,
    ) -> None:
        """Turns gradients into mean effective gradients in place: g N / (m + eps) where m > 0.

        The explicit form of what the optimizers do in `step()`, which then does not repeat it: call
        it where something else must see the result, for example before gradient clipping. A further
        backward pass before `zero_grad()` is an error.

        Args:
            parameters: those to correct; all of the model's by default.
            eps: the paper's non-zero natural number.
            factor_limit: the largest N / (m + eps) allowed.

        Raises:
            TruestepError: a parameter has a gradient but no record.
        """
        chosen = list(self._records.names if parameters is None else parameters)
        self.prepare(chosen)
        corrected: list[Tensor] = []
        whole = Pass(Options(eps=eps, limit=factor_limit))
        for parameter in chosen:
            found = self.reach(parameter)
            if found is None or parameter.grad is None:
                continue
            gradient = local(parameter.grad.detach())
            if whole.takes(gradient):
                whole.add(gradient, found)
            else:
                scale_(gradient, *found, eps, factor_limit)
            corrected.append(parameter)
        whole.run()
        for parameter in corrected:
            self._records.mark_corrected(parameter)
        self._batch.release()

    def effective_gradient(
        self, parameter: Tensor, *, eps: float = 1.0, factor_limit: float | None = None
    ) -> Tensor:
        """The mean effective gradient of one parameter, leaving its `.grad` as it is.

        Args:
            parameter: one of the model's, with a gradient.
            eps: the paper's non-zero natural number.
            factor_limit: the largest N / (m + eps) allowed.

        Returns:
            A new tensor; `.grad` itself where it is corrected already or stays plain.

        Raises:
            TruestepError: the parameter has no gradient or no record.
        """
        if parameter.grad is None:
            raise TruestepError("the parameter has no gradient; call backward() first")
        alone = not self._batch.covers(parameter)
        if alone:
            self.prepare([parameter])
        gradient, found = parameter.grad.detach(), self.reach(parameter)
        if alone:
            self._batch.release()
        return mean_effective(gradient, found, eps, factor_limit)

    def reach(self, parameter: Tensor) -> tuple[Activity, int | Tensor] | None:
        """The samples that reach a parameter and N; None where its gradient stays as it is.

        Raises:
            TruestepError: the parameter has a gradient, but no record.
        """
        if parameter.grad is None or parameter in self._plain:
            return None
        self.check([parameter])
        return self._batch.find(parameter)

    def prepare(self, parameters: Iterable[Tensor]) -> None:
        """Starts a step over several ranks, which agree once on all that it will ask for.

        Between this and `mark_step`, every rank asks for the `effective_gradient` of the same
        parameters in the same order. For one process alone it does nothing.

        Args:
            parameters: those that the step will use, the same on all ranks.

        Raises:
            TruestepError: the ranks do not agree.
        """
        self._batch.prepare(p for p in parameters if p not in self._plain)

    def mark_step(self, parameters: Iterable[Tensor]) -> None:
        """Notes that an optimizer has used the gradients of these parameters."""
        for parameter in parameters:
            record = self._records.committed.get(id(parameter))
            if record is not None:
                record.stepped = True
        self._batch.release()

    def check(self, parameters: Iterable[Tensor]) -> None:
        """Raises `TruestepError` for a parameter that is not the model's."""
        for index, parameter in enumerate(parameters):
            if parameter not in self._records.names:
                raise TruestepError(
                    f"parameter {index} of the optimizer, of shape {tuple(parameter.shape)}, is not "
                    "in the counter's model; make the SampleCounter on the model that owns all of "
                    "the optimizer's parameters"
                )

    def close(self) -> None:
        """Takes the hooks off the model and forgets the records."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._fused.clear()
        self._hooked.clear()
        self._records.clear()
        self._batch.release()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TruestepError(
            "a SampleCounter belongs to its model and cannot be copied or pickled; "
            "make a new SampleCounter on the copy of the model"
        )

    # The hooks, in the order in which they run.

    def _on_call(self, _begins: Receiver, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            self._calls.append(None)
            for outer, handle in self._fused:
                if not (outer.training or torch.compiler.is_compiling()):
                    handle.remove()
            return
        inputs = list(tensors_in((args, kwargs)))
        if torch.compiler.is_compiling():
            self._calls.append(compiled.begin(inputs, self._batch_dim))
            return
        for _, handle in self._fused:
            handle.resume()  # an evaluation that was interrupted could not
        self._find_wrapper()
        places = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        call = compiled.new_call(list(sizes_of(inputs, self._batch_dim)), places)
        self._calls.append(call)
        self._uses.begin(call)

    def _find_wrapper(self) -> None:
        wrapper = self._batch.new_wrapper()
        if wrapper is not None:
            self._watch(wrapper)

    def _watch(self, wrapper: nn.Module) -> None:
        # DistributedDataParallel lays its buckets out anew in its second forward pass.
        hook = partial(Hook, weakref.ref(self), SampleCounter._on_wrapper)
        self._handles += [
            wrapper.register_forward_pre_hook(hook(Records.watch), prepend=True),
            wrapper.register_forward_hook(hook(Records.follow), always_call=True),
        ]

    def _on_wrapper(self, method: Callable[[Records, int], None], *_: Any) -> None:
        method(self._records, FORWARD)

    def _on_begin(self, layer: Layer, *_: Any) -> None:
        layer.begin()

    def _on_layer(
        self, layer: Layer, taps: Receiver, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        if not torch.is_grad_enabled():
            return None
        rule, outputs = layer.rule_of_call(), list(tensors_in(output))
        if not any(tensor.requires_grad for tensor in outputs):
            return None
        # In a backward pass activation checkpointing runs layers again, for the call it is in.
        call = self._calls[-1] if self._calls else self._records.current
        if torch.compiler.is_compiling():
            return compiled.tapped(output, taps, call, (args, kwargs)) if layer.traced() else None
        if not self._wait_for_gradients(layer):
            return None
        call = compiled.call_of(call) if isinstance(call, Tensor) else call or Call(outside=True)
        layout = layout_of(layer, call, args, kwargs)
        bound = partial(Hook, weakref.ref(self), SampleCounter._on_gradient, layer, layout, call)
        with self._uses.unless_refused():
            activity = rule(layout, module, *args, **kwargs)
            given, inner = layer.see(activity, outputs, self._plain)
        on_backward(outputs, bound, given, inner, late=bool(layer.sharded))
        if layer.bare and given is None:
            for node, use in inner:
                self._uses.add(call, [node], use.others)
        else:
            self._uses.add(call, outputs, tensors_in((args, kwargs)))
        return None

    def _wait_for_gradients(self, layer: Layer) -> bool:
        reference, trained = weakref.ref(self), layer.trained(self._records.names)
        for owner, parameter in trained:
            if owner not in self._hooked:
                hook = Hook(reference, SampleCounter._on_accumulated)
                self._handles.append(owner.register_post_accumulate_grad_hook(hook))
                self._hooked[owner] = owner
            if parameter not in self._hooked:
                # Gathered by fully_shard, which later hands its owner the gradient.
                hook = Hook(reference, SampleCounter._on_gathered, owner)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
                self._hooked[parameter] = owner
        return bool(trained)

    def _on_return(self, taps: Receiver, _module: nn.Module, _args: Any, output: Any) -> Any:
        call = self._calls.pop() if self._calls else None
        if torch.compiler.is_compiling():
            return None if call is None else compiled.tapped(output, taps, call, ((), {}))
        if call is None:
            for _, handle in self._fused:
                handle.resume()
            return None
        call = compiled.call_of(call) if isinstance(call, Tensor) else call
        call.sizes.extend(sizes_of(output, self._batch_dim))
        outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        for tensor in outputs:
            tensor.register_hook(Hook(weakref.ref(self), SampleCounter._on_output_gradient, call))
        self._uses.end(call, outputs, self._records.names, self._plain, self._hooked)
        return None

    def _on_delivered_output(self, call: Call, deltas: list[Tensor | None], *_: Any) -> None:
        call.sizes.extend(sizes_of(deltas, self._batch_dim))
        for delta in deltas:
            # A compiled graph gives zeros to outputs that the loss does not depend on.
            if delta is not None and (self._unit == "sample" or delta.any()):
                self._on_output_gradient(call, delta)

    def _on_delivered_layer(
        self, layer: Layer, call: Call, deltas: list[Tensor | None], args: Any, kwargs: Any
    ) -> None:
        if self._handles and self._wait_for_gradients(layer):  # none once it is closed
            layout = layout_of(layer, call, args, kwargs)
            for activity, gradients in compiled.delivered(layer, layout, args, kwargs, deltas):
                self._on_gradient(layer, layout, call, activity, *gradients)

    def _on_output_gradient(self, call: Call, delta: Tensor | None) -> None:
        self._records.enter(call)
        if self._unit == "position" and delta is not None:
            call.note_positions(delta)

    def _on_gradient(
        self,
        layer: Layer,
        layout: Layout,
        call: Call,
        activity: Callable[..., dict[str, Activity]],
        *deltas: Tensor | None,
    ) -> None:
        detached = [None if delta is None else delta.detach() for delta in deltas]
        for name, found in activity(*detached).items():
            parameter = layer.owner(name, layer.module.get_parameter(name))
            check_shape(layer, name, found.shape, parameter)
            if layout.batch_dim is None:
                shared = Shared(found, batch_of(layer, call))
                self._records.receive(parameter, call, shared)
                continue
            if self._unit == "sample":
                check_batch(layer, call, found.samples)
            self._records.receive(parameter, call, found)

    def _on_gathered(self, owner: Tensor, _parameter: Tensor) -> None:
        self._records.hold(owner)

    def _on_accumulated(self, parameter: Tensor) -> None:
        self._records.commit(parameter)
