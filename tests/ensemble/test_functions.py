import math

import numpy as np
import pytest

numba = pytest.importorskip("numba")


@pytest.mark.parametrize(
    ("name", "exact", "low", "high", "ulps"),
    [
        ("exp", math.exp, -87, 88, 1.5),
        ("log", math.log, 1e-30, 1e30, 1.5),
        ("sigmoid", lambda x: 1 / (1 + math.exp(-x)), -80, 80, 3),
        ("tanh", math.tanh, -10, 10, 2),
        ("erf", math.erf, -5, 5, 8),
    ],
)
def test_to_units_in_the_last_place(name, exact, low, high, ulps):
    from truestep.kernels.loops import functions  # noqa: PLC0415

    function = getattr(functions, name)
    places = np.linspace(low, high, 5001) if low < 0 else np.geomspace(low, high, 5001)
    for x in places.astype(np.float32):
        expected = exact(float(x))
        assert abs(function(x) - expected) <= ulps * np.spacing(np.float32(abs(expected)))


def test_beyond_all_bounds():
    from truestep.kernels.loops import functions  # noqa: PLC0415

    infinite = np.float32(np.inf)
    assert functions.exp(infinite) == np.inf
    assert functions.exp(-infinite) == 0
    assert functions.sigmoid(-infinite) == 0
    assert functions.tanh(infinite) == 1
    assert functions.erf(-infinite) == -1
    assert functions.log(infinite) == np.inf
    for name in ("exp", "sigmoid", "tanh", "erf"):
        assert np.isnan(getattr(functions, name)(np.float32(np.nan)))
