"""How the cost of counting grows with batch, width and depth, beside plain SGD.

    python benchmarks/scaling.py [--rounds 20] [--json FILE] [--figure FILE] [--markdown]
    python benchmarks/scaling.py --read FILE --figure docs/images/scaling.png --markdown

Each point is a multi-layer perceptron whose training step under AdaptiveBatchSGD takes turns with SGD's. The
seconds beyond SGD's and SGD's own seconds are fitted by a power of batch, width or depth, the others held:
least squares on logarithms, with the 95 % interval of the exponent. An exponent below SGD's means that
the ratio falls as the model grows. All points together are fitted by what counting does, so that the cost of
other models can be told beforehand: so much for each layer, for each number that a layer takes or whose
gradient it gets, and for each weight and 64 samples. One thread.
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy import optimize, stats

from candidates import CANDIDATES
from tasks import mlp
from timing import machine, machine_line, take_turns

IMAGE = "images/scaling.png"  # as seen from docs/
# What is varied -> the values of (batch, width, depth).
BASE = {"batch": 256, "width": 512, "depth": 2}
RANGES = {
    "batch": [32, 64, 128, 256, 512, 1024],
    "width": [64, 128, 256, 512, 1024, 2048],
    "depth": [1, 2, 4, 8, 16],
}


def layers_of(varied: str, value: int) -> tuple[list[int], int]:
    """A model's widths, and its batch."""
    sizes = BASE | {varied: value}
    return [784, *[sizes["width"]] * sizes["depth"], 10], sizes["batch"]


def measure(varied: str, value: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each round."""
    layers, batch = layers_of(varied, value)
    steps = []
    for name in ("AdaptiveBatchSGD", "SGD"):
        torch.manual_seed(0)
        steps.append(CANDIDATES[name](mlp(*layers, batch=batch)))
    turns = zip(*take_turns(*steps, rounds), strict=True)
    return [{"varied": varied, "value": value, "own": own, "sgd": sgd} for own, sgd in turns]


def summarize(rounds: pd.DataFrame) -> pd.DataFrame:
    """Per point: median seconds of SGD and beyond it, quartiles of the ratio."""
    rounds = rounds.assign(
        beyond=rounds["own"] - rounds["sgd"], ratio=rounds["own"] / rounds["sgd"]
    )
    points = rounds.groupby(["varied", "value"], sort=False)
    table = points[["sgd", "beyond", "ratio"]].median()
    table["low"], table["high"] = points["ratio"].quantile(0.25), points["ratio"].quantile(0.75)
    return table.reset_index()


def fit(values: pd.Series, seconds: pd.Series) -> tuple[float, float]:
    """The exponent and half the width of its 95 % interval."""
    positive = seconds > 0  # what noise has pushed below SGD's time has no logarithm
    line = stats.linregress(np.log(values[positive]), np.log(seconds[positive]))
    return line.slope, stats.t.ppf(0.975, positive.sum() - 2) * line.stderr


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for varied, points in table.groupby("varied", sort=False):
        row = {
            "varied": varied,
            "points": len(points),
            "dropped": int((points["beyond"] <= 0).sum()),
        }
        for what in ("sgd", "beyond"):
            row[what], row[f"{what}_interval"] = fit(points["value"], points[what])
        rows.append(row)
    return pd.DataFrame(rows)


def parts(table: pd.DataFrame) -> tuple[dict[str, float], "pd.Series[float]"]:
    """Seconds of each thing that counting does, and by what factor they miss each point.

    None is negative; the squares of relative errors are least.
    """
    rows = []
    for varied, value in zip(table["varied"], table["value"], strict=True):
        layers, batch = layers_of(varied, value)
        pairs = list(pairwise(layers))
        numbers = batch * sum(inputs + outputs for inputs, outputs in pairs)
        weights = math.ceil(batch / 64) * sum(inputs * outputs for inputs, outputs in pairs)
        rows.append({"layer": len(pairs), "number": numbers, "weight": weights})
    work = pd.DataFrame(rows, index=table.index)
    relative = work.div(table["beyond"], axis=0)
    seconds, _ = optimize.nnls(relative.to_numpy(), np.ones(len(relative)))
    return dict(zip(work.columns, seconds, strict=True)), relative @ seconds


def draw(table: pd.DataFrame) -> Figure:
    """Seconds of SGD and beyond it, and their ratio, against what is varied."""
    varieties = list(dict.fromkeys(table["varied"]))
    figure, axes = plt.subplots(2, len(varieties), figsize=(10, 5.5), sharex="col", sharey="row")
    slopes = exponents(table).set_index("varied")
    for varied, (above, below) in zip(varieties, axes.T, strict=True):
        points = table[table["varied"] == varied]
        for what, label, marker in (("sgd", "SGD", "o"), ("beyond", "beyond SGD", "s")):
            slope, interval = slopes.loc[varied, [what, f"{what}_interval"]]
            power = f"{varied}$^{{{slope:.2f} \\pm {interval:.2f}}}$"
            seen = points[points[what] > 0]
            above.plot(seen["value"], seen[what] * 1e3, marker=marker, label=f"{label}: {power}")
        above.set(xscale="log", yscale="log")
        above.legend(frameon=False, fontsize=8)
        spread = [points["ratio"] - points["low"], points["high"] - points["ratio"]]
        below.errorbar(
            points["value"], points["ratio"], yerr=spread, marker="o", capsize=3, color="black"
        )
        below.axhline(1, color="grey", linewidth=0.8)
        held = ", ".join(f"{name} {size}" for name, size in BASE.items() if name != varied)
        below.set_xlabel(f"{varied} ({held})")
        below.set_xticks(points["value"], labels=[str(value) for value in points["value"]])
        below.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes[0, 0].set_ylabel("milliseconds a step")
    axes[1, 0].set_ylabel("AdaptiveBatchSGD / SGD")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def markdown(results: dict[str, Any]) -> str:
    table = summarize(pd.DataFrame(results["rounds"]))
    lines = [f"Measured on {machine_line(results['machine'])}; one thread.\n"]
    lines += [f"![Seconds of SGD and beyond it]({IMAGE})", ""]
    lines += ["| varied | exponent of SGD's seconds | of the seconds beyond |", "|---|---:|---:|"]
    for row in exponents(table).itertuples():
        lines.append(
            f"| {row.varied} | {row.sgd:.2f} ± {row.sgd_interval:.2f} "
            f"| {row.beyond:.2f} ± {row.beyond_interval:.2f} |"
        )
    cost, missed = parts(table)
    errors = (missed - 1).abs()
    lines += [
        "",
        (
            f"All points together: {cost['layer'] * 1e6:.0f} us for each layer, "
            f"{cost['number'] * 1e9:.3f} ns for each number that it takes or whose gradient it gets, and "
            f"{cost['weight'] * 1e9:.3f} ns for each weight and 64 samples. These miss the seconds beyond "
            f"SGD by {100 * errors.median():.0f} % (median; at most {100 * errors.max():.0f} %)."
        ),
    ]
    lines += ["", "| varied | value | SGD, ms | beyond, ms | ratio | quartiles |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    lines += [
        f"| {row.varied} | {row.value} | {row.sgd * 1e3:.3f} | {row.beyond * 1e3:.3f} "
        f"| {row.ratio:.2f} | {row.low:.2f} to {row.high:.2f} |"
        for row in table.itertuples()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--read", type=Path, help="figures of an earlier run instead of a new one")
    parser.add_argument("--figure", type=Path, help="file for the figure")
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown")
    arguments = parser.parse_args()
    if arguments.read:
        results = json.loads(arguments.read.read_text())
    else:
        torch.set_num_threads(1)
        results = {"machine": machine(), "rounds": []}
        for varied, values in RANGES.items():
            for value in values:
                rows = measure(varied, value, arguments.rounds)
                print(
                    summarize(pd.DataFrame(rows)).to_string(header=value == values[0]), flush=True
                )
                results["rounds"] += rows
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.markdown:
        print(markdown(results))
    else:
        print(exponents(summarize(pd.DataFrame(results["rounds"]))).to_string())
    if arguments.figure:
        mpl.use("agg")
        draw(summarize(pd.DataFrame(results["rounds"]))).savefig(arguments.figure, dpi=150)


if __name__ == "__main__":
    main()
