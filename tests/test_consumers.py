import pytest
import torch
from torch import nn
from torch.nn import functional

import truestep
from truestep.consumers import bypassed


def use(layer, x):
    output = layer(x)
    return output, ([output.grad_fn], [x])


def names(*layers):
    model = nn.ModuleList(layers)
    return {parameter: name for name, parameter in model.named_parameters()}


def test_called_layers_bypass_nothing():
    first, second = nn.Linear(2, 3), nn.Linear(3, 2)
    hidden, one = use(first, torch.ones(4, 2))
    output, two = use(second, torch.relu_(hidden))  # in place, after the layer has returned
    assert bypassed([output], [one, two], names(first, second)) == []


def test_a_layer_that_was_not_called_is_found_behind_one_that_was():
    first, second = nn.Linear(2, 3), nn.Linear(3, 2)
    hidden = functional.linear(torch.ones(4, 2), first.weight, first.bias)
    output, two = use(second, hidden)
    assert set(bypassed([output], [two], names(first, second))) == {"0.weight", "0.bias"}


def test_a_parameter_given_to_a_layer_as_input_is_found():
    token, layer = nn.Parameter(torch.ones(1, 2)), nn.Linear(2, 3)
    output, one = use(layer, token)
    assert bypassed([output], [one], {token: "token", **names(layer)}) == ["token"]


def test_a_second_use_past_a_called_layer_is_found():
    layer = nn.Linear(2, 2)
    output, one = use(layer, torch.ones(1, 2))
    assert bypassed([output * layer.bias], [one], names(layer)) == ["0.bias"]


class TrainedPast(nn.Module):
    """Uses a layer's weight past it: always, or in training alone."""

    def __init__(self, *, always):
        super().__init__()
        self.first, self.last, self.always = nn.Linear(6, 6), nn.Linear(6, 3), always

    def forward(self, x):
        x = self.first(x).relu()
        if self.training or self.always:
            x = nn.functional.linear(x, self.first.weight)
        return self.last(x)


@pytest.mark.parametrize("always", [True, False])
def test_a_use_past_the_layer_that_begins_later_is_an_error(always):
    model = TrainedPast(always=always)
    counter = truestep.SampleCounter(model)
    inputs = torch.randn(5, 6)
    model.first.weight.requires_grad_(not always)
    model.train(always)
    for _ in range(2):
        model(inputs).sum().backward()
    model.first.weight.requires_grad_(True)
    model.train()
    for _ in range(2):
        with pytest.raises(truestep.TruestepError, match="without calling the module that owns it"):
            model(inputs)
    counter.close()
