"""A trained model with its data, out of files: what `truestep nodes` and `truestep compress` work on."""

import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from truestep.errors import TruestepError
from truestep.nodes import call_model
from truestep.units import tensors_in

__all__ = ["SavedModel", "check_first_batch", "load_saved"]

BATCH_SIZE = 256


@dataclass(frozen=True)
class SavedModel:
    """A model and its data.

    Attributes:
        model: in evaluation mode; an exported program in the mode that it was saved in.
        loader: batches, which can be gone through again.
        forward: how the model is called on a batch, None for the usual way.
        exported: whether it came as an exported program.
        free: whether batches may be of any size.
    """

    model: nn.Module
    loader: Iterable[Any]
    forward: Any
    exported: bool
    free: bool


def load_saved(path: Path, data: Path | None = None, batch_size: int | None = None) -> SavedModel:
    """Reads a model and its data.

    Args:
        path: A Python file with `model` and `loader`, and `forward` if need be; or an exported program
            (.pt2) of `torch.export.save`.
        data: A file with the inputs instead: .npy, .pt (a tensor, or a tuple whose first item is one),
            or a Python file with `loader`.
        batch_size: Of the batches that a tensor is cut into; an exported program's own where it allows
            one only.

    Raises:
        TruestepError: A file holds something else; the message says which and what to do.
    """
    names = {} if path.suffix == ".pt2" else _run(path)
    exported = path.suffix == ".pt2"
    model = _exported(path) if exported else names.get("model")
    if not isinstance(model, nn.Module):
        found = "no `model`" if model is None else f"a `model` that is a {type(model).__name__}"
        raise TruestepError(
            f"{path} has {found}; it needs a module-level `model = ...`, a torch module."
        )
    own = _own_batch_size(path) if exported else None
    if own is not None and batch_size not in {None, own}:
        raise TruestepError(f"{path} takes batches of {own} only; leave --batch-size out.")
    loader = _loader(path, names, data, own or batch_size or BATCH_SIZE, whole=own is not None)
    if data is not None and data.suffix != ".py":
        loader = [_like(batch, model) for batch in loader]
    if not exported:
        model.eval()
    return SavedModel(model, loader, names.get("forward"), exported, own is None)


def check_first_batch(saved: SavedModel, source: Path) -> None:
    """Raises `TruestepError` for a model that does not run on its data.

    Args:
        saved: both.
        source: the file that the data came from.
    """
    for batch in saved.loader:
        try:
            with torch.no_grad():
                call_model(saved.model, batch, saved.forward)
        except TruestepError:
            raise
        except Exception as error:
            tensors = [f"{list(t.shape)} of {str(t.dtype)[6:]}" for t in tensors_in(batch)]
            said = " and ".join(tensors) or repr(batch)
            raise TruestepError(
                f"the model fails on the first batch of {source}, {said}: {_first_line(error)}; give "
                "inputs of the shape and type that it was trained on"
            ) from error
        return


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")


def _like(batch: Tensor, model: nn.Module) -> Tensor:
    """A batch of floats in the precision of the model's."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), batch.dtype)
    return batch.to(dtype) if batch.is_floating_point() else batch


def _run(path: Path) -> dict[str, Any]:
    """The module-level names of a Python file."""
    spec = importlib.util.spec_from_file_location(f"truestep_model_{path.stem}", path.resolve())
    if spec is None or spec.loader is None:
        raise TruestepError(
            f"{path} is not Python; give a file that ends in .py, or an exported .pt2."
        )
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickle look the module of a class up by name
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise TruestepError(
            f"{path}: {type(error).__name__}: {error}; correct the file (`python` on it shows the whole "
            "traceback)."
        ) from error
    return vars(module)


def _exported(path: Path) -> nn.Module:
    try:
        return torch.export.load(path).module()
    except Exception as error:
        raise TruestepError(
            f"{path} is no exported program: {error}; write it with torch.export.save()."
        ) from error


def _own_batch_size(path: Path) -> int | None:
    """The batch size of an exported program that allows no other."""
    program = torch.export.load(path)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        inputs = program.graph_signature.user_inputs
        if (
            node.op == "placeholder"
            and node.name in inputs
            and isinstance(value, Tensor)
            and value.dim()
        ):
            return value.shape[0] if isinstance(value.shape[0], int) else None
    return None


def _loader(
    path: Path, names: dict[str, Any], data: Path | None, batch_size: int, *, whole: bool
) -> Iterable[Any]:
    if data is not None and data.suffix in {".npy", ".pt", ".pth"}:
        return _cut(data, batch_size, whole=whole)
    if data is not None and data.suffix != ".py":
        raise TruestepError(f"{data} ends in none of .npy, .pt and .py; save the inputs as .npy.")
    place, names = (data, _run(data)) if data is not None else (path, names)
    loader = names.get("loader")
    if loader is None and place.suffix == ".pt2":
        raise TruestepError(f"{place} holds no data; give the inputs as --data FILE, .npy or .pt.")
    if loader is None:
        raise TruestepError(
            f"{place} has no `loader`; add a module-level `loader = ...` (batches of inputs), or give the "
            "inputs as --data FILE, .npy or .pt."
        )
    if iter(loader) is loader:
        loader = list(loader)  # gone through more than once
    return loader


def _cut(data: Path, batch_size: int, *, whole: bool) -> list[Tensor]:
    """Batches of the rows of a file."""
    try:
        if data.suffix == ".npy":
            inputs = torch.from_numpy(np.load(data, allow_pickle=False))
        else:
            inputs = next(tensors_in(torch.load(data, weights_only=True)))
    except Exception as error:
        raise TruestepError(
            f"{data} holds no tensor: {_first_line(error)}; save the inputs as one."
        ) from error
    if not inputs.dim():
        raise TruestepError(
            f"{data} holds a single number; save inputs whose first axis is the sample."
        )
    if whole and len(inputs) % batch_size:
        raise TruestepError(
            f"{data} has {len(inputs)} rows, and the exported program takes batches of {batch_size} only: "
            "give a multiple, or export with torch.export.Dim for the batch."
        )
    return list(inputs.split(batch_size))
