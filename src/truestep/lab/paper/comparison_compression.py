"""Tables of asgd-compression: what went, what is left, and aSGD's difference to SGD."""

from collections.abc import Iterator

import pandas as pd

from truestep.lab.paper.comparison import Cell, Grid
from truestep.lab.paper.effects import Effect, compare, holm, mean
from truestep.lab.paper.evidence import Evidence
from truestep.lab.paper.figures_compression import Setting, settings
from truestep.lab.paper.figures_curves import NAMES
from truestep.lab.paper.plans_asgd import COMPRESSION_DATA
from truestep.lab.paper.tables import by_seed
from truestep.lab.paper.words import difference, number

__all__ = ["compression_tables"]

KINDS = ("true", "constant", "duplicate", "pseudo")
ORDER = ("asgd", "sgd at asgd's", "sgd", "asgd at sgd's")
PAIRS = {
    "each at its own best": ("asgd", "sgd"),
    "both at aSGD's best": ("asgd", "sgd at asgd's"),
    "both at SGD's best": ("asgd at sgd's", "sgd"),
}


def compression_tables(evidence: Evidence) -> Iterator[Grid]:
    """What compression leaves at equal and at matched learning rates, and the paired differences.

    Args:
        evidence: With asgd-compression.
    """
    table = evidence.compression
    variants = {str(name): table[table["variant"] == name] for name in table["variant"].unique()}
    chosen = {
        f"{data}, {variant}" if variant else data: settings(part, data)
        for variant, part in variants.items()
        for data in COMPRESSION_DATA
    }
    yield Grid(
        "Networks before and after compression",
        "Means over networks, with half of the 95 % interval where there is one. Units by kind, each once, "
        "in the order of the columns; what is left in percent of the trained network; answers that "
        "changed, of all test samples of all networks; the largest difference of outputs on the training "
        "data, of all networks, relative to a network's largest output. Best: lowest mean validation loss.",
        (
            "data", "optimizer", "learning rate", "n", *KINDS, "removed", "parameters, %", "file, %",
            "FLOPs, %", "test accuracy, %", "answers changed", "difference",
        ),
        [
            _row(data, found[key])
            for data, found in chosen.items()
            for key in ORDER
            if key in found and len(found[key].rows)
        ],
    )  # fmt: skip
    pairs = [
        (data, words, found[one].rows, found[other].rows)
        for data, found in chosen.items()
        for words, (one, other) in PAIRS.items()
        if found
    ]
    columns = [
        holm([_apart(ours, theirs, measure, factor) for _, _, ours, theirs in pairs])
        for measure, factor in (("parameters", 1), ("accuracy", 100))
    ]
    yield Grid(
        "aSGD minus SGD, after compression",
        "Mean paired difference over seeds; below 0 in the first column, aSGD leaves fewer parameters. "
        f"p-values corrected for the {len(pairs)} comparisons of a column (Holm).",
        ("data", "learning rates", "parameters left, percentage points", "test accuracy, points"),
        [
            [Cell(data), Cell(words), *(Cell(difference(e), e.mean) for e in effects)]
            for (data, words, *_), *effects in zip(pairs, *columns, strict=True)
        ],
    )


def _row(data: str, setting: Setting) -> list[Cell]:
    rows = setting.rows
    return [
        Cell(data),
        Cell(NAMES[setting.optimizer]),
        Cell(f"{setting.lr:g}, {setting.name}", setting.lr),
        Cell(str(len(rows)), len(rows)),
        *(_plain(rows[kind]) for kind in (*KINDS, "removed")),
        *(_cell(mean(name, rows[name])) for name in ("parameters", "bytes", "flops")),
        _cell(mean("accuracy", 100 * rows["accuracy"])),
        Cell(f"{int(rows['changed'].sum())}", float(rows["changed"].sum())),
        Cell(f"{rows['difference'].max():.1e}", float(rows["difference"].max())),
    ]


def _apart(one: pd.DataFrame, other: pd.DataFrame, measure: str, factor: int) -> Effect:
    values = ({s: factor * v for s, v in by_seed(rows, measure).items()} for rows in (one, other))
    return compare(measure, *values)


def _plain(values: "pd.Series[float]") -> Cell:
    return Cell(f"{values.mean():.2f}", float(values.mean()))


def _cell(effect: Effect) -> Cell:
    return Cell(number(effect), effect.mean)
