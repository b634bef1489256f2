"""What one backward pass has brought to parameters, before anybody asks for records."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from truestep.activity import Activity
from truestep.bits import Bits
from truestep.direct import Use, join_all
from truestep.kernels.stepping import Line, number_of
from truestep.record import Landed
from truestep.way import Seen

__all__ = ["Brought", "brought_by"]


class Brought:
    """Packed uses of one call of the model, and their parameters' gradients.

    Args:
        uses: each with parameters of its own.
        task: the backward pass.
        landed: the gradients, by the identities of the parameters.

    Attributes:
        adds: whether the gradients were added to those of earlier backward passes.
        call: of the model.
        landed: the gradients.
        task: the backward pass.
    """

    __slots__ = ("_joined", "_uses", "adds", "call", "landed", "task")

    def __init__(self, uses: Sequence[Use], task: int, landed: dict[int, Landed]) -> None:
        self._uses, self.task, self.landed = uses, task, landed
        self.call, self.adds = uses[0].call, uses[0].adds
        self._joined: list[Bits] | None = None

    def nbytes(self) -> int | None:
        """The memory of the words, in bytes; None where they cannot be put behind other passes' words."""
        if any(use.outputs.device is not None or not use.direct.numbers for use in self._uses):
            return None
        together = {use.made for use in self._uses if use.made is not None}
        alone = (use.outputs.nbytes + use.inputs.nbytes for use in self._uses if use.made is None)
        found: int = sum(made.nbytes for made in together) + sum(alone)
        return found

    def release(self) -> None:
        """`truestep.direct.Use.release` of its uses."""
        for use in self._uses:
            use.release()

    def seen(self, device: torch.device | None) -> dict[int, Seen] | None:
        """How a compiled step sees each parameter, by their identities; None where it cannot.

        Args:
            device: where all are, None for the CPU.
        """
        joined, found = iter(self._join()), dict[int, Seen]()
        for use in self._uses:
            seen = use.direct.seen(use, joined, device)
            if seen is None:
                return None
            for each in seen:
                found[id(each[0])] = each
        return found

    def positions_of(self, line: Line, device: torch.device | None) -> int | None:
        """N of a parameter by position, as a table takes it; None where only the activity tells.

        Args:
            line: the parameter's.
            device: see `seen`.
        """
        reached = self.call.reached.get(line.samples)
        return None if reached is None else number_of(reached, device)

    def activities(self) -> Iterator[tuple[int, Activity]]:
        """The activity of the parameters, with their identities."""
        joined = iter(self._join())
        for use in self._uses:
            for parameter, activity in use.direct.found(use, joined):
                yield id(parameter), activity

    def _join(self) -> list[Bits]:
        """The uses' masks, joined; held here, since steps know their addresses alone."""
        if self._joined is None:
            self._joined = join_all(self._uses)
        return self._joined


def brought_by(
    uses: Sequence[tuple[Use, int]], landed: Sequence[Landed], task: int, apart: Iterable[int]
) -> Brought | None:
    """What uses that waited and the gradients of their parameters are, or None where that takes records.

    Args:
        uses: with their backward passes.
        landed: the gradients that have reached `.grad`, of other parameters too.
        task: the backward pass that is just ending.
        apart: the identities of parameters that it used otherwise as well.
    """
    call, adds = uses[0][0].call, uses[0][0].adds
    used: set[int] = set()
    found: list[Use] = []
    count = 0
    for use, brought in uses:
        if use.call is not call or use.adds != adds or brought != task:
            return None
        found.append(use)
        for parameter in use.parameters:
            count += 1
            used.add(id(parameter))
    own = [each for each in landed if id(each[0]) in used]
    gradients = {id(each[0]): each for each in own if each[3] == task}
    # No parameter twice.
    alone = count == len(used) == len(own) == len(gradients)
    if not alone or not used.isdisjoint(apart):
        return None
    return Brought(found, task, gradients)
