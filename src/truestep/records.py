"""The life of a record: it lives exactly as long as the gradient that it describes.

During a backward pass the layers leave *pending* activity of a parameter; when the parameter's gradient
has reached `.grad`, `Records.commit` adds it to the parameter's record, or starts a new one if `.grad`
was empty or zero. What a backward pass leaves uncommitted is forgotten when it ends.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.autograd import Variable

from truestep.activity import Activity, joint, total
from truestep.errors import TruestepError
from truestep.rules import Unit

__all__ = ["Call", "Record", "Records"]


@dataclass(eq=False)
class Call:
    """One forward call of the counter's model: what tells its samples from another call's.

    Attributes:
        sizes: the batch sizes that the call's inputs and outputs allow; empty where they show none.
        outside: whether it is a layer's call outside any call of the model.
        batch_size: the batch size that its layers agree on.
        positions: for each number of positions at an output, bool: those with a gradient.
    """

    sizes: set[int] = field(default_factory=set)
    outside: bool = False
    batch_size: int | None = None
    positions: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Record:
    """What one parameter's gradient is made of.

    Attributes:
        activity: the samples that reach it.
        batch_size: N of those samples' batches.
        gradient: weakly, the `.grad` that the record describes.
        version: that tensor's version when it was last known to agree with the record.
        corrected: whether it is a mean effective gradient already.
        stepped: whether an optimizer has used it.
    """

    activity: Activity
    batch_size: int | Tensor
    gradient: Callable[[], Tensor | None]
    version: int
    corrected: bool = False
    stepped: bool = False


@dataclass
class _Pending:
    fresh: bool
    uses: dict[Call, list[Activity]] = field(default_factory=dict)


class Records:
    """The records of a model's parameters.

    Args:
        names: the parameters, with their names for errors.
        unit: what counts as a sample.
    """

    def __init__(self, names: dict[Tensor, str], unit: Unit) -> None:
        self.names = names
        self.committed: dict[Tensor, Record] = {}
        self._unit = unit
        self._pending: dict[int, dict[Tensor, _Pending]] = {}

    def clear(self) -> None:
        """Forgets everything."""
        self.committed.clear()
        self._pending.clear()

    def find(self, parameter: Tensor) -> Record:
        """The record of the parameter's present gradient.

        Raises:
            TruestepError: there is none.
        """
        record = self.committed.get(parameter)
        if record is None or record.gradient() is not parameter.grad:
            raise TruestepError(
                f"{self.names[parameter]!r} has a gradient, but no sample was counted for it. Either "
                "the forward pass ran before the SampleCounter was made (a compiled model: make the "
                "counter before its first call), or the parameter was used without calling its "
                "module, or .grad was set by hand. Call the module, or leave it out with "
                "SampleCounter(model, unsupported='mean') and rules without its class"
            )
        return record

    def receive(self, parameter: Tensor, call: Call, activity: Activity) -> None:
        """Takes pending activity, in a backward pass before the gradient reaches `.grad`."""
        task = _backward_id()
        pending = self._pending.get(task)
        if pending is None:
            # Whatever this backward pass does not commit (torch.autograd.grad) goes when it ends. One
            # that raised leaves its own behind, under an id that no other backward pass looks up.
            if len(self._pending) > MOST_BACKWARDS:
                self._pending.clear()
            pending = self._pending[task] = {}
            forget = partial(_forget, weakref.ref(self), task)
            Variable._execution_engine.queue_callback(forget)  # noqa: SLF001
        if parameter not in pending:
            pending[parameter] = _Pending(self._starts_anew(parameter))
        pending[parameter].uses.setdefault(call, []).append(activity)

    def commit(self, parameter: Tensor) -> None:
        """Makes the pending activity part of the record, once the gradient has reached `.grad`."""
        gradient, record = parameter.grad, self.committed.get(parameter)
        assert gradient is not None  # noqa: S101
        entry = self._pending.get(_backward_id(), {}).pop(parameter, None)
        if entry is None:
            # A gradient from elsewhere. If more than it changed .grad since a step, it was zeroed.
            if record is not None and record.stepped and _version(gradient) > record.version + 1:
                del self.committed[parameter]
            return
        if sum(call.outside for call in entry.uses) > 1:
            raise TruestepError(
                f"{self.names[parameter]!r} is used several times outside a call of the counter's "
                "model, so which samples belong together is unknown; make the SampleCounter on the "
                "module that is called"
            )
        parts, sizes = [], []
        for call, uses in entry.uses.items():
            for same in _same_samples(uses):
                part = joint(same)
                parts.append(part)
                sizes.append(self._size(call, part))
        if not entry.fresh and record is not None:
            parts.insert(0, record.activity)
            sizes.insert(0, record.batch_size)
        self.committed[parameter] = Record(
            total(parts), sum(sizes), weakref.ref(gradient), _version(gradient)
        )

    def mark_corrected(self, parameter: Tensor) -> None:
        """Notes that the parameter's `.grad` was turned into a mean effective gradient in place."""
        record = self.find(parameter)
        assert parameter.grad is not None  # noqa: S101
        record.corrected = True
        record.version = _version(parameter.grad)

    def forget(self, task: int) -> None:
        """Drops what a backward pass has left pending."""
        self._pending.pop(task, None)

    def _starts_anew(self, parameter: Tensor) -> bool:
        """Whether a gradient about to be accumulated is the first of a new batch."""
        gradient, record = parameter.grad, self.committed.get(parameter)
        if gradient is None or record is None or record.gradient() is not gradient:
            return True
        if _version(gradient) == record.version and not record.corrected:
            return False
        values = gradient._values() if gradient.is_sparse else gradient  # noqa: SLF001
        if not values.any():  # zeroed in place
            return True
        if record.corrected:
            raise TruestepError(
                f"the gradient of {self.names[parameter]!r} is a mean effective gradient already, and "
                "a further backward pass would add a plain one to it; call zero_grad() first, or "
                "correct after the last backward pass"
            )
        return False

    def _size(self, call: Call, part: Activity) -> int | Tensor:
        if self._unit == "sample":
            return part.samples
        at_output = call.positions.get(part.samples)
        return (part.reached() if at_output is None else at_output).sum()


# Backward passes can nest (activation checkpointing), though not this deep.
MOST_BACKWARDS = 64


def _backward_id() -> int:
    return torch._C._current_graph_task_id()  # noqa: SLF001


def _version(tensor: Tensor) -> int:
    return tensor._version  # noqa: SLF001


def _forget(reference: Callable[[], Records | None], task: int) -> None:
    records = reference()
    if records is not None:
        records.forget(task)


def _same_samples(uses: list[Activity]) -> Iterator[list[Activity]]:
    # Unit "position": uses over other numbers of positions share no samples.
    for samples in {use.samples for use in uses}:
        yield [use for use in uses if use.samples == samples]
