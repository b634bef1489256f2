"""What a task is: data, model, loss, metrics and defaults, enough to compare optimizers on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from torch import Tensor, nn

from truestep.errors import TruestepError

__all__ = ["Split", "Splits", "Task"]


@dataclass(frozen=True)
class Split:
    """Samples of one of training, validation and test, whole, in memory.

    Attributes:
        inputs: [samples, ...]; the model gets `inputs[indices]`.
        targets: [samples, ...], int64 class labels or whatever the task's loss takes.

    Example:
        >>> import torch
        >>> len(Split(torch.rand(6, 64), torch.zeros(6, dtype=torch.int64)).inputs)
        6

    Raises:
        TruestepError: There are no samples, or not as many targets as inputs.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        samples = len(self.inputs)
        if not samples or samples != len(self.targets):
            raise TruestepError(
                f"A split needs as many targets as inputs, and some of both; it has {samples} "
                f"inputs and {len(self.targets)} targets. Give tensors whose first axis is "
                "the sample."
            )


@dataclass(frozen=True)
class Splits:
    """The data of a task.

    Attributes:
        train: What gradients are computed on.
        validation: What learning rates are chosen on.
        test: Read once, for the chosen learning rate.
        source: Where the data came from, for the report.

    Example:
        >>> import torch
        >>> part = Split(torch.rand(6, 2), torch.zeros(6, dtype=torch.int64))
        >>> Splits(train=part, validation=part, test=part, source="random numbers").source
        'random numbers'
    """

    train: Split
    validation: Split
    test: Split
    source: str


@dataclass(frozen=True)
class Task:
    """Everything that a race needs to know.

    Attributes:
        name: Short name, as on the command line.
        title: For headings.
        load: Reads or makes the data; gets the folder given with --data-dir, or None.
        model: Makes a fresh model; the caller seeds torch first.
        loss: (model output, targets) -> mean loss over the samples, a scalar.
        metrics: Name -> function like `loss`; higher is better.
        batch_size: Default batch size.
        epochs: Default number of passes over the training data.
        target: Name of a metric, or "loss", and the value on validation data that "epochs to
            target" waits for.
        learning_rates: Optimizer name -> learning rates to try by default; optimizers that are
            not named here get their general grid.
        optimizers: The default field of a race.
        evaluations: Evaluations on validation data per epoch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> def load(data_dir):
        ...     part = Split(torch.eye(4), torch.arange(4))
        ...     return Splits(part, part, part, source="the identity matrix")
        >>> def accuracy(output, targets):
        ...     return (output.argmax(1) == targets).float().mean()
        >>> task = Task(
        ...     name="identity",
        ...     title="Four one-hot rows",
        ...     load=load,
        ...     model=lambda: nn.Linear(4, 4),
        ...     loss=nn.functional.cross_entropy,
        ...     metrics={"accuracy": accuracy},
        ...     batch_size=2,
        ...     epochs=3,
        ...     target=("accuracy", 0.9),
        ...     learning_rates={"sgd": (0.1, 1.0)},
        ... )
        >>> task.evaluations
        1

    Raises:
        TruestepError: A number is impossible, or the target names an unknown metric.
    """

    name: str
    title: str
    load: Callable[[Path | None], Splits]
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]]
    batch_size: int
    epochs: int
    target: tuple[str, float]
    learning_rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    optimizers: tuple[str, ...] = ("sgd", "momentum", "adam", "asgd", "dasgd")
    evaluations: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "evaluations"):
            if getattr(self, name) < 1:
                raise TruestepError(
                    f"Task {self.name!r}: {name} is {getattr(self, name)}; give 1 or more."
                )
        names = [*self.metrics, "loss"]
        if self.target[0] not in names:
            raise TruestepError(
                f"Task {self.name!r}: its target {self.target[0]!r} is not a metric; "
                f"choose one of: {', '.join(names)}."
            )
        for optimizer, rates in self.learning_rates.items():
            if not rates or not all(0 < rate < inf for rate in rates):
                raise TruestepError(
                    f"Task {self.name!r}: the learning rates of {optimizer} are {rates}; "
                    "give one or more positive numbers."
                )
