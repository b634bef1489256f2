"""Accuracy and size of networks after their redundant units were taken out."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from truestep.lab.panels import (
    BAND,
    GRID,
    INK,
    PAPER,
    explain,
    plain_axes,
    ring,
    set_log_x,
    styles,
)
from truestep.lab.paper.effects import mean
from truestep.lab.paper.plans_asgd import COMPRESSION_DATA

__all__ = ["Setting", "accuracy_and_size", "by_rate", "settings"]

LOOKS = styles(["asgd", "sgd"])
NAMES = {"asgd": "aSGD", "sgd": "SGD"}
# SGD at a learning rate that is not its own.
BORROWED = "#56b4e9"


class Setting(NamedTuple):
    """An optimizer at a learning rate, on one data set.

    Attributes:
        name: What the learning rate is.
        optimizer: ``"asgd"`` or ``"sgd"``.
        lr: The learning rate.
        rows: Its trainings.
    """

    name: str
    optimizer: str
    lr: float
    rows: pd.DataFrame


def settings(table: pd.DataFrame, data: str) -> dict[str, Setting]:
    """Equal and matched learning rates: each optimizer at its own best, SGD at aSGD's, aSGD at SGD's.

    The best has the lowest mean validation loss among those at which no training diverged.

    Args:
        table: Of :func:`tables.of_compression`, one variant.
        data: Which data set.

    Returns:
        By ``"asgd"``, ``"sgd"`` (each at its own best), ``"sgd at asgd's"`` and ``"asgd at sgd's"``; none
        where a part of it was not run.
    """
    part = table[table["data"] == data]
    best = {}
    for name in ("asgd", "sgd"):
        own = part[part["optimizer"] == name]
        by_lr = own.groupby("lr")["validation_loss"].agg(lambda v: v.mean(skipna=False))
        if by_lr.notna().any():
            best[name] = float(by_lr.idxmin())  # type: ignore[arg-type]
    if len(best) < len(NAMES):
        return {}
    found = {}
    for name, other in (("asgd", "sgd"), ("sgd", "asgd")):
        for key, whose in ((name, name), (f"{name} at {other}'s", other)):
            chosen = part[(part["optimizer"] == name) & (part["lr"] == best[whose])]
            words = "its own best" if whose == name else f"{NAMES[whose]}'s best"
            found[key] = Setting(words, name, best[whose], chosen.dropna(subset=["accuracy"]))
    return found


def accuracy_and_size(table: pd.DataFrame) -> Figure:
    """Test accuracy against the parameters that are left, a panel per data set.

    Small marks are networks, large ones means; a line leads from the networks as they were trained to
    what is left of them.

    Args:
        table: Of :func:`tables.of_compression`, the main protocol.
    """
    figure = Figure(figsize=(8.0, 5.2), layout="constrained", facecolor=PAPER)
    marks = {
        "asgd": ("aSGD at its lowest validation loss", LOOKS["asgd"].colour, "o"),
        "sgd at asgd's": ("SGD at the same learning rate", BORROWED, "s"),
        "sgd": ("SGD at its own lowest", LOOKS["sgd"].colour, "D"),
    }
    for axes, data in zip(figure.subplots(2, 2).flat, COMPRESSION_DATA, strict=True):
        plain_axes(axes)
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_title(data, loc="left", fontsize=9, color=INK)
        for key, setting in settings(table, data).items():
            if key not in marks or not len(setting.rows):
                continue
            _, colour, marker = marks[key]
            left, accuracy = setting.rows["parameters"], 100 * setting.rows["accuracy"]
            axes.plot(left, accuracy, marker, color=colour, markersize=3, alpha=0.4, linewidth=0)
            axes.plot(
                [100, left.mean()],
                [100 * setting.rows["accuracy_before"].mean(), accuracy.mean()],
                color=colour, linewidth=1.2,
            )  # fmt: skip
            axes.plot(left.mean(), accuracy.mean(), marker, color=colour, markersize=8)
    figure.supxlabel("parameters left, %", fontsize=9, color=INK)
    figure.supylabel("test accuracy, %", fontsize=9, color=INK)
    explain(
        figure,
        {
            words: Line2D([], [], color=colour, marker=marker)
            for words, colour, marker in marks.values()
        },
    )
    return figure


def by_rate(table: pd.DataFrame) -> Figure:
    """Parameters left and test accuracy at each learning rate, aSGD beside SGD, a column per data set.

    Args:
        table: Of :func:`tables.of_compression`, the main protocol.
    """
    figure = Figure(figsize=(8.0, 4.2), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(2, len(COMPRESSION_DATA), sharex=True, sharey=True)
    rates = sorted(table["lr"].unique())
    for column, data in enumerate(COMPRESSION_DATA):
        part = table[table["data"] == data]
        best = settings(table, data)
        grid[0, column].set_title(data, loc="left", fontsize=9, color=INK)
        for axes, measure, factor in zip(
            grid[:, column], ("parameters", "accuracy"), (1, 100), strict=True
        ):
            plain_axes(axes)
            for name, look in LOOKS.items():
                own = part[part["optimizer"] == name]
                effects = {
                    lr: mean(measure, factor * rows[measure].dropna())
                    for lr, rows in own.groupby("lr")
                    if rows[measure].notna().any()
                }
                means = [effect.mean for effect in effects.values()]
                # Of few trainings an interval can go beyond what there is.
                low, high = (
                    np.clip([getattr(effect, end) for effect in effects.values()], 0, 100)
                    for end in ("low", "high")
                )
                axes.fill_between(
                    list(effects), low, high, color=look.colour, alpha=BAND, linewidth=0
                )
                axes.plot(list(effects), means, color=look.colour, marker=look.marker, markersize=4)
                if name in best and best[name].lr in effects:
                    chosen = ring(look.colour)
                    chosen.set_data([best[name].lr], [effects[best[name].lr].mean])
                    axes.add_line(chosen)
    set_log_x(grid.flat, rates, ticks=rates[::2])
    grid[0, 0].set_ylim(0, 105)
    grid[0, 0].set_ylabel("parameters left, %", fontsize=9, color=INK)
    grid[1, 0].set_ylabel("test accuracy, %", fontsize=9, color=INK)
    figure.supxlabel("learning rate", fontsize=9, color=INK)
    marks = {
        NAMES[name]: Line2D([], [], color=look.colour, marker=look.marker, markersize=4)
        for name, look in LOOKS.items()
    }
    explain(figure, {**marks, "lowest validation loss": ring()})
    return figure
