import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

import truestep


def test_counts_of_a_case_by_hand():
    model = nn.Linear(2, 1)
    inputs = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 3.0]])
    targets = torch.full((3, 1), 50.0)
    counts = truestep.oracle.counts(model, functional.mse_loss, inputs, targets)
    assert counts["weight"].tolist() == [[2, 1]]
    assert counts["bias"].tolist() == [3]


def test_mean_effective_gradient_of_a_case_by_hand():
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    inputs, targets = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [2.0]])
    # dloss/dw = 2 (wx + b - y) x: -2 and 0; dloss/db: -2 and -4
    found = truestep.oracle.mean_effective_gradients(model, functional.mse_loss, inputs, targets)
    assert found["weight"].tolist() == [[-2 / (1 + 1)]]
    assert found["bias"].tolist() == [-6 / (2 + 1)]


def test_the_model_is_left_alone():
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    truestep.oracle.counts(model, functional.mse_loss, torch.ones(2, 2), torch.ones(2, 1))
    assert model.weight.dtype == torch.float32
    assert model.weight.grad is None
    assert torch.equal(model.weight, before)


def test_a_sum_that_cancels_is_where_the_oracle_and_the_structure_differ():
    model = nn.Linear(1, 1, bias=False)
    inputs = torch.tensor([[[1.0], [-1.0]]])  # one sample, two positions whose terms cancel
    loss = lambda output, _: output.sum()  # noqa: E731
    assert truestep.oracle.counts(model, loss, inputs, inputs)["weight"].tolist() == [[0]]
    counter = truestep.SampleCounter(model)
    loss(model(inputs), None).backward()
    assert counter.counts()["weight"].tolist() == [[1]]


class Batch(NamedTuple):
    x: torch.Tensor
    scale: float


class Read(nn.Module):
    """A linear map of samples in the last dimension, however they are given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, first, second=None):
        x = first.x * first.scale if isinstance(first, Batch) else first
        x = x if second is None else x + second["more"][0]
        return self.layer(x.t())


def test_arguments_keywords_and_named_tuples_are_taken_sample_by_sample():
    x, more = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]), torch.tensor([[0.0] * 3, [0, 5, 0]])
    targets, model = torch.full((3, 1), 50.0), Read()
    expected = {"layer.weight": [[2, 1]], "layer.bias": [3]}
    with_more = {"layer.weight": [[2, 2]], "layer.bias": [3]}
    cases = [
        (x, expected),
        ((x,), expected),
        ({"first": x}, expected),
        ((Batch(x, 2.0),), expected),
        ((x, {"more": [more]}), with_more),
        ({"first": Batch(x, 1.0), "second": {"more": (more,)}}, with_more),
    ]
    for inputs, counts in cases:
        found = truestep.oracle.counts(model, functional.mse_loss, inputs, targets, batch_dim=1)
        assert {name: values.tolist() for name, values in found.items()} == counts
    found = truestep.oracle.mean_effective_gradients(
        model, functional.mse_loss, (x,), targets, batch_dim=1
    )
    joint = copy.deepcopy(model).double()
    functional.mse_loss(joint(x.double()), targets.double()).backward()
    factor = 3 / (torch.tensor([[2, 1]]) + 1.0)
    torch.testing.assert_close(found["layer.weight"], joint.layer.weight.grad * factor)
