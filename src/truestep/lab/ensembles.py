"""Runs of a race in the compiled loops of `truestep.ensemble`, where these can train what a task asks for.

A run of the ensemble starts from the same numbers as the torch loop's, sees the data in the same order, is
measured after the same steps, and so equals it to float32 rounding.
"""

import math
import threading
import traceback
from collections.abc import Iterable, Iterator
from itertools import groupby, islice, pairwise
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from truestep import ensemble
from truestep.errors import TruestepError
from truestep.kernels.dispatch import installed
from truestep.lab.optimizers import find_optimizer
from truestep.lab.store import RunKey, RunResult
from truestep.lab.tasks import Splits, Task, accuracy, binary_accuracy, binary_loss
from truestep.lab.training import Cost, evaluation_steps, versions
from truestep.lab.workers import Failure, one_line

__all__ = ["ENGINE", "Ensembles", "Orders", "network_of", "optimizer_of"]

ENGINE = "truestep.ensemble"

# A task's loss -> the output and the loss of a network, and the metric that an ensemble measures with it.
LOSSES: dict[Any, tuple[str, str, Any]] = {
    nn.functional.cross_entropy: ("softmax", "cross_entropy", accuracy),
    binary_loss: ("sigmoid", "binary_cross_entropy", binary_accuracy),
    nn.functional.mse_loss: ("linear", "mean_squared_error", None),
}
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.GELU: "gelu",
}
# Of nn.LeakyReLU by default, and of the ensemble.
SLOPE = 0.01
MOMENTUM = 0.9
RULES: dict[str, dict[str, Any]] = {
    "": {"name": "sgd"},
    "sgd": {"name": "sgd"},
    "momentum": {"name": "sgd", "momentum": MOMENTUM},
    "nesterov": {"name": "sgd", "momentum": MOMENTUM, "nesterov": True},
    "adagrad": {"name": "adagrad"},
    "rmsprop": {"name": "rmsprop"},
    "adam": {"name": "adam"},
    # torch's own default of AdamW
    "adamw": {"name": "adamw", "weight_decay": 0.01},
}
# How long the runs of one call take: what a killed race loses at most, beside single runs that take longer.
CALL_SECONDS = 2.0
REHEARSAL_STEPS = 30
# A forward pass is about a third of a training step.
FORWARD_SHARE = 1 / 3
WORD = 64


class Ensembles:
    """Trains runs of one batch size and optimizer together; results are those of `lab.training`.

    Args:
        task: With the epochs of the race.
        splits: Its data. Selection runs are given no test split.
        threads: How many replicas are trained at a time.

    Raises:
        TruestepError: The ensemble can't train the task's model on this data; the message is the reason.
    """

    def __init__(self, task: Task, splits: Splits, threads: int) -> None:
        if not installed():
            raise TruestepError("numba is not installed")
        self._task = task
        self._threads = threads
        self._network = network_of(task, splits)
        parts = {
            name: ensemble.Split(part.inputs, part.targets)
            for name, part in (
                ("train", splits.train),
                ("validation", splits.validation),
                ("test", splits.test),
            )
        }
        self._final = ensemble.Data(**parts)
        self._final.check(self._network)
        self._selection = ensemble.Data(parts["train"], parts["validation"])
        self._orders = Orders(self._final.train.samples)
        self._validation = len(splits.validation.targets)
        self._costs: dict[tuple[str, int], Cost] = {}

    def rehearse(self, key: RunKey) -> Cost:
        """Estimates what a run costs from its first steps; the runs of a call are as many as that allows."""
        steps = self._steps(key.batch_size)
        some = min(steps, REHEARSAL_STEPS)
        start, record = [self._start(key.seed)], ensemble.Record(splits=())
        if not self._costs:
            # The first call compiles, or loads what was compiled before.
            self._train([key], start, 1, record)
        result = self._train([key], start, some, record)
        step = float(result.seconds[0]) / max(int(result.stopped_at[0]), 1)
        passes = self._validation / key.batch_size * FORWARD_SHARE
        evaluations = len(self._measured(key.batch_size))
        cost = Cost(training=step * steps, evaluation=step * passes * evaluations)
        self._costs[key.optimizer, key.batch_size] = cost
        return cost

    def run(self, keys: Iterable[RunKey]) -> Iterator[RunResult | Failure]:
        """Results and failures, some runs of one optimizer and batch size after the other."""
        for place, some in groupby(keys, lambda key: (key.optimizer, key.batch_size, key.final)):
            cost = self._costs[place[:2]]
            seconds = cost.training + cost.evaluation
            count = max(1, int(CALL_SECONDS / seconds)) * self._threads
            while together := list(islice(some, count)):
                yield from self._attempt(together)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _attempt(self, keys: list[RunKey]) -> list[RunResult | Failure]:
        outcomes: list[RunResult | Failure] = []
        starts = []
        good = []
        for key in keys:
            try:
                starts.append(self._start(key.seed))
                good.append(key)
            except Exception as error:  # noqa: BLE001 - a user's code may raise anything
                outcomes.append(Failure(key, one_line(error), traceback.format_exc()))
        if not good:
            return outcomes
        measured = self._measured(good[0].batch_size)
        splits = ("validation", "test") if good[0].final else ("validation",)
        record = ensemble.Record(steps=measured, splits=splits)
        steps = self._steps(good[0].batch_size)
        result = self._train(good, starts, steps, record)
        return outcomes + [self._result(key, result, row) for row, key in enumerate(good)]

    def _train(
        self,
        keys: list[RunKey],
        starts: list[NDArray[np.float32]],
        steps: int,
        record: ensemble.Record,
    ) -> ensemble.Result:
        return ensemble.train(
            self._network,
            self._final if keys[0].final else self._selection,
            replicas=len(keys),
            steps=steps,
            batch_size=keys[0].batch_size,
            optimizer=[optimizer_of(key.optimizer, key.lr) for key in keys],
            seed=[key.seed for key in keys],
            start=np.stack(starts),
            order=self._orders,
            record=record,
            threads=self._threads,
            backend="compiled",
        )

    def _start(self, seed: int) -> NDArray[np.float32]:
        """The parameters of the task's model after its seed, as the torch loop starts."""
        torch.manual_seed(seed)
        model = self._task.model()
        shapes = [tuple(value.shape) for value in model.parameters()]
        layers = self._network.layers
        if shapes != [shape for k, j in layers for shape in ((j, k), (j,))]:
            raise TruestepError(
                f"The model of seed {seed} has other layers than that of seed 0. Make all alike, or "
                "give --engine torch."
            )
        return torch.cat([value.detach().flatten() for value in model.parameters()]).numpy()

    def _result(self, key: RunKey, found: ensemble.Result, row: int) -> RunResult:
        a_pass = self._steps_per_epoch(key.batch_size)
        taken = int(found.stopped_at[row])
        seconds = float(found.seconds[row])
        diverged = bool(found.status[row] == "diverged")
        train_losses = found.batch_loss[row].tolist()
        losses = {split: values[row].tolist() for split, values in found.loss.items()}
        shares = {split: values[row].tolist() for split, values in found.accuracy.items()}
        curve: list[dict[str, float]] = []
        best, best_place = -1, 0

        def measures(split: str, place: int) -> dict[str, float]:
            # There is at most one kind of metric, whatever its names.
            right = dict.fromkeys(self._task.metrics, shares[split][place])
            return {"loss": losses[split][place], **right}

        def note(step: int, train_loss: float, measured: dict[str, float]) -> None:
            curve.append(
                {
                    "epoch": step / a_pass,
                    "step": step,
                    "seconds": seconds * min(step / max(taken, 1), 1.0),
                    "train_loss": train_loss,
                    **measured,
                }
            )

        for place, step in enumerate(found.steps.tolist()):
            if step > taken:
                break
            note(step, train_losses[place], measures("validation", place))
            if not math.isfinite(curve[-1]["loss"]):
                diverged = True
                break
            if best < 0 or curve[-1]["loss"] < curve[best]["loss"]:
                best, best_place = len(curve) - 1, place
        if diverged and (not curve or math.isfinite(curve[-1]["loss"])):
            nothing = dict.fromkeys(("loss", *self._task.metrics), math.nan)
            note(taken + 1, math.nan, nothing)
        test = {}
        if key.final and not diverged:
            test = measures("test", best_place)
        return RunResult(
            key=key,
            status="diverged" if diverged else "done",
            curve=curve,
            best=best,
            test=test,
            step_seconds=seconds / taken if taken else math.nan,
            optimizer_bytes=self._optimizer_bytes(key),
            parameters=self._network.parameters,
            versions=versions() | {"threads": "1", "engine": ENGINE},
        )

    def _steps_per_epoch(self, batch_size: int) -> int:
        return math.ceil(self._final.train.samples / batch_size)

    def _steps(self, batch_size: int) -> int:
        return self._task.epochs * self._steps_per_epoch(batch_size)

    def _measured(self, batch_size: int) -> tuple[int, ...]:
        a_pass = self._steps_per_epoch(batch_size)
        due = evaluation_steps(a_pass, self._task.evaluations)
        steps = range(1, self._steps(batch_size) + 1)
        return tuple(step for step in steps if step % a_pass in due)

    def _optimizer_bytes(self, key: RunKey) -> int:
        """The optimizer's state, and the bits that adaptive batch sizes are counted from."""
        optimizer = optimizer_of(key.optimizer, key.lr)
        state = 4 * optimizer.memory * self._network.parameters
        if not optimizer.asgd:
            return state
        widths = self._network.widths
        # The inputs' bits of all layers, and the gradients' of one at a time.
        units = sum(widths[:-1]) + max(widths[1:])
        return state + WORD // 8 * math.ceil(key.batch_size / WORD) * units


class Orders:
    """The permutations of `lab.training.batches`, by seed and epoch, in any sequence.

    Args:
        samples: How many there are to permute.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        # Seed -> the generator's states before the epochs so far: an epoch draws on where the last one ended.
        self._states: dict[int, list[torch.Tensor]] = {}
        self._lock = threading.Lock()

    def __call__(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The order of an epoch, ``[samples]``."""
        generator = torch.Generator()
        with self._lock:
            first = generator.manual_seed(seed).get_state()
            states = self._states.setdefault(seed, [first])
            while True:
                known = min(epoch, len(states) - 1)
                generator.set_state(states[known])
                order = torch.randperm(self._samples, generator=generator)
                if known == len(states) - 1:
                    states.append(generator.get_state())
                if known == epoch:
                    return order.numpy()


def network_of(task: Task, splits: Splits) -> ensemble.Network:
    """The task's model and loss as a network of an ensemble.

    Args:
        task: What is to be trained.
        splits: On what.

    Raises:
        TruestepError: An ensemble can't train it; the message is the reason.
    """
    if task.loss not in LOSSES:
        raise TruestepError(
            f"the loss {_name(task.loss)} is none of {', '.join(map(_name, LOSSES))}"
        )
    output, loss, known = LOSSES[task.loss]
    for name, metric in task.metrics.items():
        if metric is not known:
            wanted = f"only truestep.lab.tasks.{_name(known)} as a metric" if known else "no metric"
            raise TruestepError(
                f"the ensemble engine knows {wanted} with this loss; the task has its own: {name}"
            )
    torch.manual_seed(0)
    model = task.model()
    widths, activation = _layers(model)
    for part in (splits.train, splits.validation, splits.test):
        _check_data(part.inputs, part.targets, widths, loss)
    return ensemble.Network(widths, activation, output, loss)


def optimizer_of(name: str, lr: float) -> ensemble.Optimizer:
    """The ensemble's optimizer of a race's name.

    Args:
        name: As for `truestep.lab.optimizers.find_optimizer`.
        lr: Learning rate.

    Raises:
        TruestepError: An ensemble doesn't have it; the message is the reason.
    """
    recipe = find_optimizer(name)
    if recipe.module:
        raise TruestepError("an import path")
    return ensemble.Optimizer(
        lr=lr,
        asgd="asgd" in recipe.transforms,
        dasgd="dasgd" in recipe.transforms,
        **RULES[recipe.base],
    )


def _layers(model: nn.Module) -> tuple[tuple[int, ...], str]:
    """Widths and activation of a sequence of linear layers."""
    if type(model) is not nn.Sequential:
        raise TruestepError(f"the model is a {type(model).__name__}, not an nn.Sequential")
    layers = list(model)
    linear: list[nn.Linear] = []
    between = layers[1::2]
    kinds = {type(layer) for layer in between}
    for layer in layers[::2]:
        if type(layer) is not nn.Linear or layer.bias is None:
            raise TruestepError(f"{layer} stands where an nn.Linear with a bias is needed")
        linear.append(layer)
    if len(layers) % 2 == 0:
        raise TruestepError(f"the model ends with {layers[-1]}, not with an nn.Linear")
    if len(kinds) > 1 or not kinds <= ACTIVATIONS.keys():
        names = ", ".join(kind.__name__ for kind in ACTIVATIONS)
        raise TruestepError(f"its layers are not joined by one kind of activation of {names}")
    for layer in between:
        slope, form = getattr(layer, "negative_slope", SLOPE), getattr(layer, "approximate", "none")
        if (slope, form) != (SLOPE, "none"):
            raise TruestepError(f"{layer} has another form than the ensemble's")
    _check_parameters(model, linear)
    widths = (linear[0].in_features, *(layer.out_features for layer in linear))
    if any(below.out_features != above.in_features for below, above in pairwise(linear)):
        raise TruestepError("its layers don't fit each other")
    return widths, ACTIVATIONS[kinds.pop()] if kinds else "relu"


def _check_parameters(model: nn.Module, linear: list[nn.Linear]) -> None:
    parameters = list(model.parameters())
    if any(value.dtype != torch.float32 or not value.is_cpu for value in parameters):
        raise TruestepError("its parameters are not float32 on the CPU")
    if not all(value.requires_grad for value in parameters):
        raise TruestepError("some of its parameters are frozen")
    if len(parameters) != 2 * len(linear):
        raise TruestepError("a layer or a parameter of it stands twice")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for module in model.modules() for name in hooks) or any(
        value._backward_hooks or value._post_accumulate_grad_hooks  # noqa: SLF001
        for value in parameters
    ):
        raise TruestepError("hooks are on it")


def _check_data(
    inputs: torch.Tensor, targets: torch.Tensor, widths: tuple[int, ...], loss: str
) -> None:
    dense = all(part.layout is torch.strided and part.is_cpu for part in (inputs, targets))
    if inputs.dtype != torch.float32 or inputs.dim() != 2 or not dense:  # noqa: PLR2004
        raise TruestepError("inputs are not dense float32 [samples, features] on the CPU")
    if loss == "mean_squared_error":
        if targets.dtype != torch.float32 or targets.shape != (len(inputs), widths[-1]):
            raise TruestepError("targets are not float32 [samples, outputs]")
        return
    if targets.is_floating_point() or targets.is_complex() or targets.dim() != 1:
        raise TruestepError("targets are not classes [samples]")
    if (loss == "binary_cross_entropy") != (widths[-1] == 1):
        raise TruestepError(f"{widths[-1]} outputs don't go with this loss")


def _name(function: Any) -> str:
    return getattr(function, "__name__", None) or type(function).__name__
