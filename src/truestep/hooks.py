"""Hooks that hold their counter weakly."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

__all__ = ["Hook", "InOrder", "Pausable"]


class Hook:
    """A hook that knows its counter weakly and does nothing once copied or pickled.

    Args:
        counter: gives the counter, or None once it is gone.
        bound: a method of the counter and its first arguments.
    """

    def __init__(self, counter: Callable[[], object | None], *bound: Any) -> None:
        self.counter = counter
        self._bound = bound

    def __call__(self, *args: Any) -> None:
        """Calls the counter's method, if the counter lives."""
        counter = self.counter()
        if counter is not None:
            method, *bound = self._bound
            method(counter, *bound, *args)

    def __reduce__(self) -> Any:
        return Hook, (_no_counter,)

    def __deepcopy__(self, memo: Any) -> "Hook":
        return Hook(_no_counter)


def _no_counter() -> None:
    return None


class InOrder:
    """Passes the gradients of some outputs on in the place that each has among all outputs.

    Args:
        hook: takes one gradient, or None, for each output.
        order: for each output, its place among those with a gradient, or None.
    """

    def __init__(self, hook: Hook, order: list[int | None]) -> None:
        self._hook, self._order = hook, order

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        """Takes the gradients of those outputs that have one."""
        self._hook(*[None if place is None else gradients[place] for place in self._order])


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
