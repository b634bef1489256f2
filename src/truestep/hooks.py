"""Hooks that hold their counter weakly."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Hook", "Pausable", "hang", "inert", "on_gradients", "on_node", "uncompiled"]

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function, *, inside: bool = True) -> Function:
    """Lets torch.compile leave a function alone, with all that it calls, when it runs by itself.

    Args:
        function: any.
        inside: whether also where a compiled function calls it, which is a graph break.
    """
    if inside:
        # All that torch.compiler.disable does to a function's callers, without seconds of imports.
        vars(function).update(
            _torchdynamo_disable=True,
            _torchdynamo_disable_msg="counts are taken between graphs, not in them",
        )
    # Where torch has no such switch, these functions are compiled too: slower, but right.
    with suppress(ImportError):
        from torch._C._dynamo import eval_frame  # noqa: PLC0415

        skip = eval_frame._FrameAction.SKIP  # noqa: SLF001
        strategy = eval_frame._FrameExecStrategy(skip, skip)  # noqa: SLF001
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function


class Hook:
    """A hook that knows its counter weakly and does nothing once copied or pickled.

    Args:
        counter: gives the counter, or None once it is gone.
        bound: a method of the counter and its first arguments.
    """

    # Whoever saves a tensor that this hangs at does not miss it.
    __torch_unserializable__ = True

    def __init__(self, counter: Callable[[], object | None], *bound: Any) -> None:
        self.counter = counter
        self._method: Callable[..., Any] | None = bound[0] if bound else None
        self._bound = bound[1:]

    def __call__(self, *args: Any) -> Any:
        """Calls the counter's method, if the counter lives."""
        counter = self.counter()
        if counter is None or self._method is None:
            return None
        return self._method(counter, *self._bound, *args)

    uncompiled(__call__, inside=False)

    def __reduce__(self) -> Any:
        return Hook, (_no_counter,)

    def __deepcopy__(self, memo: Any) -> "Hook":
        return Hook(_no_counter)


def inert(hook: Any) -> bool:
    """Whether this is a counter's hook that was copied, and so does nothing."""
    return isinstance(hook, Hook) and hook.counter is _no_counter


def _no_counter() -> None:
    return None


# What tells our hooks at a tensor from others, whose keys torch counts from 0 on.
_keys = count(-1, -1)


def hang(tensor: Tensor, hook: Callable[[Tensor], Any]) -> None:
    """What `Tensor.register_hook` does, without making a handle, which takes three quarters of its time.

    Args:
        tensor: an output; for a leaf or a subclass it is `Tensor.register_hook` itself.
        hook: takes its gradient, and may return another.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> y = 2 * w
        >>> hang(y, lambda gradient: print(gradient.tolist()))
        >>> y.sum().backward()
        [1.0, 1.0]
    """
    # First of all: it brings a view whose base was written to in place up to date, and takes its hooks away.
    node: Any = tensor.grad_fn
    if node is None or type(tensor) is not Tensor:
        tensor.register_hook(hook)
        return
    hooks: Any = tensor._backward_hooks  # noqa: SLF001
    if hooks is None:
        tensor._backward_hooks = hooks = OrderedDict()  # noqa: SLF001
        node._register_hook_dict(tensor)  # noqa: SLF001
    hooks[next(_keys)] = hook


def on_gradients(outputs: Sequence[Tensor], hook: Callable[..., Any]) -> None:
    """Calls a hook in each backward pass with the gradients of all outputs, None where one gets none.

    torch's register_multi_grad_hook does the same, but misses an output that backward() starts from, and
    keeps the graph in a reference cycle.

    Args:
        outputs: of one layer; those that no operation made are taken to get no gradient.
        hook: takes as many gradients as there are outputs.
    """
    places: dict[Any, list[tuple[int, int]]] = {}
    for place, tensor in enumerate(outputs):
        if tensor.grad_fn is not None:
            places.setdefault(tensor.grad_fn, []).append((tensor.output_nr, place))
    # A backward pass goes through nodes from the latest to the earliest, and a node owns none that is
    # later: each hook waits for the earlier ones, and nothing refers to itself.
    nodes = sorted(places, key=lambda node: node._sequence_nr(), reverse=True)  # noqa: SLF001
    known: dict[int, list[Tensor | None]] = {}
    for index, node in enumerate(nodes, 1):
        node.register_prehook(_Arrival(hook, known, places[node], nodes[index:], len(outputs)))


def on_node(node: Any, hook: Callable[..., Any]) -> None:
    """Calls a hook in each backward pass with the gradient of the first output of an autograd node."""
    node.register_prehook(_Arrival(hook, {}, [(0, 0)], [], 1))


class _Arrival:
    """Takes the gradients that arrive at one node; the last of a backward pass to do so passes all on."""

    def __init__(
        self,
        hook: Callable[..., Any],
        known: dict[int, list[Tensor | None]],
        places: list[tuple[int, int]],
        earlier: list[Any],
        count: int,
    ) -> None:
        self._hook, self._known, self._places = hook, known, places
        self._earlier, self._count = earlier, count

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        task = torch._C._current_graph_task_id()  # noqa: SLF001
        found = self._known.setdefault(task, [None] * self._count)
        for output, place in self._places:
            found[place] = gradients[output]
        if not any(map(torch._C._will_engine_execute_node, self._earlier)):  # noqa: SLF001
            self._hook(*self._known.pop(task))


class Pausable:
    """A hook that can be off for a while.

    Args:
        register: puts the hook on and returns its handle.
    """

    def __init__(self, register: Callable[[], Any]) -> None:
        self._register = register
        self._handle = register()

    def remove(self) -> None:
        """Takes the hook off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def resume(self) -> None:
        """Puts the hook on again, if it is off."""
        if self._handle is None:
            self._handle = self._register()
