"""Tables of the report: the paper's numbers, ours, and the difference."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from truestep.lab.paper.claims import TABLE_1, TABLE_2, Row
from truestep.lab.paper.effects import Effect, compare, holm, mean
from truestep.lab.paper.evidence import Evidence
from truestep.lab.paper.figures_curves import NAMES, contestants
from truestep.lab.paper.figures_more import late_spread
from truestep.lab.paper.levels import distances
from truestep.lab.paper.plans_asgd import STABILISED
from truestep.lab.paper.tables import best, by_seed, last, main_only
from truestep.lab.paper.words import difference, number

__all__ = ["Cell", "Grid", "cells_table", "level_table", "rivals_table", "stable_table"]

COLUMNS = {
    "train accuracy": "train_accuracy",
    "train loss": "train_loss",
    "test accuracy": "test_accuracy",
    "test loss": "test_loss",
}
NEAREST = 4


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text, and what it is sorted by (nan: its text)."""

    text: str
    value: float = math.nan


@dataclass(frozen=True)
class Grid:
    """A table with a caption.

    Attributes:
        title: Of the table.
        caption: What the columns are.
        heads: Of the columns.
        rows: Cells, as many as heads.
    """

    title: str
    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def cells_table(evidence: Evidence) -> Iterator[Grid]:
    """Tables 1 and 2 beside ours, and ours with the learning rate's epoch chosen on validation."""
    curves = main_only(evidence.mnist)
    selections = {
        "test_loss": "at the lowest test loss of each training, as in the paper",
        "validation_loss": "at the lowest validation loss of each training",
    }
    for table, number_ in ((TABLE_1, 1), (TABLE_2, 2)):
        for by, how in selections.items():
            rows = best(curves, by)
            lines = [
                line for (name, lr), row in table.items() for line in _lines(name, lr, row, rows)
            ]
            yield Grid(
                f"Table {number_}, {how}",
                "The paper's mean ± standard deviation over 100 repeats (its captions say "
                "variance); ours mean ± standard deviation, 95 % interval, n; the difference of the "
                "means in the paper's standard deviations.",
                (
                    "method",
                    "lr",
                    "measure",
                    "paper",
                    "ours",
                    "95 % interval",
                    "n",
                    "difference",
                    "in sd",
                ),
                lines,
            )


def level_table(evidence: Evidence) -> Iterator[Grid]:
    """The settings that come nearest to the level of Tables 1 and 2."""
    if not evidence.mnist["variant"].str.startswith("level").any():
        return
    table = distances(evidence.mnist)
    # The nearest by each measure: one setting need not fit both methods' rows.
    measures = ("distance", "distance asgd", "distance sgd")
    places = {place for name in measures for place in table[name].nsmallest(NEAREST).index}
    nearest = table.loc[sorted(places, key=lambda place: float(table["distance"][place]))]
    yield Grid(
        "The level of Tables 1 and 2",
        f"{_level_found(table)} Shown are the nearest settings to all rows, to aSGD's and to SGD's: root "
        "mean square distance in the paper's standard deviations. The paper has a test loss of 0.1922 for "
        "aSGD at 0.005 and of 0.1984 for SGD at 0.03.",
        (
            "setting",
            "steps of an epoch",
            "all rows",
            "aSGD's rows",
            "SGD's rows",
            "aSGD 0.005",
            "SGD 0.03",
        ),
        [
            [
                Cell(str(row["setting"])),
                Cell(str(row["steps"]), float(row["steps"])),
                *(Cell(f"{row[name]:.2f}", float(row[name])) for name in measures),
                Cell(f"{row['asgd']:.4f}", float(row["asgd"])),
                Cell(f"{row['sgd']:.4f}", float(row["sgd"])),
            ]
            for row in nearest.to_dict("records")
        ],
    )


def _level_found(table: pd.DataFrame) -> str:
    nearest = table.nsmallest(1, "distance").iloc[0]
    outcome = "No setting" if nearest["distance"] > 1 else "A setting"
    return (
        f"{outcome} is within one of the paper's standard deviations of all its rows: the nearest "
        f"({nearest['setting']}, epochs of {nearest['steps']} steps) is {nearest['distance']:.1f} away, of "
        f"aSGD's alone {table['distance asgd'].min():.1f} and of SGD's alone "
        f"{table['distance sgd'].min():.1f}."
    )


def stable_table(evidence: Evidence) -> Grid:
    """What each help does to aSGD and to SGD."""
    table = late_spread(evidence.stabilised)
    rows, against = [], []
    for help_ in ("alone", "early stopping", *list(STABILISED)[1:]):
        for name in ("asgd", "sgd"):
            part = table[(table["help"] == help_) & (table["optimizer"] == name)]
            alone = table[(table["help"] == "alone") & (table["optimizer"] == name)]
            cells = [
                _cell(mean(column, part[column].dropna()))
                for column in ("spread", "final", "lowest test", "lowest", "accuracy")
            ]
            rows.append([Cell(help_), Cell(NAMES[name]), *cells])
            # Early stopping chooses the epoch that is chosen anyway: no comparison.
            if help_ not in {"alone", "early stopping"}:
                effect = compare("lowest", by_seed(part, "lowest"), by_seed(alone, "lowest"))
                against.append(effect)
    ends = [Cell("—", 0.0)] * (len(rows) - len(against)) + [_difference(e) for e in holm(against)]
    return Grid(
        "Helps against late instability",
        "Spread: standard deviation of a training's test loss over the last fifth of its epochs. "
        "Chosen: at the lowest validation loss; beside it the lowest test loss, as the paper selects. Means "
        f"± half of the 95 % interval; p-values corrected for {len(against)} comparisons (Holm).",
        (
            "help",
            "optimizer",
            "spread, late",
            "test loss, end",
            "test loss, lowest",
            "test loss, chosen",
            "test accuracy, chosen",
            "chosen loss minus alone",
        ),
        [[*row, end] for row, end in zip(rows, ends, strict=True)],
    )


def rivals_table(evidence: Evidence) -> Grid:
    """DA-SGD's rivals at the end of training, and how far each is ahead of it."""
    curves = last(evidence.rivals)
    found: list[tuple[int, str, Effect, Effect | None]] = []
    for size in sorted(curves["batch_size"].unique()):
        rows = curves[curves["batch_size"] == size]
        ours = by_seed(rows, "test_accuracy", optimizer="dasgd")
        for name, _, _, part in contestants(rows, size):
            theirs = by_seed(part, "test_accuracy")
            against = None if name == NAMES["dasgd"] else compare(name, theirs, ours)
            found.append((size, name, mean(name, list(theirs.values())), against))
    corrected = holm([against for *_, against in found if against is not None])
    ahead = iter(corrected)
    lines = []
    for size, name, accuracy, against in found:
        end = Cell("—") if against is None else _difference(next(ahead))
        lines.append([Cell(str(size), size), Cell(name), _cell(accuracy), end])
    return Grid(
        "DA-SGD and its rivals at the last epoch",
        "Means ± half of the 95 % interval; in pairs of equal seeds, p-values corrected for "
        f"{len(corrected)} comparisons (Holm).",
        ("batch", "optimizer", "test accuracy", "test accuracy minus DA-SGD's"),
        lines,
    )


def _lines(name: str, lr: float, row: Row, rows: pd.DataFrame) -> Iterator[list[Cell]]:
    for (measure, column), (paper, sd) in zip(COLUMNS.items(), row, strict=True):
        effect = mean(measure, list(by_seed(rows, column, optimizer=name, lr=lr).values()))
        away = effect.mean - paper
        yield [
            Cell(NAMES[name]),
            Cell(f"{lr:g}", lr),
            Cell(measure),
            Cell(f"{paper:.4f} ± {sd:.4f}", paper),
            _with_sd(effect),
            Cell(f"{effect.low:.4f} to {effect.high:.4f}" if effect.n > 1 else "—", effect.low),
            Cell(str(effect.n), effect.n),
            Cell(f"{away:+.4f}" if effect.n else "—", away),
            Cell(f"{away / sd:+.1f}" if effect.n else "—", away / sd),
        ]


def _with_sd(effect: Effect) -> Cell:
    if not effect.n:
        return Cell("not run")
    sd = f" ± {effect.sd:.4f}" if effect.n > 1 else ""
    return Cell(f"{effect.mean:.4f}{sd}", effect.mean)


def _cell(effect: Effect) -> Cell:
    return Cell(number(effect) if effect.n else "—", effect.mean)


def _difference(effect: Effect) -> Cell:
    return Cell(difference(effect), effect.mean)
