"""Gradients to which a nested backward pass has added what no layer's hooks have seen."""

import weakref
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Unseen"]


class Unseen:
    """Gradients, known weakly, by the identity of their parameters.

    Reentrant activation checkpointing runs nested passes: what it computes is not in the graph that is held
    against the uses of layers (`truestep.consumers`).
    """

    def __init__(self) -> None:
        self._gradients: dict[int, Callable[[], Tensor | None]] = {}

    def __bool__(self) -> bool:
        return bool(self._gradients)

    def clear(self) -> None:
        """Forgets them."""
        self._gradients.clear()

    def add(self, parameter: Tensor) -> None:
        """Notes a parameter's present gradient, if it has one."""
        if parameter.grad is not None:
            self._gradients[id(parameter)] = weakref.ref(parameter.grad)

    def __contains__(self, parameter: Tensor) -> bool:
        gradient = self._gradients.get(id(parameter))
        return gradient is not None and parameter.grad is not None and gradient() is parameter.grad
