"""What a training step costs beside plain SGD's: forward, backward and step, in one process.

    python benchmarks/step.py [--threads 1] [--rounds 30] [--models mlp-small,cnn] [--peers]

Candidates take turns (A B C A B C ...), and each is compared with the plain step of the same round, so that
a machine whose speed drifts does not matter. Printed: the median ratio and its quartiles.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

import truestep

INK = 0.2  # the share of MNIST's pixels that are not black

Step = Callable[[], None]
Task = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]


def mlp(*sizes: int, batch: int) -> Task:
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    inputs = torch.rand(batch, sizes[0]) * (torch.rand(batch, sizes[0]) < INK)
    return classify(nn.Sequential(*layers[:-1]), inputs)


def classify(model: nn.Module, inputs: Tensor) -> Task:
    return model, functional.cross_entropy, inputs, torch.randint(0, 10, (len(inputs),))


def cnn() -> Task:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 14 * 14, 10),
    )
    return classify(model, torch.rand(64, 1, 28, 28))


def bag() -> Task:
    model = nn.Sequential(nn.EmbeddingBag(100_000, 32), nn.ReLU(), nn.Linear(32, 10))
    return classify(model, torch.randint(0, 100_000, (256, 17)))


MODELS: dict[str, Callable[[], Task]] = {
    "784-30-20-10 b64": lambda: mlp(784, 30, 20, 10, batch=64),
    "784-128-128-10 b256": lambda: mlp(784, 128, 128, 10, batch=256),
    "784-1024-1024-10 b256": lambda: mlp(784, 1024, 1024, 10, batch=256),
    "784-2048-2048-10 b1024": lambda: mlp(784, 2048, 2048, 10, batch=1024),
    "cnn b64": cnn,
    "bag of 100,000 b256": bag,
}


def plain(task: Task, make: Callable[[nn.Module], torch.optim.Optimizer]) -> Step:
    model, loss_fn, inputs, targets = task
    optimizer = make(model)

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()

    return step


def adaptive(model: nn.Module) -> torch.optim.Optimizer:
    counter = truestep.SampleCounter(model)
    return truestep.AdaptiveBatchSGD(model.parameters(), lr=1e-3, counter=counter)


def adaptive_adam(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    counter = truestep.SampleCounter(model)
    truestep.attach(optimizer, truestep.mean_effective_gradient(counter))
    return optimizer


def per_sample_gradients(task: Task) -> Step:
    """aSGD as one would write it with torch.func: all per-sample gradients, then their non-zeros."""
    model, loss_fn, inputs, targets = task
    parameters = dict(model.named_parameters())

    def loss_of(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, values, (x.unsqueeze(0),))
        return loss_fn(output, y.unsqueeze(0))

    gradients = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0, 0))

    def step() -> None:
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        for name, rows in gradients(values, inputs, targets).items():
            direction = rows.sum(0) / ((rows != 0).sum(0) + 1)
            with torch.no_grad():
                parameters[name].add_(direction, alpha=-1e-3)

    return step


# Candidate -> how to build it, and what it is compared with.
CANDIDATES: dict[str, tuple[Callable[[Task], Step], str]] = {
    "SGD": (lambda task: plain(task, lambda m: torch.optim.SGD(m.parameters(), lr=1e-3)), "SGD"),
    "AdaptiveBatchSGD": (lambda task: plain(task, adaptive), "SGD"),
    "SGD momentum, foreach": (
        lambda task: plain(
            task, lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9, foreach=True)
        ),
        "SGD",
    ),
    "DASGD": (
        lambda task: plain(task, lambda m: truestep.DASGD(m.parameters(), lr=1e-3)),
        "SGD momentum, foreach",
    ),
    "Adam": (lambda task: plain(task, lambda m: torch.optim.Adam(m.parameters())), "SGD"),
    "asgd+adam": (lambda task: plain(task, adaptive_adam), "Adam"),
}
PEERS: dict[str, tuple[Callable[[Task], Step], str]] = {
    "per-sample gradients (vmap)": (per_sample_gradients, "SGD"),
}


def measure(make: Callable[[], Task], rounds: int, *, peers: bool) -> dict[str, list[float]]:
    """Seconds of each candidate's steps, round by round."""
    candidates = CANDIDATES | (PEERS if peers else {})
    steps = {}
    for name, (build, _) in candidates.items():
        torch.manual_seed(0)
        steps[name] = build(make())
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 3):  # the first three allocate and compile
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number > 2:  # noqa: PLR2004
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--models", default=",".join(MODELS), help="parts of names, by commas")
    parser.add_argument(
        "--peers", action="store_true", help="per-sample gradients too, much slower"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} rounds")
    wanted = arguments.models.split(",")
    for model, make in MODELS.items():
        if not any(part in model for part in wanted):
            continue
        seconds = measure(make, arguments.rounds, peers=arguments.peers)
        candidates = CANDIDATES | PEERS
        print(f"\n{model}: SGD {statistics.median(seconds['SGD']) * 1e3:.3f} ms a step")
        for name, own in seconds.items():
            base = candidates[name][1]
            if name != base:
                ratios = [a / b for a, b in zip(own, seconds[base], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                print(f"  {name:28} {middle:8.2f} x {base}  ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
