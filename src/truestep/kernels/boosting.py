"""DA-SGD on all parameters at once, in one pass over their elements.

The twin is `update.boosted` and torch's own `sgd`, parameter by parameter. Here what Python does for
each parameter decides for small ones, so tensors are looked at attribute by attribute, not one by one.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version

from truestep.kernels import dispatch
from truestep.kernels.threads import spread

__all__ = ["Table", "boost_", "step_", "table"]

DTYPES = [{dtype} for dtype in dispatch.STORED]
# Nanoseconds that one core takes for a byte of each kind of tensor, from its cache.
PER_BYTE = 0.08

_dtype, _is_cpu, _nbytes = attrgetter("dtype"), attrgetter("is_cpu"), attrgetter("nbytes")


class Table(NamedTuple):
    """Where loops or kernels find the tensors, which it keeps alive; for one call.

    Attributes:
        rows: int64 ``[2 + kinds of tensors, parameters]``, see `truestep.kernels.loops.boost`.
        like: an array of the dtype that loops see the tensors as.
        elements: of all parameters.
        kinds: the tensors.
        device: where they are, if not on the CPU.
    """

    rows: NDArray[np.int64]
    like: NDArray[Any]
    elements: int
    kinds: Sequence[Sequence[Tensor]]
    device: torch.device | None


def table(*kinds: Sequence[Tensor]) -> Table | None:
    """The table of tensors that a compiled loop or a kernel can take; None where torch operations have to.

    All must be plain tensors on one device and of one dtype, float32, float64 or bfloat16, and a parameter's
    tensors lie alike in memory, without gaps.

    Args:
        kinds: the gradients, the previous gradients and, for `step_`, the parameters. It is the last whose
            dtypes and types are looked at: the others were made to fit.

    Example:
        >>> table([torch.ones(2, dtype=torch.float16)], [torch.ones(2, dtype=torch.float16)]) is None
        True
    """
    tensors = list(chain.from_iterable(kinds))
    if not _take_loops(kinds, tensors):
        return None
    like = dispatch.STORED[kinds[-1][0].dtype]
    # Of equal shapes, as a parameter's tensors are, those of one dtype fill equally many bytes.
    sizes = list(map(_nbytes, kinds[0]))
    if any(list(map(_nbytes, kind)) != sizes for kind in kinds[1:]):
        return None
    # imag() of a conjugate only notes that it is negated; of such, single numbers have no gaps.
    if like.itemsize in sizes and any(map(Tensor.is_neg, tensors)):
        return None
    count, height = len(sizes), 2 + len(kinds)
    values = chain(accumulate(sizes), (0,) * count, map(Tensor.data_ptr, tensors))
    rows = np.fromiter(values, np.int64, height * count).reshape(height, count)
    # Zeros that autograd makes up have no memory; neither have tensors without elements.
    if not rows[2:].all() and (rows[2:] == 0)[:, np.diff(rows[0], prepend=0) > 0].any():
        return None
    return Table(rows, like, sum(sizes) // like.itemsize, kinds, dispatch.device_of(tensors[0]))


def step_(
    table: Table,
    first: Sequence[bool],
    *,
    lr: float | Tensor,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Takes DA-SGD's step in place and makes the previous gradients the present ones.

    Args:
        table: of gradients, previous gradients and parameters.
        first: for each parameter whether its previous gradient has only to be set; empty if none's.
        lr: learning rate.
        weight_decay: L2 penalty.
        maximize: ascend.
    """
    rows, like, elements, kinds, device = table
    if first:
        rows[1] = first
    settings = (float(lr), float(weight_decay), bool(maximize))
    if device is not None:
        dispatch.gpu().boosted_step(rows, kinds[-1][0].dtype, device, *settings)
    else:
        work = elements * like.itemsize * PER_BYTE
        spread(dispatch.loops().boosted_step, elements, work, rows, like, *settings)
    increment_version(kinds[-1])


def boost_(table: Table) -> None:
    """Adds their boosters to the gradients in place; the previous ones become those there were.

    Args:
        table: of gradients and previous gradients.
    """
    rows, like, elements, kinds, device = table
    if device is not None:
        dispatch.gpu().boost(rows, kinds[0][0].dtype, device)
    else:
        work = elements * like.itemsize * PER_BYTE
        spread(dispatch.loops().boost, elements, work, rows, like)
    increment_version(kinds[0])


def _take_loops(kinds: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor]) -> bool:
    """Whether loops or kernels may read these tensors as the numbers at their addresses."""
    return (
        len(tensors) > 0
        and _on_one_device(tensors)
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None  # noqa: SLF001
        and set(map(_dtype, kinds[-1])) in DTYPES
        and set(map(type, kinds[-1])) <= dispatch.PLAIN
        and (all(map(Tensor.is_contiguous, tensors)) or all(map(_lie_alike, *kinds)))
    )


def _on_one_device(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors are where loops or kernels can go over them now."""
    if dispatch.device_of(tensors[0]) is None:
        return dispatch.installed() and all(map(_is_cpu, tensors))
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False  # torch operations are what a graph can hold
    return all(tensor.device == device for tensor in tensors)


def _lie_alike(*tensors: Tensor) -> bool:
    """Whether tensors have their elements in the same places of a block of memory without gaps."""
    tensor = tensors[0]
    if tensor.layout != torch.strided:
        return False
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous() and all(
        other.shape == tensor.shape and other.stride() == tensor.stride() for other in tensors[1:]
    )
