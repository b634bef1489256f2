"""What there is to run, what it costs, and how much of it a store has."""

from pathlib import Path
from typing import Any

from truestep.lab.paper.experiments import EXPERIMENTS
from truestep.lab.paper.planned import SCALES
from truestep.lab.paper.store import UnitStore
from truestep.lab.paper.unit import key

__all__ = ["overview"]


def overview(store: Path) -> list[dict[str, Any]]:
    """A dict per experiment: ``name``, ``title``, ``artefacts`` and ``scales``.

    Args:
        store: The file; where there is none, nothing is done yet and none is made.

    Returns:
        Each of ``scales`` has ``scale``, ``seeds``, ``units``, ``done`` and ``seconds`` (on one
        core, for all units, estimated).

    Raises:
        TruestepError: The file is not such a store.
    """
    done: set[str] = set()
    if store.is_file():
        with UnitStore(store) as units:
            done = units.keys()
    rows = []
    for experiment in EXPERIMENTS.values():
        scales = []
        for scale in SCALES:
            planned = {key(item.unit): item.unit for item in experiment.units(scale)}
            scales.append(
                {
                    "scale": scale,
                    "seeds": experiment.seeds[scale],
                    "units": len(planned),
                    "done": len(done & planned.keys()),
                    "seconds": sum(unit.cost().seconds for unit in planned.values()),
                }
            )
        rows.append(
            {
                "name": experiment.name,
                "title": experiment.title,
                "artefacts": experiment.artefacts,
                "scales": scales,
            }
        )
    return rows
