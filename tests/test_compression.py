import copy
import io
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import truestep
from planting import plant
from properties import called, double
from truestep import TruestepError, compress, find_dummy_nodes, shrink_to
from truestep.units import tensors_in
from zoo import ZOO
from zoo_layers import LAYERS
from zoo_wiring import WIRING

# torch says so, once, of LSTM(proj_size=) in float32.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

EVERY = ZOO | LAYERS | WIRING
EXACT = 1e-12
# torch's own, where it copies an exported program.
OF_TORCH = "ignore:.*LeafSpec.*:FutureWarning"


def compressed(model, x, *, optimizer=None, forward=None, exact=EXACT):
    """Compresses in float64 and holds the result to the original on all data."""
    before = copy.deepcopy(model.state_dict())
    nodes = find_dummy_nodes(model, [x] if forward else x.split(50), forward=forward)
    small, report = compress(model, nodes, x, optimizer)
    with torch.no_grad():
        if forward is None:
            pairs = [(model(x), small(x))]
        else:
            both = (forward(model, x), forward(small, x))
            pairs = zip(*map(tensors_in, both), strict=True)
        for one, other in pairs:
            assert one.shape == other.shape
            assert float((one - other).abs().max()) <= exact
    assert report.difference <= exact
    assert small.training == model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    gone = {(one.layer, one.unit) for one in report.removed}
    assert not gone & {(one.layer, one.unit) for one in report.kept}
    return small, report, nodes


def listed(nodes):
    """The units that must be removed or listed."""
    return {
        (layer.layer, unit) for layer in nodes for unit, kind in enumerate(layer.kinds()) if kind
    }


def units(entries, layer=None):
    return {one.unit for one in entries if layer is None or one.layer == layer}


@st.composite
def kinds_of(draw, number, *, pseudo=True):
    """Redundant units among the later ones."""
    kinds = {}
    choices = ["", "true", "constant", "duplicate", *(["pseudo"] if pseudo else [])]
    for unit in range(2, number):
        kind = draw(st.sampled_from(choices))
        if kind == "duplicate":
            kinds[unit] = (
                "duplicate",
                draw(st.integers(0, 1)),
                draw(st.sampled_from([0.3, 2.0, 1.0])),
            )
        elif kind:
            kinds[unit] = kind
    return kinds


def gone(kinds):
    return {unit for unit, kind in kinds.items() if kind != "pseudo"}


def data(samples, *shape):
    """Enough samples, spread so that no unit is redundant by chance."""
    return torch.randn(samples, *shape).double().clamp(-3, 3)


def busy(layer):
    """Makes units that are on for some samples and off for others, so that only planted ones are found."""
    layer.double()
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.zero_()
    return layer


@given(st.data())
def test_linear_layers_lose_exactly_the_planted_units(drawn):
    widths = drawn.draw(st.lists(st.integers(3, 9), min_size=1, max_size=3))
    between = drawn.draw(st.sampled_from(["", "norm", "dropout"]))
    bias = drawn.draw(st.booleans())
    layers, planted, inputs = [], {}, 6
    for width in widths:
        kinds = drawn.draw(kinds_of(width, pseudo=inputs >= width))
        planted[str(len(layers))] = kinds
        layers += [plant(busy(nn.Linear(inputs, width)), kinds)]
        if between == "norm":
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU())
        if between == "dropout":
            layers.append(nn.Dropout(0.3))
        inputs = width
    model = nn.Sequential(*layers, nn.Linear(inputs, 2, bias=bias)).double().eval()
    _small, report, nodes = compressed(model, data(300, 6))
    assert listed(nodes) <= {(o.layer, o.unit) for o in [*report.removed, *report.kept]}
    # Inputs of deeper layers may be larger than planting allows for: there `listed` is what holds.
    first = next(iter(planted))
    assert gone(planted[first]) <= units(report.removed, first)
    assert units(report.removed, first) <= {
        unit for layer in nodes if layer.layer == first for unit, k in enumerate(layer.kinds()) if k
    }


@given(st.data())
def test_only_planted_units_go_in_one_layer(drawn):
    kinds = drawn.draw(kinds_of(9))
    model = nn.Sequential(plant(busy(nn.Linear(12, 9)), kinds), nn.ReLU(), nn.Linear(9, 3)).double()
    small, report, _ = compressed(model, data(600, 12))
    always_on = set(kinds) - gone(kinds)
    # Of straight lines the next layer needs as many as it has outputs.
    assert units(report.removed) >= gone(kinds)
    assert len(units(report.removed) - gone(kinds)) == max(0, len(always_on) - 3)
    assert small[0].out_features == small[2].in_features == 9 - len(report.removed)
    assert units(report.kept) == set(kinds) - units(report.removed)


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "padded as it was": {"kernel_size": 3, "padding": "same"},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "strided": {"kernel_size": 2, "stride": 2},
    "dilated": {"kernel_size": 2, "dilation": 2},
    "grouped": {"kernel_size": 3, "groups": 2},
}


@given(st.data())
def test_convolutions_lose_planted_channels_or_say_why_not(drawn):
    first, second = (
        CONVOLUTIONS[drawn.draw(st.sampled_from(sorted(CONVOLUTIONS)))] for _ in range(2)
    )
    end = drawn.draw(st.sampled_from(["flat", "pooled", "averaged"]))
    kinds = drawn.draw(kinds_of(6, pseudo=False))
    between = [nn.BatchNorm2d(6)] if drawn.draw(st.booleans()) else []
    layers = [
        plant(busy(nn.Conv2d(4, 6, **first)), kinds),
        *between,
        nn.ReLU(),
        nn.Conv2d(6, 4, bias=drawn.draw(st.booleans()), **second),
        nn.ReLU(),
    ]
    layers += {"flat": [], "pooled": [nn.MaxPool2d(2, padding=1)], "averaged": [nn.AvgPool2d(2)]}[
        end
    ]
    layers.append(nn.Flatten())
    x = data(60, 4, 8, 8)
    model = nn.Sequential(*layers).double().eval()
    width = model(x[:1]).shape[1]
    model.append(nn.Linear(width, 2).double())
    _small, report, nodes = compressed(model, x)
    found = [*report.removed, *report.kept]
    assert listed(nodes) <= {(one.layer, one.unit) for one in found}
    if second is not CONVOLUTIONS["grouped"] and first is not CONVOLUTIONS["grouped"]:
        zeros = {unit for unit, kind in kinds.items() if kind == "true"}
        assert zeros <= units(report.removed, "0")
        if second in [CONVOLUTIONS["padded"], CONVOLUTIONS["padded as it was"]]:
            stay = {unit for unit, kind in kinds.items() if kind == "constant"} - units(
                report.removed
            )
            for one in report.kept:
                if one.layer == "0" and one.unit in stay:
                    assert "zeros around the input" in one.reason
        else:
            assert gone(kinds) <= units(report.removed, "0")


class Net(nn.Module):
    """Shortcuts, a concatenation, a shared layer, tied weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.body = nn.Linear(8, 8)
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 4)
        self.shared = nn.Linear(10, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.body(x))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], -1)
        x = torch.relu(self.shared(x))
        return self.head(torch.relu(self.shared(x)))


def net():
    model = Net()
    for layer in (model.stem, model.body, model.left, model.right, model.shared):
        busy(layer)
    return model.double()


def test_added_units_go_only_together():
    model = net()
    plant(model.stem, {3: "true", 4: "true"})
    with torch.no_grad():
        model.body.weight[3], model.body.bias[3] = 0.0, -1.0
    small, report, _ = compressed(model, data(400, 5))
    assert units(report.removed, "stem") == {3}
    assert units(report.removed, "body") == {3}
    assert small.stem.out_features == small.body.in_features == small.body.out_features == 7
    (kept,) = (one for one in report.kept if one.layer == "stem" and one.unit == 4)
    assert "is constant, but what of it reaches" in kept.reason


def test_concatenated_units_go_from_their_places():
    model = net()
    plant(model.left, {2: "true", 3: "constant"})
    plant(model.right, {1: "true", 2: ("duplicate", 0, 2.0)})
    with torch.no_grad():  # the shared layer reads this place once more, as its own output
        model.shared.weight[:, [2, 3, 7, 8]] *= 1
    _small, report, _ = compressed(model, data(400, 5))
    assert units(report.removed, "left") | units(report.kept, "left") >= {2, 3}
    # `shared` reads its own output too, so its places cannot go one by one.
    assert all(one.layer not in {"left", "right"} for one in report.removed)
    assert {one.reason for one in report.kept if one.layer == "left"} != set()


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = busy(nn.Linear(5, 6)), busy(nn.Linear(5, 4))
        self.head = nn.Linear(15, 3)

    def forward(self, x):
        parts = [x, torch.relu(self.left(x)), torch.relu(self.right(x))]
        return self.head(torch.cat(parts, -1))


def test_a_concatenation_with_the_input_keeps_the_order_of_columns():
    model = Concatenated().double()
    plant(model.left, {2: "true", 3: "constant", 4: ("duplicate", 0, 2.0)})
    plant(model.right, {0: "true", 3: ("duplicate", 1, 0.5)})
    small, report, _ = compressed(model, data(400, 5))
    assert units(report.removed, "left") == {2, 3, 4}
    assert units(report.removed, "right") == {0, 3}
    assert small.head.in_features == 10
    assert torch.equal(small.head.weight[:, :5], model.head.weight[:, :5])


def test_both_uses_of_a_shared_layer_are_served_by_one_removal():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(busy(nn.Linear(4, 7)), nn.ReLU(), nn.Linear(7, 3))

        def forward(self, x):
            return self.encoder(x[:, :4]) * self.encoder(x[:, 4:])

    model = Shared().double()
    plant(model.encoder[0], {2: "true", 3: "constant", 4: ("duplicate", 0, 2.0)})
    small, report, _ = compressed(model, data(300, 8))
    assert units(report.removed) == {2, 3}
    assert small.encoder[0].out_features == 5
    (kept,) = report.kept
    assert kept.unit == 4
    assert "other uses" in kept.reason


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.hidden = busy(nn.Linear(6, 9))
            self.out = nn.Linear(9, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.out(torch.relu(self.hidden(self.embedding(x)))))

    model = Tied().double()
    plant(model.hidden, {2: "true", 5: "constant"})
    x = torch.arange(11).repeat(3)[:, None]
    small, report, _ = compressed(model, x)
    assert {2, 5} <= units(report.removed)
    assert small.head.weight is small.embedding.weight


def test_a_tied_embedding_gets_narrower_in_both_places():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(30, 6)
            self.head = nn.Linear(6, 30)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(torch.relu(self.embedding(x)))

    model = Tied().double()
    with torch.no_grad():
        model.embedding.weight[:, 2] = -1 - torch.rand(30)
        model.embedding.weight[:, 4] = 2 * model.embedding.weight[:, 0]
    small, report, _ = compressed(model, torch.arange(30))
    assert small.embedding.embedding_dim == small.head.in_features == 5
    assert small.head.weight is small.embedding.weight
    assert units(report.removed) == {2}
    assert any(one.unit == 4 and "other uses" in one.reason for one in report.kept)


@given(st.integers(1, 3), st.data())
def test_depthwise_convolutions_lose_whole_groups(multiplier, drawn):
    kinds = drawn.draw(kinds_of(5, pseudo=False))
    depthwise = nn.Conv2d(5, 5 * multiplier, 3, groups=5, padding=drawn.draw(st.integers(0, 1)))
    model = nn.Sequential(
        plant(busy(nn.Conv2d(3, 5, 1)), kinds),
        nn.ReLU(),
        depthwise,
        nn.BatchNorm2d(5 * multiplier),
        nn.ReLU6(),
        nn.Conv2d(5 * multiplier, 2, 1),
    )
    model = model.double().eval()
    small, report, _ = compressed(model, data(40, 3, 5, 5))
    zeros = {unit for unit, kind in kinds.items() if kind == "true"}
    reasons = {one.unit: one.reason for one in report.kept if one.layer == "0"}
    if depthwise.padding == (0, 0):
        constants = {unit for unit, kind in kinds.items() if kind == "constant"}
        assert zeros | constants <= units(report.removed, "0")
        assert small[2].groups == small[2].in_channels == small[0].out_channels
    else:
        assert zeros <= units(report.removed, "0") | reasons.keys()
    assert small[2].out_channels == multiplier * small[2].groups
    fresh = copy.deepcopy(model)
    same = shrink_to(fresh, report.checkpoint(small))
    x = data(4, 3, 5, 5)
    assert torch.equal(same(x), small(x))


def test_groups_of_the_models_input_lose_equally_many():
    model = nn.Sequential(nn.Conv1d(4, 6, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    model = model.double()
    model[0].bias.data[[0, 1, 3]] = -50.0
    data = [torch.randn(8, 4, 3).double()]
    small, report = truestep.compress(model, truestep.find_dummy_nodes(model, data), data[0])
    assert small[0].weight.shape == (4, 2, 1)
    assert [kept.reason for kept in report.kept] == [
        "the groups of '0.weight' must lose equally many, and one has 1 to lose"
    ]
    assert torch.allclose(small(data[0]), model(data[0]))


def test_groups_lose_equally_many():
    model = nn.Sequential(
        plant(
            busy(nn.Conv1d(3, 8, 1)), {1: "true", 2: "true", 5: "true", 6: ("duplicate", 4, 2.0)}
        ),
        nn.ReLU(),
        nn.Conv1d(8, 4, 3, groups=2),
    ).double()
    small, report, _ = compressed(model, data(100, 3, 6))
    assert units(report.removed) == {1, 5}
    assert small[2].weight.shape == (4, 3, 3)
    assert small[2].groups == 2
    reasons = {one.unit: one.reason for one in report.kept}
    assert "must lose equally many" in reasons[2]
    assert "groups" in reasons[6]


def test_a_layer_norm_over_removed_features_is_refused_by_name():
    model = nn.Sequential(
        plant(busy(nn.Linear(4, 6)), {2: "true"}), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 2)
    ).double()
    small, report, _ = compressed(model, data(200, 4))
    assert not report.removed
    (kept,) = report.kept
    assert kept.reason == "is normalised together with the others by LayerNorm '2'"
    assert small[0].out_features == 6


def test_a_batch_norm_behind_the_activation_turns_zeros_into_constants():
    norm = nn.BatchNorm1d(6)
    with torch.no_grad():
        norm.bias.uniform_()
        norm.running_mean.uniform_()
    model = nn.Sequential(
        plant(busy(nn.Linear(4, 6)), {2: "true", 3: ("duplicate", 0, 2.0), 4: "constant"}),
        nn.ReLU(),
        norm,
        nn.Linear(6, 2, bias=False),
    )
    small, report, _ = compressed(model.double().eval(), data(300, 4))
    assert units(report.removed) == {2, 3, 4}
    assert small[3].bias is not None
    assert len(small[2].running_mean) == small[2].num_features == 3
    how = {one.unit: one.how for one in report.removed}
    assert how == {
        2: "folded into the next bias",
        3: "merged into unit 0",
        4: "folded into the next bias",
    }


def test_a_layer_without_live_units_keeps_one():
    model = nn.Sequential(busy(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)).double()
    plant(model[0], dict.fromkeys(range(5), "constant"))
    small, report, _ = compressed(model, data(50, 4))
    assert small[0].out_features == 1
    assert len(report.removed) == 4
    (kept,) = report.kept
    assert "is the last unit that '0." in kept.reason


def test_more_straight_lines_than_inputs_are_combinations_of_each_other():
    kinds = dict.fromkeys(range(2, 9), "pseudo")
    model = nn.Sequential(
        plant(busy(nn.Linear(2, 10)), kinds), nn.ReLU(), nn.Linear(10, 3)
    ).double()
    small, report, _ = compressed(model, data(300, 2), exact=1e-11)
    assert small[0].out_features == 5  # two lines are enough for seven
    assert {one.kind for one in report.removed} == {"pseudo"}
    assert "combination of 2 other units" in report.removed[0].how


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_straight_lines_is_folded_with_the_next_where_that_is_smaller(bias):
    kinds = dict.fromkeys(range(5), "pseudo")
    first = plant(busy(nn.Linear(8, 5)), kinds)
    layers = [first, nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 4, bias=bias)]
    model = nn.Sequential(*layers).double().eval()
    small, report, _ = compressed(model, data(200, 8), exact=1e-11)
    assert [type(small[place]) for place in range(4)] == [nn.Identity] * 4
    assert (small[4].in_features, small[4].out_features) == (8, 4)
    assert report.after.parameters == 8 * 4 + 4
    same = shrink_to(copy.deepcopy(model), report.checkpoint(small))
    x = data(5, 8)
    assert torch.equal(same(x), small(x))


def test_convolutions_of_straight_lines_are_folded_into_a_pointwise_one():
    first = plant(busy(nn.Conv2d(1, 6, 3, padding=1, stride=2)), dict.fromkeys(range(6), "pseudo"))
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(6, 2, 1), nn.ReLU(), nn.Flatten()).double()
    small, report, _ = compressed(model, data(50, 1, 6, 6), exact=1e-11)
    assert isinstance(small[0], nn.Identity)
    assert small[2].weight.shape == (2, 1, 3, 3)
    assert small[2].stride == (2, 2)
    same = shrink_to(copy.deepcopy(model), report.checkpoint(small))
    x = data(5, 1, 6, 6)
    assert torch.equal(same(x), small(x))


def test_a_straight_layer_whose_activation_stands_in_the_code_says_so():
    class Coded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = plant(busy(nn.Linear(8, 5)), dict.fromkeys(range(5), "pseudo"))
            self.second = nn.Linear(5, 2)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    small, report, _ = compressed(Coded().double(), data(100, 8))
    # It can't become one with the next, so it keeps as many units as that has outputs.
    assert small.first.out_features == small.second.in_features == 2
    assert len(report.removed) == 3
    assert len(report.kept) == 2
    assert all("in its own code" in one.reason for one in report.kept)


def test_a_saturated_sigmoid_is_folded_and_one_that_is_never_on_is_not():
    model = nn.Sequential(busy(nn.Linear(3, 4)), nn.Sigmoid(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].bias[1] = 900.0
        model[0].weight[2] *= 0.01
        model[0].bias[2] = -2.0
    _small, report, _ = compressed(model, data(100, 3))
    assert units(report.removed) == {1}
    (kept,) = report.kept
    assert kept.kind == "true"
    assert "sigmoid is not constant where z <= 0" in kept.reason


class Sized(nn.Module):
    """A size is written in the code."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first = plant(busy(nn.Conv1d(2, 4, 1)), {2: "true", 3: "true"})
        self.second = nn.Linear(12, 2)
        self.grown = nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        if self.kind == "view":
            return self.second(x.view(-1, 12))
        if self.kind == "free":
            return self.second(x.view(x.shape[0], -1))
        # With two channels gone this is another batch of as many features.
        return self.grown(x.reshape(-1, 6)).mean()


@pytest.mark.parametrize("kind", ["view", "wrong batch"])
def test_sizes_in_the_code_are_found_out(kind):
    small, report, _ = compressed(Sized(kind).double(), data(40, 2, 3))
    assert not report.removed
    assert len(report.kept) == 2
    assert small.first.out_channels == 4


class Picking(nn.Module):
    """Of one layer's units every second is read, or all by the numbers that others had."""

    def __init__(self, pick, read):
        super().__init__()
        self.pick = pick
        self.first = plant(busy(nn.Linear(4, 6)), {1: "true", 4: "constant", 5: "true"})
        self.second = nn.Linear(read, 2)
        self.other = plant(busy(nn.Linear(4, 5)), {2: "true", 3: "true"})
        self.last = nn.Linear(5, 2)

    def forward(self, x):
        picked = self.pick(torch.relu(self.first(x)))
        return self.second(picked) + self.last(torch.relu(self.other(x)))


@pytest.mark.parametrize(
    ("pick", "read", "name"),
    [
        (lambda h: h[:, ::2], 3, "getitem"),
        (lambda h: h[:, 1::3], 2, "getitem"),
        (lambda h: h[:, [0, 2, 3]], 3, "getitem"),
        (lambda h: h.roll(2, -1), 6, "roll"),
        (lambda h: torch.roll(h, (1, -1), (0, 1)), 6, "roll"),
    ],
)
def test_units_that_are_picked_by_their_numbers_stay_and_others_go(pick, read, name):
    _, report, _ = compressed(Picking(pick, read).double(), data(40, 4))
    assert {(one.layer, one.unit) for one in report.removed} == {("other", 2), ("other", 3)}
    assert {(one.layer, one.unit) for one in report.kept} == {("first", unit) for unit in (1, 4, 5)}
    assert {one.reason for one in report.kept} == {f"is spread or picked out by {name}"}


@pytest.mark.parametrize(
    "pick", [lambda h: h.flip(-1), lambda h: h.roll(1, 0), lambda h: h[::2].repeat(2, 1)]
)
def test_units_that_stay_neighbours_go(pick):
    _, report, _ = compressed(Picking(pick, 6).double(), data(40, 4))
    assert units(report.removed) >= {1, 4, 5}


def test_sizes_that_the_code_asks_for_are_no_obstacle():
    small, report, _ = compressed(Sized("free").double(), data(40, 2, 3))
    assert units(report.removed) == {2, 3}
    assert small.second.in_features == 6


@pytest.mark.parametrize("name", EVERY)
def test_every_model_of_the_zoo_is_compressed_exactly_or_says_why_not(name):
    model, _, inputs, _ = EVERY[name]()
    model, inputs = model.double().eval(), double(inputs)
    _small, report, nodes = compressed(model, inputs, forward=called)
    done = {(one.layer, one.unit) for one in [*report.removed, *report.kept]}
    assert listed(nodes) <= done
    assert all(one.reason for one in report.kept)
    assert report.after.parameters <= report.before.parameters


CHANGED = ["mlp", "cnn", "in-place relu", "resnet", "u-net", "encoder", "gated mlp", "prelu"]


@pytest.mark.parametrize("name", CHANGED)
def test_units_planted_in_models_of_the_zoo_go(name):
    model, _, inputs, _ = EVERY[name]()
    model, inputs = model.double().eval(), double(inputs)
    places = {"mlp": "0", "cnn": "3", "in-place relu": "0", "resnet": "1.first", "u-net": "middle"}
    places |= {"encoder": "encoder.layers.0.linear1", "gated mlp": "0.gate", "prelu": "body"}
    layer = model.get_submodule(places[name])
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(layer.weight.shape[0]).double())
    if name == "prelu":
        plant(layer, {1: "constant"})
    else:
        plant(layer, {1: "true"})
    _small, report, _ = compressed(model, inputs, forward=called)
    gone_or_not = {(one.layer, one.unit): one for one in [*report.removed, *report.kept]}
    one = gone_or_not[places[name], 1]
    expected = {"resnet": "GroupNorm", "gated mlp": "silu is not constant"}.get(name)
    if expected is None:
        assert one in report.removed
    else:
        assert expected in one.reason


def test_reading_numbers_of_the_data_is_refused():
    model, _, inputs, _ = EVERY["routed experts"]()
    _, report, _ = compressed(model.double(), double(inputs), forward=called)
    assert not report.removed
    assert any("nonzero" in one.reason for one in report.kept)


def optimizers(model):
    counter = truestep.SampleCounter(model)
    named = model.parameters()
    return {
        "dasgd": lambda: truestep.DASGD(named, lr=0.1),
        "asgd": lambda: truestep.AdaptiveBatchSGD(named, lr=0.1, counter=counter, momentum=0.9),
        "sgd": lambda: torch.optim.SGD(named, lr=0.1, momentum=0.9),
        "adam": lambda: torch.optim.Adam(named, lr=0.01),
        "adamw, named": lambda: torch.optim.AdamW(model.named_parameters(), lr=0.01, amsgrad=True),
    }


@pytest.mark.parametrize("name", ["dasgd", "asgd", "sgd", "adam", "adamw, named"])
def test_training_goes_on_as_it_would_have(name):
    """A dead unit gets no gradient, so the small model's steps are those of the large one."""
    model = nn.Sequential(
        plant(busy(nn.Linear(3, 6)), {2: "true", 4: "true"}), nn.ReLU(), nn.Linear(6, 2)
    ).double()
    x, y = data(80, 3), torch.randint(0, 2, (80,))
    optimizer = optimizers(model)[name]()

    def train(network, chosen, steps=4):
        for _ in range(steps):
            chosen.zero_grad()
            functional.cross_entropy(network(x), y).backward()
            chosen.step()

    train(model, optimizer)
    reference = copy.deepcopy(model)
    again = optimizers(reference)[name]()
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    nodes = find_dummy_nodes(model, x.split(30))
    small, report = compress(model, nodes, x, optimizer)
    assert {2, 4} <= units(report.removed)
    for parameter in small.parameters():
        for value in optimizer.state[parameter].values():
            assert (
                not isinstance(value, torch.Tensor)
                or value.dim() == 0
                or value.shape == parameter.shape
            )
    train(small, optimizer)
    train(reference, again)
    torch.testing.assert_close(small(x), reference(x), rtol=1e-9, atol=1e-9)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)


def test_a_bias_that_took_over_constants_is_trained_too():
    model = nn.Sequential(
        plant(busy(nn.Linear(3, 5)), {2: "constant"}), nn.ReLU(), nn.Linear(5, 2, bias=False)
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = data(50, 3)
    small, _ = compress(model, find_dummy_nodes(model, [x]), x, optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in small.parameters()
    }
    small(x).square().sum().backward()
    before = small[2].bias.detach().clone()
    optimizer.step()
    assert not torch.equal(small[2].bias, before)


def test_an_attached_correction_is_refused_and_a_booster_goes_along():
    model = nn.Sequential(
        plant(busy(nn.Linear(3, 5)), {2: "true"}), nn.ReLU(), nn.Linear(5, 2)
    ).double()
    x = data(50, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counter = truestep.SampleCounter(model)
    handle = truestep.attach(optimizer, truestep.mean_effective_gradient(counter))
    nodes = find_dummy_nodes(model, [x])
    with pytest.raises(
        TruestepError, match=r"mean_effective_gradient attached.*remove\(\) the handle"
    ):
        compress(model, nodes, x, optimizer)
    handle.remove()
    counter.close()
    truestep.attach(optimizer, truestep.directional_boost())
    model(x).square().sum().backward()
    optimizer.step()
    small, _ = compress(model, find_dummy_nodes(model, [x]), x, optimizer)
    optimizer.zero_grad()
    small(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: torch.optim.SGD(nn.Linear(2, 2).parameters()), r"is not the model's"),
        (lambda model: torch.optim.Adafactor(model.parameters()), r"state 'row_var' of '0.weight'"),
    ],
)
def test_optimizers_that_cannot_go_along_are_refused(make, message):
    model = nn.Sequential(
        plant(busy(nn.Linear(3, 5)), {2: "true"}), nn.ReLU(), nn.Linear(5, 2)
    ).double()
    optimizer, x = make(model), data(20, 3)
    model(x).square().sum().backward()
    optimizer.step()
    state = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TruestepError, match=message):
        compress(model, find_dummy_nodes(model, [x]), x, optimizer)
    for one, other in zip(model.parameters(), state, strict=True):
        assert torch.equal(one, other)


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 3),
    )


@pytest.fixture
def small_cnn():
    model = cnn().eval()
    plant(model[0], {1: "true", 3: ("duplicate", 0, 2.0)})
    plant(model[4], {2: "true", 3: "constant"})
    x = torch.randn(40, 1, 8, 8)
    small, report = compress(model, find_dummy_nodes(model, x.split(10)), x[:4])
    assert len(report.removed) >= 3
    return small, report, x


def test_a_saved_state_is_loaded_by_the_models_code(small_cnn):
    small, report, x = small_cnn
    stream = io.BytesIO()
    torch.save(report.checkpoint(small), stream)
    stream.seek(0)
    same = shrink_to(cnn(), torch.load(stream, weights_only=True)).eval()
    assert torch.equal(same(x), small(x))
    assert repr(same) == repr(small)
    same.load_state_dict(small.state_dict())
    alone = shrink_to(cnn(), small.state_dict()).eval()
    assert torch.equal(alone(x), small(x))


def test_a_state_of_another_model_is_refused(small_cnn):
    small, report, _ = small_cnn
    with pytest.raises(TruestepError, match=r"does not belong to this Sequential"):
        shrink_to(nn.Sequential(nn.Linear(3, 3)), report.checkpoint(small))


def test_the_small_model_can_be_exported(small_cnn):
    small, _, x = small_cnn
    exported = torch.export.export(small, (x,)).module()
    assert torch.equal(exported(x), small(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", OF_TORCH)
def test_onnx_of_the_small_model_computes_the_same(small_cnn, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small, _, x = small_cnn
    path = tmp_path / "small.onnx"
    torch.onnx.export(small, (x,), str(path), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), small(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(OF_TORCH)
def test_an_exported_program_is_compressed_too():
    model = cnn().eval()
    plant(model[0], {1: "true"})
    plant(model[4], {2: "true"})
    x = torch.randn(20, 1, 8, 8)
    exported = torch.export.export(model, (x,)).module()
    small, report = compress(exported, find_dummy_nodes(exported, [x]), x)
    assert ("0", 1) in {(one.layer, one.unit) for one in report.removed}
    assert report.after.parameters < report.before.parameters
    again = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


def test_training_mode_stays_and_chance_is_refused():
    model = (
        nn.Sequential(plant(busy(nn.Linear(3, 5)), {2: "true"}), nn.ReLU(), nn.Linear(5, 2))
        .double()
        .train()
    )
    x = data(30, 3)
    small, _ = compress(model, find_dummy_nodes(model, [x]), x)
    assert small.training
    assert all(module.training for module in small.modules())
    model.append(nn.Dropout(0.5))
    nodes = find_dummy_nodes(model.eval(), [x])
    with pytest.raises(TruestepError, match=r"dropout in '3' draws random.*model\.eval"):
        compress(model.train(), nodes, x)


def test_chance_that_is_none_of_torchs_is_refused():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = busy(nn.Linear(3, 5)), nn.Linear(5, 2)

        def forward(self, x):
            return self.second(torch.relu(self.first(x))) * random.random()

    model, x = Moody().double(), data(30, 3)
    with pytest.raises(TruestepError, match=r"two calls .* different outputs.*model\.eval"):
        compress(model, find_dummy_nodes(model, [x]), x)


def test_nodes_of_another_model_or_data_that_changed_are_refused():
    model = nn.Sequential(
        plant(busy(nn.Linear(3, 5)), {2: "true"}), nn.ReLU(), nn.Linear(5, 2)
    ).double()
    x = data(30, 3)
    nodes = find_dummy_nodes(model, [x])
    other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with pytest.raises(TruestepError, match=r"'0' has 4 units, but 5 in the nodes"):
        compress(other, nodes, x)
    with pytest.raises(TruestepError, match=r"is met when this Linear is called"):
        compress(nn.Linear(3, 2).double(), nodes, x)
    with pytest.raises(TruestepError, match=r"nodes is of type list"):
        compress(model, [], x)
    with pytest.raises(TruestepError, match=r"optimizer is of type str"):
        compress(model, nodes, x, "sgd")
    nodes.loader = [x + 1000 * model[0].weight[2].detach()]
    with pytest.raises(TruestepError, match=r"differs by .*find_dummy_nodes again"):
        compress(model, nodes, x)


def test_data_that_are_gone_are_replaced_by_the_example():
    model = nn.Sequential(
        plant(busy(nn.Linear(3, 5)), {2: "true"}), nn.ReLU(), nn.Linear(5, 2)
    ).double()
    x = data(30, 3)
    nodes = find_dummy_nodes(model, iter([x]))
    with pytest.warns(UserWarning, match="gone through only once"):
        _, report = compress(model, nodes, x[:7])
    assert report.compared == 7


def test_the_report_is_plain_data_and_text(small_cnn):
    _, report, _ = small_cnn
    data_ = report.to_dict()
    assert data_["after"]["parameters"] < data_["before"]["parameters"]
    assert data_["after"]["bytes"] < data_["before"]["bytes"]
    assert data_["after"]["flops"] < data_["before"]["flops"]
    assert data_["removed"][0].keys() == {"layer", "unit", "kind", "how"}
    assert data_["before"]["seconds"] > 0 < data_["after"]["seconds"]
    assert str(report).splitlines()[1].startswith("parameters")


def test_a_counter_on_the_large_model_leaves_no_hooks_on_the_small_one():
    model = nn.Sequential(
        plant(busy(nn.Linear(3, 5)), {2: "true"}), nn.ReLU(), nn.Linear(5, 2)
    ).double()
    counter = truestep.SampleCounter(model)
    x = data(30, 3)
    small, _ = compress(model, find_dummy_nodes(model, [x]), x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    counter.close()


def test_a_transformers_feed_forward_units_go():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="relu")
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    for block in model.layers:
        plant(block.linear1, {3: "true", 5: "true"})
    small, report, _ = compressed(model, data(20, 4, 8))
    assert units(report.removed, "layers.0.linear1") >= {3, 5}
    assert small.layers[1].linear2.in_features <= 14


def test_a_gated_unit_whose_gate_is_closed_goes_with_both_its_rows():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = busy(nn.Linear(4, 6)), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.down(torch.relu(self.gate(x)) * self.up(x))

    model = Gated().double()
    plant(model.gate, {2: "true", 3: "constant"})
    small, report, _ = compressed(model, data(100, 4))
    assert units(report.removed) == {2}
    assert small.gate.out_features == small.up.out_features == small.down.in_features == 5
    (kept,) = report.kept
    assert "is constant, but what of it reaches" in kept.reason


def test_a_mask_for_each_sample_leaves_zeros_alone():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = busy(nn.Linear(4, 6)), nn.Linear(6, 2)

        def forward(self, x):
            hidden = torch.relu(self.first(x)) * (x[:, :1] > 0)
            hidden = hidden.masked_fill(x[:, 1:2] > 1, 0.0)
            return self.second(hidden)

    model = Masked().double()
    plant(model.first, {2: "true", 3: "constant", 4: ("duplicate", 0, 2.0)})
    _, report, _ = compressed(model, data(100, 4))
    assert units(report.removed) == {2}


def test_sums_over_positions_of_any_number_keep_constants():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = busy(nn.Linear(4, 6)), nn.Linear(6, 2)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)).sum(1))

    model = Summed().double()
    plant(model.first, {2: "true", 3: "constant"})
    nodes = find_dummy_nodes(model, [data(20, 3, 4), data(20, 5, 4)])
    _, report = compress(model, nodes, data(20, 3, 4))
    assert units(report.removed) == {2}
    assert report.difference <= EXACT


def test_padding_in_a_pool_makes_constants_vary():
    model = nn.Sequential(
        plant(busy(nn.Conv2d(2, 4, 1)), {1: "true", 2: "constant"}),
        nn.ReLU(),
        nn.AvgPool2d(2, padding=1),
        nn.Conv2d(4, 2, 1),
    ).double()
    _, report, _ = compressed(model, data(30, 2, 4, 4))
    assert units(report.removed) == {1}
    assert units(report.kept) == {2}


def test_a_frozen_layer_stays_frozen():
    model = nn.Sequential(
        plant(busy(nn.Linear(3, 5)), {2: "true"}), nn.ReLU(), nn.Linear(5, 2)
    ).double()
    model[0].requires_grad_(requires_grad=False)
    x = data(30, 3)
    small, _ = compress(model, find_dummy_nodes(model, [x]), x)
    assert [p.requires_grad for p in small.parameters()] == [False, False, True, True]


def test_units_to_which_different_things_were_done_are_not_merged():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = busy(nn.Linear(4, 6)), nn.Linear(6, 2)

        def forward(self, x):
            left, right = torch.relu(self.first(x)).chunk(2, -1)
            return self.second(torch.cat([left * x[:, :1].abs(), right], -1))

    model = Halves().double()
    plant(model.first, {2: ("duplicate", 0, 2.0), 4: ("duplicate", 1, 2.0), 5: "true"})
    _, report, _ = compressed(model, data(100, 4))
    assert units(report.removed) == {2, 5}
    (kept,) = report.kept
    assert (kept.unit, "together with unit 1" in kept.reason) == (4, True)


@pytest.mark.parametrize("biased", [True, False])
def test_a_weight_that_another_modules_code_uses_has_no_place_for_a_bias(biased):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = plant(busy(nn.Linear(4, 6)), {2: "constant", 3: "true"})
            self.second = nn.Linear(6, 2, bias=biased)

        def forward(self, x):
            return functional.linear(torch.relu(self.first(x)), self.second.weight)

    _, report, _ = compressed(nn.Sequential(Block()).double(), data(100, 4))
    assert units(report.removed) == {3}
    (kept,) = report.kept
    assert "is used where there is no place for a bias" in kept.reason


# What is kept, carried along or refused.


def with_dummies(units=3):
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias[:units] = -50
    return model


def test_a_batch_size_that_was_set_holds_for_the_smaller_model():
    model, data = with_dummies(), torch.randn(16, 5)
    counter = truestep.SampleCounter(model)
    counter.batch_size = 64
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    nodes = truestep.find_dummy_nodes(model, [data])
    small, _ = truestep.compress(model, nodes, data, optimizer=optimizer)
    small(data).sum().backward()
    assert optimizer.counter.batch_size == 64


def test_a_depthwise_convolution_of_one_channel_is_built_anew():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, groups=4),
            nn.ReLU(),
            nn.Conv2d(4, 2, 1),
        )

    model, data = make(), torch.randn(8, 3, 6, 6)
    with torch.no_grad():
        model[0].bias[1:] = model[2].bias[1:] = -50
    small, report = truestep.compress(model, truestep.find_dummy_nodes(model, [data]), data)
    assert small[2].groups == 1
    again = truestep.shrink_to(make(), report.checkpoint(small))
    assert torch.equal(again(data), small(data))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.bias = nn.Linear(5, 8), nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return nn.functional.linear(self.encode(x).relu(), self.encode.weight.t(), self.bias)


def test_a_constant_unit_of_a_tied_autoencoder_is_compressed_or_kept_with_a_reason():
    model, data = Tied(), torch.randn(64, 5)
    with torch.no_grad():
        model.encode.weight[5], model.encode.bias[5] = 0, 1
    small, report = truestep.compress(model, truestep.find_dummy_nodes(model, [data]), data)
    torch.testing.assert_close(small(data), model(data))
    assert [one.unit for one in (*report.removed, *report.kept)] == [5]


def test_units_behind_unfold_are_kept():
    model, data = (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Unfold(2)),
        torch.randn(4, 3, 8, 8),
    )
    with torch.no_grad():
        model[0].bias[2] = -50
    small, report = truestep.compress(model, truestep.find_dummy_nodes(model, [data]), data)
    assert torch.equal(small(data), model(data))
    assert [one.unit for one in report.kept] == [2]


def test_tensors_of_inference_mode_are_refused():
    data = torch.randn(20, 5)
    with torch.inference_mode(), pytest.raises(TruestepError, match="inference_mode"):
        truestep.find_dummy_nodes(with_dummies(), [data])


def test_lbfgs_is_refused_before_its_first_step_too():
    model, data = with_dummies(), torch.randn(20, 5)
    optimizer = torch.optim.LBFGS(model.parameters())
    nodes = truestep.find_dummy_nodes(model, [data])
    with pytest.raises(TruestepError, match="LBFGS keeps"):
        truestep.compress(model, nodes, data, optimizer=optimizer)


@pytest.mark.parametrize("frozen", [0, 2])
def test_a_layer_is_not_folded_into_a_frozen_one(frozen):
    model, data = with_dummies(0), torch.randn(32, 5)
    with torch.no_grad():
        model[0].bias[:] = 60
    model[frozen].requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD(model[2 - frozen].parameters(), lr=0.1)
    nodes = truestep.find_dummy_nodes(model, [data])
    small, _ = truestep.compress(model, nodes, data, optimizer=optimizer)
    trained = [p for p in small.parameters() if p.requires_grad]
    assert {*map(id, trained)} == {*map(id, optimizer.param_groups[0]["params"])}
    assert trained


def test_a_frozen_model_stays_frozen():
    model, data = (
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)),
        torch.randn(32, 5),
    )
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 1
    model.requires_grad_(requires_grad=False)
    small, report = truestep.compress(model, truestep.find_dummy_nodes(model, [data]), data)
    assert report.removed
    assert not any(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize("norm", [False, True])
def test_a_layer_that_gets_a_bias_loses_units_of_its_own_too(norm):
    middle = nn.Linear(5, 6, bias=False)
    model = nn.Sequential(
        plant(busy(nn.Linear(4, 5)), {2: "constant"}),
        nn.ReLU(),
        middle,
        *([nn.BatchNorm1d(6)] if norm else []),
        nn.ReLU(),
        nn.Linear(6, 2),
    )
    with torch.no_grad():
        middle.weight[3] = -middle.weight[3].abs()
    small, report, _ = compressed(model.double().eval(), data(300, 4))
    assert units(report.removed, "0") == {2}
    assert 3 in units(report.removed, "2")
    assert len(small[2].bias) == small[2].out_features < 6
