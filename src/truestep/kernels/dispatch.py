"""Whether tensors can go to compiled loops."""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

__all__ = ["compiled_loops", "installed", "loops"]

# numpy has no bfloat16: 16-bit floats are read as their bits.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@functools.cache
def installed() -> bool:
    """Whether numba is there."""
    return importlib.util.find_spec("numba") is not None


def compiled_loops(tensor: Tensor) -> bool:
    """Whether a tensor can be handed to a compiled loop as an array.

    Args:
        tensor: of floating point numbers.
    """
    return (
        installed()
        and tensor.device.type == "cpu"
        and type(tensor) in {Tensor, torch.nn.Parameter}
        and tensor.dtype in DTYPES
        and tensor.layout == torch.strided
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # noqa: SLF001
    )


@functools.cache
def loops() -> Any:
    """The module of compiled loops, imported when it is first needed."""
    from truestep.kernels import loops  # noqa: PLC0415 - imports numba, which takes half a second

    return loops
