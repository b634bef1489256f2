"""Counting and correcting, or counting and stepping, of many parameters in one pass."""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from truestep.activity import Activity, Rows
from truestep.combine import Counts
from truestep.errors import resized
from truestep.kernels import stepping
from truestep.kernels.dispatch import device_of
from truestep.kernels.stepping import Entry, Options, Table, number_of

__all__ = ["Found", "Pass"]

# The samples that reach a parameter, and N; None where its gradient stays as it is.
Found = tuple[Activity, int | Tensor] | None

# Parameters for which more is made get a call of their own, so that it is not held together.
LARGE = 1 << 20

_is_cpu = attrgetter("is_cpu")


class Pass:
    """Gathers parameters and lets compiled loops or kernels go over all of them at once.

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
        self._tables: dict[tuple[torch.dtype, torch.device | None], Table] = {}
        self._changed: list[Tensor] = []
        self._held: list[Any] = []  # tables have only addresses

    @staticmethod
    def takes(*tensors: Tensor) -> bool:
        """Whether loops or kernels can go over a parameter, its gradient and its buffer."""
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
        of = 0 if parameter is None else parameter.data_ptr()
        by = 0 if buffer is None else buffer.data_ptr()
        self._changed.append(gradient if parameter is None else parameter)
        if buffer is not None:
            self._changed.append(buffer)
        self._held.append(gradient)
        place = (gradient.data_ptr(), of, by)
        self._add(place, fresh, gradient, device_of(gradient), found)

    def add_all(
        self, gradients: Sequence[Tensor], found: Iterable[Found], parameters: Sequence[Tensor]
    ) -> bool:
        """`add` of several parameters without buffers, where loops or kernels go over all at once.

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
        if not addresses:
            return True
        device = device_of(gradients[0])
        alike = all(map(_is_cpu, gradients))
        if not alike and any(device_of(gradient) != device for gradient in gradients):
            return False
        self._changed.extend(parameters)
        for gradient, each, (to, of) in zip(gradients, found, addresses, strict=True):
            self._add((to, of, 0), False, gradient, device, each)
        return True

    def add_sparse(self, gradient: Tensor, found: Found, parameter: Tensor) -> bool:
        """`add` of a table with a sparse gradient, to take a plain step, where the CPU's loops can.

        Args:
            gradient: its gradient, with values for some rows.
            found: see `add`.
            parameter: the table.

        Returns:
            Whether it was added.
        """
        if found is None or not isinstance(found[0], Rows) or self._options.weight_decay:
            return False
        rows, values = gradient._indices(), gradient._values()  # noqa: SLF001
        if found[0].shape != parameter.shape:
            raise resized(parameter.shape, found[0].shape)
        usual = len(rows) == 1 and values.shape[1:] == parameter.shape[1:] and rows.is_contiguous()
        if not (usual and values.is_cpu and values.dtype is parameter.dtype):
            return False
        entry = found[0].entry_of(rows[0])
        if entry is None or not (self.takes(values) and self.takes(parameter)):
            return False
        self.hold([parameter], gradient, rows, values, found)
        addresses = (values.data_ptr(), parameter.data_ptr(), 0)
        self.table(values, None).add(addresses, False, int(found[1]), [entry])
        return True

    def _add(
        self,
        addresses: tuple[int, int, int],
        fresh: bool,
        gradient: Tensor,
        device: torch.device | None,
        found: Found,
    ) -> None:
        table = self.table(gradient, device)
        if found is None:
            table.add(addresses, fresh, 1, [Entry(1, gradient.numel())])  # no sample: a factor of 1
            return
        activity, size = found
        if activity.shape != gradient.shape:
            raise resized(gradient.shape, activity.shape)
        self._held.append(found)
        number, entries = number_of(size, device), activity.entries(device)
        if entries is not None:
            table.add(addresses, fresh, number, entries)
            return
        counts = Counts(activity.count().to(gradient.device).contiguous(), activity.samples)
        self._held.append(counts)
        entries = counts.entries(device)
        assert entries is not None  # noqa: S101
        elements = table.add(addresses, fresh, number, entries)
        if elements >= LARGE:
            self.run()

    def table(self, like: Tensor, device: torch.device | None) -> Table:
        """What is to be done with parameters of one type.

        Args:
            like: one of them.
            device: where kernels go over them, None for the CPU's loops.
        """
        table = self._tables.get((like.dtype, device))
        if table is None:
            table = self._tables[like.dtype, device] = Table(like.element_size())
        return table

    def hold(self, changed: Iterable[Tensor], *held: object) -> None:
        """Notes which tensors will be written to, and keeps alive what tables have the addresses of."""
        self._changed.extend(changed)
        self._held += held

    def run(self) -> None:
        """Does all that was added."""
        for (dtype, device), table in self._tables.items():
            stepping.run(table, self._options, dtype, device)
        increment_version(self._changed)
        self._tables.clear()
        self._changed.clear()
        self._held.clear()
