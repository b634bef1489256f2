"""Fully connected networks on images: the curves of one training (aSGD 3.3, DA-SGD 3)."""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from truestep import ensemble
from truestep.lab.paper.curves import Curves, measured_epochs
from truestep.lab.paper.data import Vectors, splits_of, vectors
from truestep.lab.paper.engine import named, optimizer
from truestep.lab.paper.torch_images import train_in_torch
from truestep.lab.paper.unit import Cost, Outcome

__all__ = ["CLASSES", "DASGD_HIDDEN", "MNIST_HIDDEN", "PIXELS", "Images", "book_start"]

MNIST_HIDDEN = (30, 20)
DASGD_HIDDEN = (128, 128)
CLASSES, PIXELS = 10, 784
# Seconds of a step of 784-30-20-10 at batch 64, and of 784-128-128-10 at batch 1 and for each
# further sample; of an evaluation per sample and weight; how much slower torch is.
SMALL_STEP, LARGE_STEP, LARGE_SAMPLE = 2e-4, 2.5e-5, 6e-6
EVALUATION, TORCH_FACTOR = 6e-11, 6.0
BATCH = 64
# Images for training, and for validation and test together, where they are not 50,000 and 20,000.
SIZES = {"kmnist10k": (6_667, 3_333), "quickdraw10": (26_667, 13_333)}


@dataclass(frozen=True)
class Images:
    """One training of a fully connected network.

    Attributes:
        data: As in `truestep data list`.
        hidden: Widths of the hidden layers.
        activation: Of the hidden layers.
        output: ``"softmax"`` or ``"sigmoid"``.
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"``, ``"squared_error"`` (the sum over
            outputs) or ``"half_squared_error"``, half of that.
        optimizer: As in `engine.OPTIMIZERS`.
        lr: Learning rate.
        batch_size: Samples per step.
        epochs: Passes over the training images used.
        seed: Of start and order.
        train: How many training images are used, the first ones; 0 for all but the last sixth,
            which is for validation.
        start: Law of the first weights, as in `truestep.ensemble.Network`, or ``"book"``: normal
            with standard deviation 1 / sqrt(inputs), biases too (Rashid, Make Your Own Neural
            Network, which the DA-SGD paper cites).
        eps: Of the mean effective gradient.
        schedule: ``"constant"`` or ``"cosine"``.
        dropout: Probability, after each hidden layer; trained in torch.
        norm: ``""``, ``"layer"`` or ``"batch"``, before each activation; trained in torch.
        measure: Epochs between two measurements, after the first ten.
        train_curve: Whether training loss and accuracy are measured too.
        signs: Whether gradient size and share of kept signs are measured.
    """

    kind: ClassVar[str] = "images"

    data: str
    hidden: tuple[int, ...]
    activation: str
    output: str
    loss: str
    optimizer: str
    lr: float
    batch_size: int
    epochs: int
    seed: int
    train: int = 0
    start: str = "glorot_uniform"
    eps: float = 1.0
    schedule: str = "constant"
    dropout: float = 0.0
    norm: str = ""
    measure: int = 5
    train_curve: bool = True
    signs: bool = False

    def check(self) -> None:
        """Raises `TruestepError` for settings that the engine does not know."""
        self._network()
        self._optimizer()

    def cost(self) -> Cost:
        """An estimate."""
        training, others = SIZES.get(self.data, (50_000, 20_000))
        samples = self.train or training
        steps = self.epochs * math.ceil(samples / self.batch_size)
        weights = sum(i * o for i, o in pairwise(self._widths()))
        if self.hidden == MNIST_HIDDEN:
            step = SMALL_STEP * (0.3 + 0.7 * self.batch_size / BATCH)
        else:
            step = LARGE_STEP + LARGE_SAMPLE * (self.batch_size - 1)
        if self._needs_torch():
            step *= TORCH_FACTOR
        evaluated = others + samples * self.train_curve
        evaluations = len(measured_epochs(self.epochs, self.measure))
        return Cost(steps, steps * step + evaluations * evaluated * weights * EVALUATION)

    def data_sets(self) -> tuple[str, ...]:
        """The one."""
        return (self.data,)

    def run(self, data_dir: Path | None) -> Outcome:
        """Trains, and keeps loss and accuracy at the measured epochs."""
        data = vectors(self.data, data_dir)
        curves = train_in_torch(self, data) if self._needs_torch() else self._in_engine(data)
        summary = {
            "status": curves.status,
            "source": data.source,
            "fingerprint": data.fingerprint,
            "train": len(splits_of(data, self.train)["train"][1]),
            "validation": len(data.validation[1]),
            "test": len(data.test[1]),
        }
        epochs = np.array(measured_epochs(self.epochs, self.measure), dtype=np.int32)
        arrays = {"epochs": epochs} | curves.arrays
        return Outcome(summary, arrays, curves.engine, curves.steps, curves.seconds)

    def _in_engine(self, data: Vectors) -> Curves:
        splits = splits_of(data, self.train)
        per_epoch = math.ceil(len(splits["train"][1]) / self.batch_size)
        result = ensemble.train(
            self._network(),
            ensemble.Data(**{name: ensemble.Split(*pair) for name, pair in splits.items()}),
            replicas=1,
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self._optimizer(),
            seed=[self.seed],
            start=book_start(self._widths(), self.seed) if self.start == "book" else None,
            record=ensemble.Record(
                steps=tuple(
                    epoch * per_epoch for epoch in measured_epochs(self.epochs, self.measure)
                ),
                splits=("train", "validation", "test")
                if self.train_curve
                else ("validation", "test"),
                gradients=self.signs,
            ),
            threads=1,
        )
        arrays: dict[str, NDArray[np.generic]] = {}
        scale = 0.5 if self._halved() else 1.0
        for split in result.loss:
            arrays[f"{split}_loss"] = (result.loss[split][0] * scale).astype(np.float32)
            arrays[f"{split}_accuracy"] = result.accuracy[split][0].astype(np.float32)
        if self.signs:
            arrays["gradients"] = (result.gradients[0] * scale).astype(np.float32)
            arrays["signs"] = result.signs[0].astype(np.float32)
        return Curves(
            arrays,
            str(result.status[0]),
            named(result),
            int(result.stopped_at[0]),
            float(result.seconds[0]),
        )

    def _network(self) -> ensemble.Network:
        return ensemble.Network(
            widths=self._widths(),
            activation=self.activation,
            output=self.output,
            loss="squared_error" if self._halved() else self.loss,
            start="glorot_uniform" if self.start == "book" else self.start,
        )

    def _optimizer(self) -> ensemble.Optimizer:
        # Half the loss is half the gradient, which is half the learning rate.
        lr = self.lr / 2 if self._halved() else self.lr
        return optimizer(self.optimizer, lr, eps=self.eps, schedule=self.schedule)

    def _halved(self) -> bool:
        return self.loss == "half_squared_error"

    def _needs_torch(self) -> bool:
        return bool(self.dropout or self.norm)

    def _widths(self) -> tuple[int, ...]:
        return (PIXELS, *self.hidden, CLASSES)


def book_start(widths: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Weights and biases from a normal law with standard deviation 1 / sqrt(inputs), [1, all]."""
    random = np.random.default_rng([seed, len(widths)])
    parts = [
        random.normal(0.0, inputs**-0.5, size)
        for inputs, outputs in pairwise(widths)
        for size in (outputs * inputs, outputs)
    ]
    return np.concatenate(parts).astype(np.float32)[None]
