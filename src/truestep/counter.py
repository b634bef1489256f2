"""SampleCounter: watches a model's backward passes and knows each parameter's adaptive batch sizes.

The only file that hooks modules: a layer's forward hook lets the layer's rule pack the inputs, a hook on
the layer's output lets it turn the output gradient into activity, and a hook on each parameter commits
the activity when the gradient has reached `.grad`. What becomes of it is `Records`' matter.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from truestep.activity import Activity
from truestep.errors import TruestepError
from truestep.records import Call, Record, Records
from truestep.rules import RULES, Layout, Rule, Unit, find_rule
from truestep.update import scale_

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
            `model.named_modules()`) to it for modules that differ from 0.
        unsupported: "error", or "mean" to keep the plain gradient where a module has no rule.

    Raises:
        TruestepError: a module with parameters has no rule (all such modules are named), or another
            counter watches the model already.

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
        batch_dim: int | Mapping[str, int] = 0,
        unsupported: Literal["error", "mean"] = "error",
    ) -> None:
        if unit not in {"sample", "position"}:
            raise TruestepError(f"unit is {unit!r}; use 'sample' or 'position'")
        if unsupported not in {"error", "mean"}:
            raise TruestepError(f"unsupported is {unsupported!r}; use 'error' or 'mean'")
        if isinstance(model, nn.DataParallel):
            raise TruestepError(
                "nn.DataParallel runs copies of the model in threads, which cannot be counted; "
                "use torch.nn.parallel.DistributedDataParallel"
            )
        self._unit = unit
        self._override: int | None = None
        self._records = Records(_parameter_names(model), unit)
        self._calls: list[Call | None] = []
        self._hooked: set[Tensor] = set()
        dims = {"": batch_dim} if isinstance(batch_dim, int) else batch_dim
        everywhere = batch_dim if isinstance(batch_dim, int) else 0
        self._batch_dim = dims.get("", 0)
        layers, self._plain = _find_layers(model, rules, unsupported)
        hook = partial(_Hook, weakref.ref(self))
        self._handles: list[Any] = [
            model.register_forward_pre_hook(
                hook(SampleCounter._on_call), with_kwargs=True, prepend=True
            )
        ]
        for name, module, rule in layers:
            layer = _Layer(name, module, rule, Layout(dims.get(name, everywhere), unit))
            self._handles.append(
                module.register_forward_hook(hook(SampleCounter._on_layer, layer), with_kwargs=True)
            )
        # After the layers' hooks: the model may be a layer itself.
        self._handles.append(
            model.register_forward_hook(hook(SampleCounter._on_return), always_call=True)
        )

    @property
    def batch_size(self) -> int:
        """N, the number of samples of the batch that the gradients describe; 0 before any.

        Set it to the loss's denominator where that is not the batch size of the model's calls; it
        holds until it is set again, and None returns to counting.
        """
        if self._override is not None:
            return self._override
        sizes = (int(record.batch_size) for record in self._records.committed.values())
        return max(sizes, default=0)

    @batch_size.setter
    def batch_size(self, value: int | None) -> None:
        if value is not None and value < 1:
            raise TruestepError(f"batch_size is {value}; set a positive number, or None to count")
        self._override = value

    @property
    def nbytes(self) -> int:
        """The memory that the records hold, in bytes."""
        records = self._records.committed.values()
        tensors = (tensor for record in records for tensor in record.activity.tensors())
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    def counts(self) -> dict[str, Tensor]:
        """The adaptive batch sizes m of the batch that the gradients describe.

        Returns:
            Parameter name, as in `model.named_parameters()`, to an int64 tensor shaped like the
            parameter, for the parameters with a record. They stay readable after the step, until
            the next batch's gradient replaces them.
        """
        committed = self._records.committed
        return {
            name: committed[parameter].activity.count()
            for parameter, name in self._records.names.items()
            if parameter in committed
        }

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
        for parameter in self._records.names if parameters is None else parameters:
            record = self._record_to_apply(parameter)
            if record is not None and parameter.grad is not None:
                size = self._size(record)
                scale_(parameter.grad.detach(), record.activity, size, eps, factor_limit)
                self._records.mark_corrected(parameter)

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
        gradient, record = parameter.grad.detach(), self._record_to_apply(parameter)
        if record is None:
            return gradient
        size = self._size(record)
        return scale_(gradient.clone(), record.activity, size, eps, factor_limit)

    def mark_step(self, parameters: Iterable[Tensor]) -> None:
        """Notes that an optimizer has used the gradients of these parameters."""
        for parameter in parameters:
            record = self._records.committed.get(parameter)
            if record is not None:
                record.stepped = True

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
        self._hooked.clear()
        self._records.clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TruestepError(
            "a SampleCounter belongs to its model and cannot be copied or pickled; "
            "make a new SampleCounter on the copy of the model"
        )

    def _record_to_apply(self, parameter: Tensor) -> Record | None:
        if parameter.grad is None or parameter in self._plain:
            return None
        self.check([parameter])
        record = self._records.find(parameter)
        return None if record.corrected else record

    def _size(self, record: Record) -> int | Tensor:
        return record.batch_size if self._override is None else self._override

    # The hooks, in the order in which they run.

    def _on_call(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = _sizes((args, kwargs), self._batch_dim)
        self._calls.append(Call(set(inputs)) if torch.is_grad_enabled() else None)

    def _on_layer(
        self, layer: "_Layer", module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        if not torch.is_grad_enabled():
            return
        own = module._parameters.values()  # noqa: SLF001
        trained = [p for p in own if p is not None and p.requires_grad]
        if not trained:
            return
        if not isinstance(output, Tensor):
            raise TruestepError(
                f"{layer.name!r} returns {type(output).__name__}, and a rule is given the gradient of "
                "one tensor; let the module return one"
            )
        if not output.requires_grad:
            return
        for parameter in trained:
            if parameter not in self._hooked and parameter.is_leaf:
                hook = _Hook(weakref.ref(self), SampleCounter._on_accumulated)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
                self._hooked.add(parameter)
        call = self._calls[-1] if self._calls else None
        activity = layer.rule(layer.layout, module, *args, **kwargs)
        bound = (SampleCounter._on_gradient, layer, call or Call(outside=True), activity)
        output.register_hook(_Hook(weakref.ref(self), *bound))

    def _on_return(self, _module: nn.Module, _args: Any, output: Any) -> None:
        call = self._calls.pop() if self._calls else None
        if call is None:
            return
        call.sizes.update(_sizes(output, self._batch_dim))
        if self._unit == "position":
            for tensor in _tensors(output):
                if tensor.requires_grad and tensor.dim() > 0:
                    tensor.register_hook(partial(_note_positions, call))

    def _on_gradient(
        self,
        layer: "_Layer",
        call: Call,
        activity: Callable[[Tensor], dict[str, Activity]],
        delta: Tensor,
    ) -> None:
        for name, found in activity(delta.detach()).items():
            parameter = getattr(layer.module, name)
            if found.shape != parameter.shape:
                raise TruestepError(
                    f"the rule for {layer.name!r} gives {name!r} the shape {tuple(found.shape)}, but "
                    f"the parameter has {tuple(parameter.shape)}; correct the rule"
                )
            if self._unit == "sample":
                _check_batch(layer, call, found.samples)
            self._records.receive(parameter, call, found)

    def _on_accumulated(self, parameter: Tensor) -> None:
        self._records.commit(parameter)


@dataclass(frozen=True)
class _Layer:
    name: str
    module: nn.Module
    rule: Rule
    layout: Layout


class _Hook:
    """A hook that knows its counter weakly and does nothing once copied or pickled."""

    def __init__(self, counter: Callable[[], SampleCounter | None], *bound: Any) -> None:
        self.counter = counter
        self._bound = bound

    def __call__(self, *args: Any) -> None:
        counter = self.counter()
        if counter is not None:
            method, *bound = self._bound
            method(counter, *bound, *args)

    def __reduce__(self) -> Any:
        return _Hook, (_no_counter,)

    def __deepcopy__(self, memo: Any) -> "_Hook":
        return _Hook(_no_counter)


def _no_counter() -> None:
    return None


def _find_layers(
    model: nn.Module, rules: Mapping[Any, Rule], unsupported: str
) -> tuple[list[tuple[str, nn.Module, Rule]], set[Tensor]]:
    layers, plain, reasons = [], set(), []
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]  # noqa: SLF001
        _refuse_second_counter(name, module)
        if not own:
            continue
        rule = find_rule(module, rules)
        if not isinstance(rule, str):
            layers.append((name, module, rule))
        elif unsupported == "mean":
            plain.update(own)
        elif any(parameter.requires_grad for parameter in own):
            reasons.append(f"  {name or 'the model itself'}: {rule}")
    if reasons:
        raise TruestepError(
            "the samples of these modules cannot be counted:\n"
            + "\n".join(reasons)
            + "\nGive each a rule, SampleCounter(model, rules=truestep.RULES | {MyLayer: my_rule}), "
            "or keep their plain gradients with unsupported='mean'"
        )
    return layers, plain


def _refuse_second_counter(name: str, module: nn.Module) -> None:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]  # noqa: SLF001
    if any(isinstance(hook, _Hook) and hook.counter() is not None for hook in hooks):
        raise TruestepError(
            f"another SampleCounter watches {name or 'this model'!r}; use that one, or close() it"
        )


def _check_batch(layer: _Layer, call: Call, samples: int) -> None:
    known = call.sizes if call.batch_size is None else {call.batch_size}
    if known and samples not in known:
        raise TruestepError(
            f"{layer.name!r} sees a batch of {samples}, the model one of "
            f"{' or '.join(map(str, sorted(known)))}. Say where its samples are with "
            f"SampleCounter(model, batch_dim={{{layer.name!r}: ...}}), count positions with "
            "unit='position', or leave its inputs unflattened"
        )
    call.batch_size = samples


def _note_positions(call: Call, delta: Tensor) -> None:
    mask = delta.detach() != 0
    if mask.dim() > 1:
        # Features are the last dimension; of images, which have channels first, the second.
        mask = mask.any(1 if mask.dim() > 3 else -1)  # noqa: PLR2004
    mask = mask.flatten()
    known = call.positions.get(len(mask))
    call.positions[len(mask)] = mask if known is None else mask | known


def _parameter_names(model: nn.Module) -> dict[Tensor, str]:
    distributed = isinstance(model, nn.parallel.DistributedDataParallel)
    prefix = "module." if distributed else ""
    return {p: name.removeprefix(prefix) for name, p in model.named_parameters()}


def _sizes(value: Any, batch_dim: int) -> Iterator[int]:
    for tensor in _tensors(value):
        if tensor.dim() > batch_dim:
            yield tensor.shape[batch_dim]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
