"""The life of a record: it lives exactly as long as the gradient that it describes.

During a backward pass the layers leave *pending* activity of a parameter; when the parameter's gradient
has reached `.grad`, `Records.commit` adds it to the parameter's record, or starts a new one if `.grad`
was empty or zero. What a backward pass leaves uncommitted is forgotten when it ends.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import Variable

from truestep.activity import Activity
from truestep.combine import joint, total
from truestep.errors import TruestepError
from truestep.layout import Unit

__all__ = ["Call", "Record", "Records"]


@dataclass(eq=False)
class Call:
    """One forward call of the counter's model: what tells its samples from another call's.

    Attributes:
        sizes: the batch sizes that the call's inputs and outputs allow; empty where they show none.
        inputs: where the inputs' memory is.
        outside: whether it is a layer's call outside any call of the model.
        batch_size: the batch size that its layers agree on.
        positions: for each number of positions at an output, bool: those with a gradient.
    """

    sizes: list[int] = field(default_factory=list)
    inputs: set[int] = field(default_factory=set)
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
        latest: the last call that it holds, with the backward pass.
        uses: that call's uses, which a further use by the same samples must be joined with.
        before: the record without that call.
        corrected: whether it is a mean effective gradient already.
        stepped: whether an optimizer has used it.
    """

    activity: Activity
    batch_size: int | Tensor
    gradient: Callable[[], Tensor | None]
    version: int
    latest: tuple[Call, int]
    uses: list[Activity]
    before: tuple[Activity, int | Tensor] | None
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
        # The outermost backward pass and the call that it is going through, while it runs.
        self._outermost: int | None = None
        self.current: Call | None = None

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
            _at_end(self, Records.forget)
        if parameter not in pending:
            pending[parameter] = _Pending(self._starts_anew(parameter))
        pending[parameter].uses.setdefault(call, []).append(activity)

    def commit(self, parameter: Tensor) -> None:
        """Makes the pending activity part of the record, once the gradient has reached `.grad`."""
        gradient, record = parameter.grad, self.committed.get(parameter)
        assert gradient is not None  # noqa: S101
        task = _backward_id()
        entry = self._pending.get(task, {}).pop(parameter, None)
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
        before = None if entry.fresh or record is None else (record.activity, record.batch_size)
        for call, uses in entry.uses.items():
            latest = (call, task if self._outermost is None else self._outermost)
            if before is not None and record is not None and record.latest == latest:
                # Nested backward passes (reentrant checkpointing) deliver one call piece by piece.
                joined, before = record.uses + uses, record.before
            else:
                joined = uses
            activity, size = self._joint(call, joined)
            if before is not None:
                activity, size = total([before[0], activity]), before[1] + size
            reference, version = weakref.ref(gradient), _version(gradient)
            record = Record(activity, size, reference, version, latest, joined, before)
            before = (activity, size)
        assert record is not None  # noqa: S101
        self.committed[parameter] = record

    def mark_corrected(self, parameter: Tensor) -> None:
        """Notes that the parameter's `.grad` was turned into a mean effective gradient in place."""
        record = self.find(parameter)
        assert parameter.grad is not None  # noqa: S101
        record.corrected = True
        record.version = _version(parameter.grad)

    def enter(self, call: Call) -> None:
        """Notes that the backward pass has come to the output of a call."""
        self.current = call
        if self._outermost is None or self._outermost != _backward_id():
            self._outermost = _backward_id()
            _at_end(self, Records.leave)

    def leave(self, _task: int) -> None:
        """Notes the end of the backward pass."""
        self.current = self._outermost = None

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

    def _joint(self, call: Call, uses: list[Activity]) -> tuple[Activity, int | Tensor]:
        """One call's activity and its N."""
        parts = [joint(same) for same in _same_samples(uses)]
        if self._unit == "sample":
            return total(parts), sum(part.samples for part in parts)
        at_output = [call.positions.get(part.samples) for part in parts]
        masks = [
            part.reached() if mask is None else mask
            for part, mask in zip(parts, at_output, strict=True)
        ]
        return total(parts), sum(mask.sum() for mask in masks)


# Backward passes can nest (activation checkpointing), though not this deep.
MOST_BACKWARDS = 64


def _backward_id() -> int:
    return torch._C._current_graph_task_id()  # noqa: SLF001


def _version(tensor: Tensor) -> int:
    return tensor._version  # noqa: SLF001


def _at_end(records: Records, method: Callable[[Records, int], None]) -> None:
    """Calls a method with the backward pass's id when that backward pass ends."""
    task, reference = _backward_id(), weakref.ref(records)

    def call() -> None:
        living = reference()
        if living is not None:
            method(living, task)

    Variable._execution_engine.queue_callback(call)  # noqa: SLF001


def _same_samples(uses: list[Activity]) -> Iterator[list[Activity]]:
    # Unit "position": uses over other numbers of positions share no samples.
    for samples in {use.samples for use in uses}:
        yield [use for use in uses if use.samples == samples]
