"""What is kept of a training: measurements after some of its epochs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Curves", "measured_epochs"]

# The first epochs are measured one by one: that is where curves bend.
EACH_UP_TO = 10


@dataclass(frozen=True)
class Curves:
    """A training's measurements by name, its status, what computed it, its steps and seconds."""

    arrays: dict[str, NDArray[np.generic]]
    status: str
    engine: str
    steps: int
    seconds: float


def measured_epochs(epochs: int, measure: int) -> list[int]:
    """After which epochs a training is measured; 0 is its start.

    Example:
        >>> measured_epochs(20, 5)
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20]
    """
    first = range(min(EACH_UP_TO, epochs) + 1)
    return sorted({*first, *range(0, epochs + 1, measure), epochs})
