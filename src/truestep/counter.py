"""SampleCounter: watches a model's backward passes and knows each parameter's adaptive batch sizes.

The hooks are `Watch`'s, the records' life is `Records`', the ranks are `Batch`'s; this is the front of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

from torch import Tensor, nn

from truestep.activity import Activity
from truestep.arrived import Arrived
from truestep.batch import Batch
from truestep.checks import check_factor
from truestep.distributed import local
from truestep.errors import TruestepError
from truestep.fused import Pass
from truestep.hooks import uncompiled
from truestep.kernels.stepping import Options
from truestep.layers import (
    check_options,
    find_layers,
    make_layer,
    parameter_names,
    uncompiled_model,
)
from truestep.layout import Layout, Rule, Unit
from truestep.records import Records
from truestep.rules import RULES
from truestep.update import mean_effective, scale_
from truestep.watch import Watch

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
            such modules are named), another counter watches the model already, or an argument is of a
            wrong kind, or names a module that is not there.

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
        self._options = {
            "unit": unit,
            "rules": rules,
            "batch_dim": batch_dim,
            "unsupported": unsupported,
            "process_group": process_group,
        }
        model = uncompiled_model(model)
        check_options(model, unit, unsupported, rules, batch_dim)
        self._records = Records(parameter_names(model), unit)
        self._batch = Batch(model, self._records, process_group)
        layers, self._plain = find_layers(model, rules, unsupported)
        dims = {"": batch_dim} if isinstance(batch_dim, int) else batch_dim
        everywhere = batch_dim if isinstance(batch_dim, int) else 0
        made = [
            make_layer(name, module, rule, Layout(dims.get(name, everywhere), unit), unsupported)
            for name, module, rule in layers
        ]
        parts = self._records, self._batch, self._plain
        self._watch = Watch(model, made, *parts, dims.get("") or 0, unit)

    @property
    def batch_size(self) -> int:
        """N, the number of samples of the batch that the gradients describe; 0 before any.

        Set it to the loss's denominator where that is not the batch size of the model's calls; it
        holds until it is set again, and None returns to counting.
        """
        return self._batch.size()

    @batch_size.setter
    def batch_size(self, value: int | None) -> None:
        if value is not None and not (isinstance(value, Integral) and value > 0):
            raise TruestepError(f"batch_size is {value!r}; set a positive number, or None to count")
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
        """What is worth logging after a step, for each parameter with a record and elements.

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
        check_factor(eps, None)
        return self._batch.statistics(eps)

    def nonfinite(self) -> list[str]:
        """The names of the parameters whose gradient has a NaN or an infinity."""
        names = self._records.names
        gradients = [(name, p.grad) for p, name in names.items() if p.grad is not None]
        dense = [(name, g._values() if g.is_sparse else g) for name, g in gradients]  # noqa: SLF001
        return [name for name, values in dense if not values.isfinite().all()]

    @uncompiled
    def correct_gradients(
        self,
        parameters: Tensor | Iterable[Tensor] | None = None,
        *,
        eps: float = 1.0,
        factor_limit: float | None = None,
    ) -> None:
        """Turns gradients into mean effective gradients in place: g N / (m + eps) where m > 0.

        The explicit form of what the optimizers do in `step()`, which then does not repeat it: call
        it where something else must see the result, for example before gradient clipping. A further
        backward pass before `zero_grad()` is an error.

        Args:
            parameters: those to correct, or one; all of the model's by default.
            eps: the paper's non-zero natural number.
            factor_limit: the largest N / (m + eps) allowed.

        Raises:
            TruestepError: a parameter has a gradient but no record, or a number makes no factor.
        """
        check_factor(eps, factor_limit)
        if isinstance(parameters, Tensor):  # whose rows would be taken for parameters
            parameters = [parameters]
        chosen = list(self._records.names if parameters is None else parameters)
        self.prepare(chosen)
        rest = [parameter for parameter in chosen if parameter.grad is not None]
        options = Options(eps=float(eps), limit=factor_limit)
        arrived, size = self.arrived()
        whole, own = Pass(options), list[Tensor]()
        if arrived is not None:
            own, others = arrived.split(rest)
            if arrived.add_to(whole, size, own, steps=False):
                rest = others
            else:
                whole, own = Pass(options), []
        corrected: list[Tensor] = []
        for parameter, found in zip(rest, self.reach_all(rest), strict=True):
            if found is None or parameter.grad is None:
                continue
            gradient = local(parameter.grad.detach())
            if whole.takes(gradient):
                whole.add(gradient, found)
            else:
                scale_(gradient, *found, eps, factor_limit)
            corrected.append(parameter)
        whole.run()
        if arrived is not None:
            arrived.note_corrected(own)
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
            TruestepError: the parameter has no gradient or no record, or a number makes no factor.
        """
        check_factor(eps, factor_limit)
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
        if parameter.grad is None or (self._plain and parameter in self._plain):
            return None
        if id(parameter) not in self._records.known:
            self.check([parameter])
        return self._batch.find(parameter)

    def activity(self, parameter: Tensor) -> Activity | None:
        """This process's samples that reach a gradient, corrected or not; None where it stays plain.

        Raises:
            TruestepError: the parameter has a gradient, but no record.
        """
        if parameter.grad is None or parameter in self._plain:
            return None
        return self._records.find(parameter).activity

    def keep_bits(self) -> None:
        """From now on keeps all positions' bits, also where fewer give the counts: see `NodeHistory`."""
        self._records.whole = True

    def reach_all(
        self, parameters: Sequence[Tensor]
    ) -> Iterable[tuple[Activity, int | Tensor] | None]:
        """`reach` of each of several parameters with a gradient; all are looked at before the first is found.

        Raises:
            TruestepError: one of them has no record.
        """
        known = self._records.known
        if not self._plain and known.issuperset(map(id, parameters)):
            return self._batch.find_all(parameters)
        counted = [p for p in parameters if p not in self._plain]
        self.check(counted)
        found = iter(self._batch.find_all(counted))
        return (None if p in self._plain else next(found) for p in parameters)

    def arrived(self) -> tuple[Arrived | None, int | None]:
        """What a step may take instead of `reach_all` of the parameters that it has, and N if it is set."""
        return self._batch.arrived(), self._batch.override

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
        self._records.mark_stepped(parameters)
        self._batch.release()

    def check(self, parameters: Iterable[Tensor]) -> None:
        """Raises `TruestepError` for a parameter that is not the model's."""
        for index, parameter in enumerate(parameters):
            if id(parameter) not in self._records.known:
                raise TruestepError(
                    f"parameter {index} of the optimizer, of shape {tuple(parameter.shape)}, is not "
                    "in the counter's model; make the SampleCounter on the model that owns all of "
                    "the optimizer's parameters"
                )

    def moved(self, model: nn.Module) -> "SampleCounter":
        """A counter with the same options and `batch_size`, on a smaller model, say; this one is closed.

        Args:
            model: the model that is called from now on.
        """
        self.close()
        options, dims = self._options, self._options["batch_dim"]
        if isinstance(dims, Mapping):
            names = {name for name, _ in model.named_modules()}
            options = options | {"batch_dim": {n: dim for n, dim in dims.items() if n in names}}
        counter = SampleCounter(model, **options)
        counter._batch.override = self._batch.override
        return counter

    def close(self) -> None:
        """Takes the hooks off the model and forgets the records."""
        self._watch.close()
        self._records.clear()
        self._batch.release()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Copied, ()


class _Copied:
    """What is in a counter's place in a copied or unpickled model: a counter belongs to its own."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _copied()

    def __setattr__(self, name: str, value: Any) -> None:
        raise _copied()

    def __repr__(self) -> str:
        return "<SampleCounter that was copied>"


def _copied() -> TruestepError:
    return TruestepError(
        "this SampleCounter was copied or unpickled with its model, and a counter belongs to the model "
        "that it was made on; make a new SampleCounter on the copy of the model"
    )
