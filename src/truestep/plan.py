"""Decides which units can go, and what of them has to stay in the layers that read them.

A candidate is a unit whose output is, on the data, a constant plus multiples of other units. Removing it is
exact if every weight that reads it takes over that constant in its bias, and those multiples in the columns
of the other units. `decide` goes through all the places that a unit reaches and gives either a `Removal` or
the reason why not.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from truestep.units import Channels, Ledger, Site, Use

__all__ = ["Candidate", "Kept", "Plan", "Removal", "decide"]

Root = int


@dataclass(eq=False)
class Candidate:
    """A unit that could go.

    Attributes:
        site: the activation function behind which it is.
        unit: its number there.
        kind: "true", "constant", "duplicate" or "pseudo".
        terms: on the data its output is the sum of factor * other unit's output ...
        constant: ... plus this; for candidates without terms the number is read where it arrives.
        how: what to say of it if it goes; by default what its kind and terms say.
    """

    site: Site
    unit: int
    kind: str
    terms: tuple[tuple[int, float], ...] = ()
    constant: float = 0.0
    how: str = ""

    @property
    def slot(self) -> int:
        """The unit's slot."""
        return int(self.site.outputs.slots[self.unit])


@dataclass(frozen=True)
class Removal:
    """A unit that goes.

    Attributes:
        layer: the layer's path.
        unit: the unit's number.
        kind: why it could go.
        how: what became of it.
    """

    layer: str
    unit: int
    kind: str
    how: str


@dataclass(frozen=True)
class Kept:
    """A redundant unit that has to stay.

    Attributes:
        layer: the layer's path.
        unit: the unit's number.
        kind: what it is.
        reason: why it stays.
    """

    layer: str
    unit: int
    kind: str
    reason: str


@dataclass(eq=False)
class Plan:
    """What to do to a model.

    Attributes:
        removals: the units that go.
        kept: the candidates that stay.
        roots: the sets of slots that go.
        moves: for each use, by its number: columns that go, column they go to and factor, float64.
        shifts: for each use, what its bias takes over, float64 ``[outputs]``.
    """

    removals: list[Removal] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    roots: set[Root] = field(default_factory=set)
    moves: dict[int, list[tuple[int, int, float]]] = field(default_factory=dict)
    shifts: dict[int, Tensor] = field(default_factory=dict)


def decide(ledger: Ledger, candidates: Iterable[Candidate]) -> Plan:
    """Which candidates go.

    Args:
        ledger: of a forward call in which constant units had their constants.
        candidates: at most one for each unit; a unit that others are multiples of is none.

    Returns:
        The plan; every candidate is among its removals or its kept ones.
    """
    reach = _Reach(ledger)
    by_root: dict[Root, list[Candidate]] = {}
    for candidate in candidates:
        by_root.setdefault(ledger.slots.root(candidate.slot), []).append(candidate)
    plan = Plan()
    chosen: dict[Root, Candidate] = {}
    # Units that are added to each other are one set: that they are constant shows where they arrive.
    leads = {
        root: next((one for one in several if not one.terms), several[0])
        for root, several in by_root.items()
    }
    for root, lead in sorted(leads.items(), key=lambda item: bool(item[1].terms)):
        several = by_root[root]
        reason = reach.reason(root, lead)
        others = [int(lead.site.outputs.slots[unit]) for unit, _ in lead.terms]
        if not chosen.keys().isdisjoint(ledger.slots.root(other) for other in others):
            reason = reason or "is a multiple of a unit that goes itself"
        if reason is None:
            chosen[root] = lead
        else:
            plan.kept += [_keep(candidate, reason) for candidate in several]
    for root, reason in _unbalanced(ledger, set(chosen)).items():
        del chosen[root]
        plan.kept += [_keep(candidate, reason) for candidate in by_root[root]]
    plan.roots = set(chosen)
    for root, lead in chosen.items():
        folded = reach.fold(root, lead, plan)
        plan.removals += [
            Removal(one.site.key[0], one.unit, one.kind, _how(one, folded=folded))
            for one in by_root[root]
        ]
    return plan


def _keep(candidate: Candidate, reason: str) -> Kept:
    return Kept(candidate.site.key[0], candidate.unit, candidate.kind, reason)


def _how(candidate: Candidate, *, folded: bool) -> str:
    if candidate.how:
        return candidate.how
    if candidate.kind == "duplicate":
        return f"merged into unit {candidate.terms[0][0]}"
    if candidate.terms:
        return f"written as a combination of {len(candidate.terms)} other units"
    return "folded into the next bias" if folded else "removed"


class _Reach:
    """Where each set of slots arrives."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._columns: dict[Root, dict[int, list[int]]] = {}
        for use in ledger.uses:
            if use.inputs is not None:
                for column, root in enumerate(ledger.slots.roots(use.inputs.slots)):
                    self._columns.setdefault(root, {}).setdefault(use.number, []).append(column)

    def _uses(self, root: Root) -> list[tuple[Use, list[int]]]:
        """The weights that read a set, each with the columns; of depthwise ones, whose rows go too, none."""
        found = self._columns.get(root, {}).items()
        uses = [(self._ledger.uses[number], columns) for number, columns in found]
        return [(use, columns) for use, columns in uses if not _depthwise(self._ledger, use)]

    def reason(self, root: Root, candidate: Candidate) -> str | None:
        """Why a candidate has to stay, or None."""
        pinned = self._ledger.slots.reason(root)
        if pinned is not None:
            return pinned
        for use, columns in self._uses(root):
            if candidate.terms:
                reason = self._no_combination(use, columns, candidate)
            else:
                reason = self._no_constant(use, columns)
            if reason is not None:
                return reason
        return None

    def _no_constant(self, use: Use, columns: list[int]) -> str | None:
        numbers = use.constants[columns]
        if bool(numbers.isnan().any()):
            return f"is constant, but what of it reaches {use.weight!r} is not"
        return self._no_shift(use, bool((numbers != 0).any()), columns)

    def _no_shift(self, use: Use, shifted: bool, columns: list[int]) -> str | None:
        """Why a use cannot take over a constant."""
        if not shifted:
            return None
        if use.borders:
            return f"is not 0, and {use.borders} of {use.module or use.weight!r} are: no bias can be both"
        if not use.takes_bias or (use.bias is None and not use.module):
            return f"is not 0, and {use.weight!r} is used where there is no place for a bias"
        ledger = self._ledger
        same = [other for other in ledger.uses if other.weight == use.weight]
        for other in same:
            numbers = (each.constants[columns].nan_to_num() for each in (use, other))
            # Used the other way round, as in a tied autoencoder, a weight has other columns.
            if (other.in_dim, other.bias) != (use.in_dim, use.bias) or not torch.equal(*numbers):
                return f"is not the same constant in all uses of {use.weight!r}"
        uses_of_bias = 0 if use.bias is None else ledger.weights[use.bias]
        if uses_of_bias > len(same):
            return f"is not 0, and the bias {use.bias!r} that would take it over is used elsewhere"
        return None

    def _no_combination(self, use: Use, columns: list[int], candidate: Candidate) -> str | None:
        inputs = use.inputs
        assert inputs is not None  # noqa: S101
        if inputs.starts is None or not self._begins(inputs, columns, candidate):
            return f"is changed, or joined with others, on its way to {use.weight!r}"
        if self._ledger.weights[use.weight] > 1 or use.groups > 1:
            return f"is read by {use.weight!r}, which has other uses, or groups"
        if inputs.rising and (len(candidate.terms) > 1 or candidate.terms[0][1] <= 0):
            return f"goes through a maximum on its way to {use.weight!r}"
        if candidate.constant and not inputs.even:
            return f"has a constant part that does not stay one on its way to {use.weight!r}"
        for unit, _ in candidate.terms:
            others = self._of_unit(use, candidate.site, unit)
            alike = len(others) == len(columns) and torch.equal(
                inputs.starts[others], inputs.starts[columns]
            )
            if not alike or bool((_scale(inputs)[others] == 0).any()):
                return f"does not reach {use.weight!r} together with unit {unit}"
        shift = self._shift(use, columns, candidate)
        return self._no_shift(use, bool((shift != 0).any()), columns)

    def _begins(self, inputs: Channels, columns: list[int], candidate: Candidate) -> bool:
        """Whether columns are on a line from the outputs of the candidate's activation function."""
        assert inputs.starts is not None  # noqa: S101
        ledger = self._ledger
        for code in inputs.starts[columns].unique().tolist():
            kind, number = ledger.origins[code] if code >= 0 else ("", 0)
            if kind != "units" or ledger.sites[number].key != candidate.site.key:
                return False
        return True

    def _of_unit(self, use: Use, site: Site, unit: int) -> list[int]:
        root = self._ledger.slots.root(int(site.outputs.slots[unit]))
        return self._columns.get(root, {}).get(use.number, [])

    def _shift(self, use: Use, columns: list[int], candidate: Candidate) -> Tensor:
        """What is left of a combination besides multiples of other columns, float64 ``[columns]``."""
        assert use.inputs is not None  # noqa: S101
        scale, shift = _scale(use.inputs), _shift(use.inputs)
        rest = torch.full((len(columns),), candidate.constant, dtype=torch.float64, device="cpu")
        for unit, factor in candidate.terms:
            others = self._of_unit(use, candidate.site, unit)
            rest -= factor * shift[others] / scale[others]
        return scale[columns] * rest + shift[columns]

    def fold(self, root: Root, candidate: Candidate, plan: Plan) -> bool:
        """Writes down what the weights take over; whether a bias takes over anything."""
        folded = False
        for use, columns in self._uses(root):
            if candidate.terms:
                numbers = self._shift(use, columns, candidate)
                self._move(use, columns, candidate, plan)
            else:
                numbers = use.constants[columns]
            if bool((numbers != 0).any()):
                folded = True
                total = plan.shifts.setdefault(use.number, torch.zeros_like(use.constants))
                total[columns] = numbers
        return folded

    def _move(self, use: Use, columns: list[int], candidate: Candidate, plan: Plan) -> None:
        assert use.inputs is not None  # noqa: S101
        scale = _scale(use.inputs)
        for unit, factor in candidate.terms:
            others = self._of_unit(use, candidate.site, unit)
            for column, other in zip(columns, others, strict=True):
                move = (column, other, factor * float(scale[column] / scale[other]))
                plan.moves.setdefault(use.number, []).append(move)


def _scale(channels: Channels) -> Tensor:
    assert channels.scale is not None  # noqa: S101
    return channels.scale


def _shift(channels: Channels) -> Tensor:
    assert channels.shift is not None  # noqa: S101
    return channels.shift


def _depthwise(ledger: Ledger, use: Use) -> bool:
    return use.groups > 1 and ledger.owned[use.weight].shape[use.in_dim] == 1


def _unbalanced(ledger: Ledger, chosen: set[Root]) -> dict[Root, str]:
    """Those that have to stay so that groups stay equal and no layer loses its last unit."""
    back: dict[Root, str] = {}
    while True:
        left = chosen - back.keys()
        found = _too_many(ledger, left) | _unequal(ledger, left)
        if not found:
            return back
        back |= found


def _too_many(ledger: Ledger, chosen: set[Root]) -> dict[Root, str]:
    for name, _, slots in ledger.all_rows():
        roots = ledger.slots.roots(slots)
        if roots and chosen.issuperset(roots):
            return {roots[0]: f"is the last unit that {name!r} would have"}
    return {}


def _unequal(ledger: Ledger, chosen: set[Root]) -> dict[Root, str]:
    for use in ledger.uses:
        if use.groups == 1 or _depthwise(ledger, use):
            continue
        for side in (use.inputs, use.outputs):
            if side is None:
                continue
            roots = ledger.slots.roots(side.slots)
            size = len(roots) // use.groups
            groups = [
                [root for root in roots[start : start + size] if root in chosen]
                for start in range(0, len(roots), size)
            ]
            fewest = min(map(len, groups))
            surplus = [root for group in groups for root in group[fewest:]]
            if surplus:
                reason = f"the groups of {use.weight!r} must lose equally many, and one has {fewest} to lose"
                return dict.fromkeys(surplus, reason)
    return {}
