"""One function per figure: tables of `statistics` in, a matplotlib figure out, no global state."""

import math
from collections.abc import Iterable
from typing import cast

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from truestep.lab.panels import (
    BAND,
    FAINT,
    INK,
    ONCE_LINE,
    TARGET_LINE,
    Mark,
    Place,
    cross,
    draw,
    explain,
    ghosts,
    lay_out,
    mark_lost,
    ring,
    set_log_x,
    set_log_y,
    set_loss_y,
    set_metric_y,
    styles,
)

__all__ = ["batch_sizes", "curves", "learning_rates", "steps_to_target"]

# With more evaluations than this a curve is a line without markers.
MARKERS_UP_TO = 12
GOOD_BAND = 0.14  # opacity


def learning_rates(landscape: pd.DataFrame, chosen: pd.DataFrame) -> Figure:
    """Validation loss against the learning rate, with the choice and the band of good ones.

    Args:
        landscape: Of :func:`truestep.lab.statistics.landscape`.
        chosen: Of :func:`truestep.lab.statistics.choose`.
    """
    table = landscape.replace(math.inf, math.nan).rename(columns={"loss": "mean"})
    figure, panels = lay_out(chosen.index.to_list(), "learning rate", "validation loss")
    looks = styles(name for name, _ in panels)
    choices = chosen.to_dict("index")
    for place, axes in panels.items():
        style, choice, line = looks[place[0]], choices[place], _part(table, place)
        ghosts(axes, (_part(table, rival)["mean"] for rival in _rivals(place, panels)))
        if math.isfinite(choice["lr"]):
            # Wider than its ends, since a band of one learning rate would not be seen.
            low, high = choice["good_low"] / 1.2, choice["good_high"] * 1.2
            axes.axvspan(low, high, color=style.colour, alpha=GOOD_BAND, linewidth=0, zorder=0)
            mark = ring(style.colour)
            mark.set_data([choice["lr"]], [line.loc[choice["lr"], "mean"]])
            axes.add_line(mark)
        draw(axes, line, style)
        mark_lost(axes, line.index[line["diverged"] > 0], style)
    set_log_x(panels.values(), landscape.index.get_level_values("lr"))
    set_loss_y(panels.values(), table, spread=6.0)
    marks: dict[str, Mark] = {
        "mean and 95 % interval": _mean_and_band(),
        "chosen": ring(),
        "within 5 % of the best": Patch(color=INK, alpha=GOOD_BAND, linewidth=0),
        "other optimizers": Line2D([], [], color=FAINT),
    }
    if (landscape["diverged"] > 0).any():
        marks["a seed diverged"] = cross()
    explain(figure, marks)
    return figure


def curves(table: pd.DataFrame, metric: str, target: float | None = None) -> Figure:
    """A validation metric over training, each optimizer at its chosen learning rate.

    Args:
        table: Of :func:`truestep.lab.statistics.learning_curves`.
        metric: What the table holds, for the label.
        target: Value to mark with a line.
    """
    places = dict.fromkeys((name, size) for name, size, _ in table.index.to_list())
    figure, panels = lay_out(places.keys(), "epoch", f"validation {metric}")
    looks = styles(name for name, _ in panels)
    for place, axes in panels.items():
        line = _part(table, place)
        ghosts(axes, (_part(table, rival)["mean"] for rival in _rivals(place, panels)))
        if target is not None:
            axes.axhline(target, **TARGET_LINE, zorder=2)
        draw(axes, line, looks[place[0]], markers=len(line) <= MARKERS_UP_TO)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    # The target is in view, however far off it is.
    seen = table if target is None else pd.concat([table, pd.DataFrame({"mean": [target]})])
    if metric == "loss":
        set_loss_y(panels.values(), seen)
    else:
        set_metric_y(panels.values(), seen)
    marks: dict[str, Mark] = {
        "mean and 95 % interval": _mean_and_band(),
        "other optimizers": Line2D([], [], color=FAINT),
    }
    if target is not None:
        marks[f"target, {target:g}"] = Line2D([], [], **TARGET_LINE)
    explain(figure, marks)
    return figure


def steps_to_target(summary: pd.DataFrame) -> Figure:
    """Median steps to the target against the batch size, with the line of perfect scaling.

    Args:
        summary: Of :func:`truestep.lab.statistics.summarise`, with a target.
    """
    steps = summary["step_to_target"].replace(math.inf, math.nan)
    sizes = sorted(set(steps.index.get_level_values("batch_size")))
    names = set(steps.index.get_level_values("optimizer"))
    figure, panels = lay_out([(name, 0) for name in names], "batch size", "steps to the target")
    looks = styles(names)
    for place, axes in panels.items():
        style, line = looks[place[0]], steps.loc[place[0]]
        ghosts(axes, (steps.loc[rival] for rival, _ in _rivals(place, panels)))
        reached = line.dropna()
        if len(reached):
            # Twice the batch, half the steps: as many epochs at every batch size.
            perfect = [reached.iloc[0] * reached.index[0] / size for size in sizes]
            axes.plot(sizes, perfect, **TARGET_LINE, zorder=2)
        draw(axes, line.to_frame("mean"), style)
        mark_lost(axes, line.index[line.isna()], style)
    set_log_x(panels.values(), sizes, ticks=sizes)
    # Where nobody gets there, crosses stand above one to ten steps.
    set_log_y(panels.values(), steps.dropna() if steps.notna().any() else (1, 10), margin=1.6)
    marks: dict[str, Mark] = {
        "median of the seeds": Line2D([], [], color=INK, marker="o", markersize=4),
        "half the steps at twice the batch": Line2D([], [], **TARGET_LINE),
        "other optimizers": Line2D([], [], color=FAINT),
    }
    if steps.isna().any():
        marks["not reached"] = cross()
    explain(figure, marks)
    return figure


def batch_sizes(own: pd.DataFrame, fixed: pd.DataFrame, reference: int) -> Figure:
    """Test loss against the batch size: learning rate tuned at each, and tuned once.

    Args:
        own: Of :func:`truestep.lab.statistics.summarise` for the chosen learning rates.
        fixed: The same for :func:`truestep.lab.statistics.at_reference`.
        reference: The batch size whose learning rates ``fixed`` has.
    """
    tuned, once = _finished(own), _finished(fixed)
    sizes = sorted(set(own.index.get_level_values("batch_size")))
    names = set(own.index.get_level_values("optimizer"))
    figure, panels = lay_out([(name, 0) for name in names], "batch size", "test loss")
    looks = styles(names)
    for place, axes in panels.items():
        style, line, thin = looks[place[0]], _part(tuned, place[0]), _part(once, place[0])
        ghosts(axes, (_part(tuned, rival)["mean"] for rival, _ in _rivals(place, panels)))
        axes.plot(thin.index, thin["mean"], color=style.colour, **ONCE_LINE)
        draw(axes, line, style)
        lost = (thin["diverged_seeds"] > 0) | (line["diverged_seeds"] > 0)
        mark_lost(axes, thin.index[lost], style)
    both = pd.concat([tuned, once])
    set_log_x(panels.values(), sizes, ticks=sizes)
    set_loss_y(panels.values(), both)
    marks: dict[str, Mark] = {
        "learning rate tuned at each batch size (95 % interval)": _mean_and_band(),
        f"tuned at {reference} only": Line2D([], [], color=INK, **ONCE_LINE),
        "others, tuned at each": Line2D([], [], color=FAINT),
    }
    if (both["diverged_seeds"] > 0).any():
        marks["a seed diverged"] = cross()
    explain(figure, marks)
    return figure


def _part(table: pd.DataFrame, place: Place | str) -> pd.DataFrame:
    """The rows of one panel, by what is left of the index."""
    return cast("pd.DataFrame", table.xs(place))


def _rivals(place: Place, places: Iterable[Place]) -> list[Place]:
    name, size = place
    return [other for other in places if other[0] != name and other[1] == size]


def _mean_and_band() -> Mark:
    line = Line2D([], [], color=INK, marker="o", markersize=4, linewidth=1.8)
    return Patch(color=INK, alpha=BAND, linewidth=0), line


def _finished(summary: pd.DataFrame) -> pd.DataFrame:
    """The test loss where no seed diverged; nan where one did."""
    columns = {"test_loss": "mean", "test_loss_low": "low", "test_loss_high": "high"}
    table = summary.rename(columns=columns)
    values = table[["mean", "low", "high"]].where(table["diverged_seeds"] == 0)
    return values.assign(diverged_seeds=table["diverged_seeds"])
