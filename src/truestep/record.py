"""What one parameter's gradient is made of: as a record, and on its way to one."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from truestep.activity import Activity
from truestep.calls import Call
from truestep.combine import joint, total
from truestep.distributed import is_sharded, local, nobody
from truestep.errors import TruestepError
from truestep.layout import Unit

__all__ = [
    "Landed",
    "Pending",
    "Record",
    "any_on",
    "extended",
    "is_zero",
    "size_of",
    "unreached",
    "version_of",
]

# A gradient that has reached `.grad`: its parameter, the gradient (weakly), its version then, and the
# backward pass.
Landed = tuple[Tensor, Callable[[], Tensor | None], int, int]


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
        ended: whether the gradient was dropped before the latest backward pass; since then other ranks' may
            have come to lie in its memory.
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
    ended: bool = False

    def is_of(self, gradient: Tensor | None) -> bool:
        """Whether it describes this gradient."""
        return not self.ended and self.gradient() is gradient

    def was_zeroed(self, gradient: Tensor) -> bool:
        """Whether it describes this gradient, which is zero because of `zero_grad`."""
        changed = self.stepped or version_of(gradient) != self.version
        return changed and self.gradient() is gradient and self.zeroed(gradient)

    def zeroed(self, gradient: Tensor) -> bool:
        """Whether its gradient, changed since or used by a step, was zeroed in place."""
        if any_on(_values(gradient)):
            return False
        if self.stepped:
            return True
        if self.nonzero is None:  # what no sample reaches was zero before
            return self.corrected or self.activity.reaches()
        # A rank's few rows may hold nothing but zeros, or be none at all, where the others' do not.
        return bool(self.nonzero)


@dataclass(slots=True)
class Pending:
    """What a backward pass has found for one parameter whose gradient has not reached `.grad` yet.

    Attributes:
        fresh: whether a new batch begins with it.
        task: the backward pass.
        uses: the activity of the parameter's uses, by call of the model.
        refusal: why it cannot be counted, if it cannot.
    """

    fresh: bool
    task: int
    uses: dict[Call, list[Activity]] = field(default_factory=dict)
    refusal: str | None = None


def extended(
    record: Record | None, entry: Pending, task: int, name: str, unit: Unit
) -> Record | None:
    """A record with the uses of one more backward pass.

    Args:
        record: of the parameter's gradient until then, if it had one.
        entry: the uses.
        task: the outermost backward pass.
        name: the parameter's, for errors.
        unit: what counts as a sample.

    Raises:
        TruestepError: which of the uses see the same samples is unknown.
    """
    if len(entry.uses) > 1 and sum(call.outside for call in entry.uses) > 1:
        raise TruestepError(
            f"{name!r} is used several times outside a call of the counter's model, so which samples "
            "belong together is unknown; make the SampleCounter on the module that is called"
        )
    before = None if record is None else (record.activity, record.batch_size)
    for call, uses in entry.uses.items():
        latest = (call, task)
        if before is not None and record is not None and record.latest == latest:
            # Nested backward passes (reentrant checkpointing) deliver one call piece by piece.
            joined, before = record.uses + uses, record.before
        else:
            joined = uses
        parts = joined if len(joined) == 1 else [joint(same) for same in _same_samples(joined)]
        activity, size = total(parts), sum(size_of(call, part, unit) for part in parts)
        if before is not None:
            activity, size = total([before[0], activity]), before[1] + size
        record = Record(activity, size, _nothing, -1, latest, joined, before)
        before = (activity, size)
    return record


def size_of(call: Call, activity: Activity, unit: Unit) -> int | Tensor:
    """N of an activity by itself.

    Args:
        call: its own.
        activity: of one or more uses.
        unit: what counts as a sample.
    """
    if unit == "sample":
        return activity.samples
    at_output = call.reached.get(activity.samples)
    return activity.reached().sum() if at_output is None else at_output


def unreached(parameter: Tensor, gradient: Tensor, batch_size: int) -> Record:
    """The record of a gradient that came from elsewhere, of no sample among so many."""
    activity, reference = nobody(parameter), weakref.ref(gradient)
    latest, version = (Call(), -1), version_of(gradient)
    return Record(activity, batch_size, reference, version, latest, [activity], None)


def version_of(gradient: Tensor) -> int:
    """How often it was written to."""
    return gradient._version  # noqa: SLF001


def is_zero(gradient: Tensor) -> bool:
    """Whether a gradient is known to be zero, on all ranks."""
    return not (gradient.is_meta or is_sharded(gradient) or any_on(_values(gradient)))


def _values(gradient: Tensor) -> Tensor:
    """Those that are stored, on this rank."""
    return gradient._values() if gradient.is_sparse else local(gradient)  # noqa: SLF001


def any_on(values: Tensor) -> bool:
    """Whether any number is not zero.

    torch finds the ends of a CPU's floats in half the time in which it looks for one that is on.
    """
    if values.is_cpu and values.is_floating_point() and values.numel():
        low, high = values.aminmax()
        return bool(low) or bool(high)
    return bool(values.any())


def _nothing() -> None:
    return None


def _same_samples(uses: list[Activity]) -> Iterator[list[Activity]]:
    # Unit "position": uses over other numbers of positions share no samples.
    for samples in {use.samples for use in uses}:
        yield [use for use in uses if use.samples == samples]
