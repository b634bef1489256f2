"""What the autograd graph inside a layer shows: where it uses its parameters, and what it has saved."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from truestep.errors import TruestepError

__all__ = [
    "Node",
    "Recording",
    "nodes_between",
    "parameter_behind",
    "saved_tensors_are_packed",
    "uses_of",
]

Node = Any  # autograd's nodes have a class per operation and no public base

# What may stand between a parameter and the operation that uses it: views, and autocast's cast.
LINKS = {"TBackward0", "TransposeBackward0", "ToCopyBackward0"}
SPLITS = {"SplitBackward0", "SplitWithSizesBackward0"}


def nodes_between(outputs: Iterable[Tensor], inputs: Iterable[Any]) -> Iterator[Node]:
    """The nodes of the autograd graph that lead from `inputs` to `outputs`.

    Args:
        outputs: of a layer that has just run.
        inputs: what the layer was given; anything but a tensor is passed over.
    """
    seen: set[Node] = {tensor.grad_fn for tensor in inputs if isinstance(tensor, Tensor)}
    todo: list[Node] = [tensor.grad_fn for tensor in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo += [following for following, _ in node.next_functions]


def uses_of(
    outputs: Iterable[Tensor], inputs: Iterable[Any], names: Mapping[Tensor, str]
) -> Iterator[tuple[Node, list[tuple[str, int]]]]:
    """The operations that use parameters, each with the names and which piece of a split it uses.

    Args:
        outputs: of a layer that has just run.
        inputs: what the layer was given.
        names: the layer's parameters.

    Example:
        >>> linear = torch.nn.Linear(2, 2)
        >>> x = torch.ones(1, 2)
        >>> names = {p: name for name, p in linear.named_parameters()}
        >>> [(node.name(), sorted(uses)) for node, uses in uses_of([linear(x)], [x], names)]
        [('AddmmBackward0', [('bias', 0), ('weight', 0)])]
    """
    for node in nodes_between(outputs, inputs):
        if node.name() not in LINKS | SPLITS:
            found = [parameter_behind(to, piece, names) for to, piece in node.next_functions]
            uses = [use for use in found if use is not None]
            if uses:
                yield node, uses


def parameter_behind(node: Node, piece: int, names: Mapping[Tensor, str]) -> tuple[str, int] | None:
    """The parameter that an operand is a view or a cast of, if any, and which piece of a split it is."""
    place = 0
    while node is not None and node.name() in LINKS | SPLITS:
        if node.name() in SPLITS:
            place = piece
        node, piece = node.next_functions[0]
    name = names.get(getattr(node, "variable", None))  # type: ignore[arg-type]
    return None if name is None else (name, place)


def saved_tensors_are_packed() -> bool:
    """Whether something, such as activation checkpointing, replaces the tensors that nodes save."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # noqa: SLF001


class Recording:
    """What a module's call adds to the autograd graph, from its beginning until `stop`.

    Something, such as activation checkpointing, may hide the tensors that nodes save. Those of the
    call can be read all the same as long as its recording lives.

    Attributes:
        first: autograd's number of the first node that the call may make.
    """

    def __init__(self) -> None:
        self.first: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]  # noqa: SLF001
        self.tensors: list[tuple[Tensor, int]] = []
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # noqa: SLF001
        self.hidden = hooks is not None
        if hooks is not None:
            pack, unpack = hooks
            # Nodes hold both hooks, and the recording holds tensors of theirs.
            keep, find = partial(_keep, weakref.ref(self), pack), partial(_find, unpack)
            torch._C._autograd._push_saved_tensors_default_hooks(keep, find)  # noqa: SLF001

    def stop(self) -> None:
        """Ends the recording, before anything else that was begun before it."""
        if self.hidden:
            torch._C._autograd._pop_saved_tensors_default_hooks()  # noqa: SLF001


class _Kept:
    """What a node saves: packed, and in the recording."""

    def __init__(self, packed: Any, recording: Callable[[], Recording | None], place: int) -> None:
        self.packed, self.recording, self.place = packed, recording, place


def _keep(
    recording: Callable[[], Recording | None], pack: Callable[[Tensor], Any], tensor: Tensor
) -> _Kept:
    packed, living, place = pack(tensor), recording(), 0
    if living is not None:
        place = len(living.tensors)
        living.tensors.append((tensor, tensor._version))  # noqa: SLF001
    return _Kept(packed, recording, place)


def _find(unpack: Callable[[Any], Tensor], kept: _Kept) -> Tensor:
    recording = kept.recording()
    if recording is None:
        return unpack(kept.packed)
    tensor, version = recording.tensors[kept.place]
    if tensor._version != version:  # noqa: SLF001
        raise TruestepError(
            "a tensor was changed in place after it had met a parameter, under activation "
            "checkpointing; change a copy of it, or checkpoint with use_reentrant=True"
        )
    return tensor
