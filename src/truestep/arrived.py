"""What the latest backward pass has brought, before anybody asks for records.

A usual step needs less than records: where the bits are of parameters that had no gradient, each used once
by samples of one call of the model. That is kept instead, and becomes records only where somebody asks for
more.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from truestep.bits import Bits
from truestep.direct import Use, join_all
from truestep.fused import Pass
from truestep.kernels.dispatch import address_of, device_of, finds_addresses
from truestep.kernels.stepping import REAL, Line, number_of, takes
from truestep.layout import Unit
from truestep.record import Landed, Record, size_of
from truestep.way import Seen

__all__ = ["Arrived", "Buffer", "arrived_by"]

# Of momentum, and whether it holds nothing yet.
Buffer = tuple[Tensor, bool]


class Arrived:
    """Packed uses, and their parameters' gradients.

    Args:
        uses: of one call of the model, each with parameters of its own.
        landed: those parameters.
        gradients: theirs.
        task: the backward pass.
        unit: what counts as a sample.

    Attributes:
        call: of the model.
        gradients: by the identities of the parameters, weakly.
        corrected: of those whose gradient was turned into a mean effective gradient in place, the version
            that it has since.
        stepped: the identities of those whose gradient an optimizer has used.
    """

    __slots__ = (
        "_joined",
        "_landed",
        "_seen",
        "_task",
        "_unit",
        "_uses",
        "call",
        "corrected",
        "gradients",
        "stepped",
    )

    def __init__(
        self,
        uses: Sequence[Use],
        landed: Sequence[Landed],
        gradients: dict[int, Callable[[], Tensor | None]],
        task: int,
        unit: Unit,
    ) -> None:
        self._uses, self._landed, self._task, self._unit = uses, landed, task, unit
        self._joined: list[Bits] | None = None
        self._seen: tuple[torch.device | None, dict[int, Seen]] | None = None
        self.call, self.gradients = uses[0].call, gradients
        self.corrected: dict[int, int] = {}
        self.stepped: set[int] = set()

    def split(self, parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters whose gradient was brought, and the others."""
        own: list[Tensor] = []
        others: list[Tensor] = []
        for parameter in parameters:
            (own if id(parameter) in self.gradients else others).append(parameter)
        return own, others

    def add_to(
        self,
        whole: Pass,
        size: int | None,
        parameters: Sequence[Tensor],
        buffers: Sequence[Buffer] = (),
        *,
        steps: bool,
    ) -> bool:
        """Adds parameters to a pass, all at once.

        Args:
            whole: the pass.
            size: N, if it is set instead of counted.
            parameters: those with a gradient.
            buffers: theirs of momentum, if there is momentum.
            steps: whether to take a step; otherwise gradients are corrected in place.

        Returns:
            Whether all were added; if not, they may be in part, and the pass is of no more use.
        """
        if not parameters:
            return True
        first = parameters[0]
        device, dtype = device_of(first), first.dtype
        seen = self._seen_on(device)
        if seen is None or dtype not in REAL or not finds_addresses():
            return False
        gradients, table, by, fresh = self.gradients, whole.table(first, device), 0, False
        changed: list[Tensor] = []
        for place, parameter in enumerate(parameters):
            key, gradient = id(parameter), parameter.grad
            found = gradients.get(key)
            if found is None or gradient is None or found() is not gradient:
                return False
            _, line, bits = seen[key]
            shape, number = line.shape, self._size_of(line, device) if size is None else size
            if not (
                gradient.dtype is dtype is parameter.dtype
                and gradient.shape == shape == parameter.shape
                and (to := address_of(gradient))
                and (of := address_of(parameter))
                and (gradient.is_cpu if device is None else gradient.device == device)
                and number is not None
            ):
                return False
            if buffers:
                buffer, fresh = buffers[place]
                by = address_of(buffer) if takes(gradient, buffer) else 0
                if not by:
                    return False
                changed.append(buffer)
            table.add_line(line, (to, of if steps else 0, by), fresh, number, bits)
            changed.append(parameter if steps else gradient)
        whole.hold(changed, self)
        return True

    def _size_of(self, line: Line, device: torch.device | None) -> int | None:
        """N as a table takes it; None where only the activity tells."""
        if self._unit == "sample":
            return line.samples
        reached = self.call.reached.get(line.samples)
        return None if reached is None else number_of(reached, device)

    def _seen_on(self, device: torch.device | None) -> dict[int, Seen] | None:
        """How a compiled step sees each parameter, by their identities; None where it cannot.

        Args:
            device: where all are, None for the CPU.
        """
        if self._seen is not None and self._seen[0] == device:
            return self._seen[1]
        joined, found = iter(self._join()), dict[int, Seen]()
        for use in self._uses:
            seen = use.direct.seen(use, joined, device)
            if seen is None:
                return None
            for each in seen:
                found[id(each[0])] = each
        self._seen = device, found
        return found

    def note_corrected(self, parameters: Iterable[Tensor]) -> None:
        """Notes that gradients were turned into mean effective gradients in place."""
        for parameter in parameters:
            if parameter.grad is not None:
                self.corrected[id(parameter)] = parameter.grad._version  # noqa: SLF001

    def records(self) -> Iterator[tuple[int, Record]]:
        """The records, with the identities of their parameters."""
        latest = self.call, self._task
        joined, activities = iter(self._join()), {}
        for use in self._uses:
            for parameter, activity in use.direct.found(use, joined):
                activities[id(parameter)] = activity
        for parameter, gradient, version, _ in self._landed:
            key = id(parameter)
            activity = activities[key]
            size = size_of(self.call, activity, self._unit)
            record = Record(activity, size, gradient, version, latest, [activity], None)
            record.stepped, record.corrected = key in self.stepped, key in self.corrected
            record.version = self.corrected.get(key, version)
            yield key, record

    def _join(self) -> list[Bits]:
        """The uses' masks, joined; held here, since steps know their addresses alone."""
        if self._joined is None:
            self._joined = join_all(self._uses)
        return self._joined


def arrived_by(
    uses: Sequence[tuple[Use, int]],
    landed: Sequence[Landed],
    task: int,
    unit: Unit,
    apart: Iterable[int],
) -> Arrived | None:
    """What uses that waited and the gradients of their parameters are, or None where that takes records.

    Args:
        uses: with their backward passes.
        landed: the gradients that have reached `.grad`, of other parameters too.
        task: the backward pass that is just ending.
        unit: what counts as a sample.
        apart: the identities of parameters that it used otherwise as well.
    """
    call = uses[0][0].call
    used: set[int] = set()
    found: list[Use] = []
    count = 0
    for use, brought in uses:
        if use.call is not call or brought != task:
            return None
        found.append(use)
        for parameter in (use.weight,) if use.bias is None else (use.weight, use.bias):
            count += 1
            used.add(id(parameter))
    own = [each for each in landed if id(each[0]) in used]
    gradients = {id(each[0]): each[1] for each in own if each[3] == task}
    # No parameter twice.
    alone = count == len(used) == len(own) == len(gradients)
    if not alone or not used.isdisjoint(apart):
        return None
    return Arrived(found, own, gradients, task, unit)
