"""What a training step holds beside a plain optimizer's: peak memory, the counter's bits, growth.

    python benchmarks/memory.py [--models mlp,gpt] [--dtype bfloat16] [--growth 10000]

Each candidate trains in a process of its own. Its peak is the kernel's own mark of resident memory (VmHWM)
over a few steps, which sees whatever took memory: torch, numpy, compiled loops, oneDNN's scratch space.
What was resident before the model existed is subtracted, after a step of a tiny model has loaded and
compiled everything. malloc is told to hand each freed block of 64 KiB and more back at once; otherwise the
mark would measure its habit of keeping them.

Below each table: what the counter holds after a backward pass, beside the float tensors that autograd saves
for it (parameters left out) and beside the inputs and outputs of the counted layers, of which it keeps one
bit per number (embeddings: the indices and the output's bits).
"""

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import truestep
from tasks import Block

STEPS = 5  # the first one allocates what the optimizer keeps
MEGABYTE = 1 << 20

Task = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]
Watch = truestep.SampleCounter | None


def mlp() -> Task:
    sizes = (784, 2048, 2048, 10)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return classify(nn.Sequential(*layers[:-1]), torch.rand(1024, 784))


def classify(model: nn.Module, inputs: Tensor) -> Task:
    return model, functional.cross_entropy, inputs, torch.randint(0, 10, (len(inputs),))


class Residual(nn.Module):
    """Two convolutions with GroupNorm and a shortcut."""

    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, wider, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(8, wider) for _ in range(2))
        same = stride == 1 and channels == wider
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, wider, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.norms[0](self.first(x)))
        return functional.relu(self.norms[1](self.second(hidden)) + self.shortcut(x))


def resnet() -> Task:
    blocks = [Residual(32, 32, 1), Residual(32, 64, 2), Residual(64, 128, 2)]
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    return classify(model, torch.rand(64, 3, 32, 32))


class GPT(nn.Module):
    """A language model with learned positions and a tied head."""

    def __init__(self, tokens: int, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).unsqueeze(0)
        return self.head(self.blocks(self.tokens(x) + self.positions(places)))


def gpt() -> Task:
    tokens, shape = 256, (8, 128)
    return (
        GPT(tokens, shape[1], width=256, depth=4),
        lambda logits, targets: functional.cross_entropy(logits.flatten(0, 1), targets.flatten()),
        torch.randint(0, tokens, shape),
        torch.randint(0, tokens, shape),
    )


def tiny() -> Task:
    return classify(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10)), torch.rand(4, 8))


MODELS: dict[str, tuple[str, Callable[[], Task]]] = {
    "mlp": ("784-2048-2048-10, batch 1024", mlp),
    "resnet": ("3 residual blocks with GroupNorm, 32x32, batch 64", resnet),
    "gpt": ("4 layers, width 256, 128 tokens, batch 8", gpt),
}


def plain_momentum(model: nn.Module) -> tuple[torch.optim.Optimizer, Watch]:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), None


def adaptive(model: nn.Module) -> tuple[torch.optim.Optimizer, Watch]:
    counter = truestep.SampleCounter(model)
    return truestep.AdaptiveBatchSGD(model.parameters(), lr=1e-3, counter=counter), counter


def adaptive_adam(model: nn.Module) -> tuple[torch.optim.Optimizer, Watch]:
    counter = truestep.SampleCounter(model)
    optimizer = torch.optim.Adam(model.parameters())
    truestep.attach(optimizer, truestep.mean_effective_gradient(counter))
    return optimizer, counter


# Candidate -> how to make it, and what it is compared with.
CANDIDATES: dict[str, tuple[Callable[[nn.Module], tuple[torch.optim.Optimizer, Watch]], str]] = {
    "SGD": (lambda model: (torch.optim.SGD(model.parameters(), lr=1e-3), None), "SGD"),
    "AdaptiveBatchSGD": (adaptive, "SGD"),
    "SGD momentum": (plain_momentum, "SGD momentum"),
    "DASGD": (lambda model: (truestep.DASGD(model.parameters(), lr=1e-3), None), "SGD momentum"),
    "Adam": (lambda model: (torch.optim.Adam(model.parameters()), None), "Adam"),
    "asgd+adam": (adaptive_adam, "Adam"),
}


def resident(mark: str) -> int:
    """Bytes of resident memory: now (VmRSS) or at most since the last `forget_peak` (VmHWM)."""
    found = re.search(rf"{mark}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {mark}; this benchmark needs Linux")
    return int(found.group(1)) * 1024


def forget_peak() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def in_dtype(task: Task, dtype: torch.dtype) -> Task:
    model, loss_fn, inputs, targets = task
    wide = inputs.to(dtype) if inputs.is_floating_point() else inputs
    return model.to(dtype), lambda out, goals: loss_fn(out.float(), goals), wide, targets


def backward(task: Task) -> None:
    model, loss_fn, inputs, targets = task
    loss_fn(model(inputs), targets).backward()


def train(task: Task, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        backward(task)
        optimizer.step()


def peak(model: str, candidate: str, dtype: torch.dtype) -> dict[str, int]:
    """In a fresh process: the peak of a few steps above what is resident without the model."""
    torch.manual_seed(0)
    make, (_, build) = CANDIDATES[candidate][0], MODELS[model]
    for warm_up in (tiny, build):  # loads and compiles; the second one also oneDNN's kernels
        task = in_dtype(warm_up(), dtype)
        optimizer, counter = make(task[0])
        train(task, optimizer, 1)
        del task, optimizer, counter
    forget_peak()
    before = resident("VmRSS")
    task = in_dtype(build(), dtype)
    optimizer, _ = make(task[0])
    train(task, optimizer, STEPS)
    return {"peak": resident("VmHWM") - before}


def held(model: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the counter's records, of what autograd saves, and of what the counted layers see."""
    torch.manual_seed(0)
    task = in_dtype(MODELS[model][1](), dtype)
    counter = truestep.SampleCounter(task[0])
    parameters = {p.untyped_storage().data_ptr() for p in task[0].parameters()}
    saved: dict[int, int] = {}
    layers = [0]

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if tensor.is_floating_point() and place not in parameters:
            saved[place] = tensor.untyped_storage().nbytes()
        return tensor

    def see(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layers[0] += sum(tensor.nbytes for tensor in (*inputs, output))

    counted = [m for m in task[0].modules() if type(m) in truestep.RULES]
    handles = [module.register_forward_hook(see) for module in counted]
    _, loss_fn, inputs, targets = task
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_fn(task[0](inputs), targets)
        total = sum(saved.values())  # while all of them live, so that no place is taken twice
    for handle in handles:
        handle.remove()
    loss.backward()
    return {"bits": counter.nbytes, "saved": total, "layers": layers[0]}


def growth(candidate: str, steps: int) -> dict[str, int]:
    """What a long training of a tiny model adds to resident memory and to Python's objects."""
    torch.manual_seed(0)
    task = tiny()
    optimizer, _ = CANDIDATES[candidate][0](task[0])
    train(task, optimizer, steps // 10)
    forget_peak()
    before, objects = resident("VmRSS"), len(gc.get_objects())
    train(task, optimizer, steps)
    gc.collect()
    return {"bytes": resident("VmRSS") - before, "objects": len(gc.get_objects()) - objects}


def in_a_process(*arguments: str) -> dict[str, int]:
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 16),
    }
    command = [sys.executable, __file__, "--alone", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)  # noqa: S603
    return json.loads(done.stdout)


def alone(what: str, *rest: str) -> dict[str, int]:
    torch.set_num_threads(1)
    if what == "growth":
        return growth(rest[0], int(rest[1]))
    dtype = getattr(torch, rest[-1])
    return peak(rest[0], rest[1], dtype) if what == "peak" else held(rest[0], dtype)


def compare(model: str, dtype: str) -> None:
    print(f"\n{model} ({MODELS[model][0]}, {dtype})")
    print(f"  {'':18} {'without':>9} {'with':>9}  ratio")
    peaks = {name: in_a_process("peak", model, name, dtype)["peak"] for name in CANDIDATES}
    for name, (_, base) in CANDIDATES.items():
        if name != base:
            one, other = peaks[base] / MEGABYTE, peaks[name] / MEGABYTE
            print(f"  {name:18} {one:6.1f} MB {other:6.1f} MB  {other / one:5.3f} x {base}")
    found = in_a_process("held", model, dtype)
    bits = found["bits"]
    print(
        f"  the counter holds {bits / 1024:.0f} KiB after backward: "
        f"1/{found['saved'] / bits:.1f} of what autograd saves ({found['saved'] / MEGABYTE:.1f} MB), "
        f"1/{found['layers'] / bits:.1f} of the layers' inputs and outputs "
        f"({found['layers'] / MEGABYTE:.1f} MB)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="names, by commas")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--growth", type=int, default=10_000, help="steps; 0 leaves it out")
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(alone(*arguments.alone)))
        return
    print(f"torch {torch.__version__}, peak over {STEPS} steps, one thread")
    for model in filter(None, arguments.models.split(",")):
        compare(model, arguments.dtype)
    if arguments.growth:
        print(f"\n{arguments.growth} steps of a tiny model add")
        for name in CANDIDATES:
            found = in_a_process("growth", name, str(arguments.growth))
            print(f"  {name:18} {found['bytes'] / 1024:6.0f} KiB, {found['objects']} objects")


if __name__ == "__main__":
    main()
