"""The compiled loops, which alone import numba; the compiler vectorises the inner ones, over units."""

from truestep.kernels.loops.boost import boost, boosted_step
from truestep.kernels.loops.pack import join, pack_positions, pack_units
from truestep.kernels.loops.step import count, step

__all__ = ["boost", "boosted_step", "count", "join", "pack_positions", "pack_units", "step"]
