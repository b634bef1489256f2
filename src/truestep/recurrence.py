"""Recurrent layers replayed in plain operations, for the gradients of their gates at every time step.

Tensors are time first: ``[time, samples, units]``. Nothing here knows of samples that contribute; the
functions are the textbook's, forward and backward through time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["CELLS", "Deltas", "Trace", "Weights", "backward", "forward", "last_step", "output_of"]


@dataclass(frozen=True)
class Weights:
    """One layer's parameters in one direction, as torch names them; None where it has none."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None = None


@dataclass(frozen=True)
class Deltas:
    """What reaches the parameters of one layer in one direction, ``[time, samples, units]`` each.

    Attributes:
        input: gradient of the layer's input.
        input_gates: gradient of ``weight_ih x + bias_ih``.
        hidden_gates: gradient of ``weight_hh h + bias_hh``.
        projected: gradient of ``weight_hr h``; without a projection of the hidden state itself.
    """

    input: Tensor
    input_gates: Tensor
    hidden_gates: Tensor
    projected: Tensor


# A cell's step: (input gates, hidden gates, h, c) to (h, c, what its backward step needs).
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, tuple[Tensor, ...]]]
# (gradient of h, gradient of c, what was kept) to the gradients of the input gates, of the hidden gates,
# of the h before (but through the hidden gates) and of the c before.
BackwardStep = Callable[
    [Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor, Tensor | None, Tensor]
]


@dataclass(frozen=True)
class Trace:
    """A layer's run in one direction.

    Attributes:
        output: ``[time, samples, hidden]``.
        before: the hidden states that each step started from.
        inner: the hidden states before the projection.
        order: the time steps in the order in which they were taken.
        active: bool ``[time, samples, 1]``, the steps that a sample has; None for all.
        kept: for each time step, what its backward step needs.
    """

    output: Tensor
    before: Tensor
    inner: Tensor
    order: range
    active: Tensor | None
    kept: list[tuple[Tensor, ...]] = field(repr=False)


def forward(
    mode: str,
    weights: Weights,
    input: Tensor,
    state: tuple[Tensor, Tensor],
    active: Tensor | None = None,
    *,
    reverse: bool = False,
) -> Trace:
    """Runs one layer in one direction.

    Args:
        mode: a key of `CELLS`, as torch's own `RNNBase.mode`.
        weights: the layer's.
        input: ``[time, samples, inputs]``.
        state: h and c to start from, ``[samples, hidden]``; c is passed over by cells without one.
        active: see `Trace`.
        reverse: from the last time step to the first.
    """
    step, _ = CELLS[mode]
    gates = torch.nn.functional.linear(input, weights.weight_ih, weights.bias_ih)
    h, c = state
    length = len(input)
    order = range(length)[::-1] if reverse else range(length)
    befores, inners, outputs = [h] * length, [h] * length, [h] * length
    kept: list[tuple[Tensor, ...]] = [()] * length
    for time in order:
        befores[time] = h
        hidden = torch.nn.functional.linear(h, weights.weight_hh, weights.bias_hh)
        inner, cell, kept[time] = step(gates[time], hidden, h, c)
        new = inner if weights.weight_hr is None else inner @ weights.weight_hr.T
        inners[time] = inner
        if active is not None:
            new, cell = torch.where(active[time], new, h), torch.where(active[time], cell, c)
        outputs[time] = h = new
        c = cell
    stacks = [torch.stack(states) for states in (outputs, befores, inners)]
    return Trace(stacks[0], stacks[1], stacks[2], order, active, kept)


def backward(
    mode: str, weights: Weights, trace: Trace, delta: Tensor, last: tuple[Tensor, Tensor]
) -> Deltas:
    """Backpropagation through time.

    Args:
        mode: as of the run.
        weights: as of the run.
        trace: the run.
        delta: the output's gradient, ``[time, samples, hidden]``, 0 at steps that a sample does not have.
        last: the gradients of the last h and c.
    """
    _, step = CELLS[mode]
    dh, dc = last
    input_gates: list[Tensor] = [dh] * len(delta)
    hidden_gates, projected = list(input_gates), list(input_gates)
    for time in reversed(trace.order):
        dh = dh + delta[time]
        projected[time] = dh
        inner = dh if weights.weight_hr is None else dh @ weights.weight_hr
        from_input, from_hidden, direct, dc_before = step(inner, dc, trace.kept[time])
        dh_before = from_hidden @ weights.weight_hh
        if direct is not None:
            dh_before = dh_before + direct
        if trace.active is not None:
            on = trace.active[time]
            zero = torch.zeros_like(from_input)
            from_input = torch.where(on, from_input, zero)
            from_hidden = torch.where(on, from_hidden, zero)
            projected[time] = torch.where(on, dh, torch.zeros_like(dh))
            dh_before, dc_before = torch.where(on, dh_before, dh), torch.where(on, dc_before, dc)
        input_gates[time], hidden_gates[time] = from_input, from_hidden
        dh, dc = dh_before, dc_before
    gates = torch.stack(input_gates)
    return Deltas(
        gates @ weights.weight_ih, gates, torch.stack(hidden_gates), torch.stack(projected)
    )


def output_of(mode: str, weights: Weights, input: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    """The output of `forward`, by torch's own operation where that takes a layer's weights by themselves.

    Args:
        mode: as of the run.
        weights: as of the run, without a projection.
        input: ``[time, samples, inputs]``.
        state: h and c to start from, ``[samples, hidden]``.
    """
    if not input.is_cpu:  # cuDNN wants the weights of all layers in one piece
        return forward(mode, weights, input, state).output
    h, c = (each.unsqueeze(0) for each in state)
    every = weights.weight_ih, weights.weight_hh, weights.bias_ih, weights.bias_hh
    flat = [each for each in every if each is not None]
    # (layers=1, dropout=0, training=False, bidirectional=False, batch_first=False)
    rest = flat, len(flat) == len(every), 1, 0.0, False, False, False
    output: Tensor = getattr(torch, mode.lower())(input, (h, c) if mode == "LSTM" else h, *rest)[0]
    return output


def last_step(
    mode: str,
    weights: Weights,
    input: Tensor,
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor, Tensor],
    deltas: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Where the gradients of a step's gates are not zero, from what is known after the run.

    Args:
        mode: as of the run.
        weights: as of the run, without a projection.
        input: ``[samples, inputs]``.
        before: h and an LSTM's c before the step, ``[samples, hidden]``; of c it matters where it is zero.
        after: h after it; an LSTM's c after the run; bool ``[samples, 1]``: whether this was its last step.
        deltas: the gradients of h and c after it.

    Returns:
        Numbers that are zero where the gradients are, of the input gates and of the hidden gates; or where
        it cannot be told.
    """
    step, back = CELLS[mode]
    gates = torch.nn.functional.linear(input, weights.weight_ih, weights.bias_ih)
    hidden = torch.nn.functional.linear(before[0], weights.weight_hh, weights.bias_hh)
    _, _, kept = step(gates, hidden, *before)
    if mode == "LSTM":
        h, c, ended = after
        # h = o tanh(c), rounded: that tanh(c) is not 1 has to be beyond doubt.
        squashed = h / kept[3]
        sure = squashed.abs() < 1 - 16 * torch.finfo(h.dtype).eps
        squashed = torch.where(ended, torch.tanh(c), squashed.masked_fill(~sure, 1.0))
        kept = *kept[:-1], squashed
    from_input, from_hidden, _, _ = back(*deltas, kept)
    return from_input, from_hidden


def _tanh(x: Tensor, a: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    new = torch.tanh(x + a)
    return new, c, (new,)


def _tanh_backward(
    dh: Tensor, dc: Tensor, kept: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    gates = dh * (1 - kept[0] * kept[0])
    return gates, gates, None, dc


def _relu(x: Tensor, a: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    new = torch.relu(x + a)
    return new, c, (new,)


def _relu_backward(
    dh: Tensor, dc: Tensor, kept: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    gates = dh * (kept[0] > 0)
    return gates, gates, None, dc


def _lstm(x: Tensor, a: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    i, f, g, o = (x + a).chunk(4, -1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    new = f * c + i * g
    squashed = torch.tanh(new)
    return o * squashed, new, (i, f, g, o, c, squashed)


def _lstm_backward(
    dh: Tensor, dc: Tensor, kept: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    i, f, g, o, c, squashed = kept
    dc = dc + dh * o * (1 - squashed * squashed)
    gates = torch.cat(
        [
            dc * g * i * (1 - i),
            dc * c * f * (1 - f),
            dc * i * (1 - g * g),
            dh * squashed * o * (1 - o),
        ],
        -1,
    )
    return gates, gates, None, dc * f


def _gru(x: Tensor, a: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    (xr, xz, xn), (ar, az, an) = x.chunk(3, -1), a.chunk(3, -1)
    r, z = torch.sigmoid(xr + ar), torch.sigmoid(xz + az)
    n = torch.tanh(xn + r * an)
    return (h - n) * z + n, c, (r, z, n, an, h)


def _gru_backward(
    dh: Tensor, dc: Tensor, kept: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    r, z, n, an, h = kept
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h - n) * z * (1 - z)
    dr = dn * an * r * (1 - r)
    # The reset gate stands between the hidden part of the candidate and the candidate.
    return torch.cat([dr, dz, dn], -1), torch.cat([dr, dz, dn * r], -1), dh * z, dc


CELLS: dict[str, tuple[Step, BackwardStep]] = {
    "RNN_TANH": (_tanh, _tanh_backward),
    "RNN_RELU": (_relu, _relu_backward),
    "LSTM": (_lstm, _lstm_backward),
    "GRU": (_gru, _gru_backward),
}
