"""What backward passes have brought, before anybody asks for records.

A usual step needs less than records: where the bits are of parameters that each pass used once, by samples of
one call of the model. That is kept instead, and becomes records only where somebody asks for more.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from truestep.brought import Brought
from truestep.combine import total
from truestep.fused import Pass
from truestep.kernels.dispatch import STORED, address_of, device_of, finds_addresses
from truestep.kernels.stepping import Line, takes
from truestep.layout import Unit
from truestep.record import Landed, Record, any_on, size_of, version_of
from truestep.succession import as_one
from truestep.way import Seen

if TYPE_CHECKING:
    from truestep.calls import Call

__all__ = ["Arrived", "Buffer"]

# So many bytes of bits are kept even where counts would take fewer.
LITTLE_OF_ALL = 1 << 20
# Of momentum, and whether it holds nothing yet.
Buffer = tuple[Tensor, bool]


class Arrived:
    """What the present gradients of some parameters are made of, by one backward pass or several.

    Args:
        brought: by the first of them.
        unit: what counts as a sample.

    Attributes:
        calls: of the model, one of each pass.
        corrected: of parameters whose gradient was turned into a mean effective gradient in place, the
            version that it has since.
        stepped: the identities of those whose gradient an optimizer has used.
    """

    __slots__ = (
        "_device",
        "_each",
        "_held",
        "_nbytes",
        "_passes",
        "_seen",
        "_unit",
        "calls",
        "corrected",
        "stepped",
    )

    def __init__(self, brought: Brought, unit: Unit) -> None:
        self._passes, self._unit = [brought], unit
        self._nbytes: int | None = None  # of all passes' words, once there are several
        # How a step on a device sees each pass and all as one, and what the addresses in that lead to.
        self._device: torch.device | None = None
        self._each: list[dict[int, Seen]] = []
        self._seen: dict[int, Seen] | None = None
        self._held: list[object] = []
        self.calls: set[Call] = {brought.call}
        self.corrected: dict[int, int] = {}
        self.stepped: set[int] = set()

    @property
    def gradients(self) -> Mapping[int, Landed]:
        """By the identities of the parameters, weakly."""
        return self._passes[-1].landed

    def split(self, parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters whose gradient was brought, and the others."""
        own: list[Tensor] = []
        others: list[Tensor] = []
        known = self.gradients
        for parameter in parameters:
            (own if id(parameter) in known else others).append(parameter)
        return own, others

    def goes_on(self, parameters: Iterable[Tensor]) -> bool | None:
        """Whether gradients that are about to reach parameters are added to those that are here.

        Returns:
            False where they begin anew; None where only records can tell.
        """
        known, found = self.gradients, set[bool]()
        for parameter in parameters:
            key, gradient = id(parameter), parameter.grad
            landed = known.get(key)
            if gradient is None or landed is None or landed[1]() is not gradient:
                return None
            if key in self.corrected or gradient.is_sparse:
                return None
            if key not in self.stepped and version_of(gradient) == landed[2]:
                found.add(True)
            elif key in self.stepped and not any_on(gradient):
                found.add(False)
            else:
                return None
        return found.pop() if len(found) == 1 else None

    def extend(self, brought: Brought) -> bool:
        """Takes what one more pass has added to the gradients.

        Returns:
            Whether it did: of the same parameters, while bits take no more memory than counts would.
        """
        if self.gradients.keys() != brought.landed.keys():
            return False
        own, more = self._nbytes, brought.nbytes()
        if own is None:
            own = self._passes[0].nbytes()
        if own is None or more is None:
            return False
        most = 8 * sum(landed[0].numel() for landed in brought.landed.values())
        if own + more > max(most, LITTLE_OF_ALL):
            return False
        self._passes[-1].release()
        self._passes.append(brought)
        self._nbytes, self._each, self._held = own + more, [], []
        self.calls.add(brought.call)
        return True

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
        if seen is None or dtype not in STORED or not finds_addresses():
            return False
        gradients, table, by, fresh = self.gradients, whole.table(first, device), 0, False
        changed: list[Tensor] = []
        for place, parameter in enumerate(parameters):
            key, gradient = id(parameter), parameter.grad
            landed = gradients.get(key)
            if landed is None or gradient is None or landed[1]() is not gradient:
                return False
            _, line, bits = seen[key]
            shape, number = line.shape, self._size_of(key, line, device) if size is None else size
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

    def _size_of(self, key: int, line: Line, device: torch.device | None) -> int | None:
        """N as a table takes it; None where only the activity tells."""
        if self._unit == "sample":
            return line.samples
        number = 0
        for brought, seen in zip(self._passes, self._each, strict=True):
            size = brought.positions_of(seen[key][1], device)
            if size is None:
                return None
            number += size
        return number

    def _seen_on(self, device: torch.device | None) -> dict[int, Seen] | None:
        """How a compiled step sees each parameter, by their identities; None where it cannot.

        Args:
            device: where all are, None for the CPU.
        """
        if self._each and self._device == device:
            return self._seen
        each, several = list[dict[int, Seen]](), len(self._passes) > 1
        self._each, self._seen, self._device = each, None, device
        if several and device is not None:
            return None
        for brought in self._passes:
            seen = brought.seen(device)
            if seen is None:
                return None
            each.append(seen)
        self._seen = as_one(each, self._held) if several else each[0]
        return self._seen

    def note_corrected(self, parameters: Iterable[Tensor]) -> None:
        """Notes that gradients were turned into mean effective gradients in place."""
        for parameter in parameters:
            if parameter.grad is not None:
                self.corrected[id(parameter)] = version_of(parameter.grad)

    def records(self) -> Iterable[tuple[int, Record]]:
        """The records, with the identities of their parameters."""
        found: dict[int, Record] = {}
        for brought in self._passes:
            latest = brought.call, brought.task
            for key, activity in brought.activities():
                whole, size, before = activity, size_of(brought.call, activity, self._unit), None
                if key in found:
                    before = found[key].activity, found[key].batch_size
                    whole, size = total([before[0], activity]), before[1] + size
                _, gradient, version, _ = self.gradients[key]
                record = Record(whole, size, gradient, version, latest, [activity], before)
                record.stepped, record.corrected = key in self.stepped, key in self.corrected
                record.version = self.corrected.get(key, version)
                found[key] = record
        return found.items()
