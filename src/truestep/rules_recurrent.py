"""The rules for recurrent layers and cells, which run through time inside one operation.

The gradients of their gates are not to be seen from outside, so the backward pass replays the layer
(`truestep.recurrence`): about the cost of a further run through time, forward and backward. Of one layer in
one direction it first replays each sample's last step alone, for which its output is enough: where nothing is
zero there, every sample reaches every weight, whatever the other steps are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from truestep.activity import Activity, Elements, Outer
from truestep.bits import Bits, pack
from truestep.errors import TruestepError
from truestep.graph import Node, nodes_between, saved_tensors_are_packed
from truestep.layout import Inside, Layout
from truestep.recurrence import Deltas, Trace, Weights, backward, forward, last_step

__all__ = ["cell", "recurrent"]

Given = Callable[..., dict[str, Activity]]


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
        return (torch.arange(int(sizes[0])) < sizes.unsqueeze(1)).unsqueeze(-1).to(device)

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


def recurrent(
    layout: Layout,
    module: nn.RNN | nn.LSTM | nn.GRU,
    input: Tensor | PackedSequence,
    hx: Any = None,
) -> Given | Inside:
    """`nn.RNN`, `nn.LSTM`, `nn.GRU`: linear maps of the input and of the hidden state, step by step.

    Element (j, k) of ``weight_ih`` needs gradient j of the gates and input k at one time step, of
    ``weight_hh`` gradient j of the hidden part of the gates and hidden state k before that step, of
    ``weight_hr`` gradient j of the projection and unprojected state k; biases need the gradient alone.
    """
    packed, data = None, input
    if isinstance(input, PackedSequence):
        data = input.data
        packed = input._replace(data=data.new_empty(0))
    assert isinstance(data, Tensor)  # noqa: S101
    unbatched = packed is None and data.dim() == 2  # noqa: PLR2004
    layout = replace(layout, batch_dim=None if layout.batch_dim is None else 0)
    sequences = Sequences(layout, module.batch_first, unbatched, packed)
    given = [hx] if isinstance(hx, Tensor) else list(hx or [])
    states = [state.detach() for state in given]
    rest = module, sequences, data.detach(), states
    replay = partial(_replay, *rest, [])
    if module.training and module.dropout > 0 and module.num_layers > 1:

        def see_dropout(outputs: list[Tensor]) -> tuple[Given, list[tuple[Node, Given]]]:
            return partial(_replay, *rest, _dropout(module, sequences, outputs, [data, *given])), []

        return Inside(see_dropout)
    single = module.num_layers == 1 and not (module.bidirectional or module.proj_size)
    if not single or layout.unit != "sample":
        return replay

    def see_ends(outputs: list[Tensor]) -> tuple[Given, list[tuple[Node, Given]]]:
        ends = outputs[0].detach(), outputs[-1].detach()
        versions = [end._version for end in ends]  # noqa: SLF001
        return partial(_first_of, partial(_last_step, *rest, ends, versions), replay), []

    return Inside(see_ends)


def cell(
    layout: Layout,
    module: nn.RNNCell | nn.LSTMCell | nn.GRUCell,
    input: Tensor,
    hx: Any = None,
) -> Given:
    """`nn.RNNCell`, `nn.LSTMCell`, `nn.GRUCell`: one step of the layer of that name."""
    layout = replace(layout, batch_dim=None if layout.batch_dim is None else 0)
    sequences = Sequences(layout, swapped=False, unbatched=False, packed=None)
    rows = input.detach().reshape(1, -1, input.shape[-1])
    given = [hx] if isinstance(hx, Tensor) else list(hx or [])
    states = [state.detach().reshape(1, rows.shape[1], -1) for state in given]
    return partial(_replay_cell, module, sequences, rows, states)


def _replay_cell(
    module: nn.RNNCell | nn.LSTMCell | nn.GRUCell,
    sequences: Sequences,
    input: Tensor,
    states: list[Tensor],
    *deltas: Tensor | None,
) -> dict[str, Activity]:
    match module:
        case nn.RNNCell():
            mode = f"RNN_{module.nonlinearity.upper()}"
        case nn.LSTMCell():
            mode = "LSTM"
        case nn.GRUCell():
            mode = "GRU"
    with _plainly(input.device):
        weights = _weights(module, "")
        source = input.to(weights.weight_ih)
        shape = (1, source.shape[1])
        (h,), (c,) = _states(module, states, *shape)
        trace = forward(mode, weights, source, (h, c))
        ends = [None if delta is None else delta.reshape(*shape, -1) for delta in deltas]
        (dh,), (dc,) = _states(module, ends, *shape)
        gradients = backward(mode, weights, trace, torch.zeros_like(trace.output), (dh, dc))
        return _activity(module, "", sequences, source, trace, gradients)


def _first_of(
    last_step: Callable[..., dict[str, Activity] | None], replay: Given, *deltas: Tensor | None
) -> dict[str, Activity]:
    """What the last step says if that is enough, else what the replay says."""
    found = last_step(*deltas)
    return replay(*deltas) if found is None else found


def _last_step(
    module: nn.RNN | nn.LSTM | nn.GRU,
    sequences: Sequences,
    data: Tensor,
    states: list[Tensor],
    ends: tuple[Tensor, Tensor],
    versions: list[int],
    *deltas: Tensor | None,
) -> dict[str, Activity] | None:
    """The activity of each sample's last step; None if anything is zero there: earlier ones may add to it.

    Args:
        module: the layer, one layer in one direction.
        sequences: how its tensors lie.
        data: its input.
        states: its initial states.
        ends: its output and its last state, c of an LSTM.
        versions: theirs, when it returned; None is returned if they have changed.
        deltas: the gradients of output, h and c.
    """
    mode: str = module.mode
    lstm = mode == "LSTM"
    if [end._version for end in ends] != versions:  # noqa: SLF001
        return None
    with _plainly(data.device):
        weights = _weights(module, "_l0")
        source = sequences.time_first(data).to(weights.weight_ih)
        output = sequences.time_first(ends[0]).to(source)
        active, (length, samples, _) = sequences.active(data.device), source.shape
        each = torch.arange(samples, device=source.device)
        last = torch.full_like(each, length - 1) if active is None else active.sum((0, 2)) - 1
        if lstm and not last.all():
            return None  # a given c may be zero where h is not
        (h,), _ = _states(module, [sequences.states(state) for state in states], 1, samples)
        inputs = source[last, each]
        before = torch.where(last.unsqueeze(1) > 0, output[(last - 1).clamp(min=0), each], h)
        state_deltas = [
            None if delta is None else sequences.states(delta)
            for delta in deltas[-2 if lstm else -1 :]
        ]
        (dh,), (dc,) = _states(module, state_deltas, 1, samples)
        if deltas[0] is not None:
            dh = dh + sequences.time_first(deltas[0]).to(source)[last, each]
        cell = sequences.states(ends[1]).to(source)[0]
        from_input, from_hidden = last_step(mode, weights, inputs, before, cell, dh, dc)
        met = from_input, from_hidden, inputs, before
        if not all(bool(numbers.all()) for numbers in met):
            return None
        from_input, from_hidden, inputs, before = (numbers.unsqueeze(0) for numbers in met)
        gradients = Deltas(inputs, from_input, from_hidden, before)
        trace = Trace(before, before, before, range(1), None, [])
        return _activity(module, "_l0", sequences, inputs, trace, gradients)


def _replay(
    module: nn.RNN | nn.LSTM | nn.GRU,
    sequences: Sequences,
    data: Tensor,
    states: list[Tensor],
    dropout: list[Tensor],
    *deltas: Tensor | None,
) -> dict[str, Activity]:
    """Runs the layers again and goes back through them; `deltas` are those of output, h and c."""
    mode: str = module.mode
    ends = ["", "_reverse"] if module.bidirectional else [""]
    layers = range(module.num_layers)
    found: dict[str, Activity] = {}
    with _plainly(data.device):
        source = sequences.time_first(data).to(next(module.parameters()).detach())
        active = sequences.active(data.device)
        shape = (len(layers) * len(ends), source.shape[1])
        h, c = _states(module, [sequences.states(state) for state in states], *shape)
        runs: list[list[tuple[str, Weights, Tensor, Trace]]] = []
        for layer in layers:
            runs.append([])
            for reverse, end in enumerate(ends):
                suffix, place = f"_l{layer}{end}", layer * len(ends) + reverse
                weights = _weights(module, suffix)
                start = h[place], c[place]
                trace = forward(mode, weights, source, start, active, reverse=bool(reverse))
                runs[-1].append((suffix, weights, source, trace))
            source = torch.cat([trace.output for *_, trace in runs[-1]], -1)
            if layer < len(dropout):
                source = source * dropout[layer]
        output, *last = deltas[0], *deltas[-2 if mode == "LSTM" else -1 :]
        last = [None if delta is None else sequences.states(delta) for delta in last]
        dh, dc = _states(module, last, *shape)
        delta = torch.zeros_like(source)
        if output is not None:
            delta = sequences.time_first(output).to(source)
        for layer in reversed(layers):
            if layer < len(dropout):
                delta = delta * dropout[layer]
            below = []
            parts = delta.chunk(len(ends), -1)
            for reverse, (suffix, weights, source, trace) in enumerate(runs[layer]):
                place = layer * len(ends) + reverse
                states_end = dh[place], dc[place]
                gradients = backward(mode, weights, trace, parts[reverse], states_end)
                found |= _activity(module, suffix, sequences, source, trace, gradients)
                below.append(gradients.input)
            delta = torch.stack(below).sum(0)
    return found


@contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _weights(module: nn.Module, suffix: str) -> Weights:
    found = {each.name: getattr(module, each.name + suffix, None) for each in fields(Weights)}
    detached: dict[str, Any] = {name: p if p is None else p.detach() for name, p in found.items()}
    return Weights(**detached)


def _states(
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


def _activity(
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


def _is_dropout(node: Node) -> bool:
    """Whether a node multiplies by what has no gradient: noise, or a forget gate's initial state."""
    if node.name() != "MulBackward0" or node.next_functions[1][0] is not None:
        return False
    gate: bool = node.next_functions[0][0].name() == "SigmoidBackward0"
    return not gate


def _dropout(
    module: nn.RNN | nn.LSTM | nn.GRU,
    sequences: Sequences,
    outputs: list[Tensor],
    inputs: list[Tensor],
) -> list[Tensor]:
    """What dropout multiplied each layer's output by, ``[time, samples, units]``, but the last's."""
    found = []
    if not saved_tensors_are_packed():
        width = (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
        lead = inputs[0].shape[:-1]
        if sequences.packed is None:
            lead = sequences.time_first(inputs[0]).shape[:-1]
        for node in nodes_between(outputs, inputs):
            if _is_dropout(node):
                noise = node._saved_other  # noqa: SLF001
                if noise is not None and noise.shape == (*lead, width):
                    found.append((node._sequence_nr(), noise))  # noqa: SLF001
    if len(found) != module.num_layers - 1:
        name = type(module).__name__
        raise TruestepError(
            f"the dropout between the layers of nn.{name} does not show in the autograd graph (cuDNN, "
            "frozen lower layers and activation checkpointing hide it); use one "
            f"nn.{name} for each layer with nn.Dropout between them, or dropout=0, or keep its plain "
            f"gradients: SampleCounter(model, unsupported='mean') and rules without nn.{name}"
        )
    masks = [noise for _, noise in sorted(found, key=itemgetter(0))]
    if sequences.packed is not None:
        return [sequences.time_first(noise) for noise in masks]
    return masks
