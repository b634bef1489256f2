"""The premise of DA-SGD's section 2: size and steadiness of the gradient against the batch size."""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from truestep import ensemble
from truestep.lab.paper.data import splits_of, vectors
from truestep.lab.paper.engine import named, optimizer
from truestep.lab.paper.images import DASGD_HIDDEN, book_start
from truestep.lab.paper.unit import Cost, Outcome

__all__ = ["SIZES", "Premise"]

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WIDTHS = (784, *DASGD_HIDDEN, 10)
SECONDS_PER_STEP = 3e-4
SECONDS_PER_PAIR = 4e-3


@dataclass(frozen=True)
class Premise:
    """Gradients of pairs of batches at the same weights, for every batch size.

    A network of the DA-SGD paper is trained by SGD. At some of its epochs, `pairs` pairs of
    disjoint random batches of each size give two gradients each, at the same weights: what is
    left to differ between them is the samples.

    Attributes:
        data: As in `truestep data list`.
        epochs: At which epochs the weights are looked at; the last one ends the training.
        seed: Of start, order and pairs.
        pairs: Pairs of batches of each size.
        lr: Learning rate of the training, at batch size 32.
        train: As in `images.Images`.
    """

    kind: ClassVar[str] = "premise"

    data: str
    epochs: tuple[int, ...]
    seed: int
    pairs: int = 50
    lr: float = 0.004
    train: int = 0

    def check(self) -> None:
        """Nothing: the network and the optimizer are the paper's."""

    def cost(self) -> Cost:
        """An estimate."""
        steps = self.epochs[-1] * math.ceil((self.train or 50_000) / 32)
        probes = self.pairs * len(SIZES) * len(self.epochs)
        return Cost(steps, steps * SECONDS_PER_STEP + probes * SECONDS_PER_PAIR)

    def data_sets(self) -> tuple[str, ...]:
        """The one."""
        return (self.data,)

    def run(self, data_dir: Path | None) -> Outcome:
        """Trains in the engine, then draws pairs of batches in torch."""
        data = vectors(self.data, data_dir)
        train = splits_of(data, self.train)["train"]
        per_epoch = math.ceil(len(train[1]) / 32)
        result = ensemble.train(
            ensemble.Network(
                widths=WIDTHS,
                activation="sigmoid",
                output="sigmoid",
                loss="squared_error",
                start="glorot_uniform",
            ),
            ensemble.Data(train=ensemble.Split(*train)),
            replicas=1,
            epochs=self.epochs[-1],
            batch_size=32,
            optimizer=optimizer("sgd", self.lr / 2),
            seed=[self.seed],
            start=book_start(WIDTHS, self.seed),
            record=ensemble.Record(
                steps=tuple(epoch * per_epoch for epoch in self.epochs), splits=(), parameters=True
            ),
            threads=1,
        )
        inputs, targets = (torch.from_numpy(part) for part in train)
        random = torch.Generator().manual_seed(self.seed)
        sizes: list[list[float]] = []
        signs: list[list[float]] = []
        for parameters in result.parameters[0]:
            model = _model(parameters)
            row = [self._probe(model, inputs, targets, size, random) for size in SIZES]
            sizes.append([size for size, _ in row])
            signs.append([kept for _, kept in row])
        arrays: dict[str, NDArray[np.generic]] = {
            "gradients": np.array(sizes, np.float32),
            "signs": np.array(signs, np.float32),
        }
        summary = {"source": data.source, "fingerprint": data.fingerprint}
        return Outcome(
            summary,
            arrays,
            f"{named(result)}, then torch",
            int(result.stopped_at[0]),
            float(result.seconds[0]),
        )

    def _probe(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        size: int,
        random: torch.Generator,
    ) -> tuple[float, float]:
        """Mean |g| over weights and pairs, and the share of weights with equal signs."""
        total, kept = 0.0, 0.0
        for _ in range(self.pairs):
            index = torch.randperm(len(targets), generator=random)[: 2 * size]
            first, second = (_gradient(model, inputs[i], targets[i]) for i in index.split(size))
            total += float((first.abs().mean() + second.abs().mean()) / 2)
            # As the method has it: equal signs, zero and zero among them.
            kept += float((first.sign() == second.sign()).float().mean())
        return total / self.pairs, kept / self.pairs


def _model(parameters: NDArray[np.float32]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        layers += [nn.Linear(inputs, outputs), nn.Sigmoid()]
    model = nn.Sequential(*layers)
    flat = torch.from_numpy(np.array(parameters, dtype=np.float32))
    torch.nn.utils.vector_to_parameters(flat, model.parameters())
    return model


def _gradient(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Of half the squared error summed over outputs, averaged over samples; all weights as one row."""
    wanted = nn.functional.one_hot(targets, 10).to(inputs.dtype)
    loss = (model(inputs) - wanted).square().sum(1).mean() / 2
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
