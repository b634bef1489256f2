"""aSGD, Figures 5-7: steps, accuracy, loss and true dummy nodes of many trainings."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from truestep.lab.panels import INK, PAPER, plain_axes, set_log_y, styles
from truestep.lab.paper.effects import mean
from truestep.lab.paper.points import HIDDEN, make_data

__all__ = ["accuracy_and_loss", "dummies", "steps"]

LOOKS = styles(["asgd", "sgd"])
COLOURS = {name: LOOKS[name].colour for name in ("asgd", "sgd")}
NAMES = {"asgd": "aSGD", "sgd": "SGD"}
DATA = ("circles", "spirals")
# The classes; neither is the colour of an optimizer in the panel beside them.
CLASSES = {1: ("positive class", "#0072b2"), 0: ("negative class", "#cc79a7")}
NODES = sum(HIDDEN)
MOST_BARS = 51


def steps(points: pd.DataFrame) -> Figure:
    """Figure 5: the training data, and box plots of the steps to the end of training.

    Args:
        points: Rows of one ending, of :func:`tables.of_points`.
    """
    figure = Figure(figsize=(8.0, 3.0), layout="constrained", facecolor=PAPER)
    *left, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    for axes, data in zip(left, DATA, strict=True):
        plain_axes(axes)
        (inputs, labels), _ = make_data(data, 0, noise=0, shape=0)
        for label, (name, colour) in CLASSES.items():
            x, y = inputs[labels == label].T
            axes.scatter(x, y, s=7, color=colour, linewidths=0, label=name)
        axes.set_aspect("equal")
        axes.set_title(f"(a) {data}", loc="left", fontsize=9, color=INK)
    figure.legend(
        *left[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(CLASSES),
        frameon=False, fontsize=8, labelcolor=INK, markerscale=2,
    )  # fmt: skip
    _boxes(right, points, "steps")
    right.set_title("(b) steps to the end", loc="left", fontsize=9, color=INK)
    return figure


def accuracy_and_loss(points: pd.DataFrame) -> Figure:
    """Figure 6: box plots of accuracy and loss, train and test.

    Args:
        points: As for :func:`steps`.
    """
    figure = Figure(figsize=(8.0, 4.6), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(2, 2)
    columns = ("train_accuracy", "test_accuracy", "train_loss", "test_loss")
    for axes, column, letter in zip(grid.flat, columns, "abcd", strict=True):
        _boxes(axes, points, column)
        axes.set_title(f"({letter}) {column.replace('_', ' ')}", loc="left", fontsize=9, color=INK)
        if column.endswith("loss"):
            set_log_y([axes], _ends(points, column), margin=1.5)
    return figure


def dummies(points: pd.DataFrame, start: pd.DataFrame) -> Figure:
    """Figure 7: histograms of true dummy nodes per training, and their probability by place.

    Args:
        points: As for :func:`steps`.
        start: The same before the first step.
    """
    figure = Figure(figsize=(8.0, 5.2), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(2, 2)
    for column, data in enumerate(DATA):
        above, below = grid[:, column]
        for axes in (above, below):
            plain_axes(axes)
        for name, colour in COLOURS.items():
            rows = points[(points["data"] == data) & (points["optimizer"] == name)]
            if not len(rows):
                continue
            shares = np.bincount(rows["dummies"].astype(int), minlength=MOST_BARS) / len(rows)
            last = int(np.flatnonzero(shares)[-1]) + 1
            above.stairs(
                shares[:last], np.arange(last + 1) - 0.5, color=colour, fill=True, alpha=0.45
            )
            above.axvline(float(rows["dummies"].mean()), color=colour, linewidth=1.5)
            _by_place(below, _shares(rows), colour)
        first = start[(start["data"] == data) & (start["optimizer"] == "sgd")]
        if len(first):
            below.plot(
                np.arange(NODES), _shares(first), color=INK, linestyle=":", linewidth=0.9, zorder=1
            )
        above.set_title(f"({'ab'[column]}) {data}", loc="left", fontsize=9, color=INK)
        below.set_title(f"({'cd'[column]}) {data}", loc="left", fontsize=9, color=INK)
        above.set_xlabel("true dummy nodes in a training", fontsize=9, color=INK)
        centres = [10 * layer + 4.5 for layer in range(len(HIDDEN))]
        below.set_xticks(centres, [f"layer {layer + 1}" for layer in range(len(HIDDEN))])
        below.set_ylim(bottom=0)
    grid[0, 0].set_ylabel("share of trainings", fontsize=9, color=INK)
    grid[1, 0].set_ylabel("probability at a node", fontsize=9, color=INK)
    _legend(figure, {"before the first step": Line2D([], [], color=INK, linestyle=":")})
    return figure


def _shares(rows: pd.DataFrame) -> NDArray[np.float64]:
    mask = rows["mask"].to_numpy()
    shares = [float(((mask >> np.uint64(k)) & np.uint64(1)).mean()) for k in range(NODES)]
    return np.array(shares)


def _by_place(axes: Axes, shares: NDArray[np.float64], colour: str) -> None:
    axes.plot(np.arange(NODES), shares, color=colour, linewidth=1.4, zorder=3)
    for layer in range(1, len(HIDDEN)):
        axes.axvline(10 * layer - 0.5, color=INK, linewidth=0.4, alpha=0.4)


def _boxes(axes: Axes, points: pd.DataFrame, column: str) -> None:
    """Boxes: quartiles and median; whiskers: the 5 % and 95 % quantiles; a diamond: the mean."""
    plain_axes(axes)
    for place, (data, name) in enumerate((data, name) for data in DATA for name in COLOURS):
        values = points[(points["data"] == data) & (points["optimizer"] == name)][column].dropna()
        if not len(values):
            continue
        colour = COLOURS[name]
        box = axes.boxplot(
            values, positions=[place], widths=0.6, whis=(5, 95), showfliers=False,
            patch_artist=True,
        )  # fmt: skip
        box["boxes"][0].set(facecolor=colour, alpha=0.35, edgecolor=colour)
        for part in ("whiskers", "caps", "medians"):
            for line in box[part]:
                line.set(color=colour, linewidth=1.5 if part == "medians" else 1.0)
        axes.plot(place, mean(column, values).mean, marker="D", markersize=4, color=colour)
    axes.set_xticks(range(4), [f"{NAMES[name]}\n{data}" for data in DATA for name in COLOURS])


def _ends(points: pd.DataFrame, column: str) -> list[float]:
    """The ends of the whiskers."""
    groups = points.groupby(["data", "optimizer"])[column]
    return [float(value) for q in (0.05, 0.95) for value in groups.quantile(q)]


def _legend(figure: Figure, more: dict[str, Line2D]) -> None:
    marks: dict[str, Patch | Line2D] = {
        NAMES[name]: Patch(color=colour, alpha=0.6) for name, colour in COLOURS.items()
    }
    marks |= more
    figure.legend(
        list(marks.values()), list(marks), loc="outside upper left", ncols=len(marks),
        frameon=False, fontsize=8, labelcolor=INK,
    )  # fmt: skip
