"""Activity of a parameter that stacks several: attention's packed query, key and value projections."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from truestep.activity import Activity
from truestep.kernels.stepping import Entry

__all__ = ["Blocks"]


@dataclass(frozen=True)
class Blocks(Activity):
    """Rows of a parameter with an activity of their own each; no sample reaches the others.

    Attributes:
        shape: the whole parameter's.
        parts: first row of each block to the activity of its rows; blocks do not overlap.

    Example:
        >>> from truestep.activity import Elements
        >>> from truestep.bits import pack
        >>> middle = Elements(torch.Size([1]), pack(torch.ones(4, 1)))
        >>> Blocks(torch.Size([3]), {1: middle}).count()
        tensor([0, 4, 0])
    """

    shape: torch.Size
    parts: dict[int, Activity]

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples."""
        return next(iter(self.parts.values())).samples

    def entries(self, device: torch.device | None = None) -> list[Entry] | None:  # noqa: D102
        found: list[Entry] = []
        row = 0
        for first, part in sorted(self.parts.items()):
            entries = part.entries(device)
            if first != row or entries is None:
                return None
            found += entries
            row += part.shape[0]
        return found if row == self.shape[0] else None

    def masks(self, start: int, stop: int) -> Tensor:  # noqa: D102
        mask = torch.zeros(stop - start, *self.shape, dtype=torch.bool, device=self.device)
        for first, part in self.parts.items():
            mask[:, first : first + part.shape[0]] = part.masks(start, stop)
        return mask

    def count_masks(self) -> Tensor:  # noqa: D102
        counts = torch.zeros(self.shape, dtype=torch.int64, device=self.device)
        for first, part in self.parts.items():
            counts[first : first + part.shape[0]] = part.count()
        return counts

    def reached(self) -> Tensor:  # noqa: D102
        return torch.stack([part.reached() for part in self.parts.values()]).any(0)

    def tensors(self) -> Iterator[Tensor]:  # noqa: D102
        for part in self.parts.values():
            yield from part.tensors()
