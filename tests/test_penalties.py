"""Gradient penalties: backward passes through backward passes, against each sample's own gradient."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import truestep
from truestep import TruestepError
from zoo import Tied, Twice, mlp, sparse_inputs

SAMPLES = 6


def penalty_of(output, inputs):
    """Of each sample, how far the squared slope of its output is from 1 (as in WGAN-GP)."""
    (slope,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
    return (slope.flatten(1).square().sum(1) - 1).square()


def loss_of(model, inputs, *, alone):
    inputs = inputs.clone().requires_grad_()
    output = model(inputs)
    loss = penalty_of(output, inputs).sum()
    return loss if alone else loss + output.flatten(1)[:, 0].square().sum()


def counts_one_by_one(model, inputs, *, alone=False):
    reference = copy.deepcopy(model)
    names, parameters = zip(*reference.named_parameters(), strict=True)
    counts = {
        name: torch.zeros(p.shape, dtype=torch.int64) for name, p in reference.named_parameters()
    }
    for sample in inputs.split(1):
        loss = loss_of(reference, sample, alone=alone)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                counts[name] += gradient != 0
    return counts


def sequential(*layers):
    return nn.Sequential(*layers).double()


CRITICS = {
    "mlp": (mlp, (4,)),
    "smooth": (lambda: mlp(nn.Softplus), (4,)),
    "linear layer alone": (lambda: nn.Linear(4, 3), (4,)),
    "twice": (Twice, (4,)),
    "tied": (Tied, (4,)),
    "positions": (
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 2)
        ),
        (3, 4),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4, 4, 2, groups=2, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 1),
        ),
        (2, 5, 5),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 1)),
        (4,),
    ),
    "norms of positions": (
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.LayerNorm(5, bias=False), nn.ReLU(), nn.RMSNorm(5), nn.Linear(5, 2)
        ),
        (3, 4),
    ),
    "norms of channels": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Conv2d(4, 3, 2, bias=False),  # one would be taken out again
            nn.InstanceNorm2d(3, affine=True),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 1),
        ),
        (2, 4, 4),
    ),
    "transposed convolution": (
        lambda: nn.Sequential(
            nn.ConvTranspose1d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv1d(4, 1, 3)
        ),
        (2, 4),
    ),
}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", CRITICS)
def test_samples_that_reach_a_weight_through_the_penalty_count(name, alone):
    make, shape = CRITICS[name]
    model, inputs = make().double(), sparse_inputs(SAMPLES, *shape).double()
    expected = counts_one_by_one(model, inputs, alone=alone)
    counter = truestep.SampleCounter(model)
    for _ in range(2):
        model.zero_grad()
        loss_of(model, inputs, alone=alone).backward()
        counts = counter.counts()
        for key, values in expected.items():
            assert torch.equal(counts.get(key, torch.zeros_like(values)), values), key
        assert counter.batch_size == SAMPLES
    assert any((values > 0).any() for values in expected.values())


class Cubed(nn.Module):
    """Off for half of its inputs, with three derivatives."""

    def forward(self, x):
        return torch.relu(x) ** 3


DEEP = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 6), Cubed(), nn.Linear(6, 1)), (3,)),
    "deep": (
        lambda: nn.Sequential(
            nn.Linear(3, 5), Cubed(), nn.Linear(5, 4, bias=False), Cubed(), nn.Linear(4, 1)
        ),
        (3,),
    ),
    "twice": (lambda: nn.Sequential(layer := nn.Linear(3, 3), Cubed(), layer, Cubed()), (3,)),
    "positions": (lambda: nn.Sequential(nn.Linear(3, 4), Cubed(), nn.Linear(4, 2)), (2, 3)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 2, groups=2), Cubed(), nn.ConvTranspose1d(4, 1, 2, stride=2)
        ),
        (2, 4),
    ),
}


def derivative(output, inputs, order):
    """Of each sample, along another direction each time, so that few paths through the model are on."""
    for feature in range(order):
        (slopes,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
        output = slopes.flatten(1)[:, feature % 2]
    return output


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", DEEP)
def test_derivatives_of_any_order_count(name, order, inside):
    make, shape = DEEP[name]

    class Derived(nn.Module):
        """A model that returns a derivative of itself, as forces of an energy."""

        def __init__(self):
            super().__init__()
            self.inner = make()

        def forward(self, x):
            x = x.clone().requires_grad_()
            return derivative(self.inner(x), x, order)

    model, inputs = Derived().double(), sparse_inputs(SAMPLES, *shape).double()
    reference = copy.deepcopy(model)
    expected = {
        key: torch.zeros(p.shape, dtype=torch.int64) for key, p in reference.named_parameters()
    }
    for sample in inputs.split(1):
        own = torch.autograd.grad(
            reference(sample).square().sum(), list(reference.parameters()), allow_unused=True
        )
        for key, gradient in zip(expected, own, strict=True):
            expected[key] += 0 if gradient is None else gradient != 0
    assert any((values > 0).any() for values in expected.values())
    counter = truestep.SampleCounter(model if inside else model.inner)
    for _ in range(2):
        model.zero_grad()
        model(inputs).square().sum().backward()
        counts = counter.counts()
        for key, values in expected.items():
            found = counts.get(key if inside else key.removeprefix("inner."))
            assert torch.equal(torch.zeros_like(values) if found is None else found, values), key
        assert counter.batch_size == SAMPLES


def test_a_weight_used_past_its_layer_is_refused_beside_a_derivative():
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            x = x.clone().requires_grad_()
            hidden = torch.tanh(nn.functional.linear(torch.tanh(self.layer(x)), self.layer.weight))
            return derivative(hidden, x, 1)

    model = Past()
    counter = truestep.SampleCounter(model)
    with pytest.raises(TruestepError, match=r"uses 'layer.weight' without calling the module"):
        model(sparse_inputs(SAMPLES, 3))
    counter.close()


def test_second_derivatives_through_norms_are_refused_by_name():
    model = sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1))
    inputs = sparse_inputs(SAMPLES, 4).double().requires_grad_()
    counter = truestep.SampleCounter(model)
    derivative(model(inputs), inputs, 1).square().sum().backward()
    assert counter.batch_size == SAMPLES
    model.zero_grad()
    loss = derivative(model(inputs), inputs, 2).square().sum()
    with pytest.raises(TruestepError, match=r"the backward pass of '1' \(LayerNorm\)"):
        loss.backward()
    counter.close()


@pytest.mark.parametrize("last", [True, False])
def test_gradients_with_a_graph_are_freed_with_it(last):
    model, inputs = mlp(nn.Softplus).double(), sparse_inputs(SAMPLES, 4).double().requires_grad_()
    counter, seen = truestep.SampleCounter(model), []
    model[2].register_forward_pre_hook(lambda _, given: seen.append(weakref.ref(given[0])))
    given = list(model[-1].parameters()) if last else inputs
    gc.disable()
    try:
        for _ in range(2):
            loss = model(inputs).square().sum()
            slopes = torch.autograd.grad(loss, given, create_graph=True)
            assert seen[-1]() is not None
            del loss, slopes
            assert seen[-1]() is None
    finally:
        gc.enable()
    counter.close()


def test_micro_batches_add_up():
    model, inputs = mlp().double(), sparse_inputs(SAMPLES, 4).double()
    expected = counts_one_by_one(model, inputs)
    counter = truestep.SampleCounter(model)
    for part in inputs.split([1, 3, 2]):
        loss_of(model, part, alone=False).backward()
    assert counter.batch_size == SAMPLES
    for key, values in counter.counts().items():
        assert torch.equal(values, expected[key]), key


def test_a_critic_with_three_calls_and_one_backward():
    model = mlp().double()
    real, fake, between = (sparse_inputs(SAMPLES, 4).double() for _ in range(3))
    zeros = torch.zeros(SAMPLES, 0)
    plain = lambda output, _: output.sum()  # noqa: E731
    parts = [truestep.oracle.counts(model, plain, inputs, zeros) for inputs in (real, fake)]
    parts.append(counts_one_by_one(model, between, alone=True))
    counter = truestep.SampleCounter(model)
    between.requires_grad_()
    penalty = penalty_of(model(between), between).mean()
    (model(fake).sum(1).mean() - model(real).sum(1).mean() + 10 * penalty).backward()
    for key, values in counter.counts().items():
        assert torch.equal(values, sum(part[key] for part in parts)), key
    assert counter.batch_size == 3 * SAMPLES


def test_a_penalty_that_is_only_looked_at_counts_nothing():
    model, inputs = sequential(nn.Linear(4, 5), nn.PReLU(5)), sparse_inputs(SAMPLES, 4).double()
    counter = truestep.SampleCounter(model)
    loss = loss_of(model, inputs, alone=True)
    torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert counter.counts() == {}


def test_what_waits_goes_with_the_inputs_graph():
    model, inputs = mlp().double(), sparse_inputs(SAMPLES, 4).double().requires_grad_()
    counter = truestep.SampleCounter(model)
    for _ in range(3):
        model.zero_grad()
        penalty_of(model(inputs), inputs).sum().backward()
        inputs.grad = None
    assert not inputs._backward_hooks
    assert counter.batch_size == SAMPLES


class Mixing(nn.Module):
    """Maps positions, for which the features come last."""

    def __init__(self):
        super().__init__()
        self.features, self.positions, self.seen = nn.Linear(4, 5), nn.Linear(3, 2), None

    def forward(self, x):
        turned = torch.sigmoid(self.features(x)).transpose(1, 2)
        self.seen = weakref.ref(turned)
        return self.positions(turned)


def test_no_input_is_kept_of_which_autograd_keeps_a_copy():
    model, inputs = Mixing(), sparse_inputs(SAMPLES, 3, 4)
    counter = truestep.SampleCounter(model)
    for _ in range(2):
        output = model(inputs)
        assert model.seen() is None
        output.sum().backward()
    assert counter.batch_size == 2 * SAMPLES


def test_an_input_that_is_followed_goes_with_the_first_backward_pass():
    model, inputs = CRITICS["convolutions"][0](), sparse_inputs(SAMPLES, 2, 5, 5)
    counter, seen = truestep.SampleCounter(model), []
    model[2].register_forward_pre_hook(lambda _, given: seen.append(weakref.ref(given[0])))
    for _ in range(2):
        loss = model(inputs).sum()
        assert seen[-1]() is not None
        loss.backward()
        assert seen[-1]() is None
    assert counter.batch_size == 2 * SAMPLES


REFUSED = {
    "turned inputs": lambda: Mixing().double(),
    "slopes": lambda: sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 1)),
    "slopes at the end": lambda: sequential(nn.Linear(4, 5), nn.PReLU()),
    "a parametrization": lambda: sequential(
        parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 1)
    ),
    "another padding": lambda: sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular")
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_whose_backward_pass_is_not_known_are_refused_by_name(name):
    shape = (3, 4) if name == "turned inputs" else (4,)
    model, inputs = REFUSED[name](), sparse_inputs(SAMPLES, *shape).double()
    counter = truestep.SampleCounter(model)
    with pytest.raises(
        TruestepError, match=r"gradient penalty .* backward pass of '(\d|positions)'"
    ):
        loss_of(model, inputs, alone=True).backward()
    model.zero_grad()
    model(inputs).sum().backward()  # without it, the same model counts
    assert counter.batch_size == SAMPLES


def test_norms_that_mix_samples_are_refused():
    model = sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1))
    counter = truestep.SampleCounter(model, rules=truestep.RULES | truestep.rules.BATCH_NORM)
    with pytest.raises(TruestepError, match=r"the backward pass of '1' \(BatchNorm1d\)"):
        loss_of(model, sparse_inputs(SAMPLES, 4).double(), alone=True).backward()
    counter.close()


def test_a_frozen_weight_with_a_trained_bias_does_not_matter():
    model, inputs = CRITICS["mlp"][0]().double(), sparse_inputs(SAMPLES, 4).double()
    model[2].weight.requires_grad_(requires_grad=False)
    counter = truestep.SampleCounter(model)
    loss_of(model, inputs, alone=False).backward()
    counts = counter.counts()
    reference = copy.deepcopy(model).requires_grad_()
    for name, values in counts_one_by_one(reference, inputs).items():
        if name != "2.weight":
            assert torch.equal(counts[name], values), name


def test_frozen_layers_on_the_way_do_not_matter():
    model, inputs = REFUSED["slopes"](), sparse_inputs(SAMPLES, 4).double()
    model[1].requires_grad_(requires_grad=False)
    counter = truestep.SampleCounter(model)
    loss_of(model, inputs, alone=True).backward()
    assert counter.batch_size == SAMPLES
