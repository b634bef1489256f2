"""What an ensemble trains, with which optimizers, what it records and when it stops."""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truestep.errors import TruestepError

__all__ = ["Network", "Optimizer", "Record", "Stop", "whole"]

ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", "gelu")
OUTPUTS = ("linear", "sigmoid", "softmax")
LOSSES = ("cross_entropy", "binary_cross_entropy", "squared_error", "mean_squared_error")
STARTS = (
    "torch",
    "glorot_uniform",
    "glorot_normal",
    "he_uniform",
    "he_normal",
    "uniform",
    "normal",
)
RULES = ("sgd", "adam", "adamw", "adagrad", "rmsprop")
SPLITS = ("train", "validation", "test")
# What torch's optimizers take.
DEFAULT_EPS = {"adam": 1e-8, "adamw": 1e-8, "adagrad": 1e-10, "rmsprop": 1e-8}
RMSPROP_SMOOTHING = 0.99
WIDEST = 65_536
MOST_MEASUREMENTS = 10_000_000


@dataclass(frozen=True)
class Network:
    """A fully connected network, every layer with a bias.

    Attributes:
        widths: Units of each layer, the inputs first.
        activation: Of the hidden layers: "relu", "leaky_relu" (slope 0.01), "tanh", "sigmoid" or "gelu"
            (with the error function).
        output: "linear", "sigmoid" or "softmax".
        loss: "cross_entropy" of a softmax output; "binary_cross_entropy" of a sigmoid output, the mean
            over outputs; "squared_error", the sum over outputs, or "mean_squared_error", the mean over
            them, of any output. Each is the mean over the samples of a batch.
        start: How weights begin, by K inputs and J outputs of a layer. "torch": uniform in
            ±1/sqrt(K), biases too. "glorot_uniform": ±sqrt(6/(K+J)); "glorot_normal": standard deviation
            sqrt(2/(K+J)); "he_uniform": ±sqrt(6/K); "he_normal": sqrt(2/K); "uniform": ±scale;
            "normal": standard deviation scale. Biases begin at 0 in all but the first.
        scale: Of the last two.

    Example:
        >>> Network((2, 10, 1), output="sigmoid", loss="binary_cross_entropy").parameters
        41

    Raises:
        TruestepError: A name is unknown, the loss doesn't fit the output, or there is no layer.
    """

    widths: tuple[int, ...]
    activation: str = "relu"
    output: str = "softmax"
    loss: str = "cross_entropy"
    start: str = "torch"
    scale: float = 1.0

    def __post_init__(self) -> None:
        widths = self.widths if isinstance(self.widths, Sequence) else ()
        numbers = tuple(whole("Network", "widths", width) for width in widths)
        object.__setattr__(self, "widths", numbers)
        if len(self.widths) < 2 or not all(0 < width <= WIDEST for width in self.widths):  # noqa: PLR2004
            raise TruestepError(
                f"Network(widths={self.widths}) needs the number of inputs and one or more layers, each "
                f"of 1 to {WIDEST:,} units, such as (784, 30, 20, 10)."
            )
        _choose("Network", "activation", self.activation, ACTIVATIONS)
        _choose("Network", "output", self.output, OUTPUTS)
        _choose("Network", "loss", self.loss, LOSSES)
        _choose("Network", "start", self.start, STARTS)
        _check("Network", "scale", self.scale, positive=True)
        if self.output == "softmax" and self.widths[-1] == 1:
            raise TruestepError(
                "Network(output='softmax') with one output is always 1. Take output='sigmoid' with "
                "loss='binary_cross_entropy', or two outputs."
            )
        wanted = {"cross_entropy": "softmax", "binary_cross_entropy": "sigmoid"}.get(self.loss)
        if wanted is not None and self.output != wanted:
            raise TruestepError(
                f"Network(loss={self.loss!r}) goes with output={wanted!r}, not {self.output!r}. "
                "Change one of them, or take loss='squared_error'."
            )

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of each layer."""
        return tuple(pairwise(self.widths))

    @property
    def hidden(self) -> int:
        """Number of hidden units."""
        return sum(self.widths[1:-1])

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return sum(inputs * outputs + outputs for inputs, outputs in self.layers)

    def split(self, flat: NDArray[Any]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Weights ``[..., out, in]`` and biases ``[..., out]`` of each layer.

        Args:
            flat: ``[..., parameters]``: each layer's weights, row by row as in torch, then its bias.

        Example:
            >>> network = Network((2, 3, 1), output="linear", loss="squared_error")
            >>> [weight.shape for weight, _ in network.split(np.zeros((5, network.parameters)))]
            [(5, 3, 2), (5, 1, 3)]
        """
        parts, place = [], 0
        for inputs, outputs in self.layers:
            end = place + inputs * outputs
            weight = flat[..., place:end].reshape(*flat.shape[:-1], outputs, inputs)
            parts.append((weight, flat[..., end : end + outputs]))
            place = end + outputs
        return parts


@dataclass(frozen=True)
class Optimizer:
    """An optimizer, with truestep's gradient transforms in front of it.

    Attributes:
        name: "sgd", "adam", "adamw", "adagrad" or "rmsprop", with the formulas of torch's.
        lr: Learning rate.
        momentum: Of sgd.
        nesterov: Of sgd with momentum.
        weight_decay: L2 penalty; of adamw, decoupled.
        betas: Of adam and adamw; rmsprop's smoothing is 0.99.
        eps: Of the quotient; torch's default by default.
        asgd: Whether the gradient is made the mean effective gradient, ``g * N / (m + asgd_eps)``.
        asgd_eps: The eps of aSGD.
        factor_limit: Largest N / (m + eps).
        dasgd: Whether the booster is added, after that.
        schedule: Factor of the learning rate at a step: "constant", "cosine" (from 1 to 0 over the
            steps), or a function of the step, counted from 0.

    Example:
        >>> Optimizer("sgd", lr=0.01, asgd=True).label
        'asgd'

    Raises:
        TruestepError: A name is unknown or a number impossible.
    """

    name: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float | None = None
    asgd: bool = False
    asgd_eps: float = 1.0
    factor_limit: float | None = None
    dasgd: bool = False
    schedule: str | Callable[[int], float] = "constant"

    def __post_init__(self) -> None:
        _choose("Optimizer", "name", self.name, RULES)
        _check("Optimizer", "lr", self.lr)
        _check("Optimizer", "momentum", self.momentum)
        _check("Optimizer", "weight_decay", self.weight_decay)
        _check("Optimizer", "asgd_eps", self.asgd_eps)
        if self.factor_limit is not None:
            _check("Optimizer", "factor_limit", self.factor_limit, positive=True)
        betas = self.betas if isinstance(self.betas, tuple | list) else ()
        if len(betas) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in betas):  # noqa: PLR2004
            raise TruestepError(
                f"Optimizer(betas={self.betas}): give two numbers from 0 to below 1."
            )
        if self.name != "sgd" and (self.momentum or self.nesterov):
            raise TruestepError(
                f"Optimizer({self.name!r}) has no momentum; leave it out, or take 'sgd'."
            )
        if self.nesterov and not self.momentum:
            raise TruestepError("Optimizer(nesterov=True) needs a momentum, such as 0.9.")
        if not callable(self.schedule):
            _choose("Optimizer", "schedule", self.schedule, ("constant", "cosine"))
        if self.eps is None:
            object.__setattr__(self, "eps", DEFAULT_EPS.get(self.name, 0.0))
        _check("Optimizer", "eps", self.eps or 0.0, positive=self.name != "sgd")

    @property
    def label(self) -> str:
        """A short name, as of a race: "asgd", "dasgd", "asgd+dasgd", "adam", "asgd+adam"."""
        rule = "momentum" if self.momentum else self.name
        parts = [name for name, on in (("asgd", self.asgd), ("dasgd", self.dasgd)) if on]
        return "+".join([*parts, *([] if parts and rule == "sgd" else [rule])])

    @property
    def memory(self) -> int:
        """Numbers of state for each parameter."""
        rule = {"sgd": int(self.momentum > 0), "adam": 2, "adamw": 2}.get(self.name, 1)
        return rule + self.dasgd


@dataclass(frozen=True)
class Record:
    """What to measure, and after how many steps.

    Attributes:
        steps: After how many steps; 0 is the start.
        every: Or after each so many, and at the start and the end.
        every_epoch: Or after each so many epochs, likewise.
        splits: Where loss and accuracy are measured; all that there are by default.
        nodes: Dummy nodes: hidden units that are on for no training sample or for all.
        parameters: All parameters.
        batch_sizes: Adaptive batch sizes of the step that follows.
        gradients: Mean absolute gradient of the step that follows, and the share of parameters whose
            gradient has the sign it had at the step before.
        under: A loss: the first step with a training loss under it is noted; with full batches each step
            is looked at, else each measurement.

    Example:
        >>> Record(every=100).at(steps=250, steps_per_epoch=1).tolist()
        [0, 100, 200, 250]

    Raises:
        TruestepError: More than one of steps, every and every_epoch is given, or a number is impossible.
    """

    steps: tuple[int, ...] | None = None
    every: int | None = None
    every_epoch: int | None = None
    splits: tuple[str, ...] | None = None
    nodes: bool = False
    parameters: bool = False
    batch_sizes: bool = False
    gradients: bool = False
    under: float | None = None

    def __post_init__(self) -> None:
        given = [
            name for name in ("steps", "every", "every_epoch") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise TruestepError(f"Record has {' and '.join(given)}; give one of them.")
        for name in ("every", "every_epoch"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, whole("Record", name, value, least=1))
        for name in ("steps", "splits"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, str) or not isinstance(value, Iterable)):
                raise TruestepError(f"Record({name}={value!r}): give several, such as a tuple.")
        if self.steps is not None:
            steps = tuple(whole("Record", "steps", step) for step in self.steps)
            object.__setattr__(self, "steps", steps)
        if self.under is not None:
            _check("Record", "under", self.under)
        for name in self.splits or ():
            _choose("Record", "splits", name, SPLITS)

    def at(self, steps: int, steps_per_epoch: int) -> NDArray[np.int64]:
        """After how many steps to measure, ascending.

        Args:
            steps: of the whole training.
            steps_per_epoch: how many batches an epoch has.

        Raises:
            TruestepError: Steps are asked for that are never reached.
        """
        if self.steps is not None:
            chosen = np.unique(np.asarray(self.steps, np.int64))
            if chosen.size and (chosen[0] < 0 or chosen[-1] > steps):
                raise TruestepError(
                    f"Record(steps=...) asks for step {chosen[0] if chosen[0] < 0 else chosen[-1]}; "
                    f"the training goes from 0 to {steps}."
                )
            return chosen
        if self.every is None and self.every_epoch is None:
            return np.array([0, steps], np.int64)
        stride = self.every or (self.every_epoch or 1) * steps_per_epoch
        if steps // stride > MOST_MEASUREMENTS:
            raise TruestepError(
                f"Record: {steps // stride:,} measurements are asked for; the most are "
                f"{MOST_MEASUREMENTS:,}. Measure less often."
            )
        return np.unique(np.append(np.arange(0, steps, stride, dtype=np.int64), steps))


@dataclass(frozen=True)
class Stop:
    """When a replica ends before its last step; it costs nothing more from then on.

    Attributes:
        loss: A loss to fall under; with full batches and split="train" each step is looked at, else each
            measurement.
        patience: How many measurements without a new lowest loss.
        split: Whose loss.

    Example:
        >>> Stop(patience=5).split
        'validation'

    Raises:
        TruestepError: Neither is given, or a number is impossible.
    """

    loss: float | None = None
    patience: int | None = None
    split: str = field(default="")

    def __post_init__(self) -> None:
        if self.loss is None and self.patience is None:
            raise TruestepError("Stop() needs a loss, a patience, or both.")
        if self.patience is not None:
            object.__setattr__(self, "patience", whole("Stop", "patience", self.patience, least=1))
        if self.loss is not None:
            _check("Stop", "loss", self.loss)
        if not self.split:
            object.__setattr__(self, "split", "train" if self.patience is None else "validation")
        _choose("Stop", "split", self.split, SPLITS)


def _choose(owner: str, name: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise TruestepError(f"{owner}({name}={value!r}): choose one of {', '.join(values)}.")


def whole(owner: str, name: str, value: Any, least: int = 0) -> int:
    """A whole number of at least so much, as Python's.

    Raises:
        TruestepError: It is something else.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < least:
        raise TruestepError(f"{owner}({name}={value!r}): give a whole number of {least} or more.")
    return number


def _check(owner: str, name: str, value: float, *, positive: bool = False) -> None:
    if not _is_number(value):
        raise TruestepError(f"{owner}({name}={value!r}): give a number.")
    if not (math.isfinite(value) and value >= 0) or (positive and value == 0):
        raise TruestepError(
            f"{owner}({name}={value}): give a number {'above 0' if positive else 'of 0 or more'}."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
