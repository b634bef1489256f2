"""The built-in tasks, and how to find one by name or in a file of your own.

Small networks on small data, with defaults that suit a laptop. A task of your own is one
module-level `task = Task(...)` in a file; see examples/my_task.py.
"""

import importlib.util
import sys
import traceback
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from multiprocessing import parent_process
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from truestep.errors import TruestepError
from truestep.lab.language_id import LanguageNetwork, load_language_id
from truestep.lab.task import Split, Splits, Task

__all__ = ["TASKS", "Split", "Splits", "Task", "find_task", "module_name"]

_PLANE_SIZES = (512, 512, 2048)  # generated samples are free, so the test split is large


def find_task(name_or_path: str) -> Task:
    """Finds a built-in task by name, or the `task` of a Python file.

    Args:
        name_or_path: A name such as "digits", or the path of a file with a module-level
            `task = Task(...)`.

    Example:
        >>> find_task("digits").batch_size
        32

    Raises:
        TruestepError: No built-in task has that name, or the file cannot be read or run, or
            holds no Task; the message names the file, the line and the reason.
    """
    if name_or_path in TASKS:
        return TASKS[name_or_path]
    path = Path(name_or_path)
    if path.suffix == ".py" or path.name != name_or_path or path.is_file():
        return _task_of_file(path)
    close = get_close_matches(name_or_path, TASKS, n=1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    raise TruestepError(
        f"There is no task {name_or_path!r}{meant}; choose one of: {', '.join(TASKS)}, "
        "or give the path of a Python file that holds `task = Task(...)`."
    )


def module_name(path: Path) -> str:
    """The name in `sys.modules` under which `find_task` runs a task's file."""
    return f"truestep_task_{path.stem}"


def _task_of_file(path: Path) -> Task:
    if not path.is_file():
        raise TruestepError(
            f"There is no task file {path}; give the path of a Python file that holds "
            "`task = Task(...)`."
        )
    name = module_name(path)
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise TruestepError(f"Task file {path} is not Python; give a file that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickle look the module of a class up by name
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise TruestepError(
            f"Task file {path}{_line(error, path)}: {type(error).__name__}: {error}; "
            "correct the file (`python` on it shows the whole traceback)."
        ) from error
    task = getattr(module, "task", None)
    if not isinstance(task, Task):
        found = "no `task`" if task is None else f"a `task` that is a {type(task).__name__}"
        raise TruestepError(
            f"Task file {path} has {found}; it needs a module-level `task = Task(...)` "
            "with Task from truestep.lab.tasks."
        )
    return task


def _line(error: BaseException, path: Path) -> str:
    """Where in the file an error arose, as far as is known."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f", line {error.lineno}"
    place = str(path.resolve())
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == place
    ]
    return f", line {lines[-1]}" if lines else ""


def accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """Share of samples whose largest output is the target class: [samples, classes], [samples]."""
    return (output.argmax(dim=1) == targets).float().mean()


def perceptron(*widths: int) -> nn.Sequential:
    """A ReLU network of fully connected layers, Glorot start, with the given widths (input first)."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layer = nn.Linear(inputs, outputs)
        # nn.Linear's own start shrinks the signal at every layer: five of them do not learn circles
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def load_digits(data_dir: Path | None = None) -> Splits:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8 pixels in 0..1, in a fixed random order."""
    del data_dir  # the data is part of scikit-learn
    from sklearn import datasets  # noqa: PLC0415

    digits = datasets.load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.from_numpy(digits.data.astype(np.float32) / 16)[order]
    targets = torch.from_numpy(digits.target.astype(np.int64))[order]
    return _three_splits(
        inputs, targets, (1077, 360, 360), "scikit-learn's digits, embedded: 1,797 images"
    )


def _three_splits(
    inputs: Tensor, targets: Tensor, sizes: tuple[int, int, int], source: str
) -> Splits:
    """Training, validation and test, in this order along the first axis."""
    start, end = sizes[0], sizes[0] + sizes[1]
    return Splits(
        train=Split(inputs[:start], targets[:start]),
        validation=Split(inputs[start:end], targets[start:end]),
        test=Split(inputs[end : end + sizes[2]], targets[end : end + sizes[2]]),
        source=source,
    )


def load_image_task(name: str, data_dir: Path | None = None) -> Splits:
    """An image data set, pixels in 0..1, flat; validation is the end of the training images.

    The last sixth of the training images, at most 10,000, is the validation split: the last 10,000
    of MNIST's 60,000.
    """
    from truestep.lab.datasets import load_images  # noqa: PLC0415

    # the worker processes of a race stay silent, or their bars would overwrite each other
    progress = parent_process() is None and sys.stderr.isatty()
    images = load_images(name, data_dir, progress=progress)
    inputs, test_inputs = (
        torch.from_numpy(part.images.astype(np.float32) / 255).flatten(1)
        for part in (images.train, images.test)
    )
    targets, test_targets = (
        torch.from_numpy(part.labels.astype(np.int64)) for part in (images.train, images.test)
    )
    start = len(inputs) - min(10_000, len(inputs) // 6)
    return Splits(
        train=Split(inputs[:start], targets[:start]),
        validation=Split(inputs[start:], targets[start:]),
        test=Split(test_inputs, test_targets),
        source=images.source,
    )


def load_circles(data_dir: Path | None = None) -> Splits:
    """Two noisy concentric circles in the plane (scikit-learn's make_circles), always the same."""
    del data_dir  # generated
    from sklearn import datasets  # noqa: PLC0415

    points, classes = datasets.make_circles(
        sum(_PLANE_SIZES), noise=0.1, factor=0.6, random_state=0
    )
    inputs = torch.from_numpy(points.astype(np.float32))
    targets = torch.from_numpy(classes.astype(np.int64))
    return _three_splits(inputs, targets, _PLANE_SIZES, "generated: two noisy circles")


def load_spirals(data_dir: Path | None = None) -> Splits:
    """Two noisy interleaved spiral arms of one and a half turns in the plane, always the same."""
    del data_dir  # generated
    samples = sum(_PLANE_SIZES)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(2, (samples,), generator=generator)
    # the square root spreads the samples evenly along the arm, whose radius grows with the angle
    distance = torch.rand(samples, generator=generator).sqrt()
    angle = distance * 3 * torch.pi + targets * torch.pi
    arms = torch.stack((distance * angle.cos(), distance * angle.sin()), dim=1)
    inputs = arms + 0.02 * torch.randn(samples, 2, generator=generator)
    return _three_splits(inputs, targets, _PLANE_SIZES, "generated: two noisy spiral arms")


def binary_loss(output: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of one logit per sample, [samples, 1], and targets 0 or 1, [samples]."""
    return nn.functional.binary_cross_entropy_with_logits(output.squeeze(1), targets.float())


def binary_accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """Share of samples whose logit, [samples, 1], has the sign of the target, [samples]."""
    return ((output.squeeze(1) > 0) == (targets > 0)).float().mean()


def _image_task(name: str, title: str, target: float) -> Task:
    return Task(
        name=name,
        title=title,
        load=partial(load_image_task, name),
        # the network of the aSGD paper's MNIST experiment
        model=partial(perceptron, 784, 30, 20, 10),
        loss=nn.functional.cross_entropy,
        metrics={"accuracy": accuracy},
        batch_size=64,
        epochs=5,
        target=("accuracy", target),
        learning_rates={
            "sgd": (0.02, 0.05, 0.1, 0.2, 0.5),
            "momentum": (0.002, 0.005, 0.01, 0.02, 0.05),
            "adam": (0.0005, 0.001, 0.002, 0.005, 0.01),
            "asgd": (0.01, 0.02, 0.05, 0.1, 0.2),
            "dasgd": (0.02, 0.05, 0.1, 0.2, 0.5),
        },
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="digits",
            title="Handwritten digits, 8 x 8",
            load=load_digits,
            model=partial(perceptron, 64, 30, 20, 10),
            loss=nn.functional.cross_entropy,
            metrics={"accuracy": accuracy},
            batch_size=32,
            epochs=20,
            target=("accuracy", 0.93),
            learning_rates={
                "sgd": (0.05, 0.1, 0.2, 0.5, 1.0),
                "momentum": (0.01, 0.02, 0.05, 0.1, 0.2),
                "adam": (0.002, 0.005, 0.01, 0.02, 0.05),
                "asgd": (0.02, 0.05, 0.1, 0.2, 0.5),
                "dasgd": (0.02, 0.05, 0.1, 0.2, 0.5),
            },
        ),
        Task(
            name="circles",
            title="Two concentric circles",
            load=load_circles,
            # the network of the aSGD paper's synthetic experiments
            model=partial(perceptron, 2, 10, 10, 10, 10, 10, 1),
            loss=binary_loss,
            metrics={"accuracy": binary_accuracy},
            batch_size=32,
            epochs=40,
            target=("accuracy", 0.95),
            learning_rates={
                "sgd": (0.05, 0.1, 0.2, 0.5, 1.0),
                "momentum": (0.01, 0.02, 0.05, 0.1, 0.2),
                "adam": (0.001, 0.002, 0.005, 0.01, 0.02),
                "asgd": (0.05, 0.1, 0.2, 0.5, 1.0),
                "dasgd": (0.05, 0.1, 0.2, 0.5, 1.0),
            },
        ),
        Task(
            name="spirals",
            title="Two spiral arms",
            load=load_spirals,
            model=partial(perceptron, 2, 10, 10, 10, 10, 10, 1),
            loss=binary_loss,
            metrics={"accuracy": binary_accuracy},
            batch_size=32,
            epochs=100,
            target=("accuracy", 0.95),
            learning_rates={
                "sgd": (0.02, 0.05, 0.1, 0.2, 0.5),
                "momentum": (0.01, 0.02, 0.05, 0.1, 0.2),
                "adam": (0.001, 0.002, 0.005, 0.01, 0.02),
                "asgd": (0.01, 0.02, 0.05, 0.1, 0.2),
                "dasgd": (0.02, 0.05, 0.1, 0.2, 0.5),
            },
        ),
        _image_task("mnist", "MNIST", 0.95),
        _image_task("fashion-mnist", "Fashion-MNIST", 0.85),
        _image_task("kmnist", "KMNIST", 0.75),
        _image_task("quickdraw10", "QuickDraw10", 0.72),
        Task(
            name="language-id",
            title="Which of 16 languages a word is from",
            load=load_language_id,
            model=LanguageNetwork,
            loss=nn.functional.cross_entropy,
            metrics={"accuracy": accuracy},
            batch_size=256,
            epochs=3,
            evaluations=4,
            target=("accuracy", 0.7),
            optimizers=("sgd", "momentum", "asgd", "dasgd", "asgd+dasgd", "adagrad", "adam"),
            # wide enough for batch sizes from 64 to 4096
            learning_rates={
                "sgd": (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0),
                "momentum": (0.01, 0.03, 0.07, 0.2, 0.5, 1.5, 4.0),
                "asgd": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
                "dasgd": (0.07, 0.15, 0.3, 0.7, 1.5, 3.0, 6.0),
                "asgd+dasgd": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
                "adagrad": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
                "adam": (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
            },
        ),
    )
}
