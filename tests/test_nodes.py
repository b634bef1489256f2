import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional

import truestep
from planting import brute_force, plant
from properties import called
from truestep import TruestepError
from truestep.nodes import dummy_masks, find_dummy_nodes
from zoo import ZOO
from zoo_layers import LAYERS
from zoo_wiring import WIRING

# torch says so, once, of LSTM(proj_size=) in float32.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

EVERY = ZOO | LAYERS | WIRING

ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "hardtanh": nn.Hardtanh,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "prelu": nn.PReLU,
    "softsign": nn.Softsign,
    "logsigmoid": nn.LogSigmoid,
    "tanhshrink": nn.Tanhshrink,
    "hardshrink": nn.Hardshrink,
    "softshrink": nn.Softshrink,
    "threshold": lambda: nn.Threshold(-0.1, -0.3),
}


INPLACE = {name for name, make in ACTIVATIONS.items() if hasattr(make(), "inplace")}


@pytest.mark.parametrize(
    ("name", "inplace"), [*((n, False) for n in ACTIVATIONS), *((n, True) for n in sorted(INPLACE))]
)
def test_statistics_equal_those_of_all_samples_at_once(name, inplace):
    activation = ACTIVATIONS[name]()
    if inplace:
        activation.inplace = True
    model = nn.Sequential(nn.Linear(5, 7), activation, nn.Linear(7, 2)).double()
    x = 3 * torch.randn(300, 5).double()
    found = find_dummy_nodes(model, x.split(64))["0"]
    z = model[0](x).detach()
    y = model[1](z.clone()).detach()
    assert found.activation == name
    assert found.samples == 300
    torch.testing.assert_close(found.rate, (z > 0).double().mean(0), rtol=0, atol=0)
    for got, expected in (
        (found.lowest, z.amin(0)),
        (found.highest, z.amax(0)),
        (found.low, y.amin(0)),
        (found.high, y.amax(0)),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def same_as_brute_force(layer, z, y):
    true, pseudo, constant, classes = brute_force(z, y, layer.tolerance)
    assert set(layer.true.nonzero().flatten().tolist()) == true
    assert set(layer.pseudo.nonzero().flatten().tolist()) == pseudo
    assert set(layer.constant.nonzero().flatten().tolist()) == constant
    found = {}
    for unit in layer.duplicate.nonzero().flatten().tolist():
        first = int(layer.twin[unit])
        found.setdefault(first, {first}).add(unit)
        torch.testing.assert_close(y[:, unit], float(layer.ratio[unit]) * y[:, first])
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, classes))


@st.composite
def kinds_of(draw, units):
    """Redundant units among the later ones; the first two stay as they are."""
    kinds = {}
    factors = st.sampled_from([-1.5, -1.0, 0.3, 1.0, 2.0, 7.0])
    for unit in range(2, units):
        kind = draw(st.sampled_from(["", "", "true", "constant", "pseudo", "duplicate"]))
        if kind == "duplicate":
            kinds[unit] = ("duplicate", draw(st.integers(0, 1)), draw(factors))
        elif kind:
            kinds[unit] = kind
    return kinds


@given(st.data())
def test_planted_units_are_found_and_no_others(data):
    units = data.draw(st.integers(3, 12))
    kinds = data.draw(kinds_of(units))
    name = data.draw(st.sampled_from(sorted(ACTIVATIONS)))
    batch = data.draw(st.sampled_from([1, 7, 64, 500]))
    layer = plant(nn.Linear(4, units).double(), kinds)
    model = nn.Sequential(layer, ACTIVATIONS[name](), nn.Linear(units, 2)).double()
    x = 5 * torch.randn(200, 4).double().clamp(-2, 2)
    found = find_dummy_nodes(model, x.split(batch))["0"]
    z = layer(x).detach()
    same_as_brute_force(found, z, model[1](z.clone()).detach())
    for unit, kind in kinds.items():
        if kind == "constant":
            assert found.constant[unit]
        elif kind == "true":
            assert found.true[unit]
        elif kind == "pseudo":
            assert found.pseudo[unit]
        elif name == "relu" and kind[2] > 0:
            one, other = kind[1], unit
            # Of a unit that is hardly ever on, rounding is as large as its outputs.
            assert found.duplicate[other] or found.constant[one] or found.high[one] < 0.1


def test_units_are_no_multiples_of_one_that_is_nothing_but_rounding():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        # All three are on for one sample alone, and so proportional; the first by next to nothing.
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.5, 0.0]]))
        model[0].bias.copy_(torch.tensor([-3.0 + 1e-12, -5.0, -4.0]))
    x = torch.cat([torch.tensor([[3.0, 0.0]]), torch.randn(50, 2).clamp(-2, 2)]).double()
    found = find_dummy_nodes(model, [x])["0"]
    assert not found.duplicate[1]
    assert found.twin[2] == 1


def test_outputs_much_smaller_than_their_pre_activations_are_compared_as_outputs():
    model = nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        # y of the first is -0.25 to -0.19, and that of the other -192 times it but for a part in 20,000.
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.92, 1e-3]]))
        model[0].bias.copy_(torch.tensor([-22.0, 1.92 * 22]))
    x = torch.randn(200, 2).clamp(-3, 3)
    found = find_dummy_nodes(model, [x])["0"]
    assert not found.duplicate.any()
    with torch.no_grad():
        model[0].weight[1, 1] = 0
    assert find_dummy_nodes(model, [x])["0"].duplicate.sum() == 1


@given(st.integers(1, 3), st.booleans(), st.integers(1, 50), st.data())
def test_channels_of_convolutions_are_units(rank, norm, batch, data):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    kinds = data.draw(kinds_of(6))
    layer = plant(kind(2, 6, 3, padding=1).double(), kinds)
    between = [(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](6)] if norm else []
    model = nn.Sequential(layer, *between, nn.ReLU(), kind(6, 1, 1)).double().eval()
    x = torch.randn(30, 2, *[4] * rank).double().clamp(-2, 2)
    found = find_dummy_nodes(model, x.split(batch))["0"]
    z = nn.Sequential(layer, *between)(x).detach().movedim(1, -1).reshape(-1, 6)
    same_as_brute_force(found, z, z.relu())
    torch.testing.assert_close(found.rate, (z > 0).double().mean(0), rtol=0, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_every_model_of_the_zoo_can_be_looked_at(name):
    model, _, inputs, _ = EVERY[name]()
    model.eval()
    before = called(model, inputs)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = find_dummy_nodes(model, [inputs], forward=called)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert found.layers or found.skipped or name in {"rnn of three layers", "lstm with projections"}
    for layer in found:
        assert not bool((layer.true & layer.pseudo).any())
        assert bool(((layer.rate == 0) == layer.true).all())
        assert bool(((layer.rate == 1) == layer.pseudo).all())
    after = called(model, inputs)
    for one, other in zip(tensors(before), tensors(after), strict=True):
        assert torch.equal(one, other)


def tensors(output):
    return list(truestep.units.tensors_in(output))


class Functions(nn.Module):
    """Activation functions called in the code, in many spellings."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(7))

    def forward(self, x):
        first, second, third, fourth, fifth, sixth, last = self.layers
        x = functional.relu(first(x))
        x = second(x).relu()
        x = torch.relu_(third(x))
        x = functional.gelu(fourth(x), approximate="tanh")
        x = fifth(x).clamp(min=0)
        x = sixth(x).clamp(0, 6)
        return last(x)


def test_functions_in_the_code_are_seen_like_modules():
    found = find_dummy_nodes(Functions(), [torch.randn(20, 4)])
    assert [(layer.layer, layer.activation) for layer in found] == [
        ("layers.0", "relu"),
        ("layers.1", "relu"),
        ("layers.2", "relu"),
        ("layers.3", "gelu"),
        ("layers.4", "relu"),
        ("layers.5", "relu6"),
    ]


def test_a_transformers_feed_forward_units_are_found_in_evaluation_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    found = find_dummy_nodes(layer, [torch.randn(5, 3, 8)])
    assert [one.layer for one in found] == ["linear1"]
    assert len(found["linear1"]) == 16


def test_an_exported_program_is_looked_at_like_its_model():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    )
    x = torch.randn(6, 1, 4, 4)
    exported = torch.export.export(model.eval(), (x,)).module()
    one, other = (find_dummy_nodes(each, [x])["0"] for each in (model, exported))
    assert one.kinds() == other.kinds()
    torch.testing.assert_close(one.highest, other.highest)


def test_the_bound_is_the_exact_binomial_one():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    found = find_dummy_nodes(model, [torch.randn(299, 1)])["0"]
    # The chance of 299 misses in a row at this rate is 5 %, and the rule of three is close.
    assert (1 - found.bound()) ** 299 == pytest.approx(0.05)
    assert found.bound() == pytest.approx(3 / 299, rel=0.01)
    assert found.bound(0.99) > found.bound()
    exact = stats.binomtest(0, 299, alternative="less").proportion_ci(0.95, method="exact")
    assert found.bound() == pytest.approx(exact.high, rel=1e-9)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2))
def test_masks_of_many_networks_at_once(samples, units, networks):
    z = torch.randn(*[2] * networks, samples, units)
    true, pseudo = dummy_masks(z)
    assert true.shape == (*z.shape[:-2], units)
    assert torch.equal(true, (z > 0).sum(-2) == 0)
    assert torch.equal(pseudo, (z > 0).sum(-2) == samples)


def test_a_unit_with_nan_or_infinity_is_of_no_kind():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].bias[0], model[0].weight[0] = -9.0, 0.0
        model[0].bias[1] = math.nan
        model[0].bias[2] = -math.inf
    found = find_dummy_nodes(model, [torch.randn(5, 2)])["0"]
    assert found.kinds() == ["true", "not finite", "not finite"]
    assert dummy_masks(torch.tensor([[math.nan], [-1.0]]))[0].tolist() == [False]


@pytest.mark.parametrize(
    ("batch", "forward"),
    [
        (torch.randn(4, 2), None),
        ([torch.randn(4, 2), torch.zeros(4)], None),
        ((torch.randn(4, 2), torch.zeros(4)), None),
        ({"input": torch.randn(4, 2)}, None),
        ({"x": torch.randn(4, 2)}, lambda model, batch: model(batch["x"])),
    ],
)
def test_batches_may_be_tensors_tuples_and_dicts(batch, forward):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    found = find_dummy_nodes(model, [batch, batch], forward=forward)
    assert found.samples == 8
    assert len(found["0"]) == 3


def test_a_batch_of_another_kind_is_an_error_with_a_way_out():
    with pytest.raises(TruestepError, match=r"a batch is of type str; pass forward="):
        find_dummy_nodes(nn.Linear(2, 2), ["text"])


@pytest.mark.parametrize("loader", [[], [torch.empty(0, 2)]])
def test_no_samples_are_an_error(loader):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(TruestepError, match="gave no samples"):
        find_dummy_nodes(model, loader)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "loader is of type NoneType; pass batches"),
        (([torch.ones(1, 2)], "a"), "tolerance is 'a'"),
        (([torch.ones(1, 2)], -1), "tolerance is -1"),
    ],
)
def test_what_is_no_loader_or_tolerance_is_named(arguments, message):
    loader, *tolerance = arguments
    with pytest.raises(TruestepError, match=message):
        find_dummy_nodes(nn.Linear(2, 2), loader, tolerance=tolerance[0] if tolerance else None)


def test_an_empty_batch_among_others_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    x = torch.randn(9, 2)
    one = find_dummy_nodes(model, [x])["0"]
    other = find_dummy_nodes(model, [x[:4], x[:0], x[4:]])["0"]
    assert torch.equal(one.highest, other.highest)
    assert torch.equal(one.rate, other.rate)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return torch.relu(self.layer(x) + torch.randn_like(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), r"dropout in '1' draws random numbers"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), r"batch_norm in '1' normalises with"),
        (Noisy(), r"randn_like draws random"),
        (nn.TransformerEncoderLayer(2, 1, 2, dropout=0.1), r"draws random numbers"),
        (nn.Sequential(nn.Linear(2, 2), nn.RReLU()), r"rrelu in '1' draws random"),
    ],
)
def test_chance_and_batch_statistics_are_refused_with_the_way_out(model, message):
    with pytest.raises(TruestepError, match=message + r".*model\.eval\(\)"):
        find_dummy_nodes(model.train(), [torch.randn(4, 2)])


def test_dropout_in_evaluation_or_of_nothing_is_no_chance():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Dropout(0.0), nn.Linear(3, 1)).train()
    assert find_dummy_nodes(model, [torch.randn(4, 2)]).samples == 4
    assert model.training
    model[2].p = 0.5
    assert find_dummy_nodes(model.eval(), [torch.randn(4, 2)]).samples == 4


def test_a_layer_used_twice_has_the_samples_of_both_uses():
    model, _, x, _ = EVERY["twice"]()
    found = find_dummy_nodes(model, [x])["layer"]
    first = model.layer(x)
    z = torch.cat([first, model.layer(first.relu())]).detach()
    torch.testing.assert_close(found.rate, (z > 0).double().mean(0))
    assert found.samples == len(x)


def test_an_unknown_layer_is_an_error_that_names_those_there_are():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(TruestepError, match=r"'2'; layers with units: '0'"):
        find_dummy_nodes(model, [torch.randn(4, 2)])["2"]


def test_the_text_and_the_plain_data_say_the_same():
    model = nn.Sequential(
        plant(nn.Linear(2, 4), {1: "true", 2: "pseudo"}), nn.ReLU(), nn.Linear(4, 1)
    )
    found = find_dummy_nodes(model, [torch.rand(40, 2)])
    row = found.to_dict()["layers"][0]
    assert row["kinds"][1:3] == ["true", "pseudo"]
    assert row["true"] == row["kinds"].count("true") == found.count("true")
    head, line = str(found).splitlines()
    assert head.split()[:4] == ["layer", "activation", "units", "true"]
    assert line.split()[:4] == ["0", "relu", "4", str(row["true"])]


def test_memory_does_not_grow_with_the_data():
    """What is kept between batches is a few numbers for each unit."""
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 1))
    sizes = []
    for batches in (2, 40):
        found = truestep.layer_nodes.Statistics(None)
        flow = truestep.flow.Flow(model, found)
        for _ in range(batches):
            x = torch.randn(16, 3)
            flow.ledger.begin(x)
            with torch.no_grad(), flow:
                model(x)
        total = found.totals["0", "relu"]
        sizes.append(sum(t.numel() for t in tensors(total)))
    assert sizes[0] >= sizes[1] > 0


def test_units_that_were_not_finite_are_shown():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    nodes = truestep.find_dummy_nodes(model, [torch.full((4, 2), torch.nan)])
    head, row = str(nodes).splitlines()
    assert "not finite" in head
    assert row.split() == ["0", "relu", "3", "3", "0", "0", "0", "0", "0.000"]
    assert "not finite" not in str(truestep.find_dummy_nodes(model, [torch.ones(4, 2)]))
