"""The compiled loops, which alone import numba; the compiler vectorises the inner ones, over units."""

from typing import Any

from numba.core import config

from truestep.kernels.dispatch import machine_code

# numba asks for the place when a function is defined.
settings: Any = config
before = settings.CACHE_DIR
settings.CACHE_DIR = str(machine_code(before))
try:
    from truestep.kernels.loops import replicas, tables
    from truestep.kernels.loops.boost import boost, boosted_step
    from truestep.kernels.loops.pack import join, pack_positions, pack_units
    from truestep.kernels.loops.scan import scan
    from truestep.kernels.loops.step import count, step
finally:
    settings.CACHE_DIR = before

__all__ = [
    "boost",
    "boosted_step",
    "count",
    "join",
    "pack_positions",
    "pack_units",
    "replicas",
    "scan",
    "step",
    "tables",
]
