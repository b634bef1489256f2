import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

import truestep
from properties import (
    assert_accumulation_equals_joint_batch,
    assert_counts_equal_oracle,
    count,
)
from zoo import sparse_inputs

SAMPLES, TIME = 5, 4


def weight_norm(dim):
    return lambda layer: parametrizations.weight_norm(layer, dim=dim)


class LowRank(nn.Module):
    """The weight and a trained product of two small matrices."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, inputs))
        self.b = nn.Parameter(torch.randn(outputs, 2))

    def forward(self, weight):
        return weight + self.b @ self.a


def low_rank(layer):
    layer.weight.requires_grad_(requires_grad=False)
    return parametrize.register_parametrization(layer, "weight", LowRank(*layer.weight.shape))


def linear(parametrization):
    """Positions, and outputs that are off at some of them."""
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.ReLU(),
        parametrization(nn.Linear(6, 5)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 3),
    ), sparse_inputs(SAMPLES, TIME, 4)


def convolutional(parametrization, kind=nn.Conv1d, **options):
    return nn.Sequential(
        nn.Conv1d(4, 4, 1),
        nn.ReLU(),
        parametrization(kind(4, 6, 3, stride=2, **options)),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(3),
    ), sparse_inputs(SAMPLES, 4, 7)


def embedded(parametrization):
    return nn.Sequential(
        parametrization(nn.Embedding(9, 4)), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    ), torch.randint(0, 9, (SAMPLES, 3))


def normalized(parametrization):
    return nn.Sequential(
        nn.Linear(4, 6),
        parametrization(nn.LayerNorm((TIME, 6))),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    ), sparse_inputs(SAMPLES, TIME, 4)


CASES = {
    "weight norm": lambda: linear(weight_norm(0)),
    "weight norm of inputs": lambda: linear(weight_norm(1)),
    "weight norm of all": lambda: linear(weight_norm(None)),
    "weight norm of a convolution": lambda: convolutional(weight_norm(0)),
    "weight norm of a grouped convolution": lambda: convolutional(weight_norm(0), groups=2),
    "weight norm of channels": lambda: convolutional(weight_norm(1)),
    "weight norm, transposed": lambda: convolutional(weight_norm(0), nn.ConvTranspose1d),
    "weight norm of outputs, transposed": lambda: convolutional(weight_norm(1), nn.ConvTranspose1d),
    "weight norm of a table": lambda: embedded(weight_norm(0)),
    "weight norm of a norm": lambda: normalized(weight_norm(0)),
    "spectral norm": lambda: linear(parametrizations.spectral_norm),
    "spectral norm of a convolution": lambda: convolutional(parametrizations.spectral_norm),
}


def make(name):
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    model(inputs)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    return model.double(), functional.cross_entropy, inputs, torch.randint(0, 3, (SAMPLES,))


@pytest.mark.parametrize("name", CASES)
def test_counts_equal_the_oracle(name):
    assert_counts_equal_oracle(*make(name))


@pytest.mark.parametrize("name", ["weight norm", "spectral norm", "weight norm of a convolution"])
def test_accumulation_equals_the_joint_batch(name):
    model, loss_fn, inputs, targets = make(name)
    sizes = (2, len(inputs) - 2)
    assert_accumulation_equals_joint_batch(model, loss_fn, inputs, targets, sizes)


# The exact counts are less where the originals do not all depend on each other.
BOUNDED = {"orthogonal": parametrizations.orthogonal, "low rank": low_rank}


@pytest.mark.parametrize("name", BOUNDED)
def test_other_parametrizations_are_bounded_from_above(name):
    torch.manual_seed(0)
    model, inputs = linear(BOUNDED[name])
    model, inputs, targets = model.double(), inputs.double(), torch.randint(0, 3, (SAMPLES,))
    counts, _ = count(model, functional.cross_entropy, inputs, targets)
    expected = truestep.oracle.counts(model, functional.cross_entropy, inputs, targets)
    assert counts.keys() == expected.keys()
    for key, values in expected.items():
        if "parametrizations" in key:
            assert (counts[key] >= values).all()
            assert (counts[key] == values.max()).all()
        else:
            assert torch.equal(counts[key], values), key


@pytest.mark.parametrize(
    "parametrization", [weight_norm(0), weight_norm(None), parametrizations.spectral_norm]
)
def test_positions_count_as_samples(parametrization):
    torch.manual_seed(0)
    layer = parametrization(nn.Linear(4, 5))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(5, 3)).double()
    inputs, targets = (
        sparse_inputs(SAMPLES, TIME, 4).double(),
        torch.randint(0, 3, (SAMPLES * TIME,)),
    )

    def loss_fn(output, targets):
        return functional.cross_entropy(output.flatten(0, -2), targets)

    counts, size = count(model, loss_fn, inputs, targets, unit="position")
    expected = truestep.oracle.counts(model, loss_fn, inputs.flatten(0, 1), targets)
    assert size == SAMPLES * TIME
    assert counts.keys() == expected.keys()
    for key, values in expected.items():
        assert torch.equal(counts[key], values), key


def test_the_parametrization_is_not_run_again():
    layer = parametrizations.spectral_norm(nn.Linear(4, 3))
    twin = copy.deepcopy(layer)
    counter = truestep.SampleCounter(layer)
    for one in (layer, twin):
        one(torch.ones(2, 4)).sum().backward()
    assert counter.counts()["parametrizations.weight.original"].eq(2).all()
    vectors = dict(layer.named_buffers())
    for name, values in twin.named_buffers():
        assert torch.equal(vectors[name], values)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_in_a_graph():
    torch.compiler.reset()
    model, loss_fn, inputs, targets = make("weight norm")
    expected = truestep.oracle.counts(model, loss_fn, inputs, targets)
    counter = truestep.SampleCounter(model)
    compiled = torch.compile(model, backend="aot_eager")
    loss_fn(compiled(inputs), targets).backward()
    counts = counter.counts()
    assert counts.keys() == expected.keys()
    assert all(torch.equal(counts[name], values) for name, values in expected.items())


def test_layers_whose_rule_reads_values_are_refused():
    layer = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    with pytest.raises(truestep.TruestepError, match="ParametrizedLSTM computes its parameters"):
        truestep.SampleCounter(layer)
    counter = truestep.SampleCounter(layer, unsupported="mean")
    layer(torch.ones(2, 5, 3))[0].sum().backward()
    counter.correct_gradients()
    assert counter.counts() == {}


# Adapters: small trained matrices beside a frozen layer.


class Adapter(nn.Module):
    """Low-rank adaptation, of linear maps."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x)) * 0.5


class BareAdapter(nn.Module):
    """The same, of matrices."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + (x @ self.a.T) @ self.b.T * 0.5


class Extended(nn.Linear):
    """The same, in a layer that inherits from nn.Linear."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.weight.requires_grad_(requires_grad=False)
        self.lora_a = nn.ParameterDict({"default": torch.randn(2, base.in_features)})
        self.lora_b = nn.ParameterDict({"default": torch.randn(base.out_features, 2)})

    def forward(self, x):
        adapted = functional.linear(
            functional.linear(x, self.lora_a["default"]), self.lora_b["default"]
        )
        return super().forward(x) + adapted


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("adapter", [Adapter, BareAdapter, Extended])
def test_adapters(adapter, frozen):
    model, inputs = linear(adapter)
    model[0].requires_grad_(requires_grad=not frozen)
    targets = torch.randint(0, 3, (SAMPLES,))
    assert_counts_equal_oracle(model.double(), functional.cross_entropy, inputs.double(), targets)


def test_adapters_beside_frozen_modules_of_any_kind():
    model, inputs = linear(Adapter)
    model.insert(0, nn.BatchNorm1d(TIME).requires_grad_(requires_grad=False).eval())
    targets = torch.randint(0, 3, (SAMPLES,))
    assert_counts_equal_oracle(model.double(), functional.cross_entropy, inputs.double(), targets)


def transposed_linear(layer):
    hub = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers")
    return hub.Conv1D(layer.out_features, layer.in_features)


def test_linear_maps_of_transformers():
    model, inputs = linear(transposed_linear)
    targets = torch.randint(0, 3, (SAMPLES,))
    inputs = inputs.double()
    assert_counts_equal_oracle(model.double(), functional.cross_entropy, inputs, targets)
    assert truestep.rules.find_rule(model[2], truestep.RULES) is truestep.rules.transposed_linear


@pytest.mark.parametrize("name", ["spectral_norm", "orthogonal"])
def test_a_parametrization_may_be_taken_away_while_samples_are_counted(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    getattr(nn.utils.parametrizations, name)(model[0])
    counter = truestep.SampleCounter(model)
    inputs = torch.randn(6, 4) * (torch.rand(6, 4) < 0.5)
    model(inputs).sum().backward()
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    model.zero_grad()
    model(inputs).sum().backward()
    counts = counter.counts()
    (weight,) = [counts[key] for key in counts if key.startswith("0.") and key != "0.bias"]
    expected = truestep.oracle.counts(model, lambda y, _: y.sum(), inputs, torch.zeros(6))
    assert torch.equal(weight, expected["0.weight"])
