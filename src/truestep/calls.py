"""What tells one forward call of the model, and one backward pass, from another."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import Variable

from truestep.kernels.dispatch import finds_addresses

__all__ = ["Call", "at_end", "backward_id", "memory_of"]

Owner = TypeVar("Owner")

# The number of the running backward pass; -1 where none runs.
backward_id: Callable[[], int] = torch._C._current_graph_task_id  # noqa: SLF001
queue = Variable._execution_engine.queue_callback  # noqa: SLF001


@dataclass(eq=False, slots=True, weakref_slot=True)
class Call:
    """One forward call of the counter's model: what tells its samples from another call's.

    Attributes:
        sizes: the batch sizes that the call's inputs and outputs allow; empty where they show none.
        inputs: where the inputs' memory is, see `memory_of`.
        outside: whether it is a layer's call outside any call of the model.
        batch_size: the batch size that its layers agree on.
        positions: for each number of positions at an output, bool: those with a gradient.
        reached: for such numbers, how many have one.
        key: what stands for the call in a compiled graph, see `truestep.compiled`.
        task: the backward pass that it began in; -1 outside any.
    """

    sizes: list[int] = field(default_factory=list)
    inputs: set[int | None] = field(default_factory=set)
    outside: bool = False
    batch_size: int | None = None
    positions: dict[int, Tensor] = field(default_factory=dict)
    reached: dict[int, Tensor] = field(default_factory=dict)
    key: Tensor | None = None
    task: int = -1

    def note_positions(self, delta: Tensor) -> None:
        """Adds the positions where the gradient of an output is not zero."""
        delta = delta.detach()
        # Features are the last dimension; of images, which have channels first, the second.
        features = 1 if delta.dim() > 3 else -1  # noqa: PLR2004
        mask = delta.any(features) if delta.dim() > 1 else delta != 0
        mask = mask.flatten()
        known = self.positions.get(len(mask))
        mask = self.positions[len(mask)] = mask if known is None else mask | known
        self.reached[len(mask)] = mask.sum()


def memory_of(tensor: Tensor) -> int | None:
    """Where a tensor's memory begins; None under functorch, whose tensors have none to ask for."""
    return tensor.untyped_storage().data_ptr() if finds_addresses() else None


def at_end(owner: Owner, method: Callable[[Owner, int], None], task: int | None = None) -> None:
    """Calls a method with the backward pass's id when that backward pass ends."""
    task, reference = backward_id() if task is None else task, weakref.ref(owner)

    def call() -> None:
        living = reference()
        if living is not None:
            method(living, task)

    queue(call)
