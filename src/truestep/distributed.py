"""The ranks that train a model together, and how its parameters are spread over them."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from truestep.activity import Activity, Elements
from truestep.bits import Bits
from truestep.errors import TruestepError
from truestep.kernels.dispatch import PLAIN

__all__ = [
    "Ranks",
    "find_ranks",
    "is_sharded",
    "like",
    "local",
    "nobody",
    "ranks_of",
]


@dataclass(frozen=True)
class Ranks:
    """The ranks that train one model together.

    Attributes:
        group: their process group.
        may_skip: whether a rank may leave a parameter unused that another uses.
        wrapper: gives the DistributedDataParallel module, if there is one.
    """

    group: Any
    may_skip: bool
    wrapper: Callable[[], nn.Module | None] | None = None

    @property
    def rank(self) -> int:
        """This process's place among them."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many they are."""
        return dist.get_world_size(self.group)

    def refuse_join(self) -> None:
        """Raises `TruestepError` inside DistributedDataParallel's `join()`."""
        wrapper = None if self.wrapper is None else self.wrapper()
        config = getattr(wrapper, "_join_config", None)
        if config is not None and config.enable:
            raise TruestepError(
                "inside DistributedDataParallel.join() ranks that ran out of batches take no steps, so "
                "they cannot tell the others their counts; give those ranks empty batches instead, with "
                "a loss of output.sum() * 0"
            )


def find_ranks(model: nn.Module, process_group: Any = None) -> Ranks | None:
    """The ranks that train a model, or None for one process alone.

    Args:
        model: the counter's model.
        process_group: the ranks whose gradients the user adds up by hand.

    Raises:
        TruestepError: the way in which the model is spread over ranks is not known.
    """
    names = {type(module).__name__ for module in model.modules()}
    if "FullyShardedDataParallel" in names:
        raise TruestepError(
            "torch.distributed.fsdp.FullyShardedDataParallel flattens parameters, so their elements "
            "cannot be told apart; use torch.distributed.fsdp.fully_shard"
        )
    sharded = {name: p for name, p in model.named_parameters() if is_sharded(p)}
    for name, parameter in sharded.items():
        placements = [str(placement) for placement in parameter.placements]  # type: ignore[attr-defined]
        if placements != ["S(0)"]:
            raise TruestepError(
                f"{name!r} is placed as {placements} on its device mesh; only rows over one mesh "
                "dimension can be counted: use fully_shard with a one-dimensional mesh and Shard(0)"
            )
    if process_group is not None:
        return Ranks(process_group, may_skip=True)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return ranks_of(model)
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise TruestepError(
            "a part of the model is a DistributedDataParallel module; make the SampleCounter on that "
            "part, or say SampleCounter(model, process_group=...) if all gradients are averaged"
        )
    if not sharded:
        return None
    alone = [n for n, p in model.named_parameters() if p.requires_grad and n not in sharded]
    if alone:
        raise TruestepError(
            f"{', '.join(map(repr, alone))} are not sharded while others are, so who averages their "
            "gradients is unknown; call fully_shard(model) on the whole model, or say "
            "SampleCounter(model, process_group=...) if you average them"
        )
    groups = {parameter.device_mesh.get_group() for parameter in sharded.values()}  # type: ignore[attr-defined]
    if len(groups) > 1:
        raise TruestepError(
            "the model's parameters are sharded over different ranks; use one device mesh for all"
        )
    return Ranks(groups.pop(), may_skip=False)


def ranks_of(wrapper: nn.parallel.DistributedDataParallel) -> Ranks:
    """The ranks of a DistributedDataParallel module."""
    may_skip = wrapper.find_unused_parameters or wrapper.static_graph
    return Ranks(wrapper.process_group, may_skip, weakref.ref(wrapper))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    # Not isinstance: the import alone takes a second, and where there is a DTensor, somebody has paid it.
    return type(tensor) not in PLAIN and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def like(parameter: Tensor, values: Tensor) -> Tensor:
    """Values for the rows that this rank owns as a tensor like the parameter."""
    if not is_sharded(parameter):
        return values
    from torch.distributed.tensor import DTensor  # noqa: PLC0415  (see is_sharded)

    return DTensor.from_local(
        values,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def nobody(parameter: Tensor) -> Activity:
    """The activity of no sample."""
    words = torch.zeros(0, parameter.numel(), dtype=torch.int64, device=local(parameter).device)
    return Elements(parameter.shape, Bits(words, 0, 1, parameter.numel()))
