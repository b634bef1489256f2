"""What decides a run's result besides its key, as a description and its hash."""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truestep.lab.sources import own_imports
from truestep.lab.tasks import Splits, Task, module_name

__all__ = ["describe", "fingerprint", "hash_of"]

# What a person wants to read beside the hash, but which leaves the results as they are.
TITLES = ("title", "source", "samples")
HASH_LENGTH = 16


def describe(task: Task, splits: Splits, file: Path | None = None) -> dict[str, Any]:
    """All that decides a run's result besides its key: plain data that can be stored.

    Args:
        task: With the epochs that the race really has.
        splits: The task's data.
        file: The file that holds a user's task; its whole content counts, and that of the user's
            modules that it reaches.

    Returns:
        The task's parts, fingerprints of the data and of a model's start, and the versions of
        truestep and torch, with which results may change. Source and title are told, but left
        out of the hash.
    """
    torch.manual_seed(0)
    model = task.model()
    parts = (splits.train, splits.validation, splits.test)
    return {
        "task": task.name,
        "file": "" if file is None else hashlib.sha256(file.read_bytes()).hexdigest(),
        **_imports(file),
        "data": fingerprint(*(tensor for part in parts for tensor in (part.inputs, part.targets))),
        "model": _without_addresses(repr(model)),
        "parameters": {name: list(value.shape) for name, value in model.named_parameters()},
        "start": fingerprint(*model.parameters(), *model.buffers()),
        "loss": _name(task.loss),
        "metrics": {name: _name(metric) for name, metric in task.metrics.items()},
        "epochs": task.epochs,
        "evaluations": task.evaluations,
        "truestep": version("truestep"),
        "torch": torch.__version__,
        "title": task.title,
        "source": splits.source,
        "samples": [len(part.targets) for part in parts],
    }


def hash_of(description: dict[str, Any]) -> str:
    """The value of ``RunKey.experiment`` for a description, in hex."""
    decisive = {name: value for name, value in description.items() if name not in TITLES}
    text = json.dumps(decisive, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def fingerprint(*tensors: Tensor) -> str:
    """A hash of tensors' types, shapes and contents."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        # As bytes, because numpy doesn't know all of torch's types.
        flat = tensor.detach().to_dense().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _imports(file: Path | None) -> dict[str, dict[str, str]]:
    """What a task's file reaches of its user's; no entry where that is nothing."""
    module = None if file is None else sys.modules.get(module_name(file))
    own = {} if module is None else own_imports(module)
    if not own:
        return {}
    return {"imports": {name: hashlib.sha256(code).hexdigest() for name, code in own.items()}}


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, partial):
        return _without_addresses(
            f"{_name(function.func)} with {function.args} {sorted(function.keywords.items())}"
        )
    return _without_addresses(getattr(function, "__qualname__", repr(function)))


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)
