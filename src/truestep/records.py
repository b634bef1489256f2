"""The life of a record: it lives exactly as long as the gradient that it describes.

During a backward pass the layers leave *pending* activity of a parameter; when the parameter's gradient
has reached `.grad`, it has *landed*, and `Records.settle` adds the activity to the parameter's record, or
starts a new one if `.grad` was empty or zero: when the backward pass ends, or as soon as somebody asks. What
has not landed by then is forgotten.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from truestep.activity import Activity
from truestep.arrived import Arrived
from truestep.brought import Brought, brought_by
from truestep.calls import Call, at_end, backward_id
from truestep.direct import Use, join_all, pack_all
from truestep.distributed import is_sharded, local
from truestep.errors import (
    TruestepError,
    corrected_already,
    hidden_use,
    without_numbers,
    without_record,
)
from truestep.layout import Unit
from truestep.nested import Unseen
from truestep.record import (
    Landed,
    Pending,
    Record,
    extended,
    is_zero,
    unreached,
    version_of,
)
from truestep.waiting import Waiting

__all__ = ["FORWARD", "Records"]


class Records:
    """The records of a model's parameters.

    Args:
        names: the parameters, with their names for errors.
        unit: what counts as a sample.

    Attributes:
        known: the identities of the parameters.
        follows: whether a record follows its gradient when a backward pass puts another tensor in its
            place, as DistributedDataParallel does with gradient_as_bucket_view=True.
        closed: whether nobody watches the model any more.
        whole: whether somebody looks at the bits of inputs or outputs alone, not at the weights' counts.
        current: the call that the running backward pass is going through.
        landed: the gradients that have reached `.grad` and are not settled yet.
    """

    def __init__(self, names: dict[Tensor, str], unit: Unit) -> None:
        self.names = names
        self.known = {id(parameter) for parameter in names}
        # By the identity of their parameters: tensors are slow keys.
        self._committed: dict[int, Record] = {}
        self.follows = self.whole = self.closed = False
        self._unit = unit
        # By backward pass and parameter.
        self._pending: dict[int, dict[int, Pending]] = {}
        self._waiting = Waiting()
        self.landed: list[Landed] = []
        self._arrived: Arrived | None = None
        # Sharded parameters' pending activity whose gradient has not been handed to them yet.
        self._held: dict[int, list[Pending]] = {}
        self._unseen = Unseen()
        # Where gradients are followed: the parameters whose gradient the running backward passes found or
        # left with a record, and whether it was as the record had left it. Views of one bucket share
        # their version, so that this is known only before the first of them changes.
        self._living: dict[int, dict[Tensor, bool]] = {}
        # The outermost backward pass and the call that it is going through, while it runs.
        self._outermost: int | None = None
        self.current: Call | None = None
        # All that it went through: nobody else holds a call that began in a compiled graph.
        self._entered: set[Call] = set()

    @property
    def committed(self) -> dict[int, Record]:
        """The records, by the identity of their parameters."""
        return self._records_of(None)

    def _records_of(self, parameters: Iterable[Tensor] | None) -> dict[int, Record]:
        """The records, of some parameters or of all."""
        if self.landed:
            self.settle()
        arrived = self._arrived
        if arrived is not None:
            known = arrived.gradients
            if parameters is None or any(id(parameter) in known for parameter in parameters):
                self._deliver()
        return self._committed

    def clear(self) -> None:
        """Forgets everything, for good."""
        self.closed = True
        self._committed.clear()
        self._pending.clear()
        self._living.clear()
        self._held.clear()
        self._unseen.clear()
        self._waiting.clear()
        self.landed.clear()
        self._arrived = None

    def nbytes(self) -> int:
        """The memory that the records hold, in bytes."""
        records = self.committed.values()
        tensors = (tensor for record in records for tensor in record.activity.tensors())
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    def of(self, parameter: Tensor) -> Record | None:
        """The record of the parameter's present gradient, or, without one, of its last."""
        if parameter in self._unseen:
            return None
        record = self.committed.get(id(parameter))
        if record is None or parameter.grad is None or record.is_of(parameter.grad):
            if record is not None and parameter.is_meta:
                raise without_numbers(self.names[parameter])
            return record
        return None

    def adopt(self, parameter: Tensor, batch_size: int) -> None:
        """Gives a gradient that came from other ranks alone a record of no sample, if it has none."""
        gradient = parameter.grad
        if gradient is None or self.of(parameter) is not None:
            return
        self.committed[id(parameter)] = unreached(parameter, gradient, batch_size)

    def find(self, parameter: Tensor) -> Record:
        """The record of the parameter's present gradient; zeros that nobody counted are of no sample.

        Raises:
            TruestepError: there is none.
        """
        record, gradient = self._records_of([parameter]).get(id(parameter)), parameter.grad
        if parameter in self._unseen:
            raise hidden_use(self.names[parameter])
        if record is None or gradient is None or not record.is_of(gradient):
            if gradient is not None and not self.closed and is_zero(gradient):
                return unreached(parameter, gradient, 1)
            raise without_record(self.names[parameter], closed=self.closed)
        if record.mixed:
            raise corrected_already(self.names[parameter])
        if parameter.is_meta:
            raise without_numbers(self.names[parameter])
        return record

    def find_all(self, parameters: Sequence[Tensor]) -> list[Record]:
        """`find` of each of several parameters."""
        committed = self._records_of(parameters)
        if self._unseen:
            return [self.find(parameter) for parameter in parameters]
        records = [committed.get(id(parameter)) for parameter in parameters]
        return [
            record
            if record is not None
            and not record.mixed
            and not parameter.is_meta
            and record.is_of(parameter.grad)
            else self.find(parameter)
            for parameter, record in zip(parameters, records, strict=True)
        ]

    @property
    def arrived(self) -> Arrived | None:
        """What of the latest backward pass is no record yet."""
        return None if self.landed or self._unseen else self._arrived

    def receive(self, call: Call, found: Iterable[tuple[Tensor, Activity]]) -> None:
        """Takes parameters' pending activity, in a backward pass before gradients reach `.grad`."""
        task = backward_id()
        pending = self._pending_of(task)
        for parameter, activity in found:
            self._entry(pending, parameter, task).uses.setdefault(call, []).append(activity)

    def refuse(self, parameters: Iterable[Tensor], reason: str) -> None:
        """Makes it an error if the running backward pass reaches the `.grad` of these parameters."""
        task = backward_id()
        pending = self._pending_of(task)
        for parameter in parameters:
            self._entry(pending, parameter, task).refusal = reason

    def _entry(self, pending: dict[int, Pending], parameter: Tensor, task: int) -> Pending:
        entry = pending.get(id(parameter))
        if entry is None:
            fresh = parameter.grad is None or self._starts_anew(parameter, task)
            entry = pending[id(parameter)] = Pending(fresh, task)
        return entry

    def arrive(self, use: Use, delta: Tensor) -> None:
        """Takes a use and the gradient of its output; it waits if its parameters have no gradient yet."""
        task = backward_id()
        if task not in self._pending:
            self._pending_of(task)  # where the same use may still wait, with another gradient
        if self._arrived is not None and use.call in self._arrived.calls:
            self._deliver()
        use.take(delta)
        if self.follows or use.given is None:
            pack_all([use], whole=self.whole)
            self.receive(use.call, use.direct.found(use, iter(join_all([use]))))
            return
        use.adds = False
        if not use.begins():
            adds = None if self._arrived is None else self._arrived.goes_on(use.parameters)
            if adds is None:
                pending = self._pending[task]
                for parameter in use.parameters:
                    self._entry(pending, parameter, task)
            else:
                use.adds = adds
        self._waiting.add(use, delta, task, whole=self.whole)

    def _pending_of(self, task: int) -> dict[int, Pending]:
        """The pending activity of a backward pass."""
        pending = self._pending.get(task)
        if pending is None:
            if self.landed or self._waiting:
                self.settle()  # of a backward pass that this one is nested in, or that has raised
            # Whatever this backward pass does not commit (torch.autograd.grad) goes when it ends. One
            # that raised leaves its own behind, under an id that no other backward pass looks up.
            if len(self._pending) > MOST_BACKWARDS:
                self._pending.clear()
            pending = self._pending[task] = {}
            at_end(self, Records.forget)
            self.watch(task)
        return pending

    def land(self, parameter: Tensor, gradient: Tensor) -> None:
        """Notes that a parameter's gradient has reached `.grad`."""
        key, version, task = id(parameter), version_of(gradient), backward_id()
        self.landed.append((parameter, weakref.ref(gradient), version, task))
        nested = self._outermost is not None and self._outermost != task
        if nested and key not in self._pending.get(task, {}) and key not in self._held:
            self._unseen.add(parameter)
        if self.follows:
            self.settle()

    def settle(self) -> None:
        """Brings the records up to date with what has landed."""
        self._settle(self._waiting.take(None, whole=self.whole) if self._waiting else ())

    def _settle(self, uses: Sequence[tuple[Use, int]]) -> None:
        self._deliver()
        joined = iter(join_all(use for use, _ in uses))
        for use, task in uses:
            pending = self._pending.get(task, {})
            for parameter, activity in use.direct.found(use, joined):
                entry = pending.setdefault(id(parameter), Pending(not use.adds, task))
                entry.uses.setdefault(use.call, []).append(activity)
        landed, self.landed = self.landed, []
        for each in landed:
            self._commit(*each)

    def _deliver(self) -> None:
        """Makes records of what has arrived."""
        arrived, self._arrived = self._arrived, None
        if arrived is not None:
            self._committed.update(arrived.records())

    def _postpone(self, uses: Sequence[tuple[Use, int]], task: int) -> bool:
        """Keeps what a backward pass has brought until somebody asks, if it is nothing unusual."""
        if not uses or self._outermost is not None or self._held or self._unseen:
            return False
        found = brought_by(uses, self.landed, task, self._pending.get(task, ()))
        if found is None:
            return False
        known = found.landed
        if not self._follow_up(found):
            return False
        if self._committed:
            for key in known:
                self._committed.pop(key, None)
        landed, self.landed = self.landed, []
        if len(landed) > len(known):
            for each in landed:
                if id(each[0]) not in known:
                    self._commit(*each)
        return True

    def _follow_up(self, found: Brought) -> bool:
        """Puts what a pass has brought behind what arrived before, or in its place."""
        earlier = self._arrived
        if found.adds:
            return earlier is not None and earlier.extend(found)
        if earlier is not None and not earlier.gradients.keys() <= found.landed.keys():
            self._deliver()
        self._arrived = Arrived(found, self._unit)
        return True

    def hold(self, parameter: Tensor) -> None:
        """Keeps pending activity until `fully_shard` hands the parameter the gradient.

        That may be after further backward passes (`set_requires_gradient_sync(False)`), which
        accumulate the gradient elsewhere.
        """
        entry = self._pending.get(backward_id(), {}).pop(id(parameter), None)
        if entry is not None:
            self._held.setdefault(id(parameter), []).append(entry)

    def _commit(
        self,
        parameter: Tensor,
        reference: Callable[[], Tensor | None],
        version: int,
        task: int,
    ) -> None:
        """Makes the pending activity part of the record, once the gradient has reached `.grad`."""
        key, gradient, pending = id(parameter), reference(), self._pending.get(task)
        record = self._committed.get(key)
        entry = None if pending is None else pending.pop(key, None)
        entries = self._held.pop(key, []) if entry is None else [entry]
        if not entries:
            # A gradient from elsewhere. If more than it changed .grad, which parts of one bucket do for one
            # another, that was zeroed, or nobody can tell.
            if record is not None and not self.follows:
                if version > record.version + 1:
                    del self._committed[key]
                else:
                    record.version = version
            return
        sharded = gradient is not None and is_sharded(gradient)
        replaced = sharded and record is not None and record.gradient() is not gradient
        if entries[0].fresh or replaced:
            record = None
        # After a step a backward pass may add to a corrected gradient that nobody will use (a GAN's
        # discriminator, in the generator's turn); who would use it is told.
        mixed = record is not None and (record.corrected or record.mixed)
        for entry in entries:
            if entry.refusal is not None:
                self._committed.pop(key, None)
                raise TruestepError(entry.refusal)
            outermost = task if self._outermost is None else self._outermost
            record = extended(record, entry, outermost, self.names[parameter], self._unit)
        assert record is not None  # noqa: S101
        record.mixed = mixed
        record.gradient, record.version = reference, version
        if gradient is not None and sharded:
            record.nonzero = local(gradient).any()
        self._committed[key] = record
        if task in self._living:
            self._living[task][parameter] = True

    def mark_stepped(self, parameters: Iterable[Tensor]) -> None:
        """Notes that an optimizer has used the gradients of these parameters."""
        committed = self._records_of(())
        arrived = self._arrived
        for parameter in parameters:
            key = id(parameter)
            if arrived is not None and key in arrived.gradients:
                arrived.stepped.add(key)
            elif (record := committed.get(key)) is not None:
                record.stepped = True

    def mark_corrected(self, parameter: Tensor) -> None:
        """Notes that the parameter's `.grad` was turned into a mean effective gradient in place."""
        record = self.find(parameter)
        assert parameter.grad is not None  # noqa: S101
        record.corrected = True
        record.version = version_of(parameter.grad)

    def enter(self, call: Call) -> None:
        """Notes that the backward pass has come to the output of a call."""
        if self._arrived is not None and call in self._arrived.calls:
            self._deliver()
        self.current = call
        self._entered.add(call)
        task = backward_id()
        if self._outermost != task:
            self._outermost = task
            self._pending_of(task)  # at whose end it is left

    def forget(self, task: int) -> None:
        """Ends a backward pass, and drops what it has left pending."""
        if task == self._outermost:
            self.current = self._outermost = None
            self._entered.clear()
        uses = self._waiting.take(task, whole=self.whole) if self._waiting else []
        if not self._postpone(uses, task):
            self._settle(uses)
        self._pending.pop(task, None)
        if task in self._living:
            # DistributedDataParallel finishes in such a callback too: come after it.
            at_end(self, Records.follow, task)

    def watch(self, task: int) -> None:
        """Notes which gradients have a record, before a pass that `follow` ends may replace them."""
        if self.follows:
            self._deliver()
            living = self._living[task] = {}
            for parameter in self.names:
                record, gradient = self._committed.get(id(parameter)), parameter.grad
                if record is None:
                    continue
                # Only now: other ranks' gradients may come to lie where this one was.
                record.ended = record.ended or gradient is None or record.was_zeroed(gradient)
                if gradient is not None and record.is_of(gradient):
                    living[parameter] = version_of(gradient) == record.version

    def follow(self, task: int) -> None:
        """Binds records to the tensors that have been put in place of their gradients since `watch`."""
        for parameter, unchanged in self._living.pop(task, {}).items():
            record = self._committed.get(id(parameter))
            if record is not None and parameter.grad is not None:
                record.gradient = weakref.ref(parameter.grad)
                record.version = version_of(parameter.grad) if unchanged else -1

    def _starts_anew(self, parameter: Tensor, task: int) -> bool:
        """Whether a gradient about to be accumulated is the first of a new batch."""
        self._deliver()
        gradient, record = parameter.grad, self._committed.get(id(parameter))
        if gradient is None or record is None or not record.is_of(gradient):
            return True
        # After a step the content is looked at: `.grad.data.zero_()` leaves the version as it is.
        unchanged = version_of(gradient) == record.version and not record.stepped
        if self._living.get(task, {}).get(parameter, unchanged) and not record.corrected:
            return False
        if record.zeroed(gradient):
            return True
        if record.corrected and not record.stepped:
            raise corrected_already(self.names[parameter])
        return False


# Stands for a forward pass where others stand for backward passes.
FORWARD = -1

# Backward passes can nest (activation checkpointing), though not this deep.
MOST_BACKWARDS = 64
