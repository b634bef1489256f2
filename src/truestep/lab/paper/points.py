"""Many small networks on points in the plane (aSGD, section 3.2)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from truestep import ensemble
from truestep.lab.paper.data import POINTS_TEST, POINTS_TRAIN, circles, spirals
from truestep.lab.paper.engine import named, optimizer
from truestep.lab.paper.unit import ADDED, Cost, Outcome

__all__ = ["DEGREES", "ENDINGS", "FACTOR", "HIDDEN", "NOISE", "Points", "make_data"]

HIDDEN = (10, 10, 10, 10, 10)
# The paper shows its data in a figure only. Circles: the factor and noise of scikit-learn's own
# example; spirals: what the cited generator makes when nothing else is asked for.
NOISE = {"circles": 0.05, "spirals": 0.5}
FACTOR = 0.5
DEGREES = 570.0

# When a training counts as ended. "We stop training with minimal loss or 10,000 batches" can mean
# any of these: the first measured step with a training loss under the number, the measured step of
# the lowest training loss, or the last step.
ENDINGS: dict[str, float | str] = {
    "start": "first",
    "loss under 0.1": 0.1,
    "loss under 0.01": 0.01,
    "lowest loss": "lowest",
    "last step": "last",
}
MEASUREMENTS = 100
SECONDS_PER_STEP = 1e-5


@dataclass(frozen=True)
class Points:
    """Trainings of the 2-10-10-10-10-10-1 network with full batches.

    Attributes:
        data: ``"circles"`` or ``"spirals"``.
        optimizer: As in `engine.OPTIMIZERS`.
        lr: Learning rate.
        first: The first seed; replica r has seed first + r.
        replicas: How many trainings.
        steps: Updates of each.
        start: Law of the first weights, as in `truestep.ensemble.Network`.
        eps: Of the mean effective gradient.
        noise: Of the data.
        shape: Factor of the circles, degrees of the spirals.
        own_data: Whether each training has points of its own, rather than all the same.
        loss: Of the sigmoid output, as in `truestep.ensemble.Network`.
    """

    kind: ClassVar[str] = "points"

    data: str
    optimizer: str
    lr: float
    first: int
    replicas: int
    steps: int = 10_000
    start: str = "glorot_uniform"
    eps: float = 1.0
    noise: float = 0.0
    shape: float = 0.0
    own_data: bool = False
    loss: str = field(default="binary_cross_entropy", metadata=ADDED)

    def check(self) -> None:
        """Raises `TruestepError` for settings that the engine does not know."""
        self._network()
        self._optimizer()

    def cost(self) -> Cost:
        """An estimate."""
        steps = self.replicas * self.steps
        return Cost(steps, steps * SECONDS_PER_STEP)

    def data_sets(self) -> tuple[str, ...]:
        """None: points are generated."""
        return ()

    def run(self, data_dir: Path | None) -> Outcome:
        """Trains, and says where each training stood at each of the `ENDINGS`."""
        del data_dir
        every = max(1, self.steps // MEASUREMENTS)
        result = ensemble.train(
            self._network(),
            self._data(),
            replicas=self.replicas,
            steps=self.steps,
            optimizer=self._optimizer(),
            seed=self.first,
            record=ensemble.Record(every=every, nodes=True, under=0.1),
            threads=1,
        )
        measured = Measured(
            result.steps, result.loss["train"], result.loss["test"], result.accuracy["train"],
            result.accuracy["test"], result.nodes,
        )  # fmt: skip
        arrays: dict[str, NDArray[np.generic]] = {
            "first_under": result.first_under.astype(np.int32),
            "steps": result.steps.astype(np.int32),
            "mean_loss": np.nanmean(measured.train_loss, axis=0).astype(np.float32),
            "mean_dummies": (measured.nodes == 1).sum(-1).mean(0).astype(np.float32),
        }
        for place, rule in enumerate(ENDINGS.values()):
            index = _ending(measured, rule)
            arrays |= {f"{place} {key}": value for key, value in _at(measured, index).items()}
        return Outcome(
            {"diverged": int((result.status == "diverged").sum()), "endings": list(ENDINGS)},
            arrays,
            named(result),
            int(result.stopped_at.sum()),
            float(result.seconds.sum()),
        )

    def _network(self) -> ensemble.Network:
        return ensemble.Network(
            widths=(2, *HIDDEN, 1),
            activation="relu",
            output="sigmoid",
            loss=self.loss,
            start=self.start,
        )

    def _optimizer(self) -> ensemble.Optimizer:
        return optimizer(self.optimizer, self.lr, eps=self.eps)

    def _data(self) -> ensemble.Data:
        if not self.own_data:
            train, test = make_data(self.data, 0, noise=self.noise, shape=self.shape)
            return ensemble.Data(train=ensemble.Split(*train), test=ensemble.Split(*test))
        each = [
            make_data(self.data, self.first + replica, noise=self.noise, shape=self.shape)
            for replica in range(self.replicas)
        ]
        parts = [
            ensemble.Split(
                np.stack([pair[part][0] for pair in each]),
                np.stack([pair[part][1] for pair in each]),
            )
            for part in (0, 1)
        ]
        return ensemble.Data(train=parts[0], test=parts[1])


class Measured(NamedTuple):
    """Measurements [replicas, measured], nodes [replicas, measured, hidden units]."""

    steps: NDArray[np.int64]
    train_loss: NDArray[np.float32]
    test_loss: NDArray[np.float32]
    train_accuracy: NDArray[np.float32]
    test_accuracy: NDArray[np.float32]
    nodes: NDArray[np.uint8]


Pair = tuple[NDArray[np.float32], NDArray[np.int64]]


def make_data(data: str, seed: int, *, noise: float, shape: float) -> tuple[Pair, Pair]:
    """Training and test points: one draw, divided 7:3.

    Args:
        data: ``"circles"`` or ``"spirals"``.
        seed: Of the draw.
        noise: Of the points; 0 for the usual one.
        shape: Factor or degrees; 0 for the usual.
    """
    noise = noise or NOISE[data]
    samples = POINTS_TRAIN + POINTS_TEST
    if data == "circles":
        points, labels = circles(samples, seed, noise=noise, factor=shape or FACTOR)
    else:
        points, labels = spirals(samples, seed, noise=noise, degrees=shape or DEGREES)
    cut = POINTS_TRAIN
    return (points[:cut], labels[:cut]), (points[cut:], labels[cut:])


def _ending(measured: Measured, rule: float | str) -> NDArray[np.int64]:
    """The index of the measurement at which each replica ended; the last if it never did."""
    replicas, count = measured.train_loss.shape
    if rule == "first":
        return np.zeros(replicas, dtype=np.int64)
    loss = np.where(np.isfinite(measured.train_loss), measured.train_loss, np.inf)
    if rule == "last":
        return np.full(replicas, count - 1)
    if rule == "lowest":
        return np.asarray(loss.argmin(axis=1))
    under = loss < rule
    first: NDArray[np.int64] = np.where(under.any(axis=1), under.argmax(axis=1), count - 1)
    return first


def _at(measured: Measured, index: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
    rows = np.arange(len(index))
    # A bit per hidden unit: on where it is a true dummy node.
    bits = 1 << np.arange(measured.nodes.shape[-1], dtype=np.uint64)
    nodes = measured.nodes[rows, index]
    return {
        "step": measured.steps[index].astype(np.int32),
        "train_loss": measured.train_loss[rows, index].astype(np.float32),
        "test_loss": measured.test_loss[rows, index].astype(np.float16),
        "train_accuracy": measured.train_accuracy[rows, index].astype(np.float16),
        "test_accuracy": measured.test_accuracy[rows, index].astype(np.float16),
        "true_dummies": ((nodes == 1) * bits).sum(-1, dtype=np.uint64),
        "pseudo_dummies": (nodes == 2).sum(-1).astype(np.uint8),  # noqa: PLR2004 - the engine's code
    }
