"""Recurrent layers' tensors as `truestep.recurrence` takes them, and as activity what it finds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from truestep.activity import Activity, Elements, Outer
from truestep.bits import Bits, pack
from truestep.layout import Layout
from truestep.recurrence import Deltas, Trace, Weights

__all__ = ["Sequences", "activity_of", "plainly", "states_of", "weights_of"]


@dataclass(frozen=True)
class Sequences:
    """How a recurrent layer's input and output lay their samples out.

    Attributes:
        layout: of tensors ``[samples, time, units]``.
        swapped: samples come before time.
        unbatched: there is one sample, without a dimension of its own.
        packed: the lengths and the order of packed sequences; its data is not kept.
    """

    layout: Layout
    swapped: bool
    unbatched: bool
    packed: PackedSequence | None

    def time_first(self, tensor: Tensor) -> Tensor:
        """``[time, samples, units]``; the samples of packed sequences in their sorted order."""
        if self.packed is not None:
            return pad_packed_sequence(PackedSequence(tensor, self.packed.batch_sizes))[0]
        if self.unbatched:
            return tensor.unsqueeze(1)
        return tensor.transpose(0, 1) if self.swapped else tensor

    def states(self, tensor: Tensor) -> Tensor:
        """``[layers, samples, units]``, samples in the order of `time_first`."""
        if self.unbatched:
            return tensor.unsqueeze(1)
        if self.packed is None or self.packed.sorted_indices is None:
            return tensor
        return tensor.index_select(1, self.packed.sorted_indices)

    def active(self, device: torch.device) -> Tensor | None:
        """Bool ``[time, samples, 1]``: the steps that a sample has; None for all."""
        if self.packed is None:
            return None
        sizes = self.packed.batch_sizes
        steps = torch.arange(int(sizes[0]), device="cpu")
        return (steps < sizes.unsqueeze(1)).unsqueeze(-1).to(device)

    def pack(self, values: Tensor) -> Bits:
        """The bits of ``[time, samples, units]``."""
        active = self.active(values.device)
        if active is not None and self.layout.unit == "position":
            # the positions that there are, in the order in which packed sequences have them
            return pack(values[active.squeeze(-1)])
        if self.packed is not None and self.packed.unsorted_indices is not None:
            values = values.index_select(1, self.packed.unsorted_indices)
        values = values[0] if len(values) == 1 else values.transpose(0, 1)
        return pack(self.layout.arrange(values))


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Without gradients, in the parameters' own precision."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def weights_of(module: nn.Module, suffix: str) -> Weights:
    """The parameters of one layer in one direction, detached."""
    found = {each.name: getattr(module, each.name + suffix, None) for each in fields(Weights)}
    detached: dict[str, Any] = {name: p if p is None else p.detach() for name, p in found.items()}
    return Weights(**detached)


def states_of(
    module: Any, given: Sequence[Tensor | None], count: int, samples: int
) -> tuple[Tensor, Tensor]:
    """h and c ``[count, samples, hidden]``, or their gradients: zeros where there are none."""
    like = next(module.parameters()).detach()
    hidden = module.hidden_size
    h, c = (
        like.new_zeros(count, samples, width) if state is None else state.to(like)
        for width, state in zip(
            (getattr(module, "proj_size", 0) or hidden, hidden), (*given, None, None), strict=False
        )
    )
    return h, c


def activity_of(
    module: nn.Module,
    suffix: str,
    sequences: Sequences,
    source: Tensor,
    trace: Trace,
    deltas: Deltas,
) -> dict[str, Activity]:
    """The activity of one layer's parameters in one direction."""
    parts = {
        "weight_ih": (deltas.input_gates, source),
        "bias_ih": (deltas.input_gates, None),
        "weight_hh": (deltas.hidden_gates, trace.before),
        "bias_hh": (deltas.hidden_gates, None),
        "weight_hr": (deltas.projected, trace.inner),
    }
    found: dict[str, Activity] = {}
    for name, (delta, inputs) in parts.items():
        parameter = getattr(module, name + suffix, None)
        if parameter is None or not parameter.requires_grad:
            continue
        outputs = sequences.pack(delta)
        if inputs is None:
            found[name + suffix] = Elements(parameter.shape, outputs.any_position())
        else:
            found[name + suffix] = Outer(parameter.shape, outputs, sequences.pack(inputs))
    return found
