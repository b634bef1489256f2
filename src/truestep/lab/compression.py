"""The aSGD paper's second result, made useful: how much smaller networks get, at the same output.

    python -m truestep.lab.compression --out results/compression

Networks are trained by aSGD at its best learning rate, by SGD at the same one, and by SGD at its own best;
then their redundant units on the training data are taken out.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import nn

from truestep import compress, find_dummy_nodes
from truestep.lab.optimizers import build
from truestep.lab.panels import FAINT, GRID, INK, NORMAL, PAPER, SMALL, styles
from truestep.lab.tasks import TASKS, Splits, Task
from truestep.lab.training import batches, evaluate

__all__ = ["TASKS_COMPARED", "compression_figure", "compression_runs", "train_network"]

TASKS_COMPARED = ("circles", "spirals", "mnist", "fashion-mnist")
# In the order of the figure: optimizer, and whose best learning rate it has.
SETTINGS = {
    "aSGD, at its best": ("asgd", "asgd"),
    "SGD, at aSGD's": ("sgd", "asgd"),
    "SGD, at its own best": ("sgd", "sgd"),
}
MARKERS = {"aSGD, at its best": "o", "SGD, at aSGD's": "s", "SGD, at its own best": "D"}
ROWS_AT_ONCE = 1000


def compression_runs(
    names: Iterable[str] = TASKS_COMPARED,
    seeds: int = 3,
    epochs: int | None = None,
    data_dir: Path | None = None,
) -> pd.DataFrame:
    """Trains, finds dummy nodes on the training data, compresses, and compares.

    Learning rates are chosen from the task's grids by validation accuracy with seed 0.

    Args:
        names: Built-in tasks.
        seeds: How many runs of each setting.
        epochs: Passes over the data; each task's own by default.
        data_dir: Folder of local data sets.

    Returns:
        One row for each run: task, setting, optimizer, lr, seed, hidden (units), true, constant, duplicate,
        pseudo, removed (units), parameters and parameters_after, accuracy and accuracy_after on test data,
        difference (the largest of outputs on the training data), largest (output).
    """
    rows = []
    for name in names:
        task = TASKS[name] if epochs is None else replace(TASKS[name], epochs=epochs)
        splits = task.load(data_dir)
        best = {optimizer: _best_rate(task, splits, optimizer) for optimizer in ("asgd", "sgd")}
        for setting, (optimizer, whose) in SETTINGS.items():
            for seed in range(seeds):
                model = train_network(task, splits, optimizer, best[whose], seed)
                row = {"task": name, "setting": setting, "optimizer": optimizer, "lr": best[whose]}
                rows.append(row | {"seed": seed} | _compressed(task, splits, model))
                sys.stderr.write(f"{json.dumps(rows[-1])}\n")
    return pd.DataFrame(rows)


def train_network(task: Task, splits: Splits, optimizer: str, lr: float, seed: int) -> nn.Module:
    """A network of a task, trained.

    Args:
        task: With the epochs to train.
        splits: The task's data.
        optimizer: Its name, as in a race.
        lr: Learning rate.
        seed: Of the start and of the order of samples.
    """
    torch.manual_seed(seed)
    model = task.model()
    chosen, counter = build(optimizer, model, lr)
    train = splits.train
    for indices in batches(len(train.inputs), task.batch_size, task.epochs, seed):
        chosen.zero_grad()
        task.loss(model(train.inputs[indices]), train.targets[indices]).backward()
        chosen.step()
    if counter is not None:
        counter.close()
    return model.eval()


def _best_rate(task: Task, splits: Splits, optimizer: str) -> float:
    """The learning rate of the task's grid with the best validation accuracy."""

    def accuracy(lr: float) -> float:
        model = train_network(task, splits, optimizer, lr, seed=0)
        return evaluate(task, model, splits.validation)["accuracy"]

    return max(task.learning_rates[optimizer], key=accuracy)


def _compressed(task: Task, splits: Splits, model: nn.Module) -> dict[str, float]:
    data = splits.train.inputs.split(ROWS_AT_ONCE)
    nodes = find_dummy_nodes(model, data)
    small, report = compress(model, nodes, data[0])
    kinds = {kind: nodes.count(kind) for kind in ("true", "constant", "duplicate", "pseudo")}
    return {
        "hidden": sum(len(layer) for layer in nodes),
        **kinds,
        "removed": len(report.removed),
        "parameters": report.before.parameters,
        "parameters_after": report.after.parameters,
        "accuracy": evaluate(task, model, splits.test)["accuracy"],
        "accuracy_after": evaluate(task, small, splits.test)["accuracy"],
        "difference": report.difference,
        "largest": report.largest,
    }


def compression_figure(table: pd.DataFrame) -> Figure:
    """Test accuracy against the parameters that are left, one panel for each task.

    Small marks are runs, large ones means; a line leads from the network as it was trained to what is left.

    Args:
        table: Of :func:`compression_runs`.
    """
    tasks = list(dict.fromkeys(table["task"]))
    figure = Figure(
        figsize=(8.0, 0.9 + 2.2 * -(-len(tasks) // 2)), layout="constrained", facecolor=PAPER
    )
    panels = figure.subplots(-(-len(tasks) // 2), 2, squeeze=False)
    looks = styles(("asgd", "sgd"))
    colours = {
        "aSGD, at its best": looks["asgd"].colour,
        "SGD, at aSGD's": "#56b4e9",
        "SGD, at its own best": looks["sgd"].colour,
    }
    for axes, task in zip(panels.flat, tasks, strict=False):
        part = table[table["task"] == task]
        for setting, marker in MARKERS.items():
            runs = part[part["setting"] == setting]
            left = 100 * runs["parameters_after"] / runs["parameters"]
            accuracy = 100 * runs["accuracy_after"]
            axes.plot(left, accuracy, marker, color=colours[setting], markersize=3, alpha=0.5)
            axes.plot(
                [100, left.mean()],
                [100 * runs["accuracy"].mean(), accuracy.mean()],
                color=colours[setting],
                linewidth=1.2,
            )
            axes.plot(
                [left.mean()], [accuracy.mean()], marker, color=colours[setting], markersize=7
            )
        axes.set_title(
            TASKS[task].title if task in TASKS else task, loc="left", fontsize=NORMAL, color=INK
        )
        left = 100 * part["parameters_after"] / part["parameters"]
        axes.set_xlim(min(left.min() - 2, 90), 101)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set(color=FAINT)
        axes.tick_params(labelsize=SMALL, labelcolor=INK, color=FAINT, length=3)
        axes.grid(axis="both", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    for axes in list(panels.flat)[len(tasks) :]:
        axes.set_visible(False)
    figure.supxlabel("parameters left after compression, %", fontsize=NORMAL, color=INK)
    figure.supylabel("test accuracy, %", fontsize=NORMAL, color=INK)
    figure.legend(
        handles=[
            Line2D([], [], color=colours[name], marker=MARKERS[name], label=name)
            for name in MARKERS
        ],
        loc="outside upper left",
        ncols=len(MARKERS),
        frameon=False,
        fontsize=SMALL,
        labelcolor=INK,
    )
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Runs the experiment and writes the table and the figure.

    Args:
        arguments: Without the program's name; by default those of this process.
    """
    parser = argparse.ArgumentParser(
        description="How much smaller networks get, at the same output."
    )
    parser.add_argument("--out", type=Path, default=Path("results/compression"))
    parser.add_argument("--tasks", default=",".join(TASKS_COMPARED))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--data-dir", type=Path, default=None)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = chosen.tasks.split(",")
    table = compression_runs(names, chosen.seeds, chosen.epochs, chosen.data_dir)
    chosen.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(chosen.out / "runs.csv", index=False)
    compression_figure(table).savefig(chosen.out / "compression.png", dpi=150)


if __name__ == "__main__":
    main()
