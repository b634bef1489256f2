"""Figures of trainings on images: aSGD Figure 8, DA-SGD Figures 3-5, and what goes beyond them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from truestep.lab.panels import BAND, INK, PAPER, plain_axes, styles
from truestep.lab.paper.effects import mean
from truestep.lab.paper.plans_dasgd import BATCHES, DASGD_DATA
from truestep.lab.paper.tables import last

__all__ = [
    "COLOURS",
    "EARLY",
    "NAMES",
    "accuracy_by_epoch",
    "contestants",
    "error_by_batch",
    "learning_curves",
    "rates",
    "rivals",
]

KNOWN = styles(["sgd", "asgd", "dasgd", "momentum", "nesterov"])
COLOURS = {name: look.colour for name, look in KNOWN.items()}
TITLES = {
    "train_accuracy": "train accuracy",
    "test_accuracy": "test accuracy",
    "train_loss": "train loss",
    "test_loss": "test loss",
}
NAMES = {"sgd": "SGD", "asgd": "aSGD", "dasgd": "DA-SGD"}
# From light to dark, for learning rates of one optimizer.
SHADES = {
    "asgd": ("#f7b77e", "#f08a3c", "#d55e00", "#8f3f00"),
    "sgd": ("#b3dced", "#7cc4e4", "#3fa3d6", "#1f7ab8", "#3a4fa8", "#3b2a85", "#1c0f4a"),
}
# The share of the epochs that learning curves' axes do not fit.
EARLY = 0.15
# Beside a shade, for those that lie close together.
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))


def learning_curves(curves: pd.DataFrame, cells: Sequence[tuple[str, float]]) -> Figure:
    """Figure 8: accuracy and loss over the epochs, aSGD beside SGD, with mean and 95 % interval.

    Args:
        curves: Of the main protocol.
        cells: Optimizers and learning rates to draw.
    """
    figure = Figure(figsize=(8.0, 9.0), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(len(TITLES), 2, sharex=True, sharey="row")
    marks = {}
    for row, column in zip(grid, TITLES, strict=True):
        lines = []
        for axes, name in zip(row, ("asgd", "sgd"), strict=True):
            plain_axes(axes)
            axes.set_title(f"{NAMES[name]}, {TITLES[column]}", loc="left", fontsize=9, color=INK)
            own = [lr for optimizer, lr in cells if optimizer == name]
            shades = _spread(SHADES[name], len(own))
            for lr, colour, style in zip(own, shades, cycle(DASHES), strict=False):
                part = curves[(curves["optimizer"] == name) & np.isclose(curves["lr"], lr)]
                if not len(part):
                    continue
                lines.append(_mean_and_band(axes, part, column, colour, style))
                marks[f"{NAMES[name]} {lr:g}"] = Line2D([], [], color=colour, linestyle=style)
        _limit(row[0], lines)
    figure.supxlabel("epoch", fontsize=9, color=INK)
    _explain(figure, marks, 6)
    return figure


def rates(curves: pd.DataFrame) -> Figure:
    """DA-SGD Figure 3: test accuracy by epoch for each learning rate.

    Args:
        curves: Of dasgd-lr.
    """
    figure = Figure(figsize=(7.0, 3.6), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    plain_axes(axes)
    marks = {}
    values = sorted(curves["lr"].unique())
    shades = _spread((*SHADES["sgd"], *reversed(SHADES["asgd"])), len(values))
    for lr, colour in zip(values, shades, strict=True):
        _mean_and_band(axes, curves[curves["lr"] == lr], "test_accuracy", colour)
        marks[f"{lr:g}"] = Line2D([], [], color=colour, linewidth=2)
    axes.set_xlabel("epoch", fontsize=9, color=INK)
    axes.set_ylabel("test accuracy", fontsize=9, color=INK)
    _explain(figure, marks, 5)
    return figure


def error_by_batch(curves: pd.DataFrame) -> Figure:
    """DA-SGD Figure 4: test error at the last epoch by batch size, a panel per data set.

    Args:
        curves: Of dasgd-batch, the main protocol.
    """
    figure = Figure(figsize=(8.0, 3.0), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(1, len(DASGD_DATA), sharex=True)
    rows = last(curves)
    for axes, data in zip(grid, DASGD_DATA, strict=True):
        plain_axes(axes)
        own = rows[rows["data"] == data]
        title = own["data_read"].iloc[0] if len(own) else data
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        for name in ("sgd", "dasgd"):
            part = own[own["optimizer"] == name]
            _points(axes, part.assign(error=1 - part["test_accuracy"]), "error", name)
        axes.set_xticks(range(len(BATCHES)), [str(size) for size in BATCHES])
    grid[0].set_ylabel("test error", fontsize=9, color=INK)
    figure.supxlabel("batch size", fontsize=9, color=INK)
    _explain(figure, _two(), 2)
    return figure


def accuracy_by_epoch(curves: pd.DataFrame) -> Figure:
    """DA-SGD Figure 5: test accuracy by epoch, a panel per batch size.

    Args:
        curves: Of dasgd-batch, the main protocol, one data set.
    """
    figure = Figure(figsize=(8.0, 5.6), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(3, 3, sharex=True)
    for axes, (size, lr) in zip(grid.flat, BATCHES.items(), strict=True):
        plain_axes(axes)
        axes.set_title(f"batch {size}, lr {lr:g}", loc="left", fontsize=8, color=INK)
        for name in ("sgd", "dasgd"):
            rows = curves[(curves["batch_size"] == size) & (curves["optimizer"] == name)]
            if len(rows):
                _mean_and_band(axes, rows, "test_accuracy", COLOURS[name])
    figure.supxlabel("epoch", fontsize=9, color=INK)
    figure.supylabel("test accuracy", fontsize=9, color=INK)
    _explain(figure, _two(), 2)
    return figure


def rivals(curves: pd.DataFrame) -> Figure:
    """DA-SGD against momentum, Nesterov and SGD at larger rates: accuracy by epoch, by batch size.

    Args:
        curves: Of dasgd-momentum.
    """
    sizes = sorted(curves["batch_size"].unique())
    figure = Figure(figsize=(8.0, 3.4), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(1, len(sizes), sharex=True, squeeze=False)[0]
    marks = {}
    for axes, size in zip(grid, sizes, strict=True):
        plain_axes(axes)
        axes.set_title(f"batch {size}", loc="left", fontsize=9, color=INK)
        for label, colour, style, rows in contestants(curves[curves["batch_size"] == size], size):
            _mean_and_band(axes, rows, "test_accuracy", colour, style)
            marks[label] = Line2D([], [], color=colour, linestyle=style, linewidth=2)
    grid[0].set_ylabel("test accuracy", fontsize=9, color=INK)
    figure.supxlabel("epoch", fontsize=9, color=INK)
    _explain(figure, marks, 4)
    return figure


def contestants(curves: pd.DataFrame, size: int) -> Iterable[tuple[str, str, Any, pd.DataFrame]]:
    """The optimizers of dasgd-momentum at one batch size: each with its name, colour, line style and rows.

    Args:
        curves: Of that batch size.
        size: The batch size.
    """
    looks = {
        "dasgd": (COLOURS["dasgd"], "-"),
        "momentum 0.5": (COLOURS["momentum"], "--"),
        "momentum 0.9": (COLOURS["momentum"], "-"),
        # Lies on momentum 0.9, which shows in its wide gaps.
        "nesterov 0.9": (COLOURS["nesterov"], (0, (4, 4))),
    }
    for name, (colour, style) in looks.items():
        rows = curves[curves["optimizer"] == name]
        if len(rows):
            yield NAMES.get(name, name), colour, style, rows
    for factor, style in ((1.0, "-"), (1.5, "--"), (2.0, ":")):
        rows = curves[
            (curves["optimizer"] == "sgd") & np.isclose(curves["lr"], factor * BATCHES[size])
        ]
        if len(rows):
            yield f"SGD at {factor:g} x lr", COLOURS["sgd"], style, rows


def _mean_and_band(
    axes: Axes, rows: pd.DataFrame, column: str, colour: str, style: Any = "-"
) -> pd.DataFrame:
    """The mean over seeds at each epoch, with its 95 % interval as a band, of accuracies within 0 to 1."""
    effects = {epoch: mean(column, part.dropna()) for epoch, part in rows.groupby("epoch")[column]}
    line = pd.DataFrame(
        [(effect.mean, effect.low, effect.high) for effect in effects.values()],
        index=list(effects),
        columns=["mean", "low", "high"],
    )
    band = line[["low", "high"]].clip(0, 1 if column.endswith("accuracy") else None)
    axes.fill_between(line.index, band["low"], band["high"], color=colour, alpha=BAND, linewidth=0)
    axes.plot(line.index, line["mean"], color=colour, linewidth=1.3, linestyle=style)
    return line


def _points(axes: Axes, rows: pd.DataFrame, column: str, name: str) -> None:
    """Mean shares with 95 % intervals, within 0 to 1, at the batch sizes, evenly spaced."""
    places, effects = [], []
    for place, size in enumerate(BATCHES):
        values = rows[rows["batch_size"] == size][column].dropna()
        if len(values):
            places.append(place)
            effects.append(mean(column, values))
    means = [effect.mean for effect in effects]
    spread = np.nan_to_num(
        [
            [effect.mean - max(effect.low, 0), min(effect.high, 1) - effect.mean]
            for effect in effects
        ]
    ).T
    if effects:
        axes.errorbar(
            places, means, yerr=spread, color=COLOURS[name], marker=KNOWN[name].marker,
            markersize=4, linewidth=1.4, capsize=2,
        )  # fmt: skip


def _limit(axes: Axes, lines: Sequence[pd.DataFrame]) -> None:
    """Leaves the first steep epochs out of view, in which nothing is to be told apart."""
    if not lines:
        return
    late = pd.concat([line.loc[line.index >= EARLY * line.index.max(), "mean"] for line in lines])
    pad = 0.05 * (late.max() - late.min()) or 0.01
    axes.set_ylim(late.min() - pad, late.max() + pad)


def _two() -> dict[str, Line2D]:
    return {
        NAMES[name]: Line2D([], [], color=COLOURS[name], marker=KNOWN[name].marker, markersize=4)
        for name in ("sgd", "dasgd")
    }


def _explain(figure: Figure, marks: Mapping[str, Line2D], columns: int) -> None:
    figure.legend(
        list(marks.values()), list(marks), loc="outside upper left", ncols=columns,
        frameon=False, fontsize=8, labelcolor=INK, columnspacing=1.2, handlelength=2.8,
    )  # fmt: skip


def _spread(shades: Sequence[str], count: int) -> list[str]:
    """So many of the shades, evenly."""
    places = np.linspace(0, len(shades) - 1, count).round().astype(int)
    return [shades[place] for place in places]
