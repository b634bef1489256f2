"""Where the time of a small model's step goes, phase by phase, and what hooks that do nothing cost.

    python benchmarks/floor.py [--rounds 400] [--threads 1,2] [--tasks 784-,cnn] [--json FILE] [--markdown]
    python benchmarks/floor.py --read FILE --markdown

Training steps take turns in one process: SGD; SGD with empty hooks where counting has hooks; SGD with hooks
that read each layer's input and output gradient once, by torch's sum, as any way to count must; SGD with a
counter that watches; AdaptiveBatchSGD; and, for sequences of linear layers, the least that hooks in Python
can do: pack and step, with no check and no record. Printed, after the number of threads: lower quartiles of
microseconds for each phase, and the median of the ratios to SGD's step in the same round; and what a layer
more costs in forward and backward pass, from sequences of small linear layers.
"""

import argparse
import json
import math
import statistics
import time
from array import array
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Variable

import truestep
from candidates import LR
from tasks import TASKS, Task
from timing import WARM_UP, chosen, enough_rounds, machine, machine_line
from truestep.kernels.dispatch import loops
from truestep.kernels.stepping import FIELDS, LINEAR, Entry, Table

DEPTHS = 10, 30  # of the models that tell what a layer more costs
PHASES = ("forward", "backward", "step")


def plain(task: Task) -> torch.optim.Optimizer:
    return torch.optim.SGD(task.model.parameters(), lr=LR)


def nothing(*_: Any) -> None:
    pass


def counted(task: Task) -> list[nn.Module]:
    """The layers that a counter hooks."""
    return [layer for layer in task.model.modules() if type(layer) in truestep.RULES]


def with_hooks(task: Task, make: Callable[[Any], Callable[..., None]]) -> torch.optim.Optimizer:
    """SGD with hooks where counting has hooks; `make` gets a layer's arguments."""

    def on_layer(_module: nn.Module, args: Any, _kwargs: Any, output: Tensor) -> None:
        output.grad_fn.register_prehook(make(args))

    for layer in counted(task):
        layer.register_forward_hook(on_layer, with_kwargs=True)
    task.model.register_forward_pre_hook(nothing, with_kwargs=True)
    task.model.register_forward_hook(nothing, always_call=True)
    for parameter in task.model.parameters():
        parameter.register_post_accumulate_grad_hook(nothing)
    return plain(task)


def with_empty_hooks(task: Task) -> torch.optim.Optimizer:
    return with_hooks(task, lambda _args: nothing)


def with_tensor_hooks(task: Task) -> torch.optim.Optimizer:
    """What a layer's hooks cost where they wait at its output tensor instead of the node that made it."""

    def at_tensor(_module: nn.Module, _args: Any, output: Tensor) -> None:
        output.register_hook(nothing)

    for layer in counted(task):
        layer.register_forward_hook(at_tensor)
    return plain(task)


def with_full_backward_hooks(task: Task) -> torch.optim.Optimizer:
    """The same by `register_full_backward_hook`."""
    for layer in counted(task):
        layer.register_full_backward_hook(nothing)
    return plain(task)


class Passed(torch.autograd.Function):
    """An operation that does nothing and could look at the gradient that passes it."""

    @staticmethod
    def forward(_context: Any, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return gradient


def with_functions(task: Task) -> torch.optim.Optimizer:
    """The same by an operation of our own behind each layer."""

    def passed(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return Passed.apply(output)

    for layer in counted(task):
        layer.register_forward_hook(passed)
    return plain(task)


def with_reading_hooks(task: Task) -> torch.optim.Optimizer:
    def make(args: tuple[Tensor]) -> Callable[..., None]:
        def read(gradients: tuple[Tensor]) -> None:
            for tensor in (args[0], gradients[0]):
                tensor.sum()

        return read

    return with_hooks(task, make)


def watched(task: Task) -> torch.optim.Optimizer:
    optimizer = plain(task)
    optimizer.counter = truestep.SampleCounter(task.model)  # lives as long as the optimizer
    return optimizer


def adaptive(task: Task) -> torch.optim.Optimizer:
    counter = truestep.SampleCounter(task.model)
    return truestep.AdaptiveBatchSGD(task.model.parameters(), lr=LR, counter=counter)


class Least(torch.optim.Optimizer):
    """aSGD for a sequence of linear layers, right only where nothing is unusual: a floor."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.model.parameters(), {"lr": LR})
        self.uses: list[tuple[nn.Linear, Tensor, Tensor]] = []
        self.packed: list[tuple[nn.Linear, Tensor, int, int, int]] = []
        self.options = array("f", [LR, 0, 0, 1, 0, 0, 1, math.inf])
        self.shared = (
            loops().functions_of(LINEAR, np.float32).buffer_info()[0],
            self.options.buffer_info()[0],
        )
        for module in task.model.modules():
            if type(module) is nn.Linear:
                module.register_forward_hook(self._on_layer)

    def _on_layer(self, module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        def on_gradient(gradients: tuple[Tensor]) -> None:
            if not self.uses:
                Variable._execution_engine.queue_callback(self._pack)  # noqa: SLF001
            self.uses.append((module, args[0], gradients[0]))

        output.grad_fn.register_prehook(on_gradient)

    def _pack(self) -> None:
        self.packed = []
        for module, given, delta in self.uses:
            samples, inputs = given.shape
            count, outputs = (samples + 63) // 64, delta.shape[1]
            words = torch.empty(count * (inputs + outputs), dtype=torch.int64)
            places = words.data_ptr(), words.data_ptr() + 8 * count * inputs
            for tensor, units, place in zip((given, delta), (inputs, outputs), places, strict=True):
                line = array("q", [tensor.data_ptr(), 4, 0x7FFF_FFFF, samples, 1, units])
                line.extend([4 * units, 0, 4, 0, 0, 0, 0, 1, 0])
                loops().pack(0, count * units, line.buffer_info()[0], 1, place)
            self.packed.append((module, words, samples, *places))
        self.uses = []

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        table = Table(4)
        for module, _, samples, of, to in self.packed:
            rows, columns = module.weight.shape
            for parameter, entry in (
                (module.weight, Entry(rows, columns, to, of, samples)),
                (module.bias, Entry(1, rows, 0, to, samples)),
            ):
                addresses = parameter.grad.data_ptr(), parameter.data_ptr(), 0
                table.add(addresses, 0, samples, [entry])
        address, size = table.numbers.buffer_info()
        loops().step(0, table.work, address, size // FIELDS, *self.shared)


CANDIDATES: dict[str, Callable[[Task], torch.optim.Optimizer]] = {
    "SGD": plain,
    "SGD, empty hooks": with_empty_hooks,
    "SGD, reading hooks": with_reading_hooks,
    "SGD, counter": watched,
    "AdaptiveBatchSGD": adaptive,
}
ONLY_LINEAR = {"the least": Least}


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


def measure(names: list[str], threads: int, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    rows = []
    for name in names:
        built = {}
        owners = {type(m) for m in TASKS[name]().model.modules() if [*m.parameters(recurse=False)]}
        only_linear = ONLY_LINEAR if owners == {nn.Linear} else {}
        for candidate, make in (CANDIDATES | only_linear).items():
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
            pairs = zip(spent, found["SGD"], strict=True)
            row = {"task": name, "threads": threads, "candidate": candidate}
            row["ratio"] = statistics.median(sum(own) / sum(plain) for own, plain in pairs)
            rows.append(row | dict(zip(PHASES, lower, strict=True)))
    return rows


def per_layer(rounds: int) -> dict[str, float]:
    """Microseconds that a linear layer more, 8 by 8, costs in forward and backward pass."""
    torch.set_num_threads(1)
    made = {
        "SGD": plain,
        "SGD, empty hooks": with_empty_hooks,
        "SGD, empty hooks at tensors": with_tensor_hooks,
        "SGD, empty full backward hooks": with_full_backward_hooks,
        "SGD, empty autograd functions": with_functions,
        "SGD, counter": watched,
    }
    built = {}
    for depth in DEPTHS:
        for candidate, make in made.items():
            model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(depth)])
            inputs, targets = torch.randn(8, 8), torch.zeros(8, dtype=torch.long)
            task = Task(model, nn.functional.cross_entropy, inputs, targets)
            built[candidate, depth] = task, make(task)
    spent: dict[tuple[str, int], list[float]] = {key: [] for key in built}
    for number in range(WARM_UP + rounds):
        for key, (task, optimizer) in built.items():
            forward, backward, _ = phases(task, optimizer)
            if number >= WARM_UP:
                spent[key].append(forward + backward)
    lower = {key: statistics.quantiles(column, n=4)[0] for key, column in spent.items()}
    few, many = DEPTHS
    return {name: (lower[name, many] - lower[name, few]) / (many - few) for name in made}


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/performance.md."""
    lines = [f"Measured on {machine_line(results['machine'])}; microseconds, and ratios to SGD."]
    for threads in sorted({row["threads"] for row in results["rows"]}):
        lines += [
            f"\n### Phases, {threads} thread{'s' if threads > 1 else ''}\n",
            "| | candidate | forward | backward | step | ratio |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for row in results["rows"]:
            if row["threads"] == threads:
                cells = " | ".join(f"{row[phase]:.0f}" for phase in PHASES)
                lines.append(
                    f"| {row['task']} | {row['candidate']} | {cells} | {row['ratio']:.2f} |"
                )
    lines += [
        "",
        "One linear layer more, 8 by 8, batch 8, 1 thread, forward and backward pass together: "
        + ", ".join(f"{name} {spent:.0f} us" for name, spent in results["per_layer"].items())
        + ".",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=enough_rounds, default=400)
    parser.add_argument("--threads", default="1", help="numbers of threads, by commas")
    parser.add_argument(
        "--tasks", default="784-,cnn,gpt b8 by sample", help="parts of names, by commas"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--read", type=Path, help="figures of an earlier run instead of a new one")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    arguments = parser.parse_args()
    if arguments.read:
        results = json.loads(arguments.read.read_text())
    else:
        names = chosen(TASKS, arguments.tasks)
        rows = []
        for threads in arguments.threads.split(","):
            rows += measure(names, int(threads), arguments.rounds)
        results = {"machine": machine(), "rows": rows, "per_layer": per_layer(arguments.rounds)}
        for row in results["rows"]:
            spent = "  ".join(f"{phase} {row[phase]:8.1f}" for phase in PHASES)
            print(
                f"{row['threads']} {row['task']:19} {row['candidate']:18} {spent}  {row['ratio']:.2f}"
            )
        for name, microseconds in results["per_layer"].items():
            print(f"{'a layer more':22} {name:18} {microseconds:8.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.markdown:
        print("\n" + markdown(results))


if __name__ == "__main__":
    main()
