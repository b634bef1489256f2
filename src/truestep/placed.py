"""Activity of a parameter that a layer sees only through what is computed from it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from truestep.activity import Activity, Elements, Outer
from truestep.bits import pack

__all__ = ["Placed", "everything"]


@dataclass(frozen=True)
class Placed(Activity):
    """A parameter whose elements are found at other places of the tensor that a layer uses.

    Attributes:
        shape: the parameter's.
        use: the activity of the tensor that is used.
        places: int64, for each element of that tensor the element of the parameter, both flattened, -1
            where it is none; None where the two are in the same order.

    Example:
        >>> second = Elements(torch.Size([2]), pack(torch.tensor([[1, 0], [1, 1]])))
        >>> Placed(torch.Size([3]), second, torch.tensor([1, 2])).count()
        tensor([0, 2, 1])
    """

    shape: torch.Size
    use: Activity
    places: Tensor | None

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples."""
        return self.use.samples

    def masks(self, start: int, stop: int) -> Tensor:  # noqa: D102
        used = self.use.masks(start, stop)
        if self.places is None:
            return used.reshape(-1, *self.shape)
        return scatter(used.flatten(1), self.places.unsqueeze(0), self.shape)

    def count(self) -> Tensor:  # noqa: D102
        return super().count() if self.places is not None else self.use.count().reshape(self.shape)

    def reached(self) -> Tensor:  # noqa: D102
        return self.use.reached()

    def tensors(self) -> Iterator[Tensor]:  # noqa: D102
        yield from self.use.tensors()
        if self.places is not None:
            yield self.places


def scatter(mask: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Which elements of a parameter the samples reach that reach those at other places.

    Args:
        mask: bool ``[samples, elements]``.
        places: int64 ``[samples, elements]``, or ``[1, elements]`` for all samples; -1 for no element.
        shape: the parameter's.

    Returns:
        Bool ``[samples, *shape]``.
    """
    samples, elements = (mask & (places >= 0)).nonzero(as_tuple=True)
    found = mask.new_zeros(len(mask), shape.numel())
    found[samples, places.expand_as(mask)[samples, elements]] = True
    return found.reshape(len(mask), *shape)


def everything(shape: torch.Size, reached: Tensor) -> Activity:
    """Every element of a parameter, for the samples that reach any: an upper bound.

    Args:
        shape: the parameter's.
        reached: bool ``[samples]``.
    """
    column = reached.unsqueeze(-1)
    if len(shape) < 2:  # noqa: PLR2004
        return Elements(shape, pack(column.expand(-1, shape.numel())))
    inputs = column.new_ones(len(column), shape[1:].numel())
    return Outer(shape, pack(column.expand(-1, shape[0])), pack(inputs))
