"""What is computed from a parameter alone, read off the autograd graph: where its elements end up.

Each operation that autograd knows by a node is here in one of the tables, or is unknown.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from truestep.graph import Node

__all__ = ["ELEMENTWISE", "LINKS", "LOOKUPS", "MIXERS", "Part", "signed"]

Step = Callable[[Tensor], Tensor]


def signed(number: int) -> int:
    """A dimension or index as autograd saves it, with its sign."""
    return number if number < 1 << 63 else number - (1 << 64)


@dataclass(frozen=True)
class Part:
    """What one parameter contributes to a tensor that is computed from parameters alone.

    Attributes:
        name: the parameter's.
        origin: its shape.
        shape: the tensor's.
        steps: what was done to the parameter, for tensors of numbers of elements.
        copied: whether that is more than a view.
        mixed: whether any element of the tensor may depend on all of the parameter's.
        sampled: where samples may have come in unseen: what `truestep.rules_bare` needs to count there.
    """

    name: str
    origin: torch.Size
    shape: torch.Size
    steps: tuple[Step, ...] = ()
    copied: bool = False
    mixed: bool = False
    sampled: Any = None

    def then(self, step: Step | None, shape: torch.Size, copied: bool = False) -> "Part":
        """The part of a tensor that is made from this one."""
        steps = self.steps if step is None else (*self.steps, step)
        return replace(self, shape=shape, steps=steps, copied=self.copied or copied)

    def with_samples(self, sampled: Any) -> "Part":
        """The same part with a note of where samples may have come in."""
        return replace(self, sampled=sampled)

    def stirred(self, shape: torch.Size) -> "Part":
        """The part of a tensor each of whose elements may depend on all of this one's."""
        return replace(self, shape=shape, mixed=True)

    def places(self, device: torch.device) -> Tensor:
        """For each element of the tensor that of the parameter, int64 of shape `shape`; -1 for none."""
        numbers = torch.arange(self.origin.numel(), device=device).reshape(self.origin)
        for step in self.steps:
            numbers = step(numbers)
        return numbers

    def strides(self) -> tuple[int, ...] | None:
        """How far apart the parameter's elements lie along each dimension of the tensor, if it is a view.

        None, too, where it does not begin with the parameter's first element.
        """
        if self.copied:
            return None
        seen = base = torch.empty(self.origin, device="meta")
        for step in self.steps:
            seen = step(seen)
        is_view = seen is base or seen._base is base
        return seen.stride() if is_view and seen.storage_offset() == 0 else None

    def in_order(self) -> bool:
        """Whether the tensor has the parameter's elements in their order, each once."""
        if not self.steps:
            return True
        return self.shape.numel() == self.origin.numel() and ordered(self.shape, self.strides())


def ordered(shape: Sequence[int], strides: Sequence[int] | None) -> bool:
    """Whether strides are those of elements that lie one after the other."""
    if strides is None:
        return False
    return all(
        size == 1 or stride == math.prod(shape[axis + 1 :])
        for axis, (size, stride) in enumerate(zip(shape, strides, strict=True))
    )


def _reshape(_node: Node, _nr: int, shape: torch.Size) -> Step:
    return lambda t: t.reshape(shape)


def _expand(_node: Node, _nr: int, shape: torch.Size) -> Step:
    return lambda t: t.expand(shape)


def _permute(node: Node, _nr: int, _shape: torch.Size) -> Step:
    dims = [signed(dim) for dim in node._saved_dims]
    return lambda t: t.permute(dims)


def _transpose(node: Node, _nr: int, _shape: torch.Size) -> Step:
    first, second = signed(node._saved_dim0), signed(node._saved_dim1)
    return lambda t: t.transpose(first, second)


def _slice(node: Node, _nr: int, shape: torch.Size) -> Step:
    dim = signed(node._saved_dim)
    size, step = node._saved_self_sym_sizes[dim], node._saved_step
    start = signed(node._saved_start or 0)
    start = min(max(start + size if start < 0 else start, 0), size)
    index: list[Any] = [slice(None)] * len(shape)
    index[dim] = slice(start, start + step * shape[dim], step)
    return lambda t: t[tuple(index)]


def _select(node: Node, _nr: int, _shape: torch.Size) -> Step:
    dim, index = signed(node._saved_dim), signed(node._saved_index)
    return lambda t: t.select(dim, index)


def _unbind(node: Node, nr: int, _shape: torch.Size) -> Step:
    dim = signed(node._saved_dim)
    return lambda t: t.select(dim, nr)


def _split(node: Node, nr: int, shape: torch.Size) -> Step:
    dim = signed(node._saved_dim)
    start = sum(one.shape[dim] for one in node._input_metadata[:nr])
    return lambda t: t.narrow(dim, start, shape[dim])


def _repeat(node: Node, _nr: int, _shape: torch.Size) -> Step:
    repeats = tuple(node._saved_repeats)
    return lambda t: t.repeat(repeats)


def _index(node: Node, _nr: int, _shape: torch.Size) -> Step:
    index = tuple(slice(None) if one is None else one for one in node._saved_indices)
    return lambda t: t[index]


def _index_select(node: Node, _nr: int, _shape: torch.Size) -> Step:
    dim, index = signed(node._saved_dim), node._saved_index
    return lambda t: t.index_select(dim, index)


def _embedding(node: Node, _nr: int, _shape: torch.Size) -> Step:
    indices, padding = node._saved_indices, signed(node._saved_padding_idx)
    return lambda t: torch.where((indices == padding).unsqueeze(-1), -1, t[indices])


# Views, which put a tensor's elements at other places or leave some out.
LINKS: dict[str, Callable[[Node, int, torch.Size], Step]] = {
    "TBackward0": lambda _node, _nr, _shape: torch.t,
    "TransposeBackward0": _transpose,
    "PermuteBackward0": _permute,
    "ViewBackward0": _reshape,
    "UnsafeViewBackward0": _reshape,
    "ReshapeAliasBackward0": _reshape,
    "UnsqueezeBackward0": _reshape,
    "SqueezeBackward0": _reshape,
    "SqueezeBackward1": _reshape,
    "SqueezeBackward2": _reshape,
    "ExpandBackward0": _expand,
    "SliceBackward0": _slice,
    "SelectBackward0": _select,
    "UnbindBackward0": _unbind,
    "SplitBackward0": _split,
    "SplitWithSizesBackward0": _split,
    "RepeatBackward0": _repeat,
    "IndexBackward0": _index,
    "IndexSelectBackward0": _index_select,
    "EmbeddingBackward0": _embedding,
}
# Those of them that copy.
LOOKUPS = {"RepeatBackward0", "IndexBackward0", "IndexSelectBackward0", "EmbeddingBackward0"}

# Functions of each element alone; where one is flat, the gradient is 0 and a count does not matter.
ELEMENTWISE = {
    "CloneBackward0",
    "ToCopyBackward0",
    "AliasBackward0",
    "NegBackward0",
    "ExpBackward0",
    "Expm1Backward0",
    "LogBackward0",
    "Log1PBackward0",
    "SigmoidBackward0",
    "LogSigmoidBackward0",
    "TanhBackward0",
    "SoftplusBackward0",
    "EluBackward0",
    "GeluBackward0",
    "SiluBackward0",
    "ReluBackward0",
    "AbsBackward0",
    "ClampBackward1",
    "ClampMinBackward0",
    "ClampMaxBackward0",
    "HardtanhBackward0",
    "HardsigmoidBackward0",
    "PowBackward0",
    "SqrtBackward0",
    "RsqrtBackward0",
    "ReciprocalBackward0",
    "SinBackward0",
    "CosBackward0",
    "ErfBackward0",
    "AtanBackward0",
    "RsubBackward1",
    "AddBackward1",
    "SubBackward1",
    "MulBackward1",
    "DivBackward1",
}

# Operations each of whose results may depend on all elements: what reaches any reaches all.
MIXERS = {
    "SoftmaxBackward0",
    "LogSoftmaxBackward0",
    "LogsumexpBackward0",
    "LinalgVectorNormBackward0",
    "NormBackward0",
    "NormBackward1",
    "SumBackward0",
    "SumBackward1",
    "MeanBackward0",
    "MeanBackward1",
    "VarBackward0",
    "VarMeanBackward0",
    "StdBackward0",
    "StdMeanBackward0",
    "CumsumBackward0",
    "WeightNormInterfaceBackward0",
    "NativeLayerNormBackward0",
    "MmBackward0",
    "AddmmBackward0",
    "BmmBackward0",
    "MvBackward0",
    "DotBackward0",
}
