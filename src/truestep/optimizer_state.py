"""An optimizer moves on to a smaller model: its parameters are exchanged and its state is cut like them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from truestep.checks import check_kind
from truestep.errors import TruestepError
from truestep.optim import AdaptiveBatchSGD
from truestep.transforms import transform_names

__all__ = ["check_optimizer", "move_optimizer"]

Slice = Callable[[Tensor], Tensor]


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raises `TruestepError` for an optimizer that could not go on with a smaller model."""
    check_kind(optimizer, Optimizer, "optimizer", "a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TruestepError(
            "LBFGS keeps the large model's parameters and directions; compress without optimizer= and begin "
            "with a fresh one"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise TruestepError(
                    f"parameter {index} of the optimizer, of shape {tuple(parameter.shape)}, is not the "
                    "model's; pass the optimizer of the model that is compressed"
                )
            _check_state(names[id(parameter)], parameter, optimizer.state.get(parameter, {}))
    if "mean_effective_gradient" in transform_names(optimizer):
        raise TruestepError(
            "the optimizer has mean_effective_gradient attached, whose counter watches the large model; "
            "remove() the handle, compress, then attach it anew with truestep.SampleCounter(small)"
        )


def _check_state(name: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    for key, value in state.items():
        whole = not isinstance(value, Tensor) or value.numel() == 1
        if not whole and value.shape != parameter.shape:
            raise TruestepError(
                f"the optimizer's state {key!r} of {name!r} has shape {tuple(value.shape)}, not the "
                f"parameter's {tuple(parameter.shape)}, so it is not known how to make it smaller; "
                "compress without optimizer= and begin with a fresh one"
            )


def move_optimizer(
    optimizer: Optimizer, model: nn.Module, small: nn.Module, slices: Mapping[str, Slice]
) -> None:
    """Makes an optimizer train the small model.

    Args:
        optimizer: changed in place.
        model: that it trained so far.
        small: that it trains from now on.
        slices: by parameter name, what is left of a tensor of the parameter's shape; parameters that the
            small model has made anew are not among them and begin without state.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fresh = dict(small.named_parameters())
    known = set(names.values())
    for group in optimizer.param_groups:
        old, group["params"] = group["params"], []
        added: list[Tensor] = []
        for parameter in old:
            name = names[id(parameter)]
            state = optimizer.state.pop(parameter, None)
            new = fresh.get(name)
            if new is None:
                continue
            group["params"].append(new)
            if state is not None and name in slices:
                cut = slices[name]
                optimizer.state[new] = {
                    key: cut(value).clone() if _alike(value, parameter) else value
                    for key, value in state.items()
                }
            owner = name.rpartition(".")[0]
            bias = f"{owner}.bias" if owner else "bias"
            if name.endswith("weight") and bias in fresh and bias not in known:
                added.append(fresh[bias])  # a bias that took over constants
        group["params"] += added
        if "param_names" in group:
            own = {id(parameter): name for name, parameter in fresh.items()}
            group["param_names"] = [own[id(parameter)] for parameter in group["params"]]
    if isinstance(optimizer, AdaptiveBatchSGD) and optimizer.counter is not None:
        optimizer.counter = optimizer.counter.moved(small)


def _alike(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and parameter.dim() > 0
