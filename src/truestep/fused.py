"""Counting and correcting, or counting and stepping, of many parameters in one compiled pass."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from truestep.activity import Activity
from truestep.combine import Counts
from truestep.kernels import stepping
from truestep.kernels.stepping import Entry, Options, Table

__all__ = ["Found", "Pass"]

# The samples that reach a parameter, and N; None where its gradient stays as it is.
Found = tuple[Activity, int | Tensor] | None

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
        self._tables: dict[torch.dtype, Table] = {}
        self._changed: list[Tensor] = []
        self._held: list[Any] = []  # tables have only addresses

    @staticmethod
    def takes(*tensors: Tensor) -> bool:
        """Whether compiled loops can go over a parameter, its gradient and its buffer."""
        return stepping.takes(*tensors)

    def add(
        self,
        gradient: Tensor,
        found: Found,
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
        of = 0 if parameter is None else parameter.data_ptr()
        by = 0 if buffer is None else buffer.data_ptr()
        table = self._table(gradient)
        elements = table.add((gradient.data_ptr(), of, by), fresh, size, entries)
        self._held.append((gradient, found, entries))
        self._changed.append(gradient if parameter is None else parameter)
        if buffer is not None:
            self._changed.append(buffer)
        if elements >= LARGE:
            self.run()

    def add_all(
        self, gradients: Sequence[Tensor], found: Iterable[Found], parameters: Sequence[Tensor]
    ) -> bool:
        """`add` of several parameters without buffers, unless compiled loops cannot go over one of them.

        Args:
            gradients: theirs.
            found: see `add`, of each.
            parameters: what to take a step with.

        Returns:
            Whether all were added; if not, none was.
        """
        addresses = stepping.addresses(gradients, parameters)
        if addresses is None:
            return False
        self._changed.extend(parameters)
        for gradient, each, (to, of) in zip(gradients, found, addresses, strict=True):
            entries, size = self._entries(gradient, each)
            elements = self._table(gradient).add((to, of, 0), 0, size, entries)
            self._held.append(each)
            if elements >= LARGE:
                self.run()
        return True

    def _table(self, gradient: Tensor) -> Table:
        table = self._tables.get(gradient.dtype)
        if table is None:
            table = self._tables[gradient.dtype] = Table(gradient.element_size())
        return table

    def _entries(self, gradient: Tensor, found: Found) -> tuple[list[Entry], int]:
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
        for dtype, table in self._tables.items():
            stepping.run(table, self._options, dtype)
        increment_version(self._changed)
        self._tables.clear()
        self._changed.clear()
        self._held.clear()
