"""aSGD, Figures 1-4: the 2-3-2-1 network, its gradients sample by sample, its parameters over time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from truestep.lab.panels import FAINT, GRID, INK, PAPER, plain_axes
from truestep.lab.paper.small import WIDTHS, parameter_names
from truestep.lab.paper.unit import Arrays

__all__ = ["backpropagation", "gradients", "network", "trajectories"]

# The paper has red, blue and grey; orange for red can be told from blue by colour-blind readers too.
POSITIVE, NEGATIVE, ZERO = "#d55e00", "#0072b2", "#aaaaaa"
LAYERS = 3
# L3, whose dummy node the panels were chosen for.
DUMMY_LAYER = 2
TIMES = "\N{MULTIPLICATION SIGN}"
# Figure 4 gives each parameter a colour of its own, the same under both optimizers.
LINE_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#117733",
    "#882255",
)  # fmt: skip


def network(arrays: Arrays) -> Figure:
    """Figure 1: the data and the network.

    Args:
        arrays: Of a unit of kind panels.
    """
    figure = Figure(figsize=(7.0, 3.0), layout="constrained", facecolor=PAPER)
    left, right = figure.subplots(1, 2)
    inner = arrays["labels"] == 1
    points = arrays["points"]
    plain_axes(left)
    for chosen, colour, label in ((inner, NEGATIVE, "positive"), (~inner, POSITIVE, "negative")):
        left.scatter(
            points[chosen, 0], points[chosen, 1], s=10, color=colour, label=f"{label} class"
        )
    left.set_aspect("equal")
    figure.legend(frameon=False, fontsize=8, labelcolor=INK, loc="outside upper left", ncols=2)
    left.set_title("(a)", loc="left", fontsize=9, color=INK)
    right.set_axis_off()
    right.set_title("(b)", loc="left", fontsize=9, color=INK)
    places = {
        (layer, node): (layer, (count - 1) / 2 - node)
        for layer, count in enumerate(WIDTHS)
        for node in range(count)
    }
    dummies = _dummies(arrays)
    for (layer, node), place in places.items():
        for following in range(WIDTHS[layer + 1] if layer < LAYERS else 0):
            x, y = zip(place, places[layer + 1, following], strict=True)
            right.plot(x, y, color=FAINT, linewidth=1, zorder=1)
        right.scatter(place[0], place[1], s=420, color=GRID, edgecolors=INK, zorder=2)
        if layer == DUMMY_LAYER and dummies[node]:
            right.scatter(
                place[0], place[1], s=750, color="none", edgecolors=INK, linestyles="--", zorder=2
            )
            right.annotate(
                "dummy", (place[0], place[1] - 0.55), ha="center", fontsize=8, color=INK, zorder=3
            )
        name = f"x{node + 1}" if layer == 0 else f"a{node + 1}"
        right.annotate(name, place, ha="center", va="center", fontsize=8, color=INK, zorder=3)
    for layer in range(len(WIDTHS)):
        right.annotate(f"L{layer + 1}", (layer, -1.75), ha="center", fontsize=9, color=INK)
    right.set_xlim(-0.5, LAYERS + 0.5)
    right.set_ylim(-2.0, 1.6)
    return figure


def backpropagation(arrays: Arrays) -> Figure:
    """Figure 2: from the error of layer 4 to those of layer 3, for every sample.

    Args:
        arrays: Of a unit of kind panels.
    """
    rows = []
    for node in range(WIDTHS[2]):
        weight = np.full(len(arrays["points"]), arrays["w4"][0, node])
        slope = (arrays["z3"][:, node] > 0).astype(float)
        j = node + 1
        rows.append(
            [
                (f"$w^4_{{1{j}}}$", weight),
                (r"$\delta^4_1$", arrays["delta4"][:, 0]),
                (f"ReLU$'(z^3_{j})$", slope),
                (rf"$\delta^3_{j}$", arrays["delta3"][:, node]),
            ]
        )
    return _panels(arrays, rows, (TIMES, "⊙", "="))


def gradients(arrays: Arrays) -> Figure:
    """Figure 3: every sample's gradient of a bias of layer 3 and of a weight of layer 4.

    Args:
        arrays: Of a unit of kind panels.
    """
    rows = []
    for node in range(WIDTHS[2]):
        j = node + 1
        rows.append(
            [
                (rf"$\delta^3_{j}$", arrays["delta3"][:, node]),
                (rf"$\partial C/\partial b^3_{j}$", arrays["db3"][:, node]),
                (f"$a^3_{j}$", arrays["a3"][:, node]),
                (r"$\delta^4_1$", arrays["delta4"][:, 0]),
                (rf"$\partial C/\partial w^4_{{1{j}}}$", arrays["dw4"][:, node]),
            ]
        )
    return _panels(arrays, rows, ("=", "", TIMES, "="))


def trajectories(arrays: Arrays) -> Figure:
    """Figure 4: every parameter over training, a panel per layer, aSGD above SGD.

    Args:
        arrays: Of a unit of kind trajectories.
    """
    figure = Figure(figsize=(8.0, 5.0), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(2, LAYERS, sharex=True, sharey="col")
    names = parameter_names()
    for row, (name, letter) in enumerate((("asgd", "a"), ("sgd", "b"))):
        for layer in range(2, 2 + LAYERS):
            axes = grid[row, layer - 2]
            plain_axes(axes)
            own = [k for k, label in enumerate(names) if label[1] == str(layer)]
            for colour, k in zip(LINE_COLOURS, own, strict=False):
                style = ":" if names[k].startswith("b") else "-"
                axes.plot(
                    arrays["steps"], arrays[f"{name} path"][:, k], color=colour, linewidth=1.2,
                    linestyle=style, label=_mathematical(names[k]),
                )  # fmt: skip
            optimizer = {"asgd": "aSGD", "sgd": "SGD"}[name]
            axes.set_title(f"({letter}) {optimizer}, L{layer}", loc="left", fontsize=9, color=INK)
            if name == "sgd":
                axes.legend(
                    frameon=False, fontsize=7, labelcolor=INK, ncols=3, columnspacing=0.8,
                    handlelength=1.0, loc="lower left",
                )  # fmt: skip
    figure.supxlabel("step", fontsize=9, color=INK)
    figure.supylabel("value of the parameter", fontsize=9, color=INK)
    return figure


def _panels(
    arrays: Arrays,
    rows: Sequence[Sequence[tuple[str, NDArray[Any]]]],
    signs: Sequence[str],
) -> Figure:
    columns = len(rows[0])
    figure = Figure(figsize=(8.0, 1.95 * len(rows) + 0.4), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(len(rows), columns, sharex=True, sharey=True)
    for node, (line, row) in enumerate(zip(grid, rows, strict=True)):
        kind = "dummy node" if _dummies(arrays)[node] else "node"
        line[0].set_ylabel(f"{kind} {node + 1} of L3", fontsize=9, color=INK)
        for column, (axes, (label, values)) in enumerate(zip(line, row, strict=True)):
            _signed(axes, arrays["points"], values)
            axes.set_xlabel(label, fontsize=10, color=INK)
            if column < columns - 1 and signs[column]:
                axes.annotate(
                    signs[column], (1.08, 0.5), xycoords="axes fraction", ha="center",
                    va="center", fontsize=12, color=INK, annotation_clip=False,
                )  # fmt: skip
    marks = {"positive": POSITIVE, "negative": NEGATIVE, "0": ZERO}
    figure.legend(
        [Line2D([], [], color=c, marker="o", markersize=4, linewidth=0) for c in marks.values()],
        list(marks), loc="outside upper left", ncols=3, frameon=False, fontsize=8, labelcolor=INK,
    )  # fmt: skip
    return figure


def _dummies(arrays: Arrays) -> list[bool]:
    """Which nodes of L3 are true dummies: no sample activates them."""
    return [bool((inputs <= 0).all()) for inputs in arrays["z3"].T]


def _signed(axes: Axes, points: NDArray[Any], values: NDArray[Any]) -> None:
    axes.spines[:].set(color=FAINT)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal")
    for chosen, colour in ((values == 0, ZERO), (values > 0, POSITIVE), (values < 0, NEGATIVE)):
        x, y = points[chosen].T
        axes.scatter(x, y, s=7, color=colour, linewidths=0)


def _mathematical(name: str) -> str:
    """w3_12 as the paper writes it."""
    kind, layer, place = name[0], name[1], name.partition("_")[2]
    return f"${kind}^{layer}_{{{place}}}$"
