import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import truestep
from planting import straighten
from properties import called
from test_compression import busy, compressed, data, units
from truestep import compress, find_dummy_nodes, shrink_to

# By function: where it is a straight line that is not level, in two finite ends.
PIECES = {
    "relu": (0.0, 40.0),
    "relu6": (0.0, 6.0),
    "leaky_relu": (0.0, 40.0),
    "elu": (0.0, 40.0),
    "celu": (0.0, 40.0),
    "selu": (0.0, 40.0),
    "hardtanh": (-1.0, 1.0),
    "hardsigmoid": (-3.0, 3.0),
    "hardswish": (3.0, 40.0),
    "softshrink": (0.5, 40.0),
}


class Coded(nn.Module):
    """The activation function stands in the code, so no module can take its place."""

    def __init__(self, name, first, second, between=None):
        super().__init__()
        self.name, self.first, self.second = name, first, second
        self.between = nn.Identity() if between is None else between

    def forward(self, x):
        return self.second(getattr(functional, self.name)(self.between(self.first(x))))


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def removed_lines(report):
    return [one for one in report.removed if "straight lines that became" in one.how]


@given(st.data())
def test_as_many_straight_units_stay_as_the_next_layer_has_outputs(drawn):
    name = drawn.draw(st.sampled_from(sorted(PIECES)))
    straight = drawn.draw(st.integers(0, 8))
    outputs = drawn.draw(st.integers(1, 5))
    # What is planted is z, so a norm before it has to leave it as it is.
    first = straighten(busy(nn.Linear(12, 9)), range(straight), *PIECES[name])
    second = nn.Linear(9, outputs, bias=drawn.draw(st.booleans()))
    model = Coded(name, first, second).double()
    small, report, nodes = compressed(model, data(400, 12))
    slopes, _ = truestep.activations.find_activation(name, (), {}).line(
        nodes["first"].lowest, nodes["first"].highest
    )
    lines = int((slopes.isfinite() & (slopes != 0)).sum())
    assert lines >= straight
    assert len(removed_lines(report)) == max(0, lines - outputs)
    assert small.first.out_features == small.second.in_features == 9 - len(report.removed)


@pytest.mark.parametrize("where", ["before", "behind", "both"])
def test_norms_around_the_activation_are_seen_through(where):
    norms = {}
    for name in ("before", "behind"):
        norms[name] = nn.Identity()
        if where in {name, "both"}:
            norms[name] = nn.BatchNorm1d(7)
            nn.init.uniform_(norms[name].weight, 0.5, 2)
            nn.init.uniform_(norms[name].bias)
            nn.init.uniform_(norms[name].running_mean)
    first = straighten(busy(nn.Linear(12, 7)), range(7), 2.0, 40.0)
    model = Coded("relu", first, nn.Sequential(norms["behind"], nn.Linear(7, 2)), norms["before"])
    model = model.double().eval()
    small, report, _ = compressed(model, data(300, 12))
    assert len(report.removed) == 5
    assert small.first.out_features == 2
    if where != "behind":
        assert small.between.num_features == 2


@pytest.mark.parametrize("kernel", [1, 3])
def test_channels_that_the_next_convolution_needs_fewer_of(kernel):
    first = straighten(busy(nn.Conv2d(3, 20, 3, padding=1)), range(20), 0.0, 90.0)
    model = Coded("relu", first, nn.Conv2d(20, 2, kernel)).double()
    small, report, _ = compressed(model, data(40, 3, 6, 6), exact=1e-11)
    assert small.first.out_channels == small.second.in_channels == 2 * kernel**2
    assert len(report.removed) == 20 - 2 * kernel**2


def test_zeros_around_the_next_convolution_keep_the_channels():
    first = straighten(busy(nn.Conv2d(3, 20, 3, padding=1)), range(20), 0.0, 90.0)
    model = Coded("relu", first, nn.Conv2d(20, 2, 3, padding=1)).double()
    _, report, _ = compressed(model, data(40, 3, 6, 6))
    assert not report.removed
    assert units(report.kept) == set(range(20))


class Flat(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.first = straighten(busy(nn.Conv2d(2, 12, 1)), range(12), 0.0, 90.0)
        self.pool, self.second = pool, nn.LazyLinear(1)

    def forward(self, x):
        return self.second(self.pool(functional.relu(self.first(x))).flatten(1))


POOLS = {
    "none": (nn.Identity(), True),
    "average": (nn.AvgPool2d(2), True),
    "average of all": (nn.AdaptiveAvgPool2d(1), True),
    "average with zeros": (nn.AvgPool2d(2, padding=1), False),
    "upsampled": (nn.Upsample(scale_factor=2, mode="bilinear"), True),
    "maximum": (nn.MaxPool2d(2), False),
    "powers": (nn.LPPool2d(2, 2), False),
}


@pytest.mark.parametrize("name", POOLS)
def test_what_stands_between_must_leave_constants_as_they_are(name):
    pool, merges = POOLS[name]
    model = Flat(pool).double()
    x = data(60, 2, 2, 2)
    model(x[:1])
    model = model.double()
    small, report, _ = compressed(model, x, exact=1e-11)
    # Two inputs make of all channels combinations of two; only where constants stay can they be.
    assert bool(report.removed) == merges
    assert (small.first.out_channels < 12) == merges


@pytest.mark.parametrize("name", ["sum", "gate", "pad"])
def test_a_constant_part_that_does_not_stay_one_is_a_reason_and_no_error(name):
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = straighten(busy(nn.Linear(2, 8)), range(8), 0.0, 90.0)
            nn.init.uniform_(self.first.bias, 45, 50)
            self.second = nn.Linear(8, 3)

        def forward(self, x):
            y = functional.relu(self.first(x))
            if name == "sum":
                return self.second(y.sum(1))
            if name == "gate":
                return self.second(y * x[..., :1].abs())
            return self.second(functional.pad(y.mT, (1, 1)).mT)

    _, report, _ = compressed(Changed().double(), data(200, 3, 2))
    assert not report.removed
    reasons = [one.reason for one in report.kept]
    assert len(reasons) == 8
    # Two of them are what the others would be combinations of.
    assert sum("constant part that does not stay one" in reason for reason in reasons) == 6


class Several(nn.Module):
    """Units that several layers read."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first = straighten(busy(nn.Linear(12, 9)), range(9), 0.0, 90.0)
        self.left, self.right = nn.Linear(9, 2), nn.Linear(9, 3)
        self.back = nn.Linear(9, 12)

    def forward(self, x):
        y = functional.relu(self.first(x))
        if self.kind == "two readers":
            return torch.cat([self.left(y), self.right(y)], -1)
        if self.kind == "an output":
            return self.left(y), y
        if self.kind == "called twice":
            return self.left(functional.relu(self.first(self.back(y))))
        if self.kind == "also before the activation":
            return self.left(y) + self.left(self.first(x))
        return self.left(y * torch.sigmoid(self.first(x)))


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("two readers", 5),
        ("an output", 9),
        ("called twice", 9),
        ("also before the activation", 9),
        ("a gate", 9),
    ],
)
def test_every_layer_that_reads_the_units_is_served(kind, left):
    model = Several(kind).double()
    small, _, _ = compressed(model, data(300, 12), forward=called, exact=1e-11)
    assert small.first.out_features == left


def test_layers_in_a_row_get_smaller_from_the_last_one():
    first = straighten(busy(nn.Linear(12, 9)), range(5), 0.0, 90.0)
    second, x = straighten(busy(nn.Linear(9, 8)), range(6), 0.0, 90.0), data(300, 12)
    with torch.no_grad():
        second.weight[:6] /= 30  # inputs are up to 90
        second.bias[6:] = -(first(x).relu() @ second.weight[6:].T).median(0).values
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(8, 1)).double()
    small, report, _ = compressed(model, x, exact=1e-11)
    # Of the second layer two that bend and one line stay: so the first needs three lines.
    assert small[2].out_features == 3
    assert small[0].out_features == 7
    assert {one.layer for one in removed_lines(report)} == {"0", "2"}


def test_a_layer_whose_activation_is_a_module_is_folded_instead():
    first = straighten(busy(nn.Linear(12, 9)), range(9), 0.0, 90.0)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(9, 2)).double()
    small, report, _ = compressed(model, data(100, 12), exact=1e-11)
    assert isinstance(small[1], nn.Identity)
    assert report.after.parameters == 12 * 2 + 2


def coded():
    return Coded("relu", nn.Linear(12, 9), nn.Linear(9, 2))


def test_training_goes_on_and_the_state_of_rewritten_layers_begins_anew():
    model = coded().double()
    straighten(busy(model.first), range(9), 0.0, 90.0)
    x = data(100, 12)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    functional.mse_loss(model(x), torch.ones(100, 2).double()).backward()
    optimizer.step()
    small, report = compress(model, find_dummy_nodes(model, [x]), x, optimizer)
    assert removed_lines(report)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = functional.mse_loss(small(x), torch.ones(100, 2).double())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(len(optimizer.state[p]) for p in small.parameters())


def test_the_state_is_loaded_by_the_models_code_and_rounding_is_that_of_the_type():
    model = coded()
    straighten(model.first, range(9), 0.0, 9.0)
    x = data(500, 12).float()
    small, report = compress(model, find_dummy_nodes(model, x.split(100)), x)
    assert small.first.out_features == 2
    assert report.difference <= 1e-5 * report.largest
    stream = io.BytesIO()
    torch.save(report.checkpoint(small), stream)
    stream.seek(0)
    same = shrink_to(coded(), torch.load(stream, weights_only=True))
    assert torch.equal(same(x), small(x))


def test_half_precision_is_left_alone():
    model = coded().bfloat16()
    straighten(model.first, range(9), 0.0, 9.0)
    x = data(50, 12).bfloat16()
    _, report = compress(model, find_dummy_nodes(model, [x]), x)
    assert not report.removed


def test_units_that_are_read_in_different_ways_are_not_written_as_each_other():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = straighten(busy(nn.Linear(12, 8)), range(8), 0.0, 90.0)
            self.second = nn.Linear(8, 1)

        def forward(self, x):
            left, right = functional.relu(self.first(x)).chunk(2, -1)
            return self.second(torch.cat([left * x[:, :1].abs(), right], -1))

    model = Halves().double()
    before = copy.deepcopy(model.state_dict())
    compressed(model, data(200, 12), exact=1e-11)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_layers_without_a_bias_get_one(bias):
    first = nn.Conv2d(3, 12, 3, bias=bias)
    norm = nn.BatchNorm2d(12)
    nn.init.constant_(norm.bias, 50.0)
    model = Coded("relu", first, nn.Conv2d(12, 2, 1, bias=bias), norm).double().eval()
    x = data(40, 3, 6, 6)
    small, report, _ = compressed(model, x, exact=1e-11)
    assert small.first.out_channels == small.between.num_features == 2
    assert small.first.bias is not None
    fresh = Coded("relu", nn.Conv2d(3, 12, 3, bias=bias), nn.Conv2d(12, 2, 1, bias=bias))
    fresh.between = nn.BatchNorm2d(12)
    same = shrink_to(fresh.double().eval(), report.checkpoint(small))
    assert torch.equal(same(x), small(x))


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_straight_units_become_fewer_in_the_type_of_their_own_layer(first):
    other = torch.float64 if first is torch.float32 else torch.float32
    straight = straighten(busy(nn.Linear(6, 12)), range(8), 0.0, 90.0)
    behind = [straight, nn.ReLU(), nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 2)]
    model = nn.Sequential(
        busy(nn.Linear(5, 6)).to(first), nn.ReLU(), Cast(other), *[m.to(other) for m in behind]
    )
    batch = data(200, 5).to(first)
    small, report = compress(model, find_dummy_nodes(model, [batch]), batch)
    assert removed_lines(report)
    assert [p.dtype for p in small.parameters()] == [p.dtype for p in model.parameters()]
