import numpy as np
import pytest

from truestep.ensemble import Network
from truestep.ensemble.starts import first_parameters, orders

INPUTS, OUTPUTS = 300, 200


@pytest.mark.parametrize(
    ("start", "deviation", "bound"),
    [
        ("torch", (1 / (3 * INPUTS)) ** 0.5, INPUTS**-0.5),
        ("glorot_uniform", (2 / (INPUTS + OUTPUTS)) ** 0.5, (6 / (INPUTS + OUTPUTS)) ** 0.5),
        ("glorot_normal", (2 / (INPUTS + OUTPUTS)) ** 0.5, np.inf),
        ("he_uniform", (2 / INPUTS) ** 0.5, (6 / INPUTS) ** 0.5),
        ("he_normal", (2 / INPUTS) ** 0.5, np.inf),
        ("uniform", 0.5 / 3**0.5, 0.5),
        ("normal", 0.5, np.inf),
    ],
)
def test_weights_have_the_spread_of_their_name(start, deviation, bound):
    network = Network((INPUTS, OUTPUTS), start=start, scale=0.5)
    ((weight, bias),) = network.split(first_parameters(network, 7))
    # The standard error of a deviation of 60,000 numbers is 0.3 %.
    assert abs(weight.std() / deviation - 1) < 0.02
    assert abs(weight.mean()) < 5 * deviation / weight.size**0.5
    assert abs(weight).max() <= bound
    assert (bias != 0).any() == (start == "torch")


def test_starts_differ_by_seed_and_layer():
    network = Network((4, 4, 4))
    first, second = (first_parameters(network, seed) for seed in (0, 1))
    (one, _), (two, _) = network.split(first)
    assert (first != second).all()
    assert (one != two).all()
    assert (first == first_parameters(network, 0)).all()


def test_orders_are_permutations_that_do_not_depend_on_the_epochs_before():
    whole = orders([3, 4], range(5), 50).reshape(2, 5, 50)
    assert (np.sort(whole) == np.arange(50)).all()
    assert len({tuple(row) for row in whole.reshape(10, 50).tolist()}) == 10
    assert (orders([4], range(3, 5), 50)[0] == whole[1, 3:].ravel()).all()


def test_every_sample_is_equally_likely_everywhere():
    first = orders(range(20_000), range(1), 6)[:, :1]
    counts = np.bincount(first.ravel(), minlength=6)
    # Chi-square with 5 degrees of freedom: 20.5 has probability 0.001.
    assert ((counts - 20_000 / 6) ** 2 / (20_000 / 6)).sum() < 20.5
