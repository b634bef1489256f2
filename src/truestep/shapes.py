"""A model's forward pass on tensors that have shapes alone: its autograd graph, and no numbers.

A compiled graph does not show what it uses; as it is written, the model does.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from truestep.distributed import is_sharded
from truestep.layout import tensors_in

__all__ = ["traced_by_shapes"]


@contextmanager
def traced_by_shapes(
    model: nn.Module, names: Mapping[Tensor, str]
) -> Iterator[tuple[Callable[[Any, Any], list[Tensor]], dict[Tensor, str]]]:
    """A way to have the autograd graph of a model's forward pass without its numbers.

    The model's parameters, buffers and inputs are replaced by tensors that have shapes alone, and compiled
    parts run as they are written.

    Args:
        model: the model.
        names: the parameters to look for.

    Yields:
        A function from arguments and keyword arguments to the outputs that have a gradient, and the names
        of what stands for the parameters.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415 - compiling has imported it

    shapes = FakeTensorMode(allow_non_fake_inputs=True)

    def stand_in(tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            return shapes.from_tensor(tensor)
        with shapes:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return whole.requires_grad_(tensor.requires_grad)

    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    present = dict(inner.named_parameters()) | dict(inner.named_buffers())
    stand_ins = {name: stand_in(tensor) for name, tensor in present.items()}
    # fully_shard may have put gathered parameters in the places of the model's.
    own = set(names.values())
    labels = {name: names.get(tensor, name) for name, tensor in present.items()}
    known = {stand_ins[name]: label for name, label in labels.items() if label in own}

    def run(args: Any, kwargs: Any) -> list[Tensor]:
        given = pytree.tree_map_only(Tensor, stand_in, (args, kwargs))
        output = torch.func.functional_call(inner, stand_ins, *given)
        return [tensor for tensor in tensors_in(output) if tensor.requires_grad]

    with (
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
        # Activation checkpointing around the model counts the tensors that are saved.
        torch.autograd.graph.saved_tensors_hooks(_same, _same),
        _restored(inner),
        shapes,
    ):
        for module in inner.modules():
            _stop_gathering(module)
        yield run, known


def _stop_gathering(module: nn.Module) -> None:
    """Takes the hooks of fully_shard off, which would gather the module's real parameters."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):  # noqa: SLF001
        for number, hook in list(hooks.items()):
            if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp"):
                del hooks[number]


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Gives a model's modules their attributes back, which a forward pass may set."""
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    held = [value for _, values in attributes for value in values.values()]
    lists = [(value, list(value)) for value in held if type(value) is list]
    tables = [(value, dict(value)) for value in held if isinstance(value, dict)]
    try:
        yield
    finally:
        for mapping, before in (*attributes, *tables):
            mapping.clear()
            mapping.update(before)
        for items, earlier in lists:
            items[:] = earlier


def _same(tensor: Tensor) -> Tensor:
    return tensor
