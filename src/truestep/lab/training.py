"""One training run: deterministic in the task, its data and the run's key."""

import copy
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truestep import SampleCounter
from truestep.kernels.dispatch import installed
from truestep.lab.optimizers import build
from truestep.lab.store import RunKey, RunResult
from truestep.lab.tasks import Split, Splits, Task

__all__ = [
    "LOOP",
    "Cost",
    "batches",
    "evaluate",
    "evaluation_steps",
    "rehearse",
    "train",
    "versions",
]

# What a run's versions have as its engine.
LOOP = "torch loop"

# Large enough for speed, small enough for the activations of a convolutional network.
EVALUATION_CHUNK = 1024
REHEARSAL_STEPS = 4
REHEARSAL_SECONDS = 0.25


def train(task: Task, splits: Splits, key: RunKey) -> RunResult:
    """Trains a fresh model and measures it on the way.

    Runs with the same seed start from the same weights and see the data in the same order,
    whatever their optimizer and learning rate. A final run repeats its selection run bit by bit,
    then reads the test set once, with the weights of its best evaluation.

    Args:
        task: Model, loss, metrics, epochs and evaluations per epoch.
        splits: The task's data. Only final runs touch ``splits.test``.
        key: Optimizer, learning rate, batch size and seed.

    Returns:
        The curve and its measures. A run whose training or validation loss stops being finite
        ends there, with status ``"diverged"``.
    """
    model, optimizer, counter = _start(task, key)
    try:
        return _train(task, splits, key, model, optimizer, counter=counter)
    finally:
        if counter is not None:
            counter.close()


def batches(samples: int, batch_size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices of one batch after another: a fresh permutation per epoch, its smaller rest kept.

    The order depends on nothing but the arguments; the model's own draws (dropout) leave it alone.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(samples, generator=generator).split(batch_size)


def evaluate(task: Task, model: nn.Module, split: Split) -> dict[str, float]:
    """Mean loss and metrics over a split, in evaluation mode; the model's mode is put back."""
    measures = {"loss": task.loss, **task.metrics}
    sums = dict.fromkeys(measures, 0.0)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for inputs, targets in zip(
            split.inputs.split(EVALUATION_CHUNK),
            split.targets.split(EVALUATION_CHUNK),
            strict=True,
        ):
            output = model(inputs)
            for name, measure in measures.items():
                sums[name] += float(measure(output, targets)) * len(targets)
    model.train(was_training)
    return {name: total / len(split.targets) for name, total in sums.items()}


@dataclass(frozen=True)
class Cost:
    """Estimated seconds of a run: of its training steps, and of its evaluations."""

    training: float
    evaluation: float


def rehearse(task: Task, splits: Splits, key: RunKey) -> Cost:
    """Estimates what a run costs from its first few steps and a part of an evaluation."""
    model, optimizer, counter = _start(task, key)
    durations = []
    try:
        for *_, duration in islice(
            _steps(task, splits.train, key, model, optimizer), REHEARSAL_STEPS
        ):
            durations.append(duration)
            # The first step also allocates and compiles: it says nothing about the others.
            if sum(durations[1:]) > REHEARSAL_SECONDS:
                break
    finally:
        if counter is not None:
            counter.close()
    step = statistics.median(durations[1:] or durations)
    validation = splits.validation
    part = Split(validation.inputs[:EVALUATION_CHUNK], validation.targets[:EVALUATION_CHUNK])
    start = time.perf_counter()
    evaluate(task, model, part)
    evaluation = (time.perf_counter() - start) * len(validation.targets) / len(part.targets)
    return Cost(
        training=step * task.epochs * math.ceil(len(splits.train.targets) / key.batch_size),
        evaluation=evaluation * task.epochs * task.evaluations,
    )


def evaluation_steps(steps_per_epoch: int, evaluations: int) -> frozenset[int]:
    """After which steps of an epoch to evaluate, as remainders: the last step of an epoch is 0.

    More evaluations than steps are one per step.

    Example:
        >>> sorted(evaluation_steps(10, 3))
        [0, 3, 6]
    """
    return frozenset(
        steps_per_epoch * number // evaluations % steps_per_epoch
        for number in range(1, evaluations + 1)
    )


def processor() -> str:
    """The processor's name, where the system tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def versions() -> dict[str, str]:
    """What this process computes with, for the record of a run."""
    found = {
        "truestep": version("truestep"),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        **({"numba": version("numba")} if installed() else {}),
        "python": platform.python_version(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
    }
    commit = _git_commit()
    return found | {"git commit": commit} if commit else found


def _start(
    task: Task, key: RunKey
) -> tuple[nn.Module, torch.optim.Optimizer, SampleCounter | None]:
    torch.manual_seed(key.seed)
    model = task.model()
    return model, *build(key.optimizer, model, key.lr)


def _train(
    task: Task,
    splits: Splits,
    key: RunKey,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    counter: SampleCounter | None,
) -> RunResult:
    steps_per_epoch = math.ceil(len(splits.train.targets) / key.batch_size)
    evaluations = evaluation_steps(steps_per_epoch, task.evaluations)
    curve: list[dict[str, float]] = []
    best = -1
    best_weights: dict[str, Any] = {}
    durations: list[float] = []
    peak_bytes = 0
    seconds = loss_sum = samples = 0.0
    diverged = False

    for loss, size, duration in _steps(task, splits.train, key, model, optimizer):
        durations.append(duration)
        seconds += duration
        loss_sum += loss * size
        samples += size
        step = len(durations)
        due = step % steps_per_epoch in evaluations
        if step == 1 or due:
            peak_bytes = max(peak_bytes, _optimizer_bytes(optimizer, counter))
        diverged = not math.isfinite(loss)
        if diverged:
            measured = dict.fromkeys(("loss", *task.metrics), math.nan)
        elif due:
            measured = evaluate(task, model, splits.validation)
        else:
            continue
        curve.append(
            {
                "epoch": step / steps_per_epoch,
                "step": step,
                "seconds": seconds,
                "train_loss": loss_sum / samples,
                **measured,
            }
        )
        loss_sum = samples = 0.0
        diverged = not math.isfinite(measured["loss"])
        if diverged:
            break
        if best < 0 or measured["loss"] < curve[best]["loss"]:
            best = len(curve) - 1
            if key.final:
                best_weights = copy.deepcopy(model.state_dict())

    test = {}
    if key.final and not diverged:
        model.load_state_dict(best_weights)
        test = evaluate(task, model, splits.test)
    return RunResult(
        key=key,
        status="diverged" if diverged else "done",
        curve=curve,
        best=best,
        test=test,
        step_seconds=statistics.median(durations),
        optimizer_bytes=peak_bytes,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        versions=versions() | {"engine": LOOP},
    )


def _steps(
    task: Task, train: Split, key: RunKey, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[float, int, float]]:
    """Loss, samples and seconds of one step after another."""
    model.train()
    for index in batches(len(train.targets), key.batch_size, task.epochs, key.seed):
        start = time.perf_counter()
        optimizer.zero_grad()
        output = model(train.inputs.index_select(0, index))
        loss = task.loss(output, train.targets.index_select(0, index))
        value = loss.item()
        if math.isfinite(value):
            loss.backward()
            optimizer.step()
        yield value, len(index), time.perf_counter() - start


def _optimizer_bytes(optimizer: torch.optim.Optimizer, counter: SampleCounter | None) -> int:
    return _tensor_bytes(optimizer.state) + (0 if counter is None else counter.nbytes)


def _tensor_bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        # Keys are parameters, which aren't the optimizer's memory.
        return sum(_tensor_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(_tensor_bytes(value) for value in state)
    return 0


def _git_commit() -> str:
    # Of the folder the user works in: their task and their command belong to that history.
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()
