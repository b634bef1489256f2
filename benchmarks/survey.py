"""What a training step costs on models of many kinds, and in the ways in which people train.

    python benchmarks/survey.py [--rounds 40] [--threads 1,2] [--cases ResNet,LSTM] [--json FILE] [--markdown]
    python benchmarks/survey.py --read FILE --markdown

AdaptiveBatchSGD takes turns with SGD, each training a model of its own. Printed, after the number of
threads: milliseconds of a step with AdaptiveBatchSGD, and the median and the quartiles of the ratios to SGD.
A pair takes at most half a minute, and at least eight rounds.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._dynamo

import truestep
from models import MODELS
from tasks import TASKS, Task
from timing import chosen, compare, machine, machine_line, run

WIDE, SMALL = "784-1024-1024-10 b256", "784-128-128-10 b256"
LR, MICRO_BATCHES, LONGEST, FEWEST = 0.005, 4, 30.0, 8
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A model, and how it is trained."""

    make: Callable[[], Task]
    momentum: float = 0.0
    batches: int = 1
    autocast: bool = False
    compiled: bool = False


def in_bfloat16(name: str) -> Task:
    task = TASKS[name]()
    return replace(task, model=task.model.bfloat16(), inputs=task.inputs.bfloat16())


CASES = {name: Case(make) for name, make in MODELS.items()} | {
    f"{WIDE}, momentum": Case(TASKS[WIDE], momentum=0.9),
    f"{WIDE}, {MICRO_BATCHES} micro-batches": Case(TASKS[WIDE], batches=MICRO_BATCHES),
    f"{SMALL}, {MICRO_BATCHES} micro-batches": Case(TASKS[SMALL], batches=MICRO_BATCHES),
    f"{WIDE}, autocast": Case(TASKS[WIDE], autocast=True),
    f"{WIDE}, bfloat16": Case(lambda: in_bfloat16(WIDE)),
    f"{WIDE}, torch.compile": Case(TASKS[WIDE], compiled=True),
}


def step_of(case: Case, *, counts: bool) -> Step:
    """A training step of a model of its own."""
    torch.manual_seed(0)
    task = case.make()
    options = {"lr": LR, "momentum": case.momentum}
    parameters = list(task.model.parameters())
    if counts:
        rules = truestep.RULES | truestep.rules.BATCH_NORM
        counter = truestep.SampleCounter(task.model, rules=rules)
        optimizer: Any = truestep.AdaptiveBatchSGD(parameters, counter=counter, **options)
    else:
        optimizer = torch.optim.SGD(parameters, **options)
    model = torch.compile(task.model) if case.compiled else task.model
    batches = zip(task.inputs.chunk(case.batches), task.targets.chunk(case.batches), strict=True)
    pairs = list(batches)

    def step() -> None:
        optimizer.zero_grad()
        for inputs, targets in pairs:
            with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                loss = task.loss_fn(model(inputs), targets)
            (loss / len(pairs)).backward()
        optimizer.step()

    return step


def rows(names: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    for name in names:
        steps = step_of(CASES[name], counts=True), step_of(CASES[name], counts=False)
        for step in steps:
            step()  # compiles
        start = time.perf_counter()
        for step in steps:
            step()
        fitting = int(LONGEST / (time.perf_counter() - start))
        yield {"case": name, **compare([steps], max(FEWEST, min(rounds, fitting)))}


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/performance.md."""
    threads = list(results["threads"])
    columns = [
        f"ms, {number} thread{'s' * (number != '1')} | ratio | quartiles" for number in threads
    ]
    lines = [f"Measured on {machine_line(results['machine'])}.\n", f"| | {' | '.join(columns)} |"]
    lines.append("|---|" + "---:|---:|---|" * len(threads))
    found = [{row["case"]: row for row in results["threads"][number]} for number in threads]
    for name in found[0]:
        cells = []
        for of_threads in found:
            low, middle, high = of_threads[name]["ratio"]
            cells += [f"{1e3 * of_threads[name]['seconds']:.1f}", f"{middle:.2f}"]
            cells.append(f"{low:.2f} to {high:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    names = chosen(CASES, arguments.cases)
    # Else torch.compile takes the graph of the model without a counter for the other: see docs/reference.md.
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # noqa: SLF001
    results: dict[str, Any] = {"machine": machine(), "threads": {}}
    print(machine_line(results["machine"]))
    for threads in arguments.threads.split(","):
        torch.set_num_threads(int(threads))
        print(f"\n{threads} threads")
        of_threads = results["threads"][threads] = []
        for row in rows(names, arguments.rounds):
            low, middle, high = row["ratio"]
            print(
                f"{row['case']:40} {row['seconds'] * 1e3:8.1f} ms {middle:6.2f} ({low:.2f} to {high:.2f})",
                flush=True,
            )
            of_threads.append(row)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1", help="numbers of threads, by commas")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--cases", default=",".join(CASES), help="parts of names, by commas")
    run(parser, measure, markdown)


if __name__ == "__main__":
    main()
