"""Which parameters a forward pass used without calling their modules, read off the autograd graph.

`F.linear(h, embedding.weight)` or a fused path inside a module bypasses the hooks of the module that owns
the parameter, and its samples would go uncounted.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from truestep.errors import TruestepError
from truestep.layout import tensors_in

__all__ = ["COMPILED", "Used", "Uses", "bypassed", "taps_in", "used"]

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
    return _walk(outputs, uses, names).found


class _Walk(NamedTuple):
    """A walk through a graph.

    Attributes:
        found: what `bypassed` finds.
        hidden: whether there were compiled graphs that do not show what they use.
        reached: the uses that it met, by their places among all.
    """

    found: list[str]
    hidden: bool
    reached: set[int]


def _walk(outputs: Iterable[Tensor], uses: Iterable[Used], names: Mapping[Tensor, str]) -> _Walk:
    hidden = False
    inputs_of: dict[Node, tuple[int, list[Any]]] = {}
    for place, (nodes, inputs) in enumerate(uses):
        for node in nodes:
            inputs_of[node] = place, inputs
    found: dict[str, None] = {}
    met: set[int] = set()
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
                place, inputs = inputs_of[reached]
                met.add(place)
                todo += [_origin(tensor) for tensor in inputs]
            elif reached.name() in COMPILED:
                hidden = True
            else:
                todo += _before(reached)
    return _Walk(list(found), hidden, met)


class Uses:
    """The uses of layers in a model's call that has a gradient, to hold against the graph.

    That is done with the first such call in training and the first in evaluation, and again when a
    parameter that was frozen then is trained: the way through the model may be another.

    Attributes:
        hooked: the numbers of the layers whose hooks have run in that call.
    """

    def __init__(self) -> None:
        self.hooked: set[int] = set()
        self._modes: set[bool] = set()
        self._frozen: list[Tensor] = []
        self._uses: dict[Any, list[Used]] = {}
        self._refused: list[TruestepError] = []

    def checked(self, *, training: bool) -> bool:
        """Whether a call of the model in this mode was held against the graph, with what is trained now."""
        return training in self._modes and not self._thawed()

    def _thawed(self) -> bool:
        return any(parameter.requires_grad for parameter in self._frozen)

    def begin(self, call: Any) -> None:
        """Notes that a call of the model begins, of those before one is checked."""
        if not self._uses:
            self._refused.clear()
            self.hooked.clear()
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
    def collecting(self) -> Iterator[list[TruestepError]]:
        """Keeps what a rule refuses for the end of the call, so that all such modules are named at once.

        Whatever else raises makes the calls that are under way forgotten: their uses are not all known.

        Yields:
            What was refused inside.
        """
        found: list[TruestepError] = []
        try:
            yield found
        except TruestepError as error:
            found.append(error)
            self._refused.append(error)
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
        *,
        training: bool,
    ) -> bool:
        """Notes that a call of the model has returned; says whether compiled graphs hid a part of it.

        Args:
            call: the call.
            outputs: those that have a gradient.
            names: the model's parameters.
            plain: those that need no count.
            present: those that stand for others during the call, each with the other.
            training: the model's mode.

        Raises:
            TruestepError: there are parameters that `bypassed` finds, or rules have refused modules.
        """
        uses = self._uses.pop(call, None)
        if uses is None or not outputs or self.checked(training=training):
            return False
        refused, self._refused = self._refused, []
        if refused:
            raise refused[0] if len(refused) == 1 else TruestepError("\n".join(map(str, refused)))
        known = {p: name for p, name in names.items() if p not in plain}
        gathered = {p: known[owner] for p, owner in present.items() if owner in known}
        hidden = self.check(outputs, uses, known | gathered)
        self.begin_check(names, training=training)
        return hidden

    def begin_check(self, names: Iterable[Tensor], *, training: bool) -> bool:
        """Whether no such call was checked yet; it is taken to be checked now.

        Args:
            names: the model's parameters.
            training: the model's mode.
        """
        if self.checked(training=training):
            return False
        if self._thawed():
            self._modes.clear()
        self._modes.add(training)
        self._frozen = [parameter for parameter in names if not parameter.requires_grad]
        return True

    @staticmethod
    def check(outputs: Iterable[Tensor], uses: Iterable[Used], names: Mapping[Tensor, str]) -> bool:
        """Raises `TruestepError` for what `bypassed` finds; says whether compiled graphs hid a part."""
        walk = _walk(outputs, uses, names)
        if walk.found:
            raise TruestepError(
                f"the model uses {', '.join(map(repr, walk.found))} without calling the module that owns it, "
                "so the samples of that use would go uncounted. Call the module (an output head tied "
                "to an embedding: nn.Linear with its weight set to the embedding's), give the module "
                "that uses it a rule, or keep plain gradients: rules without its class and "
                "unsupported='mean'. A derivative that the model itself takes (create_graph=True) may go "
                "through linear layers, convolutions and norms alone"
            )
        return walk.hidden

    def check_graphs(
        self,
        tapped: set[int],
        written: Iterable[Tensor],
        uses: Sequence[Used],
        layers: Sequence[tuple[int, str]],
    ) -> None:
        """Raises `TruestepError` for layers that ran in a graph which does not deliver what they did.

        Args:
            tapped: `taps_in` the outputs of the model.
            written: the outputs of the model as it is written, without compiled parts.
            uses: of layers in the latter.
            layers: the number and name of each use's layer.
        """
        reached = _walk(written, uses, {}).reached
        unseen = {
            layers[place] for place in reached if layers[place][0] not in tapped | self.hooked
        }
        if unseen:
            names = ", ".join(repr(name) for _, name in sorted(unseen))
            raise TruestepError(
                f"{names} ran in a graph that was compiled before the SampleCounter was made, so the samples "
                "would go uncounted there; call torch.compiler.reset() once, or make the counter before the "
                "first call of what is compiled"
            )


def taps_in(outputs: Iterable[Tensor]) -> set[int] | None:
    """The numbers of the layers that compiled graphs will deliver to; None where that does not show.

    A tap saves its receiver's number for the backward pass.

    Args:
        outputs: of the model.
    """
    found: set[int] = set()
    seen: set[Node] = set()
    todo: list[Node] = [tensor.grad_fn for tensor in outputs]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        if node.name() not in COMPILED:
            continue
        if node.name() != "CompiledFunctionBackward":
            return None
        # Not saved_tensors: under activation checkpointing those run the forward pass again.
        for saved in getattr(node, "_raw_saved_tensors", (None,)):
            tensor = getattr(saved, "data", None)
            if not isinstance(tensor, Tensor):
                return None
            if tensor.dim() == 0 and tensor.dtype == torch.int64:
                found.add(int(tensor))
    return found


def used(output: Any, given: Any) -> Used:
    """A use of a layer: the nodes of its outputs and of the bases that these are views of, and its inputs."""
    outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    bases = [tensor._base for tensor in outputs if tensor._is_view()]  # noqa: SLF001
    ends = [*outputs, *(base for base in bases if base is not None)]
    nodes = [tensor.grad_fn for tensor in ends if tensor.grad_fn is not None]
    return nodes, list(tensors_in(given))


def _origin(given: Any) -> Node | Tensor:
    return given if not isinstance(given, Tensor) or given.is_leaf else given.grad_fn


def _before(node: Node) -> Iterator[Node | Tensor]:
    for following, _ in node.next_functions:
        if following is not None:
            # the node of a leaf knows the leaf
            yield getattr(following, "variable", following)
