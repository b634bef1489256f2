"""What a recurrent layer's last steps alone say: mostly that every sample reaches every weight.

A step's gradients need what was before it, which the layer's output holds. Of the last step that a sample's
gradient reaches no later one adds to them, so one step forward and back tells where they are zero.
"""

import torch
from torch import Tensor, nn

from truestep.activity import Activity
from truestep.placed import everything
from truestep.recurrence import last_step, output_of
from truestep.sequences import Sequences, plainly, states_of, weights_of

__all__ = ["has_last_steps", "last_steps"]


def has_last_steps(module: nn.RNN | nn.LSTM | nn.GRU) -> bool:
    """Whether a layer's output holds what its last steps need, or one more run of the layers below does.

    Several layers in both directions go on to earlier steps, and projections hide what they project.
    """
    return not (module.proj_size or (module.num_layers > 1 and module.bidirectional))


def last_steps(
    module: nn.RNN | nn.LSTM | nn.GRU,
    sequences: Sequences,
    data: Tensor,
    states: list[Tensor],
    ends: tuple[Tensor, Tensor],
    versions: list[int],
    *deltas: Tensor | None,
) -> dict[str, Activity] | None:
    """The activity of each sample's last step; None if anything is zero there: earlier ones may add to it.

    Backwards in time the last step is the first. Below the topmost layer its gradient is the layer above's.

    Args:
        module: a layer that `has_last_steps`.
        sequences: how its tensors lie.
        data: its input.
        states: its initial states.
        ends: its output and its last states, c of an LSTM.
        versions: theirs, when it returned; None is returned if they have changed.
        deltas: the gradients of output, h and c.
    """
    mode, directions = module.mode, 2 if module.bidirectional else 1
    if [end._version for end in ends] != versions:  # noqa: SLF001
        return None
    with plainly(data.device):
        source = sequences.time_first(data).to(next(module.parameters()).detach())
        output = sequences.time_first(ends[0]).to(source)
        (length, samples, _), each = source.shape, torch.arange(source.shape[1], device=data.device)
        shape = module.num_layers * directions, samples
        h, c = states_of(module, [sequences.states(state) for state in states], *shape)
        last = deltas[-2:] if mode == "LSTM" else deltas[-1:]
        given = [None if delta is None else sequences.states(delta) for delta in last]
        dh, dc = (list(state) for state in states_of(module, given, *shape))
        delta = torch.zeros_like(output)
        if deltas[0] is not None:
            delta = sequences.time_first(deltas[0]).to(source)
        active = sequences.active(data.device)
        final = torch.full_like(each, length - 1) if active is None else active.sum((0, 2)) - 1
        finals, parts = [final, torch.zeros_like(final)], delta.chunk(directions, -1)
        to_states = torch.cat([*dh, *dc], -1).any(-1)
        steps = [
            torch.where(to_states, finals[direction], _last_on(part.any(-1), final, direction))
            for direction, part in enumerate(parts)
        ]
        for direction, part in enumerate(parts):
            place = direction - directions
            dh[place] = dh[place] + part[steps[direction], each]
        inputs = [source]
        for layer in range(module.num_layers - 1):
            start = h[layer], c[layer]
            inputs.append(output_of(mode, weights_of(module, f"_l{layer}"), inputs[-1], start))
        outputs, cells = [*inputs[1:], output], sequences.states(ends[1]).to(source)
        for place in reversed(range(shape[0])):
            layer, direction = divmod(place, directions)
            weights = weights_of(module, f"_l{layer}{'_reverse' if direction else ''}")
            own, step = outputs[layer].chunk(directions, -1)[direction], steps[direction]
            before = step + 1 if direction else step - 1
            begins = ((before < 0) | (before > final)).unsqueeze(1)
            hidden = own[before.clamp(0, length - 1), each]
            h_before = torch.where(begins, h[place], hidden)
            # Where h is not zero, neither is an LSTM's c: h = o tanh(c).
            c_before = torch.where(begins, c[place], hidden)
            ended = (step == finals[direction]).unsqueeze(1)
            x = inputs[layer][step, each]
            after = own[step, each], cells[place], ended
            met = last_step(mode, weights, x, (h_before, c_before), after, (dh[place], dc[place]))
            if not all(bool(numbers.all()) for numbers in (*met, x, h_before)):
                return None
            if layer > 0:
                dh[place - 1] = dh[place - 1] + met[0] @ weights.weight_ih
        every = torch.ones_like(each, dtype=torch.bool)
    return {
        name: everything(parameter.shape, every)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    }


def _last_on(on: Tensor, final: Tensor, direction: int) -> Tensor:
    """Each sample's last step that is on, by its direction in time; int64 ``[samples]``.

    Args:
        on: bool ``[time, samples]``.
        final: each sample's last time step.
        direction: 0, or 1 for backwards.
    """
    if direction:
        return torch.minimum(on.int().argmax(0), final)
    return torch.minimum(len(on) - 1 - on.flip(0).int().argmax(0), final)
