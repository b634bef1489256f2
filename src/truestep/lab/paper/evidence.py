"""What a store says, as tables by experiment."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from truestep.lab.paper.experiments import EXPERIMENTS
from truestep.lab.paper.options import OPTIONS
from truestep.lab.paper.planned import SCALES, Planned
from truestep.lab.paper.store import UnitStore
from truestep.lab.paper.tables import (
    Found,
    of_compression,
    of_curves,
    of_points,
    of_times,
)
from truestep.lab.paper.unit import Record, key

__all__ = ["Evidence", "gather"]

# Fewer units of a scale than this are not looked at where a smaller scale is there.
MINIMUM = 4
# So many times the usual number of seeds are read where there are more than usual.
MORE_SEEDS = 4


@dataclass(frozen=True)
class Evidence:
    """Records by experiment, and tables made of them when they are asked for.

    Attributes:
        found: By experiment: its planned units that the store has, with their records.
        scales: By experiment: the scale that they are of; ``""`` where there are none.
        missing: By experiment: how many units of that scale the store lacks.
        unknown: How many of the store's units are in no experiment's plan.
    """

    found: Mapping[str, list[Found]]
    scales: Mapping[str, str]
    missing: Mapping[str, int]
    unknown: int = 0

    @cached_property
    def points(self) -> pd.DataFrame:
        """Of :func:`tables.of_points`."""
        return of_points(self.found["asgd-synthetic"])

    @cached_property
    def mnist(self) -> pd.DataFrame:
        """Of :func:`tables.of_curves`, of asgd-mnist."""
        return of_curves(self.found["asgd-mnist"])

    @cached_property
    def stabilised(self) -> pd.DataFrame:
        """Likewise, of asgd-stabilised."""
        return of_curves(self.found["asgd-stabilised"])

    @cached_property
    def compression(self) -> pd.DataFrame:
        """Of :func:`tables.of_compression`, of asgd-compression."""
        return of_compression(self.found["asgd-compression"])

    @cached_property
    def dasgd(self) -> pd.DataFrame:
        """Likewise, of dasgd-batch."""
        return of_curves(self.found["dasgd-batch"])

    @cached_property
    def rates(self) -> pd.DataFrame:
        """Likewise, of dasgd-lr."""
        return of_curves(self.found["dasgd-lr"])

    @cached_property
    def rivals(self) -> pd.DataFrame:
        """Likewise, of dasgd-momentum."""
        return of_curves(self.found["dasgd-momentum"])

    @cached_property
    def times(self) -> pd.DataFrame:
        """Of :func:`tables.of_times`, of asgd-synthetic and asgd-mnist."""
        return of_times([*self.found["asgd-synthetic"], *self.found["asgd-mnist"]])

    @cached_property
    def trajectories(self) -> list[Found]:
        """The records of asgd-trajectories."""
        return self.found["asgd-trajectories"]

    @property
    def records(self) -> list[Record]:
        """All records, each once."""
        return list(
            {record.key: record for found in self.found.values() for _, record in found}.values()
        )


def gather(store: UnitStore) -> Evidence:
    """Reads of each experiment the units of the largest scale that the store has a few of.

    Units that were run with other options are variants of the main protocol.

    Args:
        store: Finished units.

    Raises:
        TruestepError: The file can't be read.
    """
    there = store.keys()
    found: dict[str, list[Found]] = {}
    scales, missing = {}, {}
    known: set[str] = set()
    for experiment in EXPERIMENTS.values():
        found[experiment.name], scales[experiment.name], missing[experiment.name] = [], "", 0
        for scale in reversed(SCALES):
            usual = {key(item.unit): item for item in experiment.units(scale)}
            more = experiment.units(scale, MORE_SEEDS * experiment.seeds[scale])
            planned = usual | {key(item.unit): item for item in more}
            known |= planned.keys()
            # Units that two scales share do not make a scale of an experiment.
            enough = len(planned.keys() & there) >= min(len(usual), MINIMUM)
            if enough and not scales[experiment.name]:
                records = store.records(planned)
                found[experiment.name] = [(planned[name], records[name]) for name in records]
                scales[experiment.name] = scale
                missing[experiment.name] = len(usual.keys() - records.keys())
    others = store.records(there - known)
    for own in found.values():
        variants = _with_options(own, others.values())
        own.extend(variants)
        known |= {record.key for _, record in variants}
    return Evidence(found, scales, missing, len(there - known))


def _with_options(own: list[Found], others: Iterable[Record]) -> list[Found]:
    """Records that differ from a unit of the main protocol in options alone, as variants."""
    main = {_without_options(record): (item, record) for item, record in own if not item.variant}
    variants = []
    for other in others:
        item, like = main.get(_without_options(other), (None, None))
        if item is not None and like is not None:
            changes = {
                name: value
                for name, value in other.settings.items()
                if value != like.settings.get(name)
            }
            label = ", ".join(f"{name}: {value}" for name, value in changes.items())
            variants.append((Planned(item.unit, label), other))
    return variants


def _without_options(record: Record) -> str:
    fixed = {name: value for name, value in record.settings.items() if name not in OPTIONS}
    return json.dumps([record.kind, fixed], sort_keys=True)
