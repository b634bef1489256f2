"""Which units of a model have to go together: slots, joined where tensors meet.

Each unit of a layer, and each index of a parameter along one dimension, is a *slot*. Slots that can only be
removed together are joined: the row of a weight, its bias, the features of a norm behind it, the columns of
the weights that read it, and in a residual addition the rows of both layers that are added. A slot that
cannot go, such as an output of the model, is pinned with the reason.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Slots"]


class Slots:
    """A union-find structure over integers, with reasons why a set cannot be removed.

    Args:
        joining: whether joins and pins are kept; where only names of units are wanted they are not.

    Example:
        >>> slots = Slots()
        >>> rows, columns = slots.fresh(2), slots.fresh(2)
        >>> slots.join(rows, columns)
        >>> slots.pin(columns[:1], "is an output")
        >>> slots.reason(int(rows[0])), slots.reason(int(rows[1]))
        ('is an output', None)
    """

    def __init__(self, *, joining: bool = True) -> None:
        self.joining = joining
        self._parents: list[int] = []
        self._reasons: dict[int, str] = {}
        # Joined and pinned tensors, kept alive so that their identities stay theirs.
        self._done: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def fresh(self, number: int) -> Tensor:
        """New slots, int64 ``[number]``."""
        first = len(self._parents)
        self._parents.extend(range(first, first + number))
        return torch.arange(first, first + number, device="cpu")

    def join(self, left: Tensor, right: Tensor) -> None:
        """Makes one set of each pair of slots.

        Args:
            left: int64 ``[n]``.
            right: int64 ``[n]``.
        """
        key = (id(left), id(right))
        if not self.joining or left is right or key in self._done:
            return
        self._done[key] = (left, right)
        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            first, second = self.root(one), self.root(other)
            if first != second:
                self._parents[second] = first
                reason = self._reasons.pop(second, None)
                if reason is not None:
                    self._reasons.setdefault(first, reason)

    def pin(self, slots: Tensor, reason: str) -> None:
        """Keeps slots, and all that are joined with them, from being removed; the first reason stays."""
        key = (id(slots), reason)
        if not self.joining or key in self._done:
            return
        self._done[key] = (slots,)
        for slot in slots.tolist():
            self._reasons.setdefault(self.root(slot), reason)

    def reason(self, slot: int) -> str | None:
        """Why a slot cannot go; None if nothing keeps it."""
        return self._reasons.get(self.root(slot))

    def root(self, slot: int) -> int:
        """The slot that stands for a slot's set."""
        parents = self._parents
        while parents[slot] != slot:
            parents[slot] = parents[parents[slot]]
            slot = parents[slot]
        return slot

    def roots(self, slots: Tensor) -> list[int]:
        """`root` of each."""
        return [self.root(slot) for slot in slots.tolist()]

    def inside(self, slots: Tensor, chosen: Iterable[int]) -> Tensor:
        """Bool: which slots belong to the sets that `chosen` roots stand for."""
        wanted = set(chosen)
        return torch.tensor(
            [root in wanted for root in self.roots(slots)], dtype=torch.bool, device="cpu"
        )
