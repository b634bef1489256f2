"""The 2-3-2-1 network on circles: every parameter over training, every sample's gradient at its end.

aSGD, Figures 1-4. The paper numbers layers from 1 (the inputs) and nodes from 1, and so do names here.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from truestep import ensemble
from truestep.lab.paper.engine import named, optimizer
from truestep.lab.paper.points import make_data
from truestep.lab.paper.unit import ADDED, Cost, Outcome

__all__ = ["LAYER_3", "WIDTHS", "Panels", "Trajectories", "parameter_names", "per_sample"]

WIDTHS = (2, 3, 2, 1)
MEASUREMENTS = 200
# The last part of a training, in which a parameter that does not move at all has stopped.
LATE = 0.3
SECONDS_PER_STEP = 3e-6
# Parameters of node j of layer 3: its three weights and its bias, among all 20.
LAYER_3 = (slice(9, 12), slice(12, 15)), (15, 16)


@dataclass(frozen=True)
class Trajectories:
    """The same starts trained by aSGD and by SGD, all parameters recorded.

    Attributes:
        lr: Learning rate of aSGD.
        replicas: How many starts; replica r has seed r.
        steps: Full batches.
        start: Law of the first weights.
        eps: Of the mean effective gradient.
        sgd_factor: SGD's learning rate is so many times aSGD's.
    """

    kind: ClassVar[str] = "trajectories"

    lr: float
    replicas: int
    steps: int = 10_000
    start: str = "glorot_uniform"
    eps: float = 1.0
    sgd_factor: float = field(default=1.0, metadata=ADDED)

    def check(self) -> None:
        """Raises `TruestepError` for settings that the engine does not know."""
        _network(self.start)

    def cost(self) -> Cost:
        """An estimate."""
        steps = 2 * self.replicas * self.steps
        return Cost(steps, steps * SECONDS_PER_STEP)

    def data_sets(self) -> tuple[str, ...]:
        """None: points are generated."""
        return ()

    def run(self, data_dir: Path | None) -> Outcome:
        """Trains both; keeps every start's distances and one start's trajectories."""
        del data_dir
        results = {name: _train(self, name) for name in ("asgd", "sgd")}
        arrays: dict[str, NDArray[np.generic]] = {"steps": results["sgd"].steps.astype(np.int32)}
        stopped = {}
        for name, result in results.items():
            path = result.parameters
            moves = np.abs(np.diff(path, axis=1))
            late = moves[:, -round(LATE * moves.shape[1]) :]
            stopped[name] = (late == 0).all(axis=1)
            arrays |= {
                f"{name} range": np.ptp(path, axis=1).astype(np.float16),
                f"{name} net": np.abs(path[:, -1] - path[:, 0]).astype(np.float16),
                f"{name} early net": np.abs(path[:, path.shape[1] // 10] - path[:, 0]).astype(
                    np.float16
                ),
                f"{name} stopped": stopped[name],
                f"{name} loss": result.loss["train"].astype(np.float16),
            }
        shown, node = _example(stopped["asgd"], stopped["sgd"], arrays["asgd loss"])
        arrays |= {f"{name} path": result.parameters[shown] for name, result in results.items()}
        summary = {"shown": shown, "node": node, "names": parameter_names()}
        return Outcome(
            summary,
            arrays,
            named(results["sgd"]),
            sum(int(result.stopped_at.sum()) for result in results.values()),
            sum(float(result.seconds.sum()) for result in results.values()),
        )


@dataclass(frozen=True)
class Panels:
    """Every sample's part in the gradient of a network with a true dummy node in layer 3.

    Attributes:
        lr: Learning rate of aSGD.
        replicas: Among how many starts one is looked for.
        steps: Full batches.
        start: Law of the first weights.
    """

    kind: ClassVar[str] = "panels"

    lr: float
    replicas: int
    steps: int = 10_000
    start: str = "glorot_uniform"

    def check(self) -> None:
        """Raises `TruestepError` for settings that the engine does not know."""
        _network(self.start)

    def cost(self) -> Cost:
        """An estimate."""
        steps = self.replicas * self.steps
        return Cost(steps, steps * SECONDS_PER_STEP)

    def data_sets(self) -> tuple[str, ...]:
        """None: points are generated."""
        return ()

    def run(self, data_dir: Path | None) -> Outcome:
        """Trains, takes the start of lowest loss whose layer 3 has one true dummy node."""
        del data_dir
        result = _train(
            Trajectories(self.lr, self.replicas, self.steps, self.start), "asgd", nodes=True
        )
        dummies = result.nodes[:, -1, -WIDTHS[2] :] == 1
        loss = np.where(dummies.sum(1) == 1, result.loss["train"][:, -1], np.inf)
        shown = int(loss.argmin())
        (points, labels), _ = make_data("circles", 0, noise=0, shape=0)
        parameters = result.parameters[shown, -1]
        if np.isfinite(loss[shown]) and dummies[shown, 0]:
            parameters = _swapped(parameters)
        arrays = per_sample(parameters, points, labels) | {"points": points, "labels": labels}
        summary = {
            "shown": shown,
            "with one dummy": int((dummies.sum(1) == 1).sum()),
            "loss": float(result.loss["train"][shown, -1]),
            "accuracy": float(result.accuracy["train"][shown, -1]),
        }
        steps = int(result.stopped_at.sum())
        seconds = float(result.seconds.sum())
        return Outcome(summary, arrays, f"{named(result)}, then torch", steps, seconds)


def parameter_names() -> list[str]:
    """Names of all parameters in order: w3_12 is the weight from node 2 to node 1 of layer 3.

    Example:
        >>> parameter_names()[:7], len(parameter_names())
        (['w2_11', 'w2_12', 'w2_21', 'w2_22', 'w2_31', 'w2_32', 'b2_1'], 20)
    """
    names = []
    for layer, (inputs, outputs) in enumerate(pairwise(WIDTHS), 2):
        nodes = range(1, outputs + 1)
        names += [f"w{layer}_{j}{k}" for j in nodes for k in range(1, inputs + 1)]
        names += [f"b{layer}_{j}" for j in nodes]
    return names


def per_sample(
    parameters: NDArray[np.float32], points: NDArray[np.float32], labels: NDArray[np.int64]
) -> dict[str, NDArray[np.generic]]:
    """What equations 3-6 of the aSGD paper are made of, for every sample.

    Args:
        parameters: All 20, as in :func:`parameter_names`.
        points: [samples, 2].
        labels: 0 or 1 [samples].

    Returns:
        ``a2``, ``a3`` (activations), ``z3`` (weighted inputs), ``delta3``, ``delta4`` (errors, of a
        sample's own loss), each [samples, nodes], ``w4`` [1, 2], and the gradients of a sample's
        own loss that autograd gives: ``db3`` [samples, 2] and ``dw4`` [samples, 2].
    """
    layers = [nn.Linear(i, o) for i, o in pairwise(WIDTHS)]
    flat = torch.from_numpy(np.asarray(parameters, dtype=np.float32))
    torch.nn.utils.vector_to_parameters(flat, [p for layer in layers for p in layer.parameters()])
    x, y = torch.from_numpy(points), torch.from_numpy(labels)[:, None].float()
    a2 = torch.relu(layers[0](x))
    z3 = layers[1](a2)
    a3 = torch.relu(z3)
    z4 = layers[2](a3)
    losses = nn.functional.binary_cross_entropy_with_logits(z4, y, reduction="none")
    delta3, delta4 = torch.autograd.grad(losses.sum(), [z3, z4], retain_graph=True)
    own = [
        torch.autograd.grad(loss, [layers[1].bias, layers[2].weight], retain_graph=True)
        for loss in losses.flatten()
    ]
    found = {
        "a2": a2,
        "z3": z3,
        "a3": a3,
        "delta3": delta3,
        "delta4": delta4,
        "w4": layers[2].weight,
        "db3": torch.stack([bias for bias, _ in own]),
        "dw4": torch.stack([weight[0] for _, weight in own]),
    }
    return {name: value.detach().numpy() for name, value in found.items()}


def _network(start: str) -> ensemble.Network:
    return ensemble.Network(
        widths=WIDTHS,
        activation="relu",
        output="sigmoid",
        loss="binary_cross_entropy",
        start=start,
    )


def _train(plan: Trajectories, name: str, *, nodes: bool = False) -> ensemble.Result:
    train, _ = make_data("circles", 0, noise=0, shape=0)
    lr = plan.lr * (plan.sgd_factor if name == "sgd" else 1)
    return ensemble.train(
        _network(plan.start),
        ensemble.Data(train=ensemble.Split(*train)),
        replicas=plan.replicas,
        steps=plan.steps,
        optimizer=optimizer(name, lr, eps=plan.eps),
        seed=0,
        record=ensemble.Record(
            every=max(1, plan.steps // MEASUREMENTS), parameters=True, nodes=nodes
        ),
        threads=1,
    )


def _example(
    asgd: NDArray[np.bool_], sgd: NDArray[np.bool_], loss: NDArray[np.generic]
) -> tuple[int, int]:
    """The start of lowest final loss at which a node of layer 3 stops under aSGD and not under SGD.

    Returns:
        The start and the node; node 0 if there is no such start, and then the lowest loss of all.
    """
    final = np.nan_to_num(loss[:, -1].astype(np.float64), nan=np.inf)
    best, node = int(final.argmin()), 0
    lowest = np.inf
    for number, (weights, bias) in enumerate(zip(*LAYER_3, strict=True), 1):
        here = asgd[:, weights].all(1) & asgd[:, bias]
        there = sgd[:, weights].all(1) & sgd[:, bias]
        fitting = np.where(here & ~there, final, np.inf)
        if fitting.min() < lowest:
            lowest, best, node = float(fitting.min()), int(fitting.argmin()), number
    return best, node


def _swapped(parameters: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same network with the two nodes of layer 3 in the other order: the dummy is the second."""
    order = np.arange(len(parameters))
    order[9:15] = [12, 13, 14, 9, 10, 11]
    order[15:17] = [16, 15]
    order[17:19] = [18, 17]
    return parameters[order]
