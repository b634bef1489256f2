"""Figures that the papers don't have: the premise, stability late in training, Table 1's level."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from truestep.lab.panels import GRID, INK, PAPER, plain_axes, set_log_x, set_log_y, styles
from truestep.lab.paper.effects import mean
from truestep.lab.paper.plans_asgd import STABILISED
from truestep.lab.paper.premise import SIZES
from truestep.lab.paper.tables import Found

__all__ = ["late_spread", "level", "premise", "stabilised"]

LOOKS = styles(["asgd", "sgd"])
NAMES = {"asgd": "aSGD", "sgd": "SGD"}
SHADES = ("#b9cfe4", "#8db4d6", "#5f97c6", "#3478b0", "#1d5c93", "#0f4472", "#062b4b")
# The last part of training is the last fifth of its epochs.
LATE = 0.8
# Spreads under this are on the linear part of their axis, which shows 0 as well.
LINEAR_TO = 0.001


def premise(found: list[Found]) -> Figure:
    """Size of the gradient and share of kept signs against the batch size, over training.

    Args:
        found: Records of dasgd-premise.
    """
    figure = Figure(figsize=(8.0, 3.4), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(1, 2)
    epochs = found[0][1].settings["epochs"]
    shades = [SHADES[place] for place in np.linspace(0, len(SHADES) - 1, len(epochs)).astype(int)]
    labels = {"gradients": "mean absolute gradient", "signs": "share of weights that keep the sign"}
    for axes, name in zip(grid, labels, strict=True):
        plain_axes(axes)
        values = np.stack([record.outcome.arrays[name] for _, record in found])
        for place, colour in enumerate(shades):
            effects = [mean(name, values[:, place, k]) for k in range(len(SIZES))]
            low = np.array([effect.low for effect in effects])
            high = np.array([effect.high for effect in effects])
            axes.fill_between(SIZES, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(
                SIZES, [effect.mean for effect in effects], color=colour, marker="o", markersize=3
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [str(size) for size in SIZES])
        axes.minorticks_off()
        axes.set_title(labels[name], loc="left", fontsize=9, color=INK)
    set_log_y([grid[0]], np.stack([r.outcome.arrays["gradients"] for _, r in found]).ravel(), 1.3)
    grid[1].axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
    figure.supxlabel("batch size", fontsize=9, color=INK)
    marks = {
        f"epoch {epoch}": Line2D([], [], color=colour, linewidth=2)
        for epoch, colour in zip(epochs, shades, strict=True)
    }
    figure.legend(
        list(marks.values()), list(marks), loc="outside upper left", ncols=len(marks),
        frameon=False, fontsize=8, labelcolor=INK, columnspacing=1.0,
    )  # fmt: skip
    return figure


def late_spread(curves: pd.DataFrame) -> pd.DataFrame:
    """How unstable each training is late, and how good it was at best.

    Args:
        curves: Of asgd-stabilised.

    Returns:
        A row per training: ``help``, ``optimizer`` (``asgd`` or ``sgd``), ``seed``, ``spread`` (the
        standard deviation of the test loss over the last fifth of the epochs), ``lowest`` (its
        test loss at the lowest validation loss), ``lowest test`` (its lowest test loss, as the paper
        chooses), ``final`` (at the last epoch) and ``accuracy`` (test accuracy at the lowest
        validation loss). ``early stopping`` is ``alone`` stopped at
        its lowest validation loss: it has no late training.
    """
    rows: list[dict[str, Any]] = []
    for (variant, name, _), part in curves.groupby(["variant", "optimizer", "seed"]):
        late = part[part["epoch"] > LATE * part["epoch"].max()]["test_loss"]
        chosen = part.nsmallest(1, "validation_loss")
        row: dict[str, Any] = {
            "help": str(variant).removeprefix("help: "),
            "optimizer": "asgd" if str(name).startswith("asgd") else "sgd",
            "seed": int(part["seed"].iloc[0]),
            "spread": float(late.std()),
            "lowest": float(chosen["test_loss"].iloc[0]),
            "lowest test": float(part["test_loss"].min()),
            "accuracy": float(chosen["test_accuracy"].iloc[0]),
            "final": float(part["test_loss"].iloc[-1]),
        }
        rows.append(row)
        if row["help"] == "alone":
            stopped = {"help": "early stopping", "spread": np.nan, "final": row["lowest"]}
            rows.append(row | stopped)
    return pd.DataFrame(rows)


def stabilised(curves: pd.DataFrame) -> Figure:
    """Late spread, last and best test loss, with each help, aSGD beside SGD.

    Args:
        curves: Of asgd-stabilised.
    """
    table = late_spread(curves)
    helps = ["alone", "early stopping", *list(STABILISED)[1:]]
    figure = Figure(figsize=(8.0, 3.8), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(1, 3, sharey=True)
    # Before anything is drawn: margins are made on the scale that an axis has by then.
    grid[0].set_xscale("symlog", linthresh=LINEAR_TO, linscale=0.5)
    grid[0].xaxis.set_major_formatter("{x:g}")
    columns = {
        "spread": (
            "spread of the test loss, late",
            f"standard deviation,\nlogarithmic above {LINEAR_TO}",
        ),
        "final": ("test loss at the end", "test loss"),
        "lowest": ("test loss, chosen on validation", "test loss"),
    }
    for axes, (column, (title, label)) in zip(grid, columns.items(), strict=True):
        plain_axes(axes)
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_xlabel(label, fontsize=8, color=INK)
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        for shift, name in ((-0.15, "asgd"), (0.15, "sgd")):
            for place, help_ in enumerate(helps):
                rows = table[(table["help"] == help_) & (table["optimizer"] == name)]
                effect = mean(column, rows[column].dropna())
                if effect.n:
                    # Of few trainings an interval can go beyond what there is.
                    spread = np.nan_to_num(
                        [[effect.mean - max(effect.low, 0)], [effect.high - effect.mean]]
                    )
                    axes.errorbar(
                        effect.mean, place + shift, xerr=spread, color=LOOKS[name].colour,
                        marker=LOOKS[name].marker, markersize=5, capsize=2,
                    )  # fmt: skip
        axes.set_yticks(range(len(helps)), helps)
    grid[0].invert_yaxis()
    marks = [
        Line2D([], [], color=look.colour, marker=look.marker, linewidth=0)
        for look in (LOOKS["asgd"], LOOKS["sgd"])
    ]
    figure.legend(
        marks, ["aSGD", "SGD"], loc="outside upper left", ncols=2, frameon=False, fontsize=8,
        labelcolor=INK,
    )  # fmt: skip
    return figure


def level(table: pd.DataFrame) -> Figure:
    """Distance to the paper's tables against the steps of an epoch, a line per setting.

    Args:
        table: Of :func:`levels.distances`.
    """
    figure = Figure(figsize=(8.0, 3.4), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(1, 3, sharex=True, sharey=True)
    titles = {"distance": "all rows", "distance asgd": "aSGD's rows", "distance sgd": "SGD's rows"}
    names = list(dict.fromkeys(table["setting"]))
    colours = [look.colour for look in styles([f"{k}" for k in range(len(names))]).values()]
    for axes, (column, title) in zip(grid, titles.items(), strict=True):
        plain_axes(axes)
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        for colour, name in zip(colours, names, strict=True):
            part = table[table["setting"] == name]
            axes.plot(part["steps"], part[column], color=colour, marker="o", markersize=3)
    steps = sorted(table["steps"].unique())
    set_log_x(grid, steps, ticks=steps[::2])
    distances = table[list(titles)].to_numpy().ravel()
    set_log_y(grid, distances[np.isfinite(distances)], margin=1.2)
    figure.supxlabel("steps in one of the 500 epochs", fontsize=9, color=INK)
    grid[0].set_ylabel("distance in the paper's\nstandard deviations", fontsize=9, color=INK)
    figure.legend(
        [Line2D([], [], color=colour, linewidth=2) for colour in colours], names,
        loc="outside upper left", ncols=2, frameon=False, fontsize=8, labelcolor=INK,
    )  # fmt: skip
    return figure
