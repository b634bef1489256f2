"""Which parameters a forward pass used without calling their modules, read off the autograd graph.

`F.linear(h, embedding.weight)` or a fused path inside a module bypasses the hooks of the module that owns
the parameter, and its samples would go uncounted.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from truestep.errors import TruestepError

__all__ = ["COMPILED", "Uses", "bypassed"]

Node = Any  # autograd's nodes have a class per operation and no public base
# The nodes of a layer's outputs, and the tensors that it was given, or the nodes of those.
Used = tuple[list[Node], list[Any]]
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
    inputs_of: dict[Node, list[Any]] = {}
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


class Uses:
    """The uses of layers in the first call of a model that has a gradient, to hold against the graph."""

    def __init__(self) -> None:
        self._checked = False
        self._uses: dict[Any, list[Used]] = {}

    def begin(self, call: Any) -> None:
        """Notes that a call of the model begins."""
        if not self._checked:
            self._uses[call] = []

    def counts(self, call: Any) -> bool:
        """Whether the uses of a call are wanted."""
        return call in self._uses

    def add(self, call: Any, outputs: Iterable[Any], given: Iterable[Any]) -> None:
        """Notes a use: its outputs, and what went into it; tensors, or their nodes."""
        if call in self._uses:
            nodes = [each.grad_fn if isinstance(each, Tensor) else each for each in outputs]
            self._uses[call].append(([node for node in nodes if node is not None], list(given)))

    @contextmanager
    def unless_refused(self) -> Iterator[None]:
        """Forgets the calls that are under way if something raises: their uses are not all known."""
        try:
            yield
        except BaseException:
            self._uses.clear()
            raise

    def end(
        self,
        call: Any,
        outputs: Sequence[Tensor],
        names: Mapping[Tensor, str],
        plain: Container[Tensor],
        present: Mapping[Tensor, Tensor],
    ) -> None:
        """Notes that a call of the model has returned.

        Args:
            call: the call.
            outputs: those that have a gradient.
            names: the model's parameters.
            plain: those that need no count.
            present: those that stand for others during the call, each with the other.

        Raises:
            TruestepError: there are parameters that `bypassed` finds.
        """
        uses = self._uses.pop(call, None)
        if uses is None or not outputs or self._checked:
            return
        self._checked = True
        known = {p: name for p, name in names.items() if p not in plain}
        gathered = {p: known[owner] for p, owner in present.items() if owner in known}
        found = bypassed(outputs, uses, known | gathered)
        if found:
            raise TruestepError(
                f"the model uses {', '.join(map(repr, found))} without calling the module that owns it, "
                "so the samples of that use would go uncounted. Call the module (an output head tied "
                "to an embedding: nn.Linear with its weight set to the embedding's), give the module "
                "that uses it a rule, or keep plain gradients: rules without its class and "
                "unsupported='mean'"
            )


def _origin(given: Any) -> Node | Tensor:
    return given if not isinstance(given, Tensor) or given.is_leaf else given.grad_fn


def _before(node: Node) -> Iterator[Node | Tensor]:
    for following, _ in node.next_functions:
        if following is not None:
            # the node of a leaf knows the leaf
            yield getattr(following, "variable", following)
