"""Two models beside each other: sizes, speed, and how far their outputs are apart."""

import io
import itertools
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from truestep.nodes import DummyNodes, Forward, call_model, size_of
from truestep.units import tensors_in

__all__ = ["Size", "largest_difference", "measure", "outputs_differ"]

ROUNDS = 15
SECONDS = 2.0  # at most, for the timing


@dataclass
class Size:
    """How large a model is.

    Attributes:
        parameters: how many numbers are in its parameters; tied ones once.
        flops: floating point operations of a forward call on the example input.
        seconds: median time of such a call.
        bytes: of its saved state_dict.
    """

    parameters: int = 0
    flops: int = 0
    seconds: float = 0.0
    bytes: int = 0


def measure(
    large: nn.Module, small: nn.Module, example_input: Any, forward: Forward | None
) -> tuple[Size, Size]:
    """The sizes of two models; calls are timed in turns, so that both see the same machine.

    Args:
        large: one model.
        small: the other.
        example_input: a batch.
        forward: how the models are called on it.
    """
    sizes = [_size(model, example_input, forward) for model in (large, small)]
    times: tuple[list[float], list[float]] = ([], [])
    begun = time.perf_counter()
    with torch.no_grad():
        for round_number in itertools.count():
            for model, spent in zip((large, small), times, strict=True):
                start = time.perf_counter()
                call_model(model, example_input, forward)
                spent.append(time.perf_counter() - start)
            if round_number >= ROUNDS or time.perf_counter() - begun > SECONDS:
                break
    for size, spent in zip(sizes, times, strict=True):
        size.seconds = statistics.median(spent[1:] or spent)
    return sizes[0], sizes[1]


def _size(model: nn.Module, example_input: Any, forward: Forward | None) -> Size:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call_model(model, example_input, forward)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(parameters, counter.get_total_flops(), 0.0, stream.tell())


def largest_difference(
    large: nn.Module, small: nn.Module, nodes: DummyNodes, example_input: Any
) -> tuple[float, float, int]:
    """How far two models' outputs are apart on the data.

    Args:
        large: one model.
        small: the other.
        nodes: with the data; where that can be gone through only once, the example input stands for it.
        example_input: a batch.

    Returns:
        The largest difference, the largest magnitude of the first model's outputs, and the samples seen.
    """
    once = isinstance(nodes.loader, Iterator)
    if once:
        warnings.warn(
            "the data can be gone through only once, so that the small model is compared on the example "
            "input alone; give find_dummy_nodes a list or a DataLoader",
            stacklevel=3,
        )
    difference = largest = 0.0
    samples = 0
    with torch.no_grad():
        for batch in [example_input] if once else nodes.loader:
            outputs = [call_model(model, batch, nodes.forward) for model in (large, small)]
            for one, other in zip(*map(_numbers, outputs), strict=True):
                if one.numel():
                    difference = max(difference, _distance(one, other))
                    finite = one[one.isfinite()]
                    largest = max(largest, float(finite.abs().max()) if len(finite) else 0.0)
            samples += size_of(batch, nodes.batch_dim)
    return difference, largest, samples


def outputs_differ(one: Any, other: Any) -> bool:
    """Whether two outputs differ in any number."""
    return any(
        _distance(a, b) != 0
        for a, b in zip(_numbers(one), _numbers(other), strict=True)
        if a.numel()
    )


def _numbers(output: Any) -> list[Tensor]:
    found = [tensor.detach() for tensor in tensors_in(output)]
    return [torch.view_as_real(t) if t.is_complex() else t for t in found]


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference; equal where both are the same infinity or both are nan."""
    if one.shape != other.shape:
        return float("inf")
    a, b = one.double(), other.double()
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
    return float(gap.max())
