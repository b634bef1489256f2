"""What trains a race's runs: the ensemble where it can, the torch loop for the rest.

Both give the same results to float32 rounding. A run's ``versions["engine"]`` says which one it was.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from truestep.errors import TruestepError
from truestep.lab.ensembles import ENGINE, Ensembles, optimizer_of
from truestep.lab.plan import Plan, UsageError
from truestep.lab.store import RunKey
from truestep.lab.tasks import Splits
from truestep.lab.training import LOOP
from truestep.lab.workers import Here, Workers

__all__ = ["Engines", "choose_engines"]


@dataclass(frozen=True)
class Engines:
    """What trains which runs.

    Attributes:
        loop: Trains one run after the other with torch.
        ensemble: Trains many at once, or None where it has none to train.
        reasons: Optimizer -> why the torch loop trains it.
        told: All that as a sentence.
    """

    loop: Here | Workers
    ensemble: Ensembles | None
    reasons: Mapping[str, str]
    told: str

    def share(
        self, keys: list[RunKey]
    ) -> Iterator[tuple[Here | Workers | Ensembles, list[RunKey]]]:
        """The engines with the keys of each; the ensemble's by batch size and optimizer."""
        if self.ensemble is not None:
            ours = [key for key in keys if key.optimizer not in self.reasons]
            yield self.ensemble, sorted(ours, key=lambda key: (key.batch_size, key.optimizer))
        yield self.loop, [key for key in keys if key.optimizer in self.reasons]


def choose_engines(
    plan: Plan, splits: Splits, wanted: str, loop: Here | Workers, threads: int
) -> Engines:
    """Finds what can train the plan's runs.

    Args:
        plan: Of the race.
        splits: The task's data.
        wanted: One of `truestep.lab.plan.ENGINES`.
        loop: What trains with torch.
        threads: How many replicas the ensemble trains at a time.

    Raises:
        UsageError: The ensemble is wanted, and can't train some of the runs.
    """
    reasons: dict[str, str] = {}
    ensemble = None
    if wanted == "torch":
        reasons = dict.fromkeys(plan.grids, "asked for")
    else:
        try:
            ensemble = Ensembles(plan.task, splits, threads)
        except TruestepError as error:
            reasons = dict.fromkeys(plan.grids, str(error))
        else:
            reasons = dict(_unknown(plan))
    if wanted == "ensemble" and reasons:
        raise UsageError(
            f"--engine ensemble can't train {', '.join(reasons)}: {'; '.join(set(reasons.values()))}. "
            "Give --engine auto, which trains such runs with torch."
        )
    if len(reasons) == len(plan.grids):
        ensemble = None
    return Engines(loop, ensemble, reasons, _told(plan, reasons))


def _unknown(plan: Plan) -> Iterator[tuple[str, str]]:
    for name, grid in plan.grids.items():
        try:
            optimizer_of(name, grid[0])
        except TruestepError as error:
            yield name, str(error)


def _told(plan: Plan, reasons: Mapping[str, str]) -> str:
    why = "; ".join(dict.fromkeys(reasons.values()))
    if not reasons:
        return f"{ENGINE} trains all runs, equal to the {LOOP}'s to rounding."
    if len(reasons) == len(plan.grids):
        return f"The {LOOP} trains all runs: {why.rstrip('.')}."
    ours = [name for name in plan.grids if name not in reasons]
    return (
        f"{ENGINE} trains the runs of {', '.join(ours)}, the {LOOP} those of {', '.join(reasons)} "
        f"({why.rstrip('.')})."
    )
