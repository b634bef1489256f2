"""The operations at which parameters meet data, as autograd's nodes show them."""

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from truestep.derived import signed
from truestep.graph import Node

__all__ = ["FACTORS", "PRODUCTS", "lead", "placed", "region", "whole"]

# Operations on elements: by operand, where the gradient is passed on, if not everywhere.
FACTORS: dict[str, dict[int, Callable[[Node], Tensor]]] = {
    "AddBackward0": {},
    "SubBackward0": {},
    "RsubBackward0": {},
    "MulBackward0": {0: lambda node: node._saved_other, 1: lambda node: node._saved_self},
    "DivBackward0": {1: lambda node: node._saved_self},
    "AddcmulBackward0": {1: lambda node: node._saved_tensor2, 2: lambda node: node._saved_tensor1},
    "WhereBackward0": {
        0: lambda node: node._saved_condition,
        1: lambda node: ~node._saved_condition,
    },
    "PreluKernelBackward0": {1: lambda node: node._saved_self < 0},
    "NativeLayerNormBackward0": {1: lambda node: node._saved_input - node._saved_result1},
    "CatBackward0": {},
    "StackBackward0": {},
}
# Products: which operands are multiplied, and what their node calls them.
PRODUCTS = {
    "MmBackward0": {0: "_saved_self", 1: "_saved_mat2"},
    "BmmBackward0": {0: "_saved_self", 1: "_saved_mat2"},
    "MvBackward0": {0: "_saved_self", 1: "_saved_vec"},
    "AddmmBackward0": {1: "_saved_mat1", 2: "_saved_mat2"},
}
VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}


def lead(
    node: Node, rows: int, user: Node | None, dim: int, sizes: Collection[int]
) -> tuple[int, ...]:
    """How the rows of a product were laid out before they were flattened for it.

    Args:
        node: a product's.
        rows: how many there are.
        user: the node of the operation on the product.
        dim: the dimension of samples.
        sizes: how many samples there may be; empty where nothing shows it.
    """
    if set(sizes) == {1}:
        return (rows, 1) if dim == 1 else (1, rows)
    if rows > 0 and user is not None and user.name() in VIEWS:
        viewed = torch.Size(user._input_metadata[0].shape)
        total = torch.Size(node._input_metadata[0].shape).numel()
        for end in range(1, len(viewed) + 1):
            if viewed[:end].numel() == rows and viewed[end:].numel() == total // rows:
                holds = end > dim and viewed[dim] in sizes
                if holds or rows not in sizes:
                    return tuple(viewed[:end])
    return (rows,)


def region(node: Node, index: int) -> Callable[[Tensor], Tensor] | None:
    """What an operand gets of the gradient of an operation's output; None if the graph does not show it."""
    if node.name() == "StackBackward0":
        return partial(torch.select, dim=signed(node._saved_dim), index=index)
    if node.name() != "CatBackward0":
        return whole
    dim = signed(node._saved_dim)
    sizes = [_size(edge, dim) for edge in node.next_functions]
    total = node._input_metadata[0].shape[dim]
    if sizes.count(None) == 1:
        sizes[sizes.index(None)] = total - sum(filter(None, sizes))
    before, size, after = sizes[:index], sizes[index], sizes[index + 1 :]
    if size is None or (None in before and None in after):
        return None
    start = sum(filter(None, before))
    if None in before:
        start = total - size - sum(filter(None, after))
    return partial(torch.narrow, dim=dim, start=start, length=size)


def placed(
    node: Node, shape: torch.Size, cut: Callable[[Tensor], Tensor]
) -> tuple[Callable[[Tensor], Tensor], torch.Size, bool]:
    """Brings an operand's numbers of elements to the shape of an operation's output.

    Args:
        node: the operation's.
        shape: of its output.
        cut: what the operand gets of it.

    Returns:
        How, that shape, and whether it copies.
    """
    if node.name() not in {"StackBackward0", "CatBackward0"}:
        return lambda numbers: numbers.expand(shape), shape, False

    def place(numbers: Tensor) -> Tensor:
        result = numbers.new_full(shape, -1)
        cut(result).copy_(numbers)
        return result

    return place, shape, True


def whole(tensor: Tensor) -> Tensor:
    """All of it."""
    return tensor


def _size(edge: tuple[Node, int], dim: int) -> int | None:
    node, number = edge
    if node is None:
        return None
    variable = getattr(node, "variable", None)
    shape = node._input_metadata[number].shape if variable is None else variable.shape
    size: int = shape[dim]
    return size
