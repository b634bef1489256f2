"""The ledger: a row per claim, and which open choices change a verdict."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from truestep.lab.paper import ledger_asgd as asgd
from truestep.lab.paper import ledger_dasgd as dasgd
from truestep.lab.paper.evidence import Evidence
from truestep.lab.paper.ledger_paths import a8
from truestep.lab.paper.planned import LEARNING_RATE, SMOKE, Planned
from truestep.lab.paper.points import ENDINGS
from truestep.lab.paper.tables import main_only
from truestep.lab.paper.verdict import Finding, Verdict, settled

__all__ = ["Sensitivity", "ledger", "sensitivity"]


@dataclass(frozen=True)
class Sensitivity:
    """What one open choice does to one claim.

    Attributes:
        choice: What differs from the main protocol: ``"start: torch"``.
        claim: The claim's name.
        verdict: With the choice.
        usual: Under the main protocol, looked at in the same cells.
        gained: Conditions that hold with the choice only.
        lost: Conditions that hold without it only.
        known: How many of the claim's conditions it was run in with two seeds or more.
        total: How many the claim has.
        ours: Our figure with the choice.
    """

    choice: str
    claim: str
    verdict: Verdict
    usual: Verdict
    gained: Sequence[str]
    lost: Sequence[str]
    known: int
    total: int
    ours: str

    @property
    def changes(self) -> bool:
        """Whether the verdict is another one, or holds under other conditions."""
        return self.verdict != self.usual or bool(self.gained or self.lost)


def ledger(evidence: Evidence) -> list[Finding]:
    """A finding for each claim, A1 to A8 and D1 to D5.

    Args:
        evidence: What there is.
    """
    points, rates = _points(evidence)
    mnist = main_only(evidence.mnist)
    curves = main_only(evidence.dasgd)
    findings = [
        asgd.a1(mnist),
        asgd.a2(mnist),
        asgd.a3(mnist),
        asgd.a4(points, rates),
        asgd.a5(points, rates),
        asgd.a6(points, rates),
        asgd.a7(main_only(evidence.times)),
        a8(evidence.trajectories),
        dasgd.d1(curves, evidence.rivals),
        dasgd.d2(evidence.dasgd),
        dasgd.d3(curves, evidence.rivals),
        dasgd.d4(evidence.rates),
        dasgd.d5(curves, evidence.rivals),
    ]
    return [settled(finding, evidence.scales) for finding in findings]


def sensitivity(evidence: Evidence) -> list[Sensitivity]:
    """Each choice that was run, with each claim that it bears on.

    The usual verdict is looked at in the cells that the choice was run in, and nothing else. Scale
    smoke, which gives no verdict, has no row.

    Args:
        evidence: What there is.
    """
    choices = {
        "asgd-synthetic": (_of_endings, _of_points),
        "asgd-mnist": (_of_mnist,),
        "asgd-trajectories": (_of_trajectories,),
        "dasgd-batch": (_of_dasgd,),
    }
    return [
        row
        for name, own in choices.items()
        if evidence.scales[name] != SMOKE
        for rows in own
        for row in rows(evidence)
    ]


Claims = Sequence[Callable[[pd.DataFrame], Finding]]


def _of_endings(evidence: Evidence) -> Iterator[Sensitivity]:
    points, rates = _points(evidence)
    for ending in ENDINGS:
        if len(points) and ending not in {asgd.ENDING, "start"}:
            for claim in (asgd.a4, asgd.a5, asgd.a6):
                usual, other = claim(points, rates), claim(points, rates, ending)
                yield _row(f"training ends at: {ending}", usual, other)


def _of_points(evidence: Evidence) -> Iterator[Sensitivity]:
    table = evidence.points
    nothing = table.iloc[:0]
    claims = [
        lambda part, claim=claim: claim(part, nothing) for claim in (asgd.a4, asgd.a5, asgd.a6)
    ]
    usual = main_only(table)
    for variant, part in _variants(table):
        if variant != LEARNING_RATE:
            # As many seeds, so that what is clear with more is not taken for a change.
            same = usual[usual["data"].isin(part["data"]) & (usual["seed"] <= part["seed"].max())]
            yield from _compared(variant, claims, same, part)


def _of_mnist(evidence: Evidence) -> Iterator[Sensitivity]:
    table = evidence.mnist
    usual = main_only(table)
    for variant, part in _variants(table):
        if variant.startswith("level"):
            # Steps differ, so only what needs no epochs can be compared.
            same = usual[usual["seed"] <= part["seed"].max()]
            yield from _compared(f"{variant}, 32,000 steps", (asgd.a1, asgd.a2), same, part)
            continue
        cells = set(zip(part["optimizer"], part["lr"], strict=True))
        same = usual[[cell in cells for cell in zip(usual["optimizer"], usual["lr"], strict=True)]]
        same = same[(same["epoch"] <= part["epoch"].max()) & (same["seed"] <= part["seed"].max())]
        yield from _compared(variant, (asgd.a1, asgd.a2, asgd.a3), same, part)


def _of_trajectories(evidence: Evidence) -> Iterator[Sensitivity]:
    usual = a8(evidence.trajectories)
    for planned, record in evidence.trajectories:
        if planned.variant not in {"", LEARNING_RATE}:
            yield _row(planned.variant, usual, a8([(Planned(planned.unit), record)]))


def _of_dasgd(evidence: Evidence) -> Iterator[Sensitivity]:
    table = evidence.dasgd
    nothing = table.iloc[:0]
    claims = [
        lambda part, claim=claim: claim(part, nothing) for claim in (dasgd.d1, dasgd.d3, dasgd.d5)
    ]
    usual = main_only(table)
    for variant, part in _variants(table):
        if variant == LEARNING_RATE:
            continue
        same = usual[
            usual["data"].isin(part["data"]) & usual["batch_size"].isin(part["batch_size"])
        ]
        data = ", ".join(sorted(part["data"].unique()))
        yield from _compared(f"{variant} ({data})", claims, same, part)


def _variants(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    if len(table):
        for variant, part in table[table["variant"] != ""].groupby("variant", sort=False):
            yield str(variant), part


def _compared(
    choice: str, claims: Claims, usual: pd.DataFrame, other: pd.DataFrame
) -> Iterator[Sensitivity]:
    for claim in claims:
        yield _row(choice, claim(usual), claim(other))


def _row(choice: str, usual: Finding, other: Finding) -> Sensitivity:
    before, after = usual.holding, other.holding
    return Sensitivity(
        choice=choice,
        claim=other.claim.name,
        verdict=other.verdict,
        usual=usual.verdict,
        gained=[name for name in after if name not in before],
        lost=[name for name in before if name not in after],
        known=sum(condition.state != "not run" for condition in other.conditions),
        total=len(other.conditions),
        ours=other.ours,
    )


def _points(evidence: Evidence) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The main protocol, and the grid of learning rates with the main one among them."""
    table = evidence.points
    if not len(table):
        return table, table
    main = main_only(table)
    grid = table[table["variant"] == LEARNING_RATE]
    seeds = grid["seed"].max() if len(grid) else -1
    return main, pd.concat([grid, main[main["seed"] <= seeds]])
