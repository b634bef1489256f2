"""Verdicts by rule: what a claim predicts, as conditions, and what the data says of each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from truestep.lab.paper.effects import Effect, holm
from truestep.lab.paper.planned import SMOKE

__all__ = ["Claim", "Condition", "Finding", "Verdict", "corrected", "judged", "settled"]

Verdict = Literal["reproduced", "only under ...", "not reproduced", "no verdict", "not run"]
# More conditions than this are counted rather than named.
NAMED = 5

State = Literal["holds", "fails", "open", "not run"]


@dataclass(frozen=True)
class Condition:
    """A part of a claim that holds or doesn't.

    Attributes:
        under: What it is about, in a few words: ``"spirals"``.
        effect: Signed so that the claim predicts a number above `threshold`.
        threshold: As above; the interval must lie above it. The p-value is against 0, and is
            asked for only where the threshold is 0.
    """

    under: str
    effect: Effect
    threshold: float = 0.0

    @property
    def state(self) -> State:
        """``"holds"``, ``"fails"`` (the interval lies below), ``"open"``, or ``"not run"`` (by two seeds)."""
        effect = self.effect
        if not (math.isfinite(effect.mean) and math.isfinite(effect.low)):
            return "not run"
        if self.threshold == 0:
            return "holds" if effect.above else "fails" if effect.below else "open"
        if effect.low > self.threshold:
            return "holds"
        return "fails" if effect.high < self.threshold else "open"


@dataclass(frozen=True)
class Claim:
    """What a paper says.

    Attributes:
        name: ``"A1"`` to ``"A8"``, ``"D1"`` to ``"D5"``.
        experiments: Those that its verdict rests on.
        text: The claim.
        paper: The paper's figure.
        protocol: How it is looked at here.
        criterion: When it counts as reproduced.
    """

    name: str
    experiments: tuple[str, ...]
    text: str
    paper: str
    protocol: str
    criterion: str


@dataclass(frozen=True)
class Finding:
    """A row of the ledger.

    Attributes:
        claim: The claim.
        verdict: As its conditions say.
        reason: Which conditions hold, in words.
        ours: Our figure, with interval and n.
        conditions: With p-values corrected by Holm's method within the claim, see `corrected`.
        matched: The same with each optimizer at its own best learning rate, in words.
        scale: Of the claim's experiments; ``""`` where none was run.
    """

    claim: Claim
    verdict: Verdict
    reason: str
    ours: str
    conditions: Sequence[Condition]
    matched: str
    scale: str = ""

    @property
    def holding(self) -> list[str]:
        """The conditions that hold."""
        return [condition.under for condition in self.conditions if condition.state == "holds"]


def corrected(conditions: Sequence[Condition]) -> list[Condition]:
    """The same conditions, their p-values corrected together by Holm's method; for words, before `judged`."""
    effects = holm([condition.effect for condition in conditions])
    return [
        replace(condition, effect=effect)
        for condition, effect in zip(conditions, effects, strict=True)
    ]


def judged(
    claim: Claim, conditions: Sequence[Condition], ours: str, matched: str = "not run"
) -> Finding:
    """The verdict that follows from a claim's conditions.

    All hold: reproduced. None holds: not reproduced. Some: only under those. A condition that has no
    interval is left out and told; without any there is nothing to say.

    Args:
        claim: The claim.
        conditions: All its parts; their p-values are corrected together, if they are not yet.
        ours: Our figure.
        matched: The counterpart at matched learning rates, in words.
    """
    conditions = corrected(conditions)
    groups: dict[State, list[str]] = {"holds": [], "fails": [], "open": [], "not run": []}
    for condition in conditions:
        groups[condition.state].append(condition.under)
    known = len(conditions) - len(groups["not run"])
    verdict: Verdict
    if known == 0:
        verdict = "not run"
    elif len(groups["holds"]) == known:
        verdict = "reproduced"
    elif groups["holds"]:
        verdict = "only under ..."
    else:
        verdict = "not reproduced"
    words = {
        "holds": "holds: ",
        "fails": "the opposite: ",
        "open": "no clear difference: ",
        "not run": "fewer than two seeds: ",
    }
    if not any(condition.effect.n for condition in conditions):
        return Finding(claim, verdict, "", "not run", conditions, matched)
    reason = "; ".join(
        words[state] + _listed(names, len(conditions)) for state, names in groups.items() if names
    )
    return Finding(claim, verdict, reason, ours, conditions, matched)


def settled(finding: Finding, scales: Mapping[str, str]) -> Finding:
    """The same with its scale, and without a verdict where there is too little to judge.

    Scale smoke only shows that everything works, and what is true of a few cells of a table says nothing
    of the claim about all of them: half of the conditions or more need two seeds.

    Args:
        finding: Of a claim.
        scales: By experiment; ``""`` for what was not run.
    """
    own = [scales[name] for name in finding.claim.experiments if scales[name]]
    finding = replace(finding, scale=", ".join(dict.fromkeys(own)))
    known = sum(condition.state != "not run" for condition in finding.conditions)
    if 2 * known < len(finding.conditions):
        return replace(finding, verdict="not run")
    if SMOKE in own and finding.verdict != "not run":
        return replace(finding, verdict="no verdict")
    return finding


def _listed(names: Sequence[str], total: int) -> str:
    if len(names) == total > 1:
        return f"all {total} conditions"
    if len(names) <= NAMED:
        return ", ".join(names)
    return f"{len(names)} of {total} conditions ({', '.join(names[:NAMED])}, ...)"
