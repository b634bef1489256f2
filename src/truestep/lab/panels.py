"""Small panels, one by optimizer: how they are laid out and what is drawn in each.

Seven crossing lines with bands can't be told apart in one panel, so each optimizer has its own,
with the others in grey behind it. Looks are fixed by name, so that an optimizer is the same colour
in every figure.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

__all__ = [
    "BAND",
    "FAINT",
    "GRID",
    "INK",
    "ONCE_LINE",
    "PAPER",
    "TARGET_LINE",
    "Mark",
    "Place",
    "Style",
    "cross",
    "draw",
    "explain",
    "ghosts",
    "lay_out",
    "mark_lost",
    "plain_axes",
    "ring",
    "set_log_x",
    "set_log_y",
    "set_loss_y",
    "set_metric_y",
    "styles",
]

INK = "#222222"
FAINT = "#cccccc"
GRID = "#ececec"
PAPER = "#ffffff"
WIDTH = 8.0  # inches: 800 pixels at 100 dots per inch, where 9 points are easy to read
SMALL, NORMAL = 8.0, 9.0
COLUMNS = 4
# Wider loss ranges than this are logarithmic.
LOGARITHMIC_FROM = 3
# A logarithmic axis with fewer labels gets finer ones.
FEWEST_TICKS = 3
BAND = 0.2  # opacity of an interval
BAND_ROOM = 0.3  # how far intervals may widen an axis, relative to the spread of the means
TARGET_LINE: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (1, 2))}
ONCE_LINE: dict[str, Any] = {"linewidth": 1.0, "linestyle": "--", "zorder": 3}

# Optimizer and batch size.
Place = tuple[str, int]
# What a legend shows beside an explanation: one thing, or several on top of each other.
Mark = Artist | tuple[Artist, ...]


@dataclass(frozen=True)
class Style:
    """How an optimizer looks in every figure: colours on white and on black, and a marker."""

    colour: str
    dark_colour: str
    marker: str


# Okabe and Ito's colours and Paul Tol's muted ones, which colour-blind readers can tell apart.
# Names that a race often has keep theirs; others take the spare ones in alphabetical order.
KNOWN = {
    "sgd": Style(INK, "#f0f0f0", "o"),
    "momentum": Style("#56b4e9", "#7cc8f2", "s"),
    "nesterov": Style("#332288", "#9d92f0", "D"),
    "adagrad": Style("#e69f00", "#f0b42c", "^"),
    "rmsprop": Style("#999933", "#c2c25a", "v"),
    "adam": Style("#cc79a7", "#e39cc3", "P"),
    "adamw": Style("#882255", "#d9709f", "X"),
    "dasgd": Style("#0072b2", "#4aa8e0", "s"),
    "asgd": Style("#d55e00", "#f58a3c", "o"),
    "asgd+dasgd": Style("#009e73", "#2cc79b", "D"),
}
SPARE = (
    Style("#44aa99", "#6fd0c0", "v"),
    Style("#aa4499", "#d680c8", "^"),
    Style("#117733", "#55b877", "P"),
    Style("#cc6677", "#e8929f", "X"),
    Style("#88760a", "#d3bd4a", "s"),
    Style("#4b5bb5", "#95a2ee", "o"),
)


def styles(names: Iterable[str]) -> dict[str, Style]:
    """The looks of a race's optimizers, the same in all its figures, in the order of drawing.

    Args:
        names: The optimizers.

    Example:
        >>> list(styles(["zeta", "adam", "sgd"]))
        ['sgd', 'adam', 'zeta']
    """
    unique = set(names)
    spare = cycle(SPARE)
    return {name: style for name, style in KNOWN.items() if name in unique} | {
        name: next(spare) for name in sorted(unique - KNOWN.keys())
    }


# The panels.


def lay_out(places: Collection[Place], x: str, y: str) -> tuple[Figure, dict[Place, Axes]]:
    """Panels by optimizer; with several batch sizes, a row by optimizer and a column by size.

    Args:
        places: Which panels there are.
        x: Label of all x axes.
        y: Label of all y axes.

    Returns:
        The figure, and the axes by place.
    """
    looks = styles(name for name, _ in places)
    sizes = sorted({size for _, size in places})
    by_size = len(sizes) > 1
    rows = len(looks) if by_size else math.ceil(len(looks) / COLUMNS)
    # Five are three and two rather than four and one.
    columns = len(sizes) if by_size else math.ceil(len(looks) / rows)
    height = (1.2 if by_size else 1.8) * rows + 0.9
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = {}
    for row, name in enumerate(looks):
        for column, size in enumerate(sizes):
            axes = grid[row, column] if by_size else grid.flat[row]
            plain_axes(axes)
            if by_size:
                _name_row_and_column(axes, name, size, first=row == 0, last=size == sizes[-1])
            else:
                axes.set_title(_short(name, 26), loc="left", pad=3, **_title(name, 26))
                # Below the last panel of a column there is nothing to share its labels with.
                axes.xaxis.set_tick_params(labelbottom=row + columns >= len(looks))
            if (name, size) in places:
                panels[name, size] = axes
    for axes in set(grid.flat) - set(panels.values()):
        axes.set_visible(False)
    figure.supxlabel(x, fontsize=NORMAL, color=INK)
    figure.supylabel(y, fontsize=NORMAL, color=INK)
    return figure, panels


def explain(figure: Figure, marks: Mapping[str, Mark]) -> None:
    """A line of explanations above the panels.

    Args:
        figure: The figure.
        marks: By explanation, what matplotlib takes as a legend's handle.
    """
    figure.legend(
        cast("list[Artist]", list(marks.values())),  # the stubs forget tuples
        list(marks),
        loc="outside upper left",
        ncols=len(marks),
        frameon=False,
        fontsize=SMALL,
        labelcolor=INK,
        borderpad=0,
        handletextpad=0.5,
        columnspacing=1.4,
    )


def plain_axes(axes: Axes) -> None:
    """The look of every panel: two spines, faint horizontal lines, small labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=FAINT)
    axes.tick_params(labelsize=SMALL, labelcolor=INK, color=FAINT, length=3)
    axes.set_facecolor("none")
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _name_row_and_column(axes: Axes, name: str, size: int, *, first: bool, last: bool) -> None:
    if first:
        axes.set_title(f"batch size {size}", fontsize=NORMAL, color=INK)
    if last:
        axes.annotate(
            _short(name, 15),
            (1.04, 0.5),
            xycoords="axes fraction",
            rotation=270,
            va="center",
            **_title(name, 15),
        )


def _short(name: str, length: int) -> str:
    """The class of an import path, and no more of a name than there is room for."""
    name = name.rsplit(":", 1)[-1]
    return name if len(name) <= 2 * length else f"{name[: 2 * length - 1]}…"


def _title(name: str, length: int) -> dict[str, Any]:
    size = NORMAL * min(1.0, length / len(_short(name, length)))
    return {"color": INK, "fontsize": size, "fontweight": "bold"}


# What is drawn in a panel.


def ghosts(axes: Axes, lines: Iterable["pd.Series[float]"]) -> None:
    """Lines of other panels, in grey behind everything."""
    for line in lines:
        axes.plot(line.index, line, color=FAINT, linewidth=0.8, zorder=1)


def draw(axes: Axes, line: pd.DataFrame, style: Style, *, markers: bool = True) -> None:
    """The column ``mean`` as a line, and its interval as a band where there is one."""
    if {"low", "high"} <= set(line.columns):
        axes.fill_between(
            line.index, line["low"], line["high"], color=style.colour, alpha=BAND, linewidth=0
        )
    axes.plot(
        line.index,
        line["mean"],
        color=style.colour,
        marker=style.marker if markers else "",
        markersize=4,
        linewidth=1.8,
        zorder=3,
    )


def mark_lost(axes: Axes, places: Iterable[float], style: Style) -> None:
    """Crosses along the top edge, where a result is not a number."""
    for place in places:
        handle = cross(style.colour)
        handle.set(transform=axes.get_xaxis_transform(), zorder=4)
        handle.set_data([place], [0.94])
        axes.add_line(handle)


def cross(colour: str = INK) -> Line2D:
    """The mark of a lost result."""
    return Line2D([], [], color=colour, marker="x", markersize=5, markeredgewidth=1.4, linewidth=0)


def ring(colour: str = INK) -> Line2D:
    """The mark of a choice."""
    return Line2D(
        [],
        [],
        marker="o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=colour,
        linewidth=0,
        zorder=4,
    )


# The axes. Numbers are written out: 0.001 rather than a power of ten.


def set_log_x(
    panels: Iterable[Axes], values: Collection[float], ticks: Collection[float] = ()
) -> None:
    """A logarithmic axis as wide as the values, with these ticks or at decades."""
    low, high = min(values), max(values)
    pad = (high / low) ** 0.06 if high > low else 1.5
    low, high = low / pad, high * pad
    decades = [10.0**k for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    shown = sorted(ticks) or decades[:: max(1, math.ceil(len(decades) / 4))] or sorted(set(values))
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(FixedLocator(shown))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(_written_out))


def set_metric_y(panels: Iterable[Axes], table: pd.DataFrame) -> None:
    """Room for all means; intervals may go beyond what a metric can be, and the axis should not.

    Args:
        panels: The axes.
        table: With the column ``mean``.
    """
    low, high = float(table["mean"].min()), float(table["mean"].max())
    pad = 0.08 * (high - low) or 0.1
    for axes in panels:
        axes.set_ylim(low - pad, high + pad)
        axes.yaxis.set_major_locator(MaxNLocator(5))


def set_loss_y(panels: Iterable[Axes], table: pd.DataFrame, spread: float = math.inf) -> None:
    """Room for all means and for most of their intervals, logarithmic where that spans much.

    Args:
        panels: The axes.
        table: With the columns ``mean``, ``low`` and ``high``.
        spread: The axis ends at this multiple of the lowest mean.
    """
    means = table["mean"].dropna()
    if not len(means):
        return
    low, high = float(means.min()), float(means.max())
    if low > 0:
        high = min(high, low * spread)
    # The interval of two seeds can be a dozen times as wide as their distance.
    room = BAND_ROOM * (high - low)
    ends = table[["low", "high"]].fillna({"low": low, "high": high})
    top = min(max(float(ends["high"].max()), high), high + room)
    bottom = max(min(float(ends["low"].min()), low), low - room)
    if low > 0 and high / low > LOGARITHMIC_FROM:
        set_log_y(panels, [max(bottom, low / (1 + BAND_ROOM)), top], margin=1.1)
        return
    pad = 0.08 * (top - bottom) or 0.1
    for axes in panels:
        axes.set_ylim(bottom - pad, top + 2 * pad)
        axes.yaxis.set_major_locator(MaxNLocator(5))


def set_log_y(panels: Iterable[Axes], values: Iterable[float], margin: float) -> None:
    """A logarithmic axis for the positive values, this factor wider at both ends."""
    positive = [value for value in values if math.isfinite(value) and value > 0]
    if not positive:
        return
    low, high = min(positive) / margin, max(positive) * margin
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        if len(ticks) < FEWEST_TICKS:
            ticks = [step * 10.0**k for k in decades for step in steps]
            ticks = [tick for tick in ticks if low <= tick <= high]
    for axes in panels:
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(_written_out))


def _written_out(value: float, _: object) -> str:
    return np.format_float_positional(value, precision=6, fractional=False, trim="-")
