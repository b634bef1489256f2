"""What a training step costs beside others: seconds and peak memory, on this machine.

    python benchmarks/step.py [--threads 1,2] [--rounds 40] [--tasks 784-30,cnn] [--peers] [--memory]
                              [--device cuda] [--json FILE] [--markdown]
    python benchmarks/step.py --read FILE --markdown

Two candidates take turns (A B A B ...) in one process, and each step is compared with its neighbour, so that
a machine whose speed drifts does not matter. Printed: the median ratio and its quartiles. Other libraries are
slow enough to disturb their neighbours, so each has a block of its own beside SGD, after the rest.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

import peak
import truestep
from candidates import CANDIDATES, LR, PAIRS, PEERS, refusal
from tasks import TASKS, task_on
from timing import chosen, compare, enough_rounds, machine, machine_line, run

PEER_ROUNDS = 3
# Sizes of the parameters whose optimizer's step is measured alone.
ALONE = {"one parameter of 16.8M": [1 << 24], "500 parameters of 100": [100] * 500}

# Where memory happens to lie moves the step of a large parameter by 20 %: each is made so many times.
PLACES = 5

Row = dict[str, Any]


def of_training(tasks: list[str], rounds: int, device: str) -> Iterator[Row]:
    for task in tasks:
        for candidate, baseline in PAIRS:
            steps = [CANDIDATES[name](task_on(device, task)) for name in (candidate, baseline)]
            found = compare([(steps[0], steps[1])], rounds, device)
            yield {"task": task, "candidate": candidate, "baseline": baseline, **found}


def of_peers(tasks: list[str], device: str) -> Iterator[Row]:
    for task in tasks:
        for peer, (_, build) in PEERS.items():
            row = {"task": task, "candidate": peer, "baseline": "SGD"}
            why = refusal(peer, task_on(device, task))
            if why is not None:
                yield row | {"skipped": why}
                continue
            steps = build(task_on(device, task)), CANDIDATES["SGD"](task_on(device, task))
            yield row | compare([steps], PEER_ROUNDS, device)


def of_steps_alone(rounds: int, device: str) -> Iterator[Row]:
    def optimizer(make: Any, sizes: list[int]) -> torch.optim.Optimizer:
        parameters = [nn.Parameter(torch.randn(size, device=device)) for size in sizes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return make(parameters)

    def own(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return truestep.DASGD(parameters, lr=LR)

    baselines = {
        "SGD momentum, fused": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, fused=True),
        "SGD momentum, foreach": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, foreach=True),
    }
    for what, sizes in ALONE.items():
        for baseline, make in baselines.items():
            pairs = (
                (optimizer(own, sizes).step, optimizer(make, sizes).step) for _ in range(PLACES)
            )
            found = compare(pairs, rounds, device)
            yield {"task": what, "candidate": "DASGD", "baseline": baseline, **found}


def of_many_counted(rounds: int, device: str) -> Iterator[Row]:
    """AdaptiveBatchSGD's step, with its counts, for 250 layers of 10 by 10."""

    def optimizer(make: Any) -> torch.optim.Optimizer:
        model = nn.Sequential(*[nn.Linear(10, 10) for _ in range(250)]).to(device)
        made = make(model)
        for _ in range(2):  # the first call of a model looks at more than those to come
            made.zero_grad()
            model(torch.randn(64, 10, device=device)).square().sum().backward()
        return made

    def own(model: nn.Module) -> torch.optim.Optimizer:
        counter = truestep.SampleCounter(model)
        return truestep.AdaptiveBatchSGD(model.parameters(), lr=LR, counter=counter)

    for name in ("fused", "foreach"):
        options = {name: True}
        pairs = (
            (
                optimizer(own).step,
                optimizer(lambda m, o=options: torch.optim.SGD(m.parameters(), LR, **o)).step,
            )
            for _ in range(PLACES)
        )
        found = compare(pairs, rounds, device)
        task = "500 parameters of 10 and 100"
        yield {"task": task, "candidate": "AdaptiveBatchSGD", "baseline": f"SGD, {name}", **found}


def of_memory(tasks: list[str], device: str, *, peers: bool) -> Iterator[Row]:
    for task in tasks:
        names = [*CANDIDATES, *(PEERS if peers else ())]
        for name in names:
            row = {"task": task, "candidate": name}
            why = refusal(name, task_on(device, task)) if name in PEERS else None
            if why is None:
                yield row | {"peak": peak.peak_of(task, name, device)}
            else:
                yield row | {"skipped": why}


def line(row: Row) -> str:
    if "skipped" in row:
        return f"{row['task']:24} {row['candidate']:22} skipped: {row['skipped']}"
    if "peak" in row:
        return f"{row['task']:24} {row['candidate']:22} {row['peak'] / 1e6:9.1f} MB"
    low, middle, high = row["ratio"]
    return (
        f"{row['task']:24} {row['candidate']:22} {row['seconds'] * 1e3:9.3f} ms "
        f"{middle:8.3f} x {row['baseline']} ({low:.3f} to {high:.3f})"
    )


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/performance.md."""
    parts = [f"Measured on {machine_line(results['machine'])}.\n"]
    for threads, blocks in results["threads"].items():
        for title, rows in blocks.items():
            parts.append(f"### {title}, {threads} thread{'s' if threads != '1' else ''}\n")
            parts.append("| | candidate | ms | beside | ratio | quartiles |")
            parts.append("|---|---|---:|---|---:|---:|")
            parts += [as_cells(row) for row in rows]
            parts.append("")
    if results["memory"]:
        tasks = list(dict.fromkeys(row["task"] for row in results["memory"]))
        parts.append("### Peak memory of training, MB, 1 thread\n")
        parts.append("| candidate | " + " | ".join(tasks) + " |")
        parts.append("|---|" + "---:|" * len(tasks))
        for name in dict.fromkeys(row["candidate"] for row in results["memory"]):
            own = {r["task"]: r for r in results["memory"] if r["candidate"] == name}
            cells = [f"{own[t]['peak'] / 1e6:.1f}" if "peak" in own[t] else "" for t in tasks]
            parts.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def as_cells(row: Row) -> str:
    if "skipped" in row:
        return f"| {row['task']} | {row['candidate']} | | | | {row['skipped']} |"
    low, middle, high = row["ratio"]
    return (
        f"| {row['task']} | {row['candidate']} | {row['seconds'] * 1e3:.3f} | {row['baseline']} "
        f"| {middle:.2f} | {low:.2f} to {high:.2f} |"
    )


def shown(rows: Iterator[Row]) -> list[Row]:
    found = []
    for row in rows:
        print(line(row), flush=True)
        found.append(row)
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    tasks = chosen(TASKS, arguments.tasks)
    device = arguments.device
    results: dict[str, Any] = {"machine": machine(device), "threads": {}, "memory": []}
    print(machine_line(results["machine"]))

    def show(title: str, rows: Iterator[Row], into: dict[str, list[Row]]) -> None:
        into[title] = shown(rows)
        if arguments.json:  # after each block: a long run that is interrupted keeps what it has
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")

    for threads in arguments.threads.split(","):
        torch.set_num_threads(int(threads))
        print(f"\n{threads} threads, {arguments.rounds} rounds")
        blocks = results["threads"][threads] = {}
        rounds = arguments.rounds
        alone = chain(of_steps_alone(rounds, device), of_many_counted(rounds, device))
        show("Step alone", alone, blocks)
        show("Training step", of_training(tasks, rounds, device), blocks)
        if arguments.peers:
            show("aSGD by other libraries", of_peers(tasks, device), blocks)
    if arguments.memory:
        print("\npeak memory")
        show("memory", of_memory(tasks, device, peers=arguments.peers), results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1", help="numbers of threads, by commas")
    parser.add_argument("--rounds", type=enough_rounds, default=40)
    parser.add_argument("--tasks", default=",".join(TASKS), help="parts of names, by commas")
    parser.add_argument("--peers", action="store_true", help="other libraries too, much slower")
    parser.add_argument("--memory", action="store_true", help="peak memory too")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    run(parser, measure, markdown)


if __name__ == "__main__":
    main()
