"""Counting and correcting, or counting and stepping, of many parameters in one compiled pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from truestep.activity import Activity
from truestep.combine import Counts
from truestep.kernels import stepping
from truestep.kernels.stepping import Entry, Options, Task

__all__ = ["Pass"]

# Larger parameters get a call of their own, so that what is made for them is not held together.
LARGE = 1 << 20


class Pass:
    """Gathers parameters and lets compiled loops go over all of them at once.

    Args:
        options: see `truestep.kernels.stepping.Options`.

    Example:
        >>> gradient = torch.ones(2)
        >>> whole = Pass(Options(eps=1.0))
        >>> if whole.takes(gradient):
        ...     whole.add(gradient, (Counts(torch.tensor([0, 1]), 4), 4))
        ...     whole.run()
        ... else:  # numba is not installed
        ...     gradient = torch.tensor([1.0, 2.0])
        >>> gradient
        tensor([1., 2.])
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._tasks: dict[torch.dtype, list[Task]] = {}
        self._changed: list[Tensor] = []
        self._held: list[Any] = []  # the tasks have only addresses

    @staticmethod
    def takes(*tensors: Tensor) -> bool:
        """Whether compiled loops can go over a parameter, its gradient and its buffer."""
        return stepping.takes(*tensors)

    def add(
        self,
        gradient: Tensor,
        found: tuple[Activity, int | Tensor] | None,
        parameter: Tensor | None = None,
        buffer: Tensor | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        """Adds a parameter.

        Args:
            gradient: its gradient.
            found: the samples that reach it, and N; None where the gradient is to be taken as it is.
            parameter: what to take a step with; without it the gradient is corrected in place.
            buffer: of momentum.
            fresh: whether the buffer holds nothing yet.
        """
        entries, size = self._entries(gradient, found)
        to = gradient.data_ptr()
        of = 0 if parameter is None else parameter.data_ptr()
        by = 0 if buffer is None else buffer.data_ptr()
        tasks = self._tasks.setdefault(gradient.dtype, [])
        for entry in entries:
            tasks.append(Task(to, of, by, fresh, size, entry))
            passed = entry.rows * entry.columns * gradient.element_size()
            to, of, by = to + passed, of and of + passed, by and by + passed
        changed = gradient if parameter is None else parameter
        self._changed.append(changed)
        if buffer is not None:
            self._changed.append(buffer)
        self._held.append(gradient)
        if changed.numel() >= LARGE:
            self.run()

    def _entries(
        self, gradient: Tensor, found: tuple[Activity, int | Tensor] | None
    ) -> tuple[list[Entry], int]:
        if found is None:
            return [Entry(1, gradient.numel())], 1  # no sample: a factor of 1
        activity, size = found
        entries = activity.entries()
        if entries is None:
            activity = Counts(activity.count().contiguous(), activity.samples)
            entries = activity.entries() or []
        self._held.append(activity)
        return entries, int(size)

    def run(self) -> None:
        """Does all that was added."""
        for dtype, tasks in self._tasks.items():
            stepping.run(tasks, self._options, dtype)
        increment_version(self._changed)
        self._tasks.clear()
        self._changed.clear()
        self._held.clear()
