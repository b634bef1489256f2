"""The summary of a race as text: the columns of the report's table, and a table for a terminal."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

__all__ = ["Column", "Row", "columns", "plain", "sorted_rows", "table", "with_interval"]

Row = Mapping[str, Any]

DECIMALS = 4
# Numbers from here on have four digits without decimals.
WHOLE = 1000


@dataclass(frozen=True)
class Column:
    """A column of the report's table.

    Attributes:
        head: What it holds, with the unit.
        explanation: The same in a sentence.
        text: A row's cell.
        value: What a row is sorted by; nan goes last.
        verdict: ``"better"``, ``"worse"`` or ``""``: whether a row's interval says so.
    """

    head: str
    explanation: str
    text: Callable[[Row], str]
    value: Callable[[Row], float | str]
    verdict: Callable[[Row], str] = lambda _: ""


def sorted_rows(summary: pd.DataFrame) -> list[Row]:
    """The rows by batch size, the lowest test loss first, those without one last."""
    order = ["batch_size", *summary.columns.intersection(["test_loss"]), "optimizer"]
    rows = summary.reset_index().sort_values(order, na_position="last").to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def columns(summary: pd.DataFrame, target: tuple[str, float] | None = None) -> list[Column]:
    """The columns of the report's table that this summary can fill.

    Args:
        summary: Of :func:`truestep.lab.statistics.summarise`.
        target: What it was asked for, for the heads.
    """
    baseline = str(summary.attrs["baseline"])
    compared = _compared(summary)
    shown = [
        Column("optimizer", "Name.", lambda row: row["optimizer"], lambda row: row["optimizer"])
    ]
    if _several(summary):
        shown.append(
            Column(
                "batch size",
                "Samples per step.",
                lambda row: str(row["batch_size"]),
                lambda row: row["batch_size"],
            )
        )
    shown.append(
        Column(
            "learning rate",
            "Chosen on validation data. * marks an end of the grid.",
            _learning_rate,
            lambda row: row["lr"],
        )
    )
    metrics = [name for name in ("loss", *_metrics(summary)) if f"test_{name}" in summary.columns]
    shown += [_test_column(metric) for metric in metrics]
    if compared:
        shown += [_difference_column(metric, baseline) for metric in metrics]
    if target is not None:
        sign = "≤" if target[0] == "loss" else "≥"
        goal = f"{target[0]} {sign} {target[1]:g}"
        shown += [
            _reach_column("epoch", f"epochs to {goal}"),
            _reach_column("seconds", f"seconds to {goal}"),
        ]
    shown.append(
        Column(
            "ms per step" + (f" (over {baseline}'s)" if compared else ""),
            "Median duration of a training step.",
            lambda row: _step(row, ratio=compared),
            lambda row: row["step_seconds"],
        )
    )
    shown += [
        Column(
            "memory, bytes per parameter",
            "Optimizer state and, for asgd, the counter's records, at their peak.",
            lambda row: plain(row["bytes_per_parameter"], 3),
            lambda row: row["bytes_per_parameter"],
        ),
        Column(
            "diverged in grid, %",
            "Share of the runs over all learning rates and seeds that diverged.",
            lambda row: f"{100 * row['diverged']:.0f}",
            lambda row: row["diverged"],
        ),
    ]
    return shown


def table(summary: pd.DataFrame) -> Table:
    """The summary for a terminal of 80 columns.

    Args:
        summary: Of :func:`truestep.lab.statistics.summarise`.
    """
    baseline = str(summary.attrs["baseline"])
    metrics = _metrics(summary)
    several, compared = _several(summary), _compared(summary)
    shown = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    shown.add_column("optimizer", overflow="fold")
    for head in (
        "lr",
        "test loss",
        *([f"minus\n{baseline}'s"] if compared else []),
        *(f"test\n{metric}" for metric in metrics[:1]),
        *(["target,\nepochs"] if "epoch_to_target" in summary.columns else []),
        "step,\nms",
        "B per\nparam",
    ):
        shown.add_column(head, justify="right", no_wrap=True)
    batch_size = None
    for row in sorted_rows(summary):
        if several and row["batch_size"] != batch_size:
            batch_size = row["batch_size"]
            shown.add_section()
            shown.add_row(Text(f"batch {batch_size}", style="bold"))
        name = row["optimizer"].rsplit(":", 1)[-1]
        cells = [name, _learning_rate(row), _tested(row, "loss", before_count="\n")]
        if compared:
            strong = bool(_verdict(row, "loss"))
            text = _difference(row, "loss", baseline) + ("†" if strong else "")
            cells.append(Text(text, style="bold" if strong else ""))
        cells += [_tested(row, metric, interval=False) for metric in metrics[:1]]
        if "epoch_to_target" in row:
            cells.append(_reached(row, "epoch", count_all=False))
        cells += [plain(1e3 * row["step_seconds"], 3), plain(row["bytes_per_parameter"], 3)]
        shown.add_row(*cells)
    shown.caption = _caption(summary, compared=compared)
    shown.caption_justify = "left"
    return shown


def plain(value: float, digits: int = 4) -> str:
    """A number with this many significant digits; a dash where there is none."""
    return f"{value:.{digits}g}" if math.isfinite(value) else "—"


def with_interval(mean: float, low: float, high: float) -> str:
    """A mean with half its interval, as precise as the interval deserves.

    Half the interval has two digits, or one where the second would be the fifth decimal.

    Example:
        >>> with_interval(0.98765, 0.93245, 1.04285), with_interval(0.98765, 0.98731, 0.98799)
        ('0.988 ± 0.055', '0.9877 ± 0.0003')
        >>> with_interval(2.0, float("nan"), float("nan")), with_interval(1e4, 1e4, 1e4)
        ('2.000', '10000 ± 0')
    """
    half = (high - low) / 2
    if not half > 0:
        digits = f"{mean:.0f}" if abs(mean) >= WHOLE else f"{mean:#.4g}"
        return (digits if math.isfinite(mean) else "—") + (" ± 0" if half == 0 else "")
    exponent = math.floor(math.log10(half))
    decimals = max(0, min(1 - exponent, max(DECIMALS, -exponent)))
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}"


def _several(summary: pd.DataFrame) -> bool:
    return len(set(summary.index.get_level_values("batch_size"))) > 1


def _compared(summary: pd.DataFrame) -> bool:
    names = set(summary.index.get_level_values("optimizer"))
    return len(names) > 1 and summary.attrs["baseline"] in names


def _metrics(summary: pd.DataFrame) -> list[str]:
    """The test metrics besides the loss."""
    names = [str(name) for name in summary.columns if f"{name}_difference" in summary.columns]
    return [name.removeprefix("test_") for name in names if name != "test_loss"]


def _test_column(metric: str) -> Column:
    return Column(
        f"test {metric}",
        "Mean over seeds ± half of the 95 % interval.",
        lambda row: _tested(row, metric),
        lambda row: row[f"test_{metric}"],
    )


def _difference_column(metric: str, baseline: str) -> Column:
    return Column(
        f"{metric} minus {baseline}'s",
        f"Mean paired difference to {baseline}'s run of the same seed ± half of the 95 % "
        "interval. Bold where the interval leaves out 0.",
        lambda row: _difference(row, metric, baseline),
        lambda row: row[f"test_{metric}_difference"],
        lambda row: _verdict(row, metric),
    )


def _reach_column(unit: str, head: str) -> Column:
    return Column(
        head,
        "On validation data; median over seeds, a seed that never gets there counting as infinite.",
        lambda row: _reached(row, unit),
        lambda row: row[f"{unit}_to_target"],
    )


def _learning_rate(row: Row) -> str:
    return plain(row["lr"]) + ("*" if row.get("at_edge") else "")


def _tested(row: Row, metric: str, *, interval: bool = True, before_count: str = " ") -> str:
    name = f"test_{metric}"
    seeds, diverged = int(row["seeds"]), int(row["diverged_seeds"])
    if math.isnan(row["lr"]) or 0 < seeds == diverged:
        return "diverged"
    if name not in row or math.isnan(row[name]):
        return "not run"
    ends = (row[f"{name}_low"], row[f"{name}_high"]) if interval else (math.nan, math.nan)
    text = with_interval(row[name], *ends)
    return f"{text}{before_count}{diverged} of {seeds} diverged" if diverged and interval else text


def _difference(row: Row, metric: str, baseline: str) -> str:
    name = f"test_{metric}_difference"
    if row["optimizer"] == baseline or name not in row:
        return "—"
    return with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"])


def _verdict(row: Row, metric: str) -> str:
    name = f"test_{metric}_difference"
    low, high = row.get(f"{name}_low", math.nan), row.get(f"{name}_high", math.nan)
    if not (low > 0 or high < 0):
        return ""
    return "better" if (high < 0) == (metric == "loss") else "worse"


def _reached(row: Row, unit: str, *, count_all: bool = True) -> str:
    median, share, seeds = row[f"{unit}_to_target"], row["reached"], int(row["seeds"])
    if math.isnan(share):
        return "—"
    count = round(share * seeds)
    if not math.isfinite(median):
        return "never" if count == 0 else f"{count} of {seeds}"
    return plain(median, 3) + (f" ({count} of {seeds})" if count < seeds and count_all else "")


def _step(row: Row, *, ratio: bool) -> str:
    text = plain(1e3 * row["step_seconds"], 3)
    return f"{text} ({row['step_ratio']:.2f})" if ratio and row["step_ratio"] > 0 else text


def _caption(summary: pd.DataFrame, *, compared: bool) -> str:
    seeds = int(summary["seeds"].max())
    if seeds > 1:
        parts = [f"± half of the 95 % interval over {seeds} seeds"]
        parts += ["† the interval leaves out 0"] if compared else []
    else:
        parts = ["one seed: no intervals"]
    if "at_edge" in summary.columns and summary["at_edge"].any():
        parts.append("* an end of its grid: a better one may lie beyond")
    return "; ".join(parts) + "."
