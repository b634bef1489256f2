"""What compression does to units of every activation function that are off, on, or somewhere in between."""

import pytest
import torch
from torch import nn

from planting import straighten
from test_compression import busy, compressed, data
from test_nodes import ACTIVATIONS
from truestep.activations import find_activation

# Where units are kept; far from 0 smooth functions are constant or straight to the last place.
RANGES = {
    "far off": (-900.0, -800.0),
    "off": (-1.2, -0.2),
    "on": (3.5, 5.5),
    "far on": (800.0, 900.0),
}
# What becomes of a single such unit beside others that bend.
GONE = {
    "relu": {"far off", "off"},
    "relu6": {"far off", "off", "far on"},
    "leaky_relu": set(),
    "prelu": set(),
    "elu": {"far off"},
    "celu": {"far off"},
    "selu": {"far off"},
    "gelu": {"far off"},
    "silu": {"far off"},
    "mish": {"far off"},
    "softplus": {"far off"},
    "sigmoid": {"far off", "far on"},
    "tanh": {"far off", "far on"},
    "hardtanh": {"far off", "on", "far on"},
    "hardsigmoid": {"far off", "on", "far on"},
    "hardswish": {"far off"},
    "softsign": set(),
    "logsigmoid": {"far on"},
    "tanhshrink": set(),
    "hardshrink": set(),
    "softshrink": set(),
    "threshold": {"far off", "off"},
}
REASONS = {"off": "is never on, but its output varies", "on": "is always on, and no combination"}


def test_every_activation_has_its_row():
    assert GONE.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("where", RANGES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_unit_goes_where_it_is_constant_and_is_listed_otherwise(name, where):
    first = straighten(busy(nn.Linear(6, 5)), [2], *RANGES[where])
    model = nn.Sequential(first, ACTIVATIONS[name](), nn.Linear(5, 3)).double()
    small, report, nodes = compressed(model, data(400, 6))
    kind = "true" if where.endswith("off") else "pseudo"
    assert bool(getattr(nodes["0"], kind)[2])
    assert {one.unit for one in report.removed} == ({2} if where in GONE[name] else set())
    assert small[0].out_features == 5 - (where in GONE[name])
    if where not in GONE[name]:
        (kept,) = report.kept
        assert kept.unit == 2
        assert REASONS[where.removeprefix("far ")] in kept.reason
        assert name in kept.reason


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_straight_pieces_are_straight_and_rising_functions_rise(name):
    function = ACTIVATIONS[name]().double()
    given = {"leaky_relu": (0.2,), "threshold": (-0.1, -0.3)}.get(name, ())
    known = find_activation(name, given, {})
    z = torch.linspace(-9, 9, 4001).double()
    with torch.no_grad():
        y = function(z)
    for piece in known.pieces:
        inside = (z >= piece.low) & (z <= piece.high)
        line = piece.slope * z[inside] + piece.intercept
        torch.testing.assert_close(y[inside], line, rtol=1e-14, atol=1e-14)
    if known.rising:
        assert bool((y.diff() >= 0).all())
