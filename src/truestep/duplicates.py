"""Units whose outputs are proportional on all samples, found in one pass and in bounded memory.

Proportional on all samples is proportional on the first batch that is not all zeros, so candidates are found
there, by a few random projections of each unit's normalised outputs, and from then on only candidates are
looked at: each batch splits the classes that it contradicts. What remains was compared on every sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Duplicates"]

PROJECTIONS = 4
# How far projections of proportional outputs may differ: far above rounding, far below chance.
CLOSE = 1e-4
ROWS_AT_ONCE = 256
# Of outputs this much smaller than what they come from, too few digits are left to make others of them.
MOST_ROUNDING = 100.0


@dataclass
class _Class:
    """Units that were proportional so far; the first one is what the others are multiples of.

    Attributes:
        members: int64 ``[n]``.
        products: float64 ``[n]``, of each with the first, over all samples.
        errors: float64 ``[n]``, the largest deviation of each from proportionality.
    """

    members: Tensor
    products: Tensor
    errors: Tensor

    def ratios(self) -> Tensor:
        return self.products / self.products[0]

    def part(self, chosen: Tensor) -> "_Class":
        """Some of the members; products with the new first one are the old ones times its ratio."""
        members, products = self.members[chosen], self.products[chosen]
        return _Class(members, products * self.ratios()[chosen][0], self.errors[chosen])


class Duplicates:
    """The classes of proportional units of one layer.

    Memory: a few numbers for each unit, and, for one batch at a time, the outputs of candidates.

    Args:
        units: how many there are.
        tolerance: the largest deviation from proportionality, relative to a unit's largest
            pre-activation and to its largest output.

    Example:
        >>> found = Duplicates(3, tolerance=1e-6)
        >>> y = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])
        >>> found.update(y, 1, y.amin(0), y.amax(0), y.amax(0))
        >>> [part.tolist() for part in found.pairs(y.amax(0), y.amax(0))]
        [[1], [0], [2.0]]
    """

    def __init__(self, units: int, tolerance: float) -> None:
        self._tolerance = tolerance
        self._silent = torch.ones(units, dtype=torch.bool, device="cpu")
        self._classes: list[_Class] = []
        self._generator = torch.Generator().manual_seed(0)

    def update(self, y: Tensor, dim: int, low: Tensor, high: Tensor, size: Tensor) -> None:
        """Takes a batch of outputs.

        Args:
            y: the outputs.
            dim: where the units are.
            low: the smallest output of each unit in this batch, ``[units]``.
            high: the largest.
            size: the largest magnitude of each unit's pre-activation so far.
        """
        kept: list[_Class] = []
        for found in self._classes:
            values = _columns(y, dim, found.members)
            found.products += values[:, :1].double().mul(values.double()).sum(0).cpu()
            kept += self._split(found, values, size)
        new = self._silent & ((low != 0) | (high != 0))
        if bool(new.any()):
            self._silent &= ~new
            members = new.nonzero().squeeze(1)
            values = _columns(y, dim, members)
            for places in self._candidates(values):
                chosen = values[:, places.to(values.device)]
                products = chosen[:, :1].double().mul(chosen.double()).sum(0).cpu()
                whole = _Class(members[places], products, torch.zeros_like(products))
                kept += self._split(whole, chosen, size)
        self._classes = kept

    def pairs(self, largest: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What was found.

        Others of a class are multiples of its first unit whose outputs are about as large, beside the
        pre-activations of whose rounding they have a part, as any's.

        Args:
            largest: the largest magnitude of each unit's outputs, ``[units]``.
            size: that of its pre-activations.

        Returns:
            Units, what each is a multiple of, and the factors (float64).
        """
        empty = torch.empty(0, dtype=torch.int64, device="cpu")
        units, firsts, factors = [empty], [empty], [empty.double()]
        largest, size = largest.double(), size.double()
        for found in self._classes:
            rounding = size[found.members] / largest[found.members]
            best = int((rounding <= 2 * rounding.min()).nonzero()[0])
            ratios = found.ratios() / found.ratios()[best]
            errors = found.errors + ratios.abs() * found.errors[best]
            first = found.members[best]
            near = errors <= self._tolerance * (
                largest[found.members] + ratios.abs() * largest[first]
            )
            near &= (found.members != first) & (rounding[best] <= MOST_ROUNDING)
            units.append(found.members[near])
            firsts.append(first.expand(int(near.sum())))
            factors.append(ratios[near])
        return torch.cat(units), torch.cat(firsts), torch.cat(factors)

    def _split(self, found: _Class, values: Tensor, size: Tensor) -> list[_Class]:
        """The classes that a batch leaves of one."""
        whole: list[_Class] = []
        while len(found.members) > 1:
            ratios = found.ratios()
            expected = values[:, :1].double() * ratios.to(values.device)
            errors = (values.double() - expected).abs().amax(0).cpu()
            found.errors = torch.maximum(found.errors, errors)
            sizes = size[found.members].double()
            same = errors <= self._tolerance * (sizes + ratios.abs() * sizes[0])
            same[0] = True  # also where it is nan
            if int(same.sum()) > 1:
                whole.append(found.part(same))
            if bool(same.all()):
                break
            values = values[:, (~same).to(values.device)]
            found = found.part(~same)
        return whole

    def _candidates(self, values: Tensor) -> list[Tensor]:
        """Groups of columns whose projections agree."""
        size = PROJECTIONS, len(values)
        rows = torch.randn(size, generator=self._generator, device="cpu").to(values)
        projected = (rows @ values).double().cpu()
        projected /= values.norm(dim=0).double().cpu()
        # Factors may be negative: the largest projection is made positive.
        largest = projected.abs().argmax(0, keepdim=True)
        projected *= projected.gather(0, largest).sign()
        groups: list[Tensor] = []
        taken = torch.zeros(projected.shape[1], dtype=torch.bool, device="cpu")
        for start in range(0, projected.shape[1], ROWS_AT_ONCE):
            some = projected[:, start : start + ROWS_AT_ONCE]
            near = (some[0].unsqueeze(1) - projected[0]).abs() < CLOSE
            for offset in (near.sum(1) > 1).nonzero().squeeze(1).tolist():
                close = (some[:, offset, None] - projected).abs().amax(0) < CLOSE
                group = close & ~taken
                if not taken[start + offset] and int(group.sum()) > 1:
                    taken |= group
                    groups.append(group.nonzero().squeeze(1))
        return groups


def _columns(y: Tensor, dim: int, units: Tensor) -> Tensor:
    """The outputs of some units, ``[rows, units]``."""
    whole = len(units) == y.shape[dim]  # in their order
    some = y if whole else y.index_select(dim, units.to(y.device))
    some = some.float() if some.dtype in {torch.float16, torch.bfloat16} else some
    return some.movedim(dim, -1).reshape(-1, len(units))
