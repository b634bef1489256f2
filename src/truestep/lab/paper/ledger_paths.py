"""The aSGD paper's claim A8, on the paths of parameters, against the data."""

from collections.abc import Sequence

import numpy as np

from truestep.lab.paper.claims import CLAIMS
from truestep.lab.paper.effects import mean
from truestep.lab.paper.planned import LEARNING_RATE
from truestep.lab.paper.small import LAYER_3
from truestep.lab.paper.tables import Found
from truestep.lab.paper.unit import Record
from truestep.lab.paper.verdict import Condition, Finding, corrected, judged
from truestep.lab.paper.words import difference

__all__ = ["a8"]


def a8(trajectories: Sequence[Found]) -> Finding:
    """Distances of parameters, and parameters that stop."""
    main = [record for planned, record in trajectories if not planned.variant]
    if not main:
        return judged(CLAIMS["A8"], [], "")
    faster = [record for planned, record in trajectories if planned.variant == LEARNING_RATE]
    arrays = main[0].outcome.arrays
    ranges = [arrays[f"{name} range"].astype(float) for name in ("asgd", "sgd")]
    early = [arrays[f"{name} early net"].astype(float) for name in ("asgd", "sgd")]
    stopped = [arrays[f"{name} stopped"] for name in ("asgd", "sgd")]
    only = (stopped[0] & ~stopped[1]).sum(1) - (stopped[1] & ~stopped[0]).sum(1).astype(float)
    other = _other_node(ranges, stopped)
    conditions = [
        Condition("further", mean("range", (ranges[0] - ranges[1]).mean(1))),
        Condition("faster", mean("early", (early[0] - early[1]).mean(1))),
        Condition("stop under aSGD only", mean("stopped", only)),
        Condition("another node moves more", mean("other node", other)),
    ]
    conditions = corrected(conditions)
    factor = ranges[0].mean() / ranges[1].mean()
    ours = (
        f"range {factor:.2f} times SGD's, {difference(conditions[0].effect)} further; parameters "
        f"that stop under aSGD only minus under SGD only: {difference(conditions[2].effect)}; the "
        f"other node: {difference(conditions[3].effect)}"
    )
    return judged(CLAIMS["A8"], conditions, ours, _at_equal_loss([*main, *faster]))


def _at_equal_loss(records: Sequence[Record]) -> str:
    """Distances beside SGD at the rate whose last training loss is nearest to aSGD's.

    The rate is chosen on the first half of the starts, distances are compared on the other. Of losses the
    median counts: trainings that got stuck would decide the mean.
    """
    if len(records) < 2:  # noqa: PLR2004 - nothing to choose from
        return "not run"
    half = records[0].settings["replicas"] // 2
    ours = records[0].outcome.arrays
    loss = np.nanmedian(ours["asgd loss"][:half, -1].astype(float))

    def distance(record: Record) -> float:
        theirs = record.outcome.arrays["sgd loss"][:half, -1].astype(float)
        return abs(float(np.nanmedian(theirs) - loss))

    nearest = min(records, key=distance)
    factor = nearest.settings.get("sgd_factor", 1)
    ranges = [
        arrays[half:].astype(float)
        for arrays in (ours["asgd range"], nearest.outcome.arrays["sgd range"])
    ]
    effect = mean("range", (ranges[0] - ranges[1]).mean(1))
    return (
        f"at equal training loss (median), SGD at {factor:g} times the rate: range "
        f"{ranges[0].mean() / ranges[1].mean():.2f} times SGD's, {difference(effect)} further"
    )


def _other_node(ranges: list[np.ndarray], stopped: list[np.ndarray]) -> list[float]:
    """Where a node of layer 3 stops under aSGD only: how much further the other node's weights go."""
    weights, biases = LAYER_3
    nodes = [[*range(w.start, w.stop), b] for w, b in zip(weights, biases, strict=True)]
    found = []
    for node, other in (nodes, nodes[::-1]):
        here = stopped[0][:, node].all(1) & ~stopped[1][:, node].all(1)
        found += list((ranges[0] - ranges[1])[here][:, other].mean(1))
    return found
