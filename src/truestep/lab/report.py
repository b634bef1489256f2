"""The report of a race: one HTML file that needs nothing else, and its figures as PNG files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from truestep.errors import TruestepError
from truestep.lab import figures
from truestep.lab.findings import findings, notes
from truestep.lab.panels import FAINT, GRID, INK, Style, styles
from truestep.lab.pictures import inline_svg, png, write_file
from truestep.lab.statistics import (
    at_reference,
    choose,
    landscape,
    learning_curves,
    summarise,
)
from truestep.lab.store import RunResult
from truestep.lab.tables import columns, plain, sorted_rows, table

__all__ = ["table", "write_report"]


@dataclass(frozen=True)
class _Drawing:
    """A figure of the report: its file name without the ending, and what it shows."""

    name: str
    title: str
    caption: str
    figure: Figure


def write_report(
    folder: Path, task_info: dict[str, Any], results: Sequence[RunResult], baseline: str
) -> dict[str, Any]:
    """Writes report.html and the figures, each file complete or not at all.

    Args:
        folder: Where to; it is made where it does not exist.
        task_info: Plain data on the task and the race: ``name``, ``title``, ``source`` (where the
            data came from), ``epochs``, ``metrics`` (names), ``target`` (name and value),
            ``command``, ``engines`` (a sentence: what trained which runs), ``reference_batch_size``
            (or None), ``train``, ``validation``, ``test``
            (samples), ``parameters``, ``experiment`` (hash).
        results: The experiment's runs.
        baseline: Optimizer that the others are compared with.

    Returns:
        What the report says as plain data that JSON can hold: ``task``, ``rows``, ``notes``,
        ``findings``, ``versions`` and ``files``. A number that is not finite is None.

    Raises:
        TruestepError: There are no results, or the folder can't be written.
    """
    chosen = choose(results)
    if not len(chosen):
        raise TruestepError("There are no results to report on yet. Run the race first.")
    target = (str(task_info["target"][0]), float(task_info["target"][1]))
    summary = summarise(results, chosen, baseline, target)
    drawings = _draw(results, chosen, summary, task_info)
    said = {
        "findings": findings(summary),
        "notes": notes(summary, chosen),
        "versions": _versions(results),
    }
    # Before the page, which takes over the layout.
    contents = {f"{drawing.name}.png": png(drawing.figure) for drawing in drawings}
    page = _page(
        task=task_info,
        seeds=_seeds(results),
        runs=len(results),
        optimizers=list(dict.fromkeys(summary.index.get_level_values("optimizer"))),
        rows=sorted_rows(summary),
        columns=columns(summary, target),
        drawings=[(drawing, inline_svg(drawing.name, drawing.figure)) for drawing in drawings],
        colours=_colours(styles(summary.index.get_level_values("optimizer"))),
        **said,
    )
    # Last, so that a new report never stands beside old figures.
    contents["report.html"] = page.encode()
    for name, content in contents.items():
        write_file(Path(folder) / name, content)
    return {
        "task": task_info,
        **said,
        "rows": _plain_rows(summary.join(chosen[["grid", "good_low", "good_high"]])),
        "files": [str(Path(folder) / name) for name in contents],
    }


def _draw(
    results: Sequence[RunResult],
    chosen: pd.DataFrame,
    summary: pd.DataFrame,
    task_info: Mapping[str, Any],
) -> list[_Drawing]:
    seeds = _seeds(results)
    rates = _Drawing(
        "learning-rates",
        "Learning rates",
        f"Validation loss at the best evaluation of each run against its learning rate, mean of "
        f"{seeds} with its 95 % interval. The ring is the choice; the shaded band holds the raced "
        "learning rates around it whose loss is within 5 % of the best: the wider, the less there "
        "is to tune. A cross stands where a seed diverged, which rules a learning rate out. Axes "
        "end at six times the lowest loss.",
        figures.learning_rates(landscape(results), chosen),
    )
    name, value = task_info["target"]
    drawings = [*_draw_batch_sizes(results, chosen, summary, task_info), rates]
    for metric in dict.fromkeys(["loss", name, *task_info["metrics"][:1]]):
        curves = learning_curves(results, chosen, metric)
        if len(curves):
            goal = f" The dotted line is the target, {value:g}." if metric == name else ""
            drawings.append(
                _Drawing(
                    f"curves-{metric}",
                    f"Validation {metric} over training",
                    f"Each optimizer at its chosen learning rate; mean of {seeds} with its 95 % "
                    f"interval, without seeds that diverged.{goal}",
                    figures.curves(curves, metric, value if metric == name else None),
                )
            )
    return drawings


def _draw_batch_sizes(
    results: Sequence[RunResult],
    chosen: pd.DataFrame,
    summary: pd.DataFrame,
    task_info: Mapping[str, Any],
) -> list[_Drawing]:
    """What there is to see only where several batch sizes were raced."""
    if len(set(summary.index.get_level_values("batch_size"))) == 1:
        return []
    seeds, drawings = _seeds(results), []
    reference = task_info["reference_batch_size"]
    if reference is not None and "test_loss" in summary.columns:
        fixed = summarise(results, at_reference(chosen, reference))
        drawings.append(
            _Drawing(
                "batch-sizes",
                "Test loss against the batch size",
                f"Bold: each optimizer at the learning rate chosen for each batch size, mean of "
                f"{seeds} with its 95 % interval. Dashed: at the learning rate chosen at batch "
                f"size {reference}, kept for all. All are chosen on validation data and trained "
                f"for {task_info['epochs']} epochs.",
                figures.batch_sizes(summary, fixed, reference),
            )
        )
    name, value = task_info["target"]
    sign = "at most" if name == "loss" else "at least"
    drawings.append(
        _Drawing(
            "steps-to-target",
            "Steps to the target",
            f"Steps to a validation {name} of {sign} {value:g}, each optimizer at its chosen "
            f"learning rate; median of {seeds}, where a seed that never gets there counts as "
            "infinite. Along the dotted line twice the batch takes half the steps.",
            figures.steps_to_target(summary),
        )
    )
    return drawings


def _page(**content: Any) -> str:
    environment = Environment(
        loader=PackageLoader("truestep.lab"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(plain=plain, **content)


def _colours(looks: Mapping[str, Style]) -> dict[str, tuple[str, str]]:
    """What each colour of a figure is on a light and on a dark page."""
    shared = {INK: "#e8e8e6", FAINT: "#4c4f54", GRID: "#2b2e33"}
    return {colour[1:]: (colour, dark) for colour, dark in shared.items()} | {
        look.colour[1:]: (look.colour, look.dark_colour) for look in looks.values()
    }


def _seeds(results: Sequence[RunResult]) -> str:
    count = len({result.key.seed for result in results})
    return f"{count} seeds" if count > 1 else "one seed"


def _versions(results: Sequence[RunResult]) -> dict[str, str]:
    """What the runs were made with; everything there is where they differ."""
    names = dict.fromkeys(name for result in results for name in result.versions)
    return {
        name: ", ".join(
            dict.fromkeys(
                str(result.versions[name]) for result in results if name in result.versions
            )
        )
        for name in names
    }


def _plain_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = table.reset_index().to_dict("records")
    return [{str(name): _plain_value(value) for name, value in row.items()} for row in rows]


def _plain_value(value: Any) -> Any:
    # JSON has no nan and no inf.
    return None if isinstance(value, float) and not math.isfinite(value) else value
