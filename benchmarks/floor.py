"""Where the time of a small model's step goes, phase by phase, and what hooks that do nothing cost.

    python benchmarks/floor.py [--rounds 400] [--tasks 784-30,784-128,cnn] [--json FILE] [--markdown]
    python benchmarks/floor.py --read FILE --markdown

Four training steps take turns in one process: SGD; SGD with empty hooks where counting has hooks; SGD with a
counter that watches; AdaptiveBatchSGD. Printed: lower quartiles of microseconds for each phase.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import truestep
from candidates import LR
from tasks import TASKS, Task
from timing import WARM_UP, machine, machine_line

PHASES = ("forward", "backward", "step")


def plain(task: Task) -> torch.optim.Optimizer:
    return torch.optim.SGD(task.model.parameters(), lr=LR)


def with_empty_hooks(task: Task) -> torch.optim.Optimizer:
    def nothing(*_: Any) -> None:
        pass

    def on_layer(_module: nn.Module, _args: Any, _kwargs: Any, output: Tensor) -> None:
        output.grad_fn.register_prehook(nothing)

    for layer in task.model.modules():
        if type(layer) in truestep.RULES:
            layer.register_forward_hook(on_layer, with_kwargs=True)
    task.model.register_forward_pre_hook(nothing, with_kwargs=True)
    task.model.register_forward_hook(nothing, always_call=True)
    for parameter in task.model.parameters():
        parameter.register_post_accumulate_grad_hook(nothing)
    return plain(task)


def watched(task: Task) -> torch.optim.Optimizer:
    optimizer = plain(task)
    optimizer.counter = truestep.SampleCounter(task.model)  # lives as long as the optimizer
    return optimizer


def adaptive(task: Task) -> torch.optim.Optimizer:
    counter = truestep.SampleCounter(task.model)
    return truestep.AdaptiveBatchSGD(task.model.parameters(), lr=LR, counter=counter)


CANDIDATES: dict[str, Callable[[Task], torch.optim.Optimizer]] = {
    "SGD": plain,
    "SGD, empty hooks": with_empty_hooks,
    "SGD, counter": watched,
    "AdaptiveBatchSGD": adaptive,
}


def phases(task: Task, optimizer: torch.optim.Optimizer) -> tuple[float, float, float]:
    """Microseconds of one training step's phases."""
    optimizer.zero_grad()
    marks = [time.perf_counter()]
    loss = task.loss_fn(task.model(task.inputs), task.targets)
    marks.append(time.perf_counter())
    loss.backward()
    marks.append(time.perf_counter())
    optimizer.step()
    marks.append(time.perf_counter())
    first, second, third = (1e6 * (b - a) for a, b in pairwise(marks))
    return first, second, third


def measure(names: list[str], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        built = {}
        for candidate, make in CANDIDATES.items():
            torch.manual_seed(0)
            task = TASKS[name]()
            built[candidate] = task, make(task)
        found: dict[str, list[tuple[float, float, float]]] = {candidate: [] for candidate in built}
        for number in range(WARM_UP + rounds):
            for candidate, (task, optimizer) in built.items():
                spent = phases(task, optimizer)
                if number >= WARM_UP:
                    found[candidate].append(spent)
        for candidate, spent in found.items():
            lower = [statistics.quantiles(column, n=4)[0] for column in zip(*spent, strict=True)]
            rows.append(
                {"task": name, "candidate": candidate, **dict(zip(PHASES, lower, strict=True))}
            )
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/performance.md."""
    lines = [
        f"Measured on {machine_line(results['machine'])}; microseconds, 1 thread.\n",
        "| | candidate | forward | backward | step |",
        "|---|---|---:|---:|---:|",
    ]
    for row in results["rows"]:
        cells = " | ".join(f"{row[phase]:.0f}" for phase in PHASES)
        lines.append(f"| {row['task']} | {row['candidate']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--tasks", default="784-30,784-128,cnn", help="parts of names, by commas")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--read", type=Path, help="figures of an earlier run instead of a new one")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    arguments = parser.parse_args()
    if arguments.read:
        results = json.loads(arguments.read.read_text())
    else:
        torch.set_num_threads(1)
        wanted = arguments.tasks.split(",")
        names = [name for name in TASKS if any(part in name for part in wanted)]
        results = {"machine": machine(), "rows": measure(names, arguments.rounds)}
        for row in results["rows"]:
            spent = "  ".join(f"{phase} {row[phase]:8.1f}" for phase in PHASES)
            print(f"{row['task']:22} {row['candidate']:18} {spent}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.markdown:
        print("\n" + markdown(results))


if __name__ == "__main__":
    main()
