"""The rules for recurrent layers and cells, which run through time inside one operation.

The gradients of their gates are not to be seen from outside, so the backward pass replays the layer
(`truestep.recurrence`): about the cost of a further run through time, forward and backward. Where that is
enough, it replays each sample's last step alone (`truestep.last_steps`).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from truestep.activity import Activity
from truestep.errors import TruestepError
from truestep.graph import Node, nodes_between, saved_tensors_are_packed
from truestep.last_steps import has_last_steps, last_steps
from truestep.layout import Inside, Layout
from truestep.recurrence import Trace, Weights, backward, forward
from truestep.sequences import Sequences, activity_of, plainly, states_of, weights_of

__all__ = ["cell", "recurrent"]

Given = Callable[..., dict[str, Activity]]


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
    if layout.unit != "sample" or layout.batch_dim is None or not has_last_steps(module):
        return replay

    def see_ends(outputs: list[Tensor]) -> tuple[Given, list[tuple[Node, Given]]]:
        ends = outputs[0].detach(), outputs[-1].detach()
        versions = [end._version for end in ends]  # noqa: SLF001
        return partial(_first_of, partial(last_steps, *rest, ends, versions), replay), []

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
    states = [state.detach().reshape(1, rows.shape[1], state.shape[-1]) for state in given]
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
    with plainly(input.device):
        weights = weights_of(module, "")
        source = input.to(weights.weight_ih)
        shape = (1, source.shape[1])
        (h,), (c,) = states_of(module, states, *shape)
        trace = forward(mode, weights, source, (h, c))
        ends = [
            None if delta is None else delta.reshape(*shape, delta.shape[-1]) for delta in deltas
        ]
        (dh,), (dc,) = states_of(module, ends, *shape)
        gradients = backward(mode, weights, trace, torch.zeros_like(trace.output), (dh, dc))
        return activity_of(module, "", sequences, source, trace, gradients)


def _first_of(
    last_step: Callable[..., dict[str, Activity] | None], replay: Given, *deltas: Tensor | None
) -> dict[str, Activity]:
    """What the last step says if that is enough, else what the replay says."""
    found = last_step(*deltas)
    return replay(*deltas) if found is None else found


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
    with plainly(data.device):
        source = sequences.time_first(data).to(next(module.parameters()).detach())
        active = sequences.active(data.device)
        shape = (len(layers) * len(ends), source.shape[1])
        h, c = states_of(module, [sequences.states(state) for state in states], *shape)
        runs: list[list[tuple[str, Weights, Tensor, Trace]]] = []
        for layer in layers:
            runs.append([])
            for reverse, end in enumerate(ends):
                suffix, place = f"_l{layer}{end}", layer * len(ends) + reverse
                weights = weights_of(module, suffix)
                start = h[place], c[place]
                trace = forward(mode, weights, source, start, active, reverse=bool(reverse))
                runs[-1].append((suffix, weights, source, trace))
            source = torch.cat([trace.output for *_, trace in runs[-1]], -1)
            if layer < len(dropout):
                source = source * dropout[layer]
        output, *last = deltas[0], *deltas[-2 if mode == "LSTM" else -1 :]
        last = [None if delta is None else sequences.states(delta) for delta in last]
        dh, dc = states_of(module, last, *shape)
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
                found |= activity_of(module, suffix, sequences, source, trace, gradients)
                below.append(gradients.input)
            delta = torch.stack(below).sum(0)
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
