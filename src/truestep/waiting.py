"""Uses whose tensors wait to be packed together.

What is done for many at once costs each of them a fraction: all wait for the end of the backward pass,
unless their tensors would take too much memory until then.
"""

from torch import Tensor

from truestep.direct import Use, pack_all
from truestep.kernels import dispatch

__all__ = ["Waiting"]

# Bytes of small inputs and output gradients that a backward pass may hold until it ends, of one layer and of
# all. Larger ones are packed while they are in the processor's caches, and their memory is free sooner.
MOST_OF_ONE, MOST_OF_ALL = 1 << 18, 1 << 20
# Where kernels pack, of all: to launch one takes longer than most tensors, so those that wait go together.
MOST_LAUNCHED = 1 << 23


class Waiting:
    """Uses, each with its backward pass, that have their output's gradient."""

    def __init__(self) -> None:
        self._uses: list[tuple[Use, int]] = []
        self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._uses)

    def clear(self) -> None:
        """Forgets them."""
        self._uses.clear()
        self._bytes = 0

    def add(self, use: Use, delta: Tensor, task: int, *, whole: bool) -> None:
        """Lets a use wait, and packs what should not wait for longer.

        Args:
            use: of parameters that have no gradient yet.
            delta: its output's gradient.
            task: the backward pass.
            whole: see `truestep.direct.pack_all`.
        """
        launched = dispatch.on_triton(delta)
        most = MOST_LAUNCHED if launched else min(MOST_OF_ONE, MOST_OF_ALL - self._bytes)
        size = use.wait(most)
        if size is None:
            pack_all([use], whole=whole)
        # Only now: another device's thread may look at all that wait.
        self._uses.append((use, task))
        if size is None:
            return
        self._bytes += size
        if launched and self._bytes > MOST_LAUNCHED:
            self._bytes = 0
            pack_all([each for each, _ in self._unchanged(task)], whole=whole)

    def take(self, ending: int | None, *, whole: bool) -> list[tuple[Use, int]]:
        """All that wait, packed; they wait no longer.

        Args:
            ending: the backward pass that is just ending, if any.
            whole: see `truestep.direct.pack_all`.
        """
        uses = self._unchanged(ending)
        self._uses, self._bytes = [], 0
        pack_all([use for use, _ in uses], whole=whole)
        return uses

    def _unchanged(self, running: int | None) -> list[tuple[Use, int]]:
        """Those whose tensors are as they were: what a pass that raised has left behind may have changed."""
        return [pair for pair in self._uses if pair[0].is_unchanged(strict=pair[1] == running)]
