"""Which parameters a forward pass used without calling their modules, read off the autograd graph.

`F.linear(h, embedding.weight)` or a fused path inside a module bypasses the hooks of the module that owns
the parameter, and its samples would go uncounted.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from truestep.errors import TruestepError
from truestep.layout import tensors_in

__all__ = ["COMPILED", "Used", "Uses", "bypassed", "traced_by_shapes", "used"]

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
    return _walk(outputs, uses, names)[0]


def _walk(
    outputs: Iterable[Tensor], uses: Iterable[Used], names: Mapping[Tensor, str]
) -> tuple[list[str], bool]:
    """What `bypassed` finds, and whether there were compiled graphs that do not show what they use."""
    hidden = False
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
            elif reached.name() in COMPILED:
                hidden = True
            else:
                todo += _before(reached)
    return list(found), hidden


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
    ) -> bool:
        """Notes that a call of the model has returned; says whether compiled graphs hid a part of it.

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
            return False
        self._checked = True
        known = {p: name for p, name in names.items() if p not in plain}
        gathered = {p: known[owner] for p, owner in present.items() if owner in known}
        return self.check(outputs, uses, known | gathered)

    def begin_check(self) -> bool:
        """Whether no call was checked yet; it is taken to be checked now."""
        checked, self._checked = self._checked, True
        return not checked

    @staticmethod
    def check(outputs: Iterable[Tensor], uses: Iterable[Used], names: Mapping[Tensor, str]) -> bool:
        """Raises `TruestepError` for what `bypassed` finds; says whether compiled graphs hid a part."""
        found, hidden = _walk(outputs, uses, names)
        if found:
            raise TruestepError(
                f"the model uses {', '.join(map(repr, found))} without calling the module that owns it, "
                "so the samples of that use would go uncounted. Call the module (an output head tied "
                "to an embedding: nn.Linear with its weight set to the embedding's), give the module "
                "that uses it a rule, or keep plain gradients: rules without its class and "
                "unsupported='mean'"
            )
        return hidden


def used(output: Any, given: Any) -> Used:
    """A use of a layer: the nodes of its outputs and of the bases that these are views of, and its inputs."""
    outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    bases = [tensor._base for tensor in outputs if tensor._is_view()]  # noqa: SLF001
    ends = [*outputs, *(base for base in bases if base is not None)]
    nodes = [tensor.grad_fn for tensor in ends if tensor.grad_fn is not None]
    return nodes, list(tensors_in(given))


@contextmanager
def traced_by_shapes(
    model: nn.Module, names: Mapping[Tensor, str]
) -> Iterator[tuple[Callable[[Any, Any], list[Tensor]], dict[Tensor, str]]]:
    """A way to have the autograd graph of a model's forward pass without its numbers.

    A compiled graph does not show what it uses. The model's parameters, buffers and inputs are replaced by
    tensors that have shapes alone, and compiled parts run as they are written.

    Args:
        model: the model.
        names: the parameters to look for.

    Yields:
        A function from arguments and keyword arguments to the outputs that have a gradient, and the names
        of what stands for the parameters.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415 - compiling has imported it

    shapes = FakeTensorMode(allow_non_fake_inputs=True)

    def without_numbers(value: Any) -> Any:
        return pytree.tree_map_only(Tensor, shapes.from_tensor, value)

    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    present = dict(inner.named_parameters()) | dict(inner.named_buffers())
    stand_ins: dict[str, Tensor] = {n: shapes.from_tensor(t) for n, t in present.items()}
    known: dict[Tensor, str] = {stand_ins[n]: names[t] for n, t in present.items() if t in names}

    def run(args: Any, kwargs: Any) -> list[Tensor]:
        given = without_numbers((args, kwargs))
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
        yield run, known


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


def _origin(given: Any) -> Node | Tensor:
    return given if not isinstance(given, Tensor) or given.is_leaf else given.grad_fn


def _before(node: Node) -> Iterator[Node | Tensor]:
    for following, _ in node.next_functions:
        if following is not None:
            # the node of a leaf knows the leaf
            yield getattr(following, "variable", following)
