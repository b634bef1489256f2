"""Dummy nodes and compressions as tables and figures."""

import pandas as pd
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from truestep.compression_report import CompressionReport
from truestep.lab.panels import INK, NORMAL, PAPER, SMALL
from truestep.layer_nodes import KINDS, table_of
from truestep.nodes import DummyNodes

__all__ = [
    "compression_tables",
    "heat_map",
    "history_frame",
    "node_frame",
    "node_table",
    "unit_frame",
]

COLUMNS = ("layer", "activation", "units", *KINDS[1:], "rate")
# Kinds of Okabe and Ito's colours, and greys by how often a unit is on.
COLOURS = {
    "true": "#000000",
    "constant": "#0072b2",
    "duplicate": "#cc79a7",
    "pseudo": "#e69f00",
    "not finite": "#d55e00",
}
SHADES = ("#f2f2f2", "#e0e0e0", "#cccccc", "#b8b8b8")
MOST_KEPT = 20  # lines
WIDTH = 8.0  # inches


def node_frame(nodes: DummyNodes) -> pd.DataFrame:
    """One row for each layer: how many units of each kind, and the mean rate of activation."""
    frame = pd.DataFrame([layer.summary() for layer in nodes.layers])
    return frame if len(frame) else pd.DataFrame(columns=[*COLUMNS, "bound"])


def unit_frame(nodes: DummyNodes) -> pd.DataFrame:
    """One row for each unit: its kind, rate of activation, range, constant and what it is a multiple of."""
    frames = [
        pd.DataFrame(
            {
                "layer": layer.layer,
                "unit": range(len(layer)),
                "kind": layer.kinds(),
                "rate": layer.rate,
                "lowest": layer.lowest,
                "highest": layer.highest,
                "constant": layer.value,
                "twin": layer.twin,
                "ratio": layer.ratio,
            }
        )
        for layer in nodes.layers
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def history_frame(rows: list[dict[str, object]]) -> pd.DataFrame:
    """The rows of a `NodeHistory`, indexed by label and layer."""
    return pd.DataFrame(rows).set_index(["label", "layer"])


def node_table(nodes: DummyNodes) -> Table:
    """`node_frame` for a terminal, 80 columns wide."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    head, *lines = table_of(nodes.layers)
    for name in head:
        right = name not in {"layer", "activation"}
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for line in lines:
        table.add_row(*line)
    return table


def compression_tables(report: CompressionReport) -> list[Table]:
    """Sizes before and after, what went, and what stays with the reason."""
    sizes = Table("", "before", "after", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in sizes.columns[1:]:
        column.justify = "right"
    before, after = report.before, report.after
    sizes.add_row("parameters", f"{before.parameters:,}", f"{after.parameters:,}")
    sizes.add_row("FLOPs of the example", f"{before.flops:,}", f"{after.flops:,}")
    sizes.add_row("milliseconds", f"{1e3 * before.seconds:.3f}", f"{1e3 * after.seconds:.3f}")
    sizes.add_row("bytes of the state", f"{before.bytes:,}", f"{after.bytes:,}")
    went = Table("layer", "kind", "what became of it", "units", box=None, padding=(0, 2, 0, 0))
    went.columns[-1].justify = "right"
    gone: dict[tuple[str, str, str], int] = {}
    for one in report.removed:
        how = "merged into another unit" if one.how.startswith("merged") else one.how
        gone[one.layer, one.kind, how] = gone.get((one.layer, one.kind, how), 0) + 1
    for (layer, kind, how), number in gone.items():
        went.add_row(layer, kind, how, str(number))
    stays = Table("layer", "kind", "why it stays", "units", box=None, padding=(0, 2, 0, 0))
    stays.columns[-1].justify = "right"
    reasons: dict[tuple[str, str, str], int] = {}
    for other in report.kept:
        key = (other.layer, other.kind, other.reason)
        reasons[key] = reasons.get(key, 0) + 1
    for (layer, kind, reason), number in list(reasons.items())[:MOST_KEPT]:
        stays.add_row(layer, kind, reason, str(number))
    if len(reasons) > MOST_KEPT:
        stays.add_row("", "", f"and {len(reasons) - MOST_KEPT} more: --json has all of them", "")
    for table in (went, stays):
        table.columns[0].overflow = "fold"
    return [table for table in (sizes, went, stays) if table.row_count]


def heat_map(units: pd.DataFrame) -> Figure:
    """Layers by units: the kind of each redundant unit, and in grey how often the others are on.

    Args:
        units: Of :func:`unit_frame`.
    """
    layers = list(dict.fromkeys(units["layer"])) if len(units) else []
    widest = max((int((units["layer"] == layer).sum()) for layer in layers), default=1)
    figure = Figure(
        figsize=(WIDTH, 0.9 + 0.32 * max(1, len(layers))), layout="constrained", facecolor=PAPER
    )
    axes = figure.subplots()
    names = list(COLOURS)
    colours = ListedColormap([PAPER, *SHADES, *COLOURS.values()])
    norm = BoundaryNorm([edge - 0.5 for edge in range(colours.N + 1)], colours.N)
    image = [[0] * widest for _ in layers]
    for row, layer in enumerate(layers):
        part = units[units["layer"] == layer]
        for unit, (kind, rate) in enumerate(zip(part["kind"], part["rate"], strict=True)):
            shade = min(int(rate * len(SHADES)), len(SHADES) - 1)
            image[row][unit] = 1 + (len(SHADES) + names.index(kind) if kind else shade)
    axes.imshow(image or [[0]], cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(layers)), layers, fontsize=SMALL, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("unit", fontsize=NORMAL, color=INK)
    axes.tick_params(labelsize=SMALL, labelcolor=INK, length=0)
    axes.spines[:].set_visible(False)
    shown = [name for name in names if len(units) and (units["kind"] == name).any()]
    marks = [Patch(color=COLOURS[name], label=name) for name in shown]
    marks += [
        Patch(color=SHADES[0], label="on for few samples"),
        Patch(color=SHADES[-1], label="on for most"),
    ]
    figure.legend(
        handles=marks,
        loc="outside upper left",
        ncols=len(marks),
        frameon=False,
        fontsize=SMALL,
        labelcolor=INK,
    )
    return figure
