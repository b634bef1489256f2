"""What one parameter's gradient is made of: as a record, and on its way to one."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from truestep.activity import Activity
from truestep.calls import Call
from truestep.distributed import local

__all__ = ["Pending", "Record", "any_on"]


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

    def zeroed(self, gradient: Tensor) -> bool:
        """Whether its gradient, changed since or used by a step, was zeroed in place."""
        values = gradient._values() if gradient.is_sparse else local(gradient)  # noqa: SLF001
        if any_on(values):
            return False
        if self.stepped:
            return True
        if self.nonzero is None:  # what no sample reaches was zero before
            return self.activity.reaches()
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


def any_on(values: Tensor) -> bool:
    """Whether any number is not zero.

    torch finds the ends of a CPU's floats in half the time in which it looks for one that is on.
    """
    if values.is_cpu and values.is_floating_point() and values.numel():
        low, high = values.aminmax()
        return bool(low) or bool(high)
    return bool(values.any())
