"""The rules for convolutions."""

import functools
from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from truestep.activity import Activity, Elements, Outer, Window
from truestep.bits import pack
from truestep.layout import Layout, as_read

__all__ = ["CONVOLUTIONS", "convolution", "transposed_convolution", "window_of"]


def convolution(
    layout: Layout,
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    input: Tensor,
) -> Callable[[Tensor], dict[str, Activity]]:
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: a linear map at each output position, any position counts."""
    rank, weight, bias = len(module.kernel_size), module.weight, module.bias
    inputs, size = None, tuple(input.shape[-rank:])
    if weight.requires_grad:
        inputs = pack(_channels_last(as_read(input), rank, layout.batch_dim))

    def activity(delta: Tensor) -> dict[str, Activity]:
        outputs = pack(_channels_last(delta, rank, layout.batch_dim))
        found: dict[str, Activity] = {}
        if inputs is not None:
            window = window_of(module, size, tuple(delta.shape[-rank:]), layout)
            found["weight"] = Outer(weight.shape, outputs, inputs, window)
        if bias is not None and bias.requires_grad:
            ends = outputs.apart() if layout.unit == "position" else outputs.any_position()
            found["bias"] = Elements(bias.shape, ends)
        return found

    return activity


def _padding_of(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """As `torch.nn.functional.pad` takes it, of what the module's `forward` looks at."""
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        return tuple(module._reversed_padding_repeated_twice)  # noqa: SLF001
    return tuple(size for size in reversed(padding) for _ in range(2))


def window_of(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    size: tuple[int, ...],
    positions: tuple[int, ...],
    layout: Layout,
) -> Window:
    """How a convolution looks at its input.

    Args:
        module: the convolution.
        size: spatial shape of the input.
        positions: spatial shape of the output.
        layout: of the call.
    """
    return _window(
        size=size,
        positions=positions,
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        dilation=tuple(module.dilation),
        padding=_padding_of(module),
        padding_mode="constant" if module.padding_mode == "zeros" else module.padding_mode,
        channels=module.in_channels,
        groups=module.groups,
        by_position=layout.unit == "position",
    )


# Made once: every call of a layer on images of one size has the same.
_window = functools.lru_cache(maxsize=256)(Window)


def _channels_last(images: Tensor, rank: int, batch_dim: int | None) -> Tensor:
    """Images as ``[samples, positions, channels]``.

    Positions are kept apart: the kernel's view of the input is only laid out when counts are wanted.
    """
    if batch_dim == 0 and images.dim() == rank + 2:
        return images.flatten(2).transpose(1, 2)
    return Layout(batch_dim).arrange(images.movedim(-rank - 1, -1))


def transposed_convolution(
    layout: Layout,
    module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
    input: Tensor,
    output_size: list[int] | None = None,
) -> Callable[[Tensor], dict[str, Activity]]:
    """`nn.ConvTranspose1d` to `3d`: a convolution with input and output gradient in changed places."""
    del output_size
    rank = len(module.kernel_size)
    inputs, positions = None, tuple(input.shape[-rank:])
    if module.weight.requires_grad:
        inputs = pack(_channels_last(as_read(input), rank, layout.batch_dim))

    def activity(delta: Tensor) -> dict[str, Activity]:
        outputs = pack(_channels_last(delta, rank, layout.batch_dim))
        found: dict[str, Activity] = {}
        if inputs is not None:
            padding = cast("tuple[int, ...]", module.padding)  # a transposed one takes no string
            window = _window(
                size=tuple(delta.shape[-rank:]),
                positions=positions,
                kernel=tuple(module.kernel_size),
                stride=tuple(module.stride),
                dilation=tuple(module.dilation),
                padding=tuple(side for side in reversed(padding) for _ in range(2)),
                padding_mode="constant",
                channels=module.out_channels,
                groups=module.groups,
                by_position=layout.unit == "position",
            )
            found["weight"] = Outer(module.weight.shape, inputs, outputs, window, transposed=True)
        if module.bias is not None and module.bias.requires_grad:
            ends = outputs.apart() if layout.unit == "position" else outputs.any_position()
            found["bias"] = Elements(module.bias.shape, ends)
        return found

    return activity


CONVOLUTIONS = (convolution, transposed_convolution)
