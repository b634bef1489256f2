"""Which parameters a forward pass used without calling their modules, read off the autograd graph.

`F.linear(h, embedding.weight)` or a fused path inside a module bypasses the hooks of the module that owns
the parameter, and its samples would go uncounted.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from truestep.errors import TruestepError

__all__ = ["Used", "bypassed", "refuse_bypassed"]

Node = Any  # autograd's nodes have a class per operation and no public base
# The nodes of a layer's outputs, and the tensors that it was given.
Used = tuple[list[Node], list[Tensor]]
# What a compiled graph leaves of itself (of the backend "eager", the taps); what it uses cannot be seen.
COMPILED = {"CompiledFunctionBackward", "ApplyTemplateBackward"}


def bypassed(
    outputs: Iterable[Tensor], uses: Iterable[Used], names: Mapping[Tensor, str]
) -> list[str]:
    """The names of parameters that `outputs` depend on other than through the uses of layers.

    Args:
        outputs: of the model.
        uses: of the layers in this call, each with its output nodes, as they were when it returned.
        names: the parameters to look for.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> x = torch.ones(1, 2)
        >>> h = layer(x)
        >>> y = torch.nn.functional.linear(h, layer.weight)
        >>> bypassed([y], [([h.grad_fn], [x])], {p: n for n, p in layer.named_parameters()})
        ['weight']
    """
    inputs_of: dict[Node, list[Tensor]] = {}
    for nodes, inputs in uses:
        for node in nodes:
            inputs_of[node] = inputs
    found: dict[str, None] = {}
    seen: set[Node] = set()
    todo = [_origin(tensor) for tensor in outputs]
    while todo:
        reached = todo.pop()
        if isinstance(reached, Tensor):
            if reached in names:
                found[names[reached]] = None
        elif reached not in seen:
            seen.add(reached)
            if reached in inputs_of:
                todo += [_origin(tensor) for tensor in inputs_of[reached]]
            elif reached.name() not in COMPILED:
                todo += _before(reached)
    return list(found)


def refuse_bypassed(
    outputs: Iterable[Tensor], uses: Iterable[Used], names: Mapping[Tensor, str]
) -> None:
    """Raises `TruestepError` if there are parameters that `bypassed` finds."""
    found = bypassed(outputs, uses, names)
    if found:
        raise TruestepError(
            f"the model uses {', '.join(map(repr, found))} without calling the module that owns it, "
            "so the samples of that use would go uncounted. Call the module (an output head tied "
            "to an embedding: nn.Linear with its weight set to the embedding's), give the module "
            "that uses it a rule, or keep plain gradients: rules without its class and "
            "unsupported='mean'"
        )


def _origin(tensor: Tensor) -> Node | Tensor:
    return tensor if tensor.is_leaf else tensor.grad_fn


def _before(node: Node) -> Iterator[Node | Tensor]:
    for following, _ in node.next_functions:
        if following is not None:
            # the node of a leaf knows the leaf
            yield getattr(following, "variable", following)
