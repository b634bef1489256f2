"""The same trained MNIST networks made smaller by truestep and by two peers, without training again.

    pip install -e '.[lab,peers]'
    python benchmarks/compression.py --json results/compression/peers.json

The networks are trained by Adam. truestep takes out what is redundant on the 50,000 training images.
torch-pruning takes out, by magnitude, the same share of hidden units; torch.nn.utils.prune sets to zero the
same share of weights by magnitude, which leaves all sizes as they are. Accuracy is on the 10,000 test images.
"""

import argparse
import copy
import importlib.util
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import truestep
from timing import machine
from truestep.lab.tasks import Split, accuracy, load_image_task
from truestep.lab.training import batches

ROUNDS = 30
ROWS = 1000


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 49, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def trained(make: Callable[[], nn.Sequential], data: Split, lr: float, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for indices in batches(len(data.inputs), 64, epochs, seed=0):
        optimizer.zero_grad()
        output = model(data.inputs[indices])
        nn.functional.cross_entropy(output, data.targets[indices]).backward()
        optimizer.step()
    return model.eval()


def by_truestep(model: nn.Module, data: Split) -> tuple[nn.Module, float]:
    inputs = data.inputs.split(ROWS)
    nodes = truestep.find_dummy_nodes(model, inputs)
    small, report = truestep.compress(model, nodes, inputs[0])
    hidden = sum(len(layer) for layer in nodes)
    return small, len(report.removed) / hidden


def by_torch_pruning(model: nn.Module, share: float, example: Tensor) -> nn.Module:
    import torch_pruning  # noqa: PLC0415 - a peer, where it is installed

    small = copy.deepcopy(model)
    last = [module for module in small.modules() if isinstance(module, nn.Linear)][-1]
    pruner = torch_pruning.pruner.BasePruner(
        small,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=share,
        global_pruning=True,
        ignored_layers=[last],
    )
    pruner.step()
    return small


def by_masks(model: nn.Module, share: float) -> nn.Module:
    small = copy.deepcopy(model)
    weights = [(m, "weight") for m in small.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=share)
    for module, name in weights:
        prune.remove(module, name)
    return small


def milliseconds(models: list[nn.Module], batch: Tensor) -> list[float]:
    """Median times of one batch, the models taking turns."""
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(ROUNDS):
            for model, spent in zip(models, times, strict=True):
                start = time.perf_counter()
                model(batch)
                spent.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(spent) for spent in times]


def size(model: nn.Module) -> int:
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    return stream.tell()


@torch.no_grad()
def row(
    title: str, model: nn.Module, before: nn.Module, train: Split, test: Split
) -> dict[str, Any]:
    gaps = [(model(x) - before(x)).abs().max().item() for x in train.inputs.split(ROWS)]
    return {
        "way": title,
        "parameters": sum(p.numel() for p in model.parameters()),
        "nonzero": sum(int((p != 0).sum()) for p in model.parameters()),
        "bytes": size(model),
        "accuracy": float(accuracy(model(test.inputs), test.targets)),
        "difference": max(gaps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch_pruning") is None:
        sys.exit("torch_pruning is not installed. Run in the clone: pip install -e '.[peers]'")
    torch.set_num_threads(1)
    data = load_image_task("mnist")
    results: dict[str, Any] = {"machine": machine(), "lr": arguments.lr, "epochs": arguments.epochs}
    for name, make in {"MLP 784-256-128-10": mlp, "CNN": cnn}.items():
        model = trained(make, data.train, arguments.lr, arguments.epochs)
        small, share = by_truestep(model, data.train)
        weights = 1 - sum(p.numel() for p in small.parameters()) / sum(
            p.numel() for p in model.parameters()
        )
        ways = {
            "as trained": model,
            "truestep": small,
            "torch-pruning, by magnitude": by_torch_pruning(model, share, data.train.inputs[:1]),
            "torch.nn.utils.prune, by magnitude": by_masks(model, weights),
        }
        rows = [row(title, way, model, data.train, data.test) for title, way in ways.items()]
        times = milliseconds(list(ways.values()), data.test.inputs[:ROWS])
        for one, spent in zip(rows, times, strict=True):
            one["milliseconds"] = spent
            one["speed"] = times[0] / spent
            print(name, one)
        results[name] = {"share of units": share, "rows": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
