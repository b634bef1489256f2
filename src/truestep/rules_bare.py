"""The rule for parameters that a module uses in its own forward pass: scales, tokens, gates, matrices.

After the module's call, the autograd graph is read in the order in which it was made. What is computed from
the module's parameters alone (`truestep.derived`) is followed to the operations where it meets data
(`truestep.meetings`): the gradient there and the other operand tell which samples reach the parameter.
"""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from truestep.consumers import COMPILED
from truestep.derived import ELEMENTWISE, LINKS, LOOKUPS, MIXERS, Part
from truestep.errors import TruestepError
from truestep.graph import Node, Recording
from truestep.layout import Given, Inside, Layout
from truestep.meetings import Use, elements, matrix
from truestep.operations import FACTORS, PRODUCTS, lead, placed, region, whole

__all__ = ["HOLDERS", "LEAVE_OUT", "UncountableError", "bare", "holders_in", "own_parameters"]

# Modules that hold parameters for others and are never called.
HOLDERS = (nn.ParameterList, nn.ParameterDict)
GROUPS = (nn.ModuleList, nn.ModuleDict)

LEAVE_OUT = "module.forward = torch.compiler.disable(module.forward), and compile the modules in it"
WAYS_OUT = (
    "Give the module a rule, SampleCounter(model, rules=truestep.RULES | {MyLayer: my_rule}), or keep its "
    "plain gradients with unsupported='mean'"
)


class UncountableError(TruestepError):
    """A module uses its parameters in a way that the rule does not know.

    Args:
        message: which, and how.
        alone: whether each sample's own gradient may tell.
    """

    def __init__(self, message: str, *, alone: bool = True) -> None:
        super().__init__(message)
        self.alone = alone


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that a module has itself or in lists and dictionaries, by their names in it.

    Example:
        >>> module = nn.Module()
        >>> module.scales = nn.ParameterList([torch.ones(2)])
        >>> module.layer = nn.Linear(2, 2)
        >>> list(own_parameters(module))
        ['scales.0']
    """
    return dict(_held(module, ""))


def holders_in(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold parameters for this one."""
    for child in module.children():
        if isinstance(child, HOLDERS + GROUPS):
            yield child
            yield from holders_in(child)


def _held(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, child in module.named_children():
        if isinstance(child, HOLDERS + GROUPS):
            yield from _held(child, f"{prefix}{name}.")


def bare(
    path: str,
    recording: Recording | None,
    layout: Layout,
    module: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> Inside:
    """Any module: the operations at which its own parameters meet data.

    Args:
        path: the module's dotted name.
        recording: of the call; None where the graph holds nothing else.
        layout: where the module's tensors hold the samples.
        module: any.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    dim = layout.batch_dim or 0
    sizes = {tensor.shape[dim] for tensor in given if tensor.dim() > dim}

    def see(outputs: list[Tensor]) -> tuple[None, list[tuple[Node, Given]]]:
        names = {p: name for name, p in own_parameters(module).items() if p.requires_grad}
        reader = _Reader(layout, names, sizes, recording, f"{path}." if path else "")
        return None, list(reader.read(outputs))

    return Inside(see)


class _Other:
    """An operand that is not computed from the module's parameters alone."""


DATA, CONSTANT, UNSEEN = _Other(), _Other(), _Other()  # UNSEEN: a tensor without gradient
Operand = _Other | tuple[Part, ...]
Edge = tuple[Node, int]


class _Reader:
    """One look at the graph of one call.

    Args:
        layout: where tensors hold the samples.
        names: the module's parameters.
        sizes: how many samples there may be; empty where nothing shows it.
        recording: of the call, if it is not all of the graph.
        prefix: of the module's parameters, in the model.
    """

    def __init__(
        self,
        layout: Layout,
        names: dict[Tensor, str],
        sizes: set[int],
        recording: Recording | None,
        prefix: str,
    ) -> None:
        self._layout, self._names, self._sizes = layout, names, sizes
        self._first = 0 if recording is None else recording.first
        self._prefix = prefix
        self._dim = layout.batch_dim or 0
        self._values: dict[Edge, Operand] = {}
        self._users: dict[Node, Node] = {}
        self._found: dict[tuple[Node, int, str], Use] = {}

    def read(self, outputs: list[Tensor]) -> Iterator[tuple[Node, Use]]:
        """The nodes where parameters meet data, each with what is to get the gradient of its output."""
        for node in self._nodes(outputs):
            operands = [self._operand(*edge) for edge in node.next_functions]
            if any(isinstance(operand, tuple) for operand in operands):
                self._visit(node, operands)
            elif CONSTANT in operands and node.name() in LINKS:
                self._values[node, 0] = CONSTANT
        for output in outputs:
            if output in self._names:
                self._refuse_output(self._names[output])
            self._leave(output.grad_fn, output.output_nr)
        return ((node, use) for (node, _, _), use in self._found.items())

    def _leave(self, node: Node, number: int) -> None:
        """What is computed from parameters alone and leaves the module."""
        for part in _owned(self._values.get((node, number), DATA)):
            if self._layout.batch_dim is None and number == 0:
                self._found[node, -1, part.name] = self._use(node, part, None, whole)
            elif part.sampled is None:
                self._refuse_output(part.name)
            else:
                self._settle(part)

    def _nodes(self, outputs: list[Tensor]) -> list[Node]:
        """The nodes that the call has made, in their order."""
        seen: dict[Node, int] = {}
        todo = [output.grad_fn for output in outputs]
        while todo:
            node = todo.pop()
            if node is None or node in seen or hasattr(node, "variable"):
                continue
            number = node._sequence_nr()
            if number >= self._first:
                seen[node] = number
                for following, _ in node.next_functions:
                    self._users[following] = node
                    todo.append(following)
        return sorted(seen, key=seen.__getitem__)

    def _operand(self, node: Node, number: int) -> Operand:
        if node is None:
            return UNSEEN
        variable = getattr(node, "variable", None)
        if variable is None:
            if node.name() == "ToCopyBackward0" and (node, number) not in self._values:
                # Autocast keeps the cast of a parameter from an earlier call.
                return self._operand(*node.next_functions[0])
            return self._values.get((node, number), DATA)
        if variable in self._names:
            return (Part(self._names[variable], variable.shape, variable.shape),)
        return CONSTANT if isinstance(variable, nn.Parameter) else DATA

    def _visit(self, node: Node, operands: list[Operand]) -> None:
        name = node.name()
        if getattr(node, "_saved_scale_grad_by_freq", False):
            (part, *_) = (part for each in operands for part in _owned(each))
            raise UncountableError(
                f"{self._prefix + part.name!r} is looked up with scale_grad_by_freq=True, which divides "
                f"by counts itself; set it to False. {WAYS_OUT}",
                alone=False,
            )
        if (name in LINKS or name in ELEMENTWISE) and len(operands) == 1:
            self._follow(node, operands[0])
        elif name in FACTORS and not (name.startswith("NativeLayerNorm") and _owned(operands[0])):
            self._join(node, operands)
        else:
            self._multiply_or_mix(node, operands)

    def _follow(self, node: Node, operand: Operand) -> None:
        """An operation on what is computed from parameters alone."""
        name = node.name()
        for number, output in enumerate(node._input_metadata):
            shape = torch.Size(output.shape)
            step = LINKS[name](node, number, shape) if name in LINKS else None
            found = [part.then(step, shape, copied=name in LOOKUPS) for part in _owned(operand)]
            if name in LOOKUPS | {"ExpandBackward0"} and self._may_hold_samples(shape):
                for place, part in enumerate(found):
                    if part.sampled is None:
                        use = self._use(node, part, None, whole)
                        found[place] = part.with_samples((node, 0, use))
            self._values[node, number] = tuple(found)

    def _join(self, node: Node, operands: list[Operand]) -> None:
        """Operations on elements, which broadcast their operands or put them side by side."""
        shape = torch.Size(node._input_metadata[0].shape)
        unseen = UNSEEN in operands or node.name() == "WhereBackward0"
        brought = any(self._aligned(part, shape) for each in operands for part in _owned(each))
        found: list[Part] = []
        for index, operand in enumerate(operands):
            for part in _owned(operand):
                cut = region(node, index)
                if cut is None:
                    self._refuse(node, part.name)
                joined = part.then(*placed(node, shape, cut))
                if self._aligned(part, shape):
                    found.append(joined)
                    continue
                # A constant of the parameter's own shape brings no samples; of one sample, all do.
                grown = shape != part.shape or shape[self._dim : self._dim + 1] == (1,)
                sampled = None
                if DATA in operands or brought or (unseen and grown):
                    factor = FACTORS[node.name()].get(index)
                    passed = None if factor is None else factor(node)
                    sampled = (node, index, self._use(node, part, passed, cut))
                may = DATA in operands or self._may_hold_samples(shape)
                found.append(joined.with_samples(sampled if may else None))
        if DATA in operands:
            for part in found:
                self._settle(part)
        else:
            self._values[node, 0] = tuple(found)

    def _multiply_or_mix(self, node: Node, operands: list[Operand]) -> None:
        """Products of matrices, and operations whose results depend on all elements of an operand."""
        name = node.name()
        for index, operand in enumerate(operands):
            if any(part.sampled for part in _owned(operand)):
                for part in _owned(operand):
                    if part.sampled is None:
                        self._refuse(node, part.name)
                    self._settle(part)
                operands[index] = DATA
        parts = [(index, part) for index, each in enumerate(operands) for part in _owned(each)]
        if not parts:
            return
        factors = PRODUCTS.get(name, {})
        data = [operands[index] in (DATA, UNSEEN) for index in factors]
        if any(data):
            for index, part in parts:
                self._found[node, index, part.name] = self._product(node, index, part)
        elif name in MIXERS and DATA not in operands:
            for number, output in enumerate(node._input_metadata):
                shape = torch.Size(output.shape)
                self._values[node, number] = tuple(part.stirred(shape) for _, part in parts)
        else:
            self._refuse(node, parts[0][1].name)

    def _product(self, node: Node, index: int, part: Part) -> Use:
        """A product of data and what is computed from a parameter, or the bias that is added to one."""
        saved = PRODUCTS[node.name()]
        shape = torch.Size(node._input_metadata[0].shape)
        if index not in saved:
            rows = self._rows(node, shape[0])
            return self._use(node, part, None, lambda delta: delta.reshape(*rows, shape[-1]))
        left, right = sorted(saved)
        inputs = getattr(node, saved[left if index == right else right]).detach()
        arrange = whole
        if index == left:
            # The other way round: the data's columns are its samples.
            turned = torch.Size([*part.shape[:-2], part.shape[-1], part.shape[-2]])
            part, inputs, arrange = part.then(_turn, turned), inputs.mT, _turn
        elif node.name() == "MvBackward0":
            part, arrange = part.then(_column, torch.Size([*part.shape, 1])), _column
        if len(part.shape) > 2:  # noqa: PLR2004
            repeats, strides = part.shape[0], part.strides()
            if repeats > 1 and not part.mixed and (strides is None or strides[0] != 0):
                self._refuse(node, part.name)
            part = part.then(lambda numbers: numbers.select(0, 0), part.shape[1:])
            if repeats > 1:
                return self._made(node, part, matrix(self._layout, part, inputs, arrange))
            inputs = inputs.squeeze(0)
        rows = (len(inputs),) if index == left else self._rows(node, len(inputs))
        inputs = inputs.reshape(*rows, inputs.shape[-1])
        product = matrix(
            self._layout, part, inputs, lambda delta: arrange(delta).reshape(*rows, part.shape[-1])
        )
        return self._made(node, part, product)

    def _rows(self, node: Node, rows: int) -> tuple[int, ...]:
        return lead(node, rows, self._users.get(node), self._dim, self._sizes)

    def _use(
        self,
        node: Node,
        part: Part,
        factor: Tensor | None,
        cut: Callable[[Tensor], Tensor],
    ) -> Use:
        shape = torch.Size(node._input_metadata[0].shape)
        return self._made(node, part, elements(self._layout, part, shape, factor, cut))

    def _made(self, node: Node, part: Part, activity: Any) -> Use:
        others = [
            getattr(following, "variable", following)
            for following, number in node.next_functions
            if following is not None and not _owned(self._operand(following, number))
        ]
        return Use(part.name, activity, others)

    def _may_hold_samples(self, shape: torch.Size) -> bool:
        if self._layout.batch_dim is None:
            return False
        return len(shape) > self._dim and (not self._sizes or shape[self._dim] in self._sizes)

    def _aligned(self, part: Part, shape: torch.Size) -> bool:
        """Whether samples that may have come in unseen are where those of an operation's output are."""
        if part.sampled is None or len(part.shape) != len(shape):
            return False
        if self._layout.unit == "position" and shape[self._dim] == 1:
            return part.shape == shape
        return part.shape[self._dim] == shape[self._dim]

    def _settle(self, part: Part) -> None:
        """Counts where samples came in unseen."""
        node, index, use = part.sampled
        self._found[node, index, part.name] = use

    def _refuse_output(self, name: str) -> NoReturn:
        raise UncountableError(
            f"{self._prefix + name!r} leaves the module that owns it without having met a sample, so it is "
            "unknown which samples reach it; use it in that module, or say batch_dim={...: None} for the "
            f"module if all samples share what it returns. {WAYS_OUT}"
        )

    def _refuse(self, node: Node, name: str) -> NoReturn:
        if node.name() in COMPILED:
            raise UncountableError(
                f"{self._prefix + name!r} is used inside a compiled graph, which does not show how; leave "
                f"its module out, {LEAVE_OUT}. {WAYS_OUT}"
            )
        raise UncountableError(
            f"{self._prefix + name!r} is used by the operation {node.name().split(':')[-1]!r}, which the "
            f"rule for parameters outside layers does not know, or not in this form. {WAYS_OUT}"
        )


def _owned(operand: Operand) -> tuple[Part, ...]:
    return operand if isinstance(operand, tuple) else ()


def _turn(tensor: Tensor) -> Tensor:
    return tensor.mT


def _column(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(-1)
