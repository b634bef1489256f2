"""From records to tables: a row per training, or per training and epoch."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from truestep.lab.paper.compression import MEASURES as COMPRESSED
from truestep.lab.paper.planned import Planned
from truestep.lab.paper.points import ENDINGS, HIDDEN
from truestep.lab.paper.unit import Record

__all__ = [
    "Found",
    "best",
    "by_seed",
    "last",
    "main_only",
    "of_compression",
    "of_curves",
    "of_points",
    "of_times",
]

# A planned unit and its record.
Found = tuple[Planned, Record]
LAYERS = len(HIDDEN)
NODES = HIDDEN[0]
MEASURES = (
    *("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"),
    *("test_loss", "test_accuracy", "gradients", "signs"),
)


def of_points(found: Iterable[Found]) -> pd.DataFrame:
    """A row per training of kind points and ending.

    Returns:
        Columns: ``variant``, ``data``, ``optimizer``, ``lr``, ``seed``, ``ending``, ``steps``,
        ``converged``, ``train_loss``, ``test_loss``, ``train_accuracy``, ``test_accuracy``,
        ``dummies`` (true ones), ``layer 1`` to ``layer 5`` (true ones in each), ``pseudo``,
        ``mask`` (a bit per hidden unit).
    """
    tables = [
        _ending(planned, record, place, name)
        for planned, record in found
        for place, name in enumerate(record.outcome.summary["endings"])
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def of_curves(found: Iterable[Found]) -> pd.DataFrame:
    """A row per training of kind images and measured epoch.

    Returns:
        Columns: ``variant``, ``unit`` (a number per training), the unit's settings, ``data_read``
        (a stand-in by its own name), ``status``, ``epoch``, and what was measured.
    """
    tables = []
    for number, (planned, record) in enumerate(found):
        arrays = record.outcome.arrays
        columns = {name: arrays[name] for name in MEASURES if name in arrays}
        settings = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in record.settings.items()
        }
        # A Series per setting would be slow; one value is broadcast, but a tuple is not.
        settings["hidden"] = "-".join(map(str, settings["hidden"]))
        tables.append(
            pd.DataFrame(
                {
                    "variant": planned.variant,
                    "unit": number,
                    **settings,
                    "data_read": record.outcome.summary["source"].partition(":")[0],
                    "status": record.outcome.summary["status"],
                    "epoch": arrays["epochs"],
                    **columns,
                }
            )
        )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def of_compression(found: Iterable[Found]) -> pd.DataFrame:
    """A row per training of kind compression.

    Returns:
        Columns: ``variant``, ``data``, ``optimizer``, ``lr``, ``seed``; of the units that were hidden
        ``true``, ``constant``, ``duplicate``, ``pseudo`` (each unit once) and ``removed``;
        ``parameters``, ``bytes`` and ``flops`` that are left, in percent; ``validation_loss``,
        ``accuracy`` and ``accuracy_before`` (of test data), ``changed`` (test samples that get another
        answer), ``difference`` (the largest of outputs on training data, relative to the largest
        output). nan where training diverged.
    """
    tables = []
    for planned, record in found:
        settings, arrays = record.settings, record.outcome.arrays
        before = record.outcome.summary["before"]
        columns = {name: arrays[name].astype(float) for name in COMPRESSED}
        tables.append(
            pd.DataFrame(
                {
                    "variant": planned.variant,
                    **{name: settings[name] for name in ("data", "optimizer", "lr")},
                    "seed": settings["first"] + np.arange(settings["replicas"]),
                    **columns,
                    **{
                        name: 100 * columns[name] / before.get(name, np.nan)
                        for name in ("parameters", "bytes", "flops")
                    },
                    "difference": columns["difference"] / columns["largest"],
                }
            )
        )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def of_times(found: Iterable[Found]) -> pd.DataFrame:
    """Seconds of a replica-step for each unit of kinds points and images.

    Returns:
        Columns: ``variant``, ``kind``, ``data``, ``optimizer``, ``lr``, ``batch_size`` (0 for full
        batches), ``seed``, ``seconds_per_step`` (processor time, measurements included).
    """
    rows = [
        {
            "variant": planned.variant,
            "kind": record.kind,
            "data": record.settings["data"],
            "optimizer": record.settings["optimizer"],
            "lr": record.settings["lr"],
            "batch_size": record.settings.get("batch_size", 0),
            "seed": record.settings.get("seed", record.settings.get("first")),
            "seconds_per_step": record.outcome.train_seconds / max(1, record.outcome.replica_steps),
        }
        for planned, record in found
    ]
    return pd.DataFrame(rows)


def best(curves: pd.DataFrame, by: str) -> pd.DataFrame:
    """The row of each training with the lowest ``by``; none for a training that has no finite one."""
    finite = curves[np.isfinite(curves[by])]
    rows: pd.DataFrame = finite.loc[finite.groupby("unit")[by].idxmin()]
    return rows


def main_only(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the main protocol."""
    return table[table["variant"] == ""] if len(table) else table


def last(curves: pd.DataFrame) -> pd.DataFrame:
    """The row of each training at its last epoch."""
    return curves[curves["epoch"] == curves["epochs"]]


def by_seed(table: pd.DataFrame, value: str, **where: Any) -> dict[int, float]:
    """A column of the rows that match, by seed; values that are not finite are left out.

    Example:
        >>> table = pd.DataFrame({"seed": [0, 1, 0], "lr": [1, 1, 2], "loss": [3.0, 4.0, 5.0]})
        >>> by_seed(table, "loss", lr=1)
        {0: 3.0, 1: 4.0}
    """
    chosen = np.ones(len(table), dtype=bool)
    for name, wanted in where.items():
        chosen &= (table[name] == wanted).to_numpy()
    rows = table[chosen]
    values = zip(rows["seed"].to_list(), rows[value].to_list(), strict=True)
    return {int(seed): float(v) for seed, v in values if np.isfinite(v)}


def _ending(planned: Planned, record: Record, place: int, name: str) -> pd.DataFrame:
    settings, arrays = record.settings, record.outcome.arrays
    get = {key: arrays[f"{place} {key}"] for key in _ENDING_KEYS}
    mask = get.pop("true_dummies")
    layers = {f"layer {k + 1}": _bits(mask, k) for k in range(LAYERS)}
    steps, converged = get.pop("step"), np.ones(len(mask), dtype=bool)
    rule = ENDINGS[name]
    if isinstance(rule, float):
        converged = get["train_loss"] < rule
    if name == "loss under 0.1":
        # The engine looks at every step for this one.
        first = arrays["first_under"]
        converged = first >= 0
        steps = np.where(converged, first, steps)
    return pd.DataFrame(
        {
            "variant": planned.variant,
            "data": settings["data"],
            "optimizer": settings["optimizer"],
            "lr": settings["lr"],
            "seed": settings["first"] + np.arange(settings["replicas"]),
            "ending": name,
            "steps": steps.astype(float),
            "converged": converged,
            **{key: value.astype(float) for key, value in get.items()},
            "dummies": sum(layers.values()),
            **layers,
            "mask": mask,
        }
    ).rename(columns={"pseudo_dummies": "pseudo"})


_ENDING_KEYS: Sequence[str] = (
    "step",
    "train_loss",
    "test_loss",
    "train_accuracy",
    "test_accuracy",
    "true_dummies",
    "pseudo_dummies",
)


def _bits(mask: NDArray[Any], layer: int) -> NDArray[Any]:
    nodes = np.arange(NODES * layer, NODES * (layer + 1), dtype=np.uint64)
    counts: NDArray[np.float64] = ((mask[:, None] >> nodes) & np.uint64(1)).sum(1).astype(float)
    return counts
