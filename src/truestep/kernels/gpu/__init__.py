"""Triton's kernels: what `truestep.kernels.loops` does, on CUDA devices. Nothing else imports Triton.

Each launch goes over many tensors. What is to be done with one is a line of a table of int64, which is
copied to the device; a line takes as many *tiles* as it needs programs, and its first field says how many
tiles come before it.
"""

from truestep.kernels.gpu.boosts import boost, boosted_step
from truestep.kernels.gpu.entries import count
from truestep.kernels.gpu.launches import probe
from truestep.kernels.gpu.packs import join, pack
from truestep.kernels.gpu.steps import step

__all__ = ["boost", "boosted_step", "count", "join", "pack", "probe", "step"]
