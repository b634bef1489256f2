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
from truestep.distributed import is_sharded, local, nobody
from truestep.errors import TruestepError
from truestep.layout import Unit

__all__ = ["FORWARD", "Call", "Record", "Records"]


@dataclass(eq=False, slots=True, weakref_slot=True)
class Call:
    """One forward call of the counter's model: what tells its samples from another call's.

    Attributes:
        sizes: the batch sizes that the call's inputs and outputs allow; empty where they show none.
        inputs: where the inputs' memory is.
        outside: whether it is a layer's call outside any call of the model.
        batch_size: the batch size that its layers agree on.
        positions: for each number of positions at an output, bool: those with a gradient.
        key: what stands for the call in a compiled graph, see `truestep.compiled`.
    """

    sizes: list[int] = field(default_factory=list)
    inputs: set[int] = field(default_factory=set)
    outside: bool = False
    batch_size: int | None = None
    positions: dict[int, Tensor] = field(default_factory=dict)
    key: Tensor | None = None

    def note_positions(self, delta: Tensor) -> None:
        """Adds the positions where the gradient of an output is not zero."""
        mask = delta.detach() != 0
        if mask.dim() > 1:
            # Features are the last dimension; of images, which have channels first, the second.
            mask = mask.any(1 if mask.dim() > 3 else -1)  # noqa: PLR2004
        mask = mask.flatten()
        known = self.positions.get(len(mask))
        self.positions[len(mask)] = mask if known is None else mask | known


@dataclass(slots=True)
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
        mixed: whether plain gradients were added to a corrected one after its step.
        nonzero: of a sharded gradient, whether this rank's part had anything but zeros at first.
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
    mixed: bool = False
    nonzero: Tensor | None = None


@dataclass(slots=True)
class _Pending:
    fresh: bool
    task: int
    uses: dict[Call, list[Activity]] = field(default_factory=dict)


class Records:
    """The records of a model's parameters.

    Args:
        names: the parameters, with their names for errors.
        unit: what counts as a sample.

    Attributes:
        known: the identities of the parameters.
        committed: the records, by the identity of their parameters: tensors are slow keys.
        follows: whether a record follows its gradient when a backward pass puts another tensor in its
            place, as DistributedDataParallel does with gradient_as_bucket_view=True.
        current: the call that the running backward pass is going through.
    """

    def __init__(self, names: dict[Tensor, str], unit: Unit) -> None:
        self.names = names
        self.known = {id(parameter) for parameter in names}
        self.committed: dict[int, Record] = {}
        self.follows = False
        self._unit = unit
        # By backward pass and parameter.
        self._pending: dict[int, dict[int, _Pending]] = {}
        # Sharded parameters' pending activity whose gradient has not been handed to them yet.
        self._held: dict[int, list[_Pending]] = {}
        # Where gradients are followed: the parameters whose gradient the running backward passes found or
        # left with a record, and whether it was as the record had left it. Views of one bucket share
        # their version, so that this is known only before the first of them changes.
        self._living: dict[int, dict[Tensor, bool]] = {}
        # The outermost backward pass and the call that it is going through, while it runs.
        self._outermost: int | None = None
        self.current: Call | None = None
        # All that it went through: nobody else holds a call that began in a compiled graph.
        self._entered: set[Call] = set()

    def clear(self) -> None:
        """Forgets everything."""
        self.committed.clear()
        self._pending.clear()
        self._living.clear()
        self._held.clear()

    def nbytes(self) -> int:
        """The memory that the records hold, in bytes."""
        records = self.committed.values()
        tensors = (tensor for record in records for tensor in record.activity.tensors())
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    def nonfinite(self) -> list[str]:
        """The names of the parameters whose gradient has a NaN or an infinity."""
        gradients = [(name, p.grad) for p, name in self.names.items() if p.grad is not None]
        dense = [(name, g._values() if g.is_sparse else g) for name, g in gradients]  # noqa: SLF001
        return [name for name, values in dense if not values.isfinite().all()]

    def of(self, parameter: Tensor) -> Record | None:
        """The record of the parameter's present gradient, or, without one, of its last."""
        record = self.committed.get(id(parameter))
        if record is None or parameter.grad is None or record.gradient() is parameter.grad:
            return record
        return None

    def adopt(self, parameter: Tensor, batch_size: int) -> None:
        """Gives a gradient that came from other ranks alone a record of no sample, if it has none."""
        gradient = parameter.grad
        if gradient is None or self.of(parameter) is not None:
            return
        reference, version = weakref.ref(gradient), _version(gradient)
        activity, latest = nobody(parameter), (Call(), -1)
        self.committed[id(parameter)] = Record(
            activity, batch_size, reference, version, latest, [activity], None
        )

    def find(self, parameter: Tensor) -> Record:
        """The record of the parameter's present gradient.

        Raises:
            TruestepError: there is none.
        """
        record = self.committed.get(id(parameter))
        if record is None or record.gradient() is not parameter.grad:
            raise TruestepError(
                f"{self.names[parameter]!r} has a gradient, but no sample was counted for it. Either "
                "the forward pass ran before the SampleCounter was made, or torch.compile did (make the "
                "counter before the compiled model's first call, or call torch.compiler.reset() after "
                "making it), or the parameter was used without calling its module, or .grad was set by "
                "hand. Call the module, or leave it out with SampleCounter(model, unsupported='mean') "
                "and rules without its class"
            )
        if record.mixed:
            self._refuse_mixture(parameter)
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
            self.watch(task)
        entry = pending.get(id(parameter))
        if entry is None:
            entry = pending[id(parameter)] = _Pending(self._starts_anew(parameter, task), task)
        entry.uses.setdefault(call, []).append(activity)

    def hold(self, parameter: Tensor) -> None:
        """Keeps pending activity until `fully_shard` hands the parameter the gradient.

        That may be after further backward passes (`set_requires_gradient_sync(False)`), which
        accumulate the gradient elsewhere.
        """
        entry = self._pending.get(_backward_id(), {}).pop(id(parameter), None)
        if entry is not None:
            self._held.setdefault(id(parameter), []).append(entry)

    def commit(self, parameter: Tensor) -> None:
        """Makes the pending activity part of the record, once the gradient has reached `.grad`."""
        gradient, record = parameter.grad, self.committed.get(id(parameter))
        assert gradient is not None  # noqa: S101
        task = _backward_id()
        pending = self._pending.get(task)
        entry = None if pending is None else pending.pop(id(parameter), None)
        entries = self._held.pop(id(parameter), []) if entry is None else [entry]
        if not entries:
            # A gradient from elsewhere. If more than it changed .grad since a step, it was zeroed.
            if record is not None and record.stepped and _version(gradient) > record.version + 1:
                del self.committed[id(parameter)]
            return
        sharded = is_sharded(gradient)
        replaced = sharded and record is not None and record.gradient() is not gradient
        if entries[0].fresh or replaced:
            record = None
        # After a step a backward pass may add to a corrected gradient that nobody will use (a GAN's
        # discriminator, in the generator's turn); who would use it is told.
        mixed = record is not None and (record.corrected or record.mixed)
        for entry in entries:
            record = self._extended(parameter, record, entry)
        assert record is not None  # noqa: S101
        record.mixed = mixed
        record.gradient, record.version = weakref.ref(gradient), _version(gradient)
        if sharded:
            record.nonzero = local(gradient).any()
        self.committed[id(parameter)] = record
        if task in self._living:
            self._living[task][parameter] = True

    def _extended(self, parameter: Tensor, record: Record | None, entry: _Pending) -> Record | None:
        """A record with the uses of one more backward pass."""
        if len(entry.uses) > 1 and sum(call.outside for call in entry.uses) > 1:
            raise TruestepError(
                f"{self.names[parameter]!r} is used several times outside a call of the counter's "
                "model, so which samples belong together is unknown; make the SampleCounter on the "
                "module that is called"
            )
        before = None if record is None else (record.activity, record.batch_size)
        for call, uses in entry.uses.items():
            latest = (call, entry.task if self._outermost is None else self._outermost)
            if before is not None and record is not None and record.latest == latest:
                # Nested backward passes (reentrant checkpointing) deliver one call piece by piece.
                joined, before = record.uses + uses, record.before
            else:
                joined = uses
            activity, size = self._joint(call, joined)
            if before is not None:
                activity, size = total([before[0], activity]), before[1] + size
            record = Record(activity, size, _nothing, -1, latest, joined, before)
            before = (activity, size)
        return record

    def mark_corrected(self, parameter: Tensor) -> None:
        """Notes that the parameter's `.grad` was turned into a mean effective gradient in place."""
        record = self.find(parameter)
        assert parameter.grad is not None  # noqa: S101
        record.corrected = True
        record.version = _version(parameter.grad)

    def enter(self, call: Call) -> None:
        """Notes that the backward pass has come to the output of a call."""
        self.current = call
        self._entered.add(call)
        if self._outermost is None or self._outermost != _backward_id():
            self._outermost = _backward_id()
            _at_end(self, Records.leave)

    def leave(self, _task: int) -> None:
        """Notes the end of the backward pass."""
        self.current = self._outermost = None
        self._entered.clear()

    def forget(self, task: int) -> None:
        """Drops what a backward pass has left pending."""
        self._pending.pop(task, None)
        if task in self._living:
            # DistributedDataParallel finishes in such a callback too: come after it.
            _at_end(self, Records.follow, task)

    def watch(self, task: int) -> None:
        """Notes which gradients have a record, before a pass that `follow` ends may replace them."""
        if self.follows:
            found = {p: (p.grad, self.committed.get(id(p))) for p in self.names}
            self._living[task] = {
                p: _version(gradient) == record.version
                for p, (gradient, record) in found.items()
                if gradient is not None and record is not None and record.gradient() is gradient
            }

    def follow(self, task: int) -> None:
        """Binds records to the tensors that have been put in place of their gradients since `watch`."""
        for parameter, unchanged in self._living.pop(task, {}).items():
            record = self.committed.get(id(parameter))
            if record is not None and parameter.grad is not None:
                record.gradient = weakref.ref(parameter.grad)
                record.version = _version(parameter.grad) if unchanged else -1

    def _starts_anew(self, parameter: Tensor, task: int) -> bool:
        """Whether a gradient about to be accumulated is the first of a new batch."""
        gradient, record = parameter.grad, self.committed.get(id(parameter))
        if gradient is None or record is None or record.gradient() is not gradient:
            return True
        # After a step the content is looked at: `.grad.data.zero_()` leaves the version as it is.
        unchanged = _version(gradient) == record.version and not record.stepped
        if self._living.get(task, {}).get(parameter, unchanged) and not record.corrected:
            return False
        if _zeroed(gradient, record):
            return True
        if record.corrected and not record.stepped:
            self._refuse_mixture(parameter)
        return False

    def _refuse_mixture(self, parameter: Tensor) -> None:
        raise TruestepError(
            f"the gradient of {self.names[parameter]!r} is a mean effective gradient already, and a "
            "further backward pass adds a plain one to it; call zero_grad() first, or correct after "
            "the last backward pass"
        )

    def _joint(self, call: Call, uses: list[Activity]) -> tuple[Activity, int | Tensor]:
        """One call's activity and its N."""
        if len(uses) == 1 and self._unit == "sample":
            return uses[0], uses[0].samples
        parts = [joint(same) for same in _same_samples(uses)]
        if self._unit == "sample":
            return total(parts), sum(part.samples for part in parts)
        at_output = [call.positions.get(part.samples) for part in parts]
        masks = [
            part.reached() if mask is None else mask
            for part, mask in zip(parts, at_output, strict=True)
        ]
        return total(parts), sum(mask.sum() for mask in masks)


# Stands for a forward pass where others stand for backward passes.
FORWARD = -1

# Backward passes can nest (activation checkpointing), though not this deep.
MOST_BACKWARDS = 64


def _backward_id() -> int:
    return torch._C._current_graph_task_id()  # noqa: SLF001


def _zeroed(gradient: Tensor, record: Record) -> bool:
    """Whether a gradient was zeroed in place since its record was made."""
    values = gradient._values() if gradient.is_sparse else local(gradient)  # noqa: SLF001
    if values.any():
        return False
    # A rank's few rows may hold nothing but zeros, or be none at all, where the others' do not.
    return record.nonzero is None or record.stepped or bool(record.nonzero)


def _nothing() -> None:
    return None


def _version(tensor: Tensor) -> int:
    return tensor._version  # noqa: SLF001


def _at_end(
    records: Records, method: Callable[[Records, int], None], task: int | None = None
) -> None:
    """Calls a method with the backward pass's id when that backward pass ends."""
    task, reference = _backward_id() if task is None else task, weakref.ref(records)

    def call() -> None:
        living = reference()
        if living is not None:
            method(living, task)

    Variable._execution_engine.queue_callback(call)  # noqa: SLF001


def _same_samples(uses: list[Activity]) -> Iterator[list[Activity]]:
    # Unit "position": uses over other numbers of positions share no samples.
    for samples in {use.samples for use in uses}:
        yield [use for use in uses if use.samples == samples]
