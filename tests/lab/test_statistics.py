import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_result

from truestep import TruestepError
from truestep.lab.statistics import (
    at_reference,
    choose,
    interval,
    landscape,
    learning_curves,
    paired_difference,
    reach,
    summarise,
)

values = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20)


@given(values, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_interval_is_scipys_t_interval(numbers, level):
    mean, low, high = interval(numbers, level)
    error = scipy.stats.sem(numbers)
    assert mean == pytest.approx(np.mean(numbers), abs=1e-9)
    if error > 0:
        expected = scipy.stats.t.interval(level, len(numbers) - 1, loc=mean, scale=error)
        assert (low, high) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    else:
        assert (low, high) == (mean, mean)


def test_interval_by_hand():
    # sd = 1, n = 3, t(0.975, 2) = 4.302653
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert high - mean == mean - low == pytest.approx(4.302653 / math.sqrt(3))


@pytest.mark.parametrize(
    ("numbers", "mean"),
    [
        ([], math.nan),
        ([3.0], 3.0),
        ([1.0, math.nan], math.nan),
        ([1.0, math.inf], math.inf),
        ([-math.inf, math.inf], math.nan),
    ],
)
def test_no_interval_is_invented(numbers, mean):
    result = interval(numbers)
    assert result.mean == pytest.approx(mean, nan_ok=True)
    assert math.isnan(result.low)
    assert math.isnan(result.high)


def test_differences_are_paired_by_seed_not_by_position():
    a = {0: 10.0, 1: 20.0, 2: 30.0}
    b = {2: 27.0, 1: 18.0, 0: 9.0, 7: -100.0}
    mean, low, high, n = paired_difference(a, b)
    assert (mean, n) == (2.0, 3)
    assert (low, high) == pytest.approx(interval([1.0, 2.0, 3.0])[1:])


def test_pairing_finds_what_the_seeds_scatter_hides():
    a = {seed: 10.0 * seed + 0.1 + 0.001 * (-1) ** seed for seed in range(5)}
    b = {seed: 10.0 * seed for seed in range(5)}
    assert paired_difference(a, b).low > 0.09
    assert interval(a.values()).low < interval(b.values()).mean


def test_one_pair_and_no_pair_have_no_bounds():
    assert paired_difference({0: 3.0}, {0: 1.0})[::3] == (2.0, 1)
    assert math.isnan(paired_difference({0: 3.0}, {0: 1.0}).low)
    mean, *_, n = paired_difference({0: 3.0}, {1: 1.0})
    assert math.isnan(mean)
    assert n == 0


def grid(losses_by_lr, optimizer="sgd", **more):
    """Selection runs: {lr: [lowest validation loss of each seed, or None for diverged]}."""
    return [
        make_result(optimizer, lr, seed=seed, losses=(loss + 1, loss, loss + 2), **more)
        if loss is not None
        else make_result(
            optimizer, lr, seed=seed, losses=(3.0, math.nan), status="diverged", **more
        )
        for lr, losses in losses_by_lr.items()
        for seed, loss in enumerate(losses)
    ]


def test_landscape_means_over_seeds_and_counts_diverged():
    table = landscape(grid({0.1: [1.0, 2.0, 3.0], 0.3: [1.0, None, 2.0], 1.0: [None] * 3}))
    assert table.loc[("sgd", 64, 0.1)].tolist() == pytest.approx(
        [2.0, *interval([1.0, 2.0, 3.0])[1:], 2.0, 3, 0]
    )
    assert table.loc[("sgd", 64, 0.3), ["loss", "finished_loss", "seeds", "diverged"]].tolist() == [
        math.inf,
        1.5,
        3,
        1,
    ]
    assert table.loc[("sgd", 64, 1.0), "diverged"] == 3
    assert math.isnan(table.loc[("sgd", 64, 1.0), "finished_loss"])


def test_the_lowest_mean_over_seeds_wins_not_the_lowest_run():
    chosen = choose(grid({0.1: [1.1, 1.1], 0.3: [0.9, 1.5], 1.0: [1.2, 1.2]}))
    assert chosen.loc[("sgd", 64), ["lr", "loss"]].tolist() == pytest.approx([0.1, 1.1])


def test_each_optimizer_and_batch_size_has_its_own():
    results = (
        grid({0.1: [1.0], 0.3: [2.0]}, batch_size=32)
        + grid({0.1: [2.0], 0.3: [1.0]}, batch_size=64)
        + grid({0.01: [2.0], 0.03: [1.0]}, optimizer="adam", batch_size=64)
    )
    assert choose(results)["lr"].to_dict() == {
        ("sgd", 32): 0.1,
        ("sgd", 64): 0.3,
        ("adam", 64): 0.03,
    }


def test_test_results_have_no_say():
    results = grid({0.1: [1.0], 0.3: [2.0]}) + grid({0.3: [0.001]}, final=True)
    assert choose(results).loc[("sgd", 64), "lr"] == 0.1


def test_a_diverged_run_loses_to_any_that_finished():
    chosen = choose(grid({0.1: [9.0, 9.0], 0.3: [0.1, None]}))
    assert chosen.loc[("sgd", 64), "lr"] == 0.1
    assert chosen.loc[("sgd", 64), "diverged"] == 0.25


def test_where_all_diverge_somewhere_the_fewest_win():
    results = grid({0.1: [5.0, None, None], 0.3: [3.0, None, 3.0], 1.0: [2.0, 1.0, None]})
    chosen = choose(results).loc[("sgd", 64)]
    assert (chosen["lr"], chosen["loss"]) == (1.0, math.inf)
    assert (chosen["good_low"], chosen["good_high"]) == (1.0, 1.0)


def test_where_every_run_diverged_there_is_no_choice():
    chosen = choose(grid({0.1: [None], 0.3: [None, None]})).loc[("sgd", 64)]
    assert math.isnan(chosen["lr"])
    assert not chosen["at_edge"]
    assert chosen["diverged"] == 1.0


def test_an_unfinished_learning_rate_does_not_hide_a_finished_one():
    # Fewer runs, all diverged, against as many diverged runs beside a finished one.
    chosen = choose(grid({0.1: [None], 0.3: [None, 2.0]}))
    assert chosen.loc[("sgd", 64), "lr"] == 0.3


def test_equal_losses_choose_the_smaller_learning_rate():
    assert choose(grid({0.3: [1.0], 0.1: [1.0]})).loc[("sgd", 64), "lr"] == 0.1


@pytest.mark.parametrize(
    ("losses", "edge"),
    [
        ({0.1: [1.0], 0.3: [2.0], 1.0: [3.0]}, True),
        ({0.1: [3.0], 0.3: [2.0], 1.0: [1.0]}, True),
        ({0.1: [3.0], 0.3: [1.0], 1.0: [2.0]}, False),
        # The grid went on to a learning rate that diverged: nothing better lies beyond.
        ({0.1: [3.0], 0.3: [1.0], 1.0: [None]}, False),
        ({0.1: [1.0]}, True),
    ],
)
def test_a_choice_at_the_edge_of_its_grid_is_flagged(losses, edge):
    assert choose(grid(losses)).loc[("sgd", 64), "at_edge"] == edge


def test_the_good_band_is_unbroken_and_within_five_percent():
    losses = {0.01: [1.0], 0.03: [1.06], 0.1: [1.05], 0.3: [1.0], 1.0: [1.049], 3.0: [1.051]}
    losses[0.3] = [0.999]  # the best; 5 % more is 1.04895
    losses[1.0] = [1.04]
    chosen = choose(grid(losses)).loc[("sgd", 64)]
    assert (chosen["good_low"], chosen["good_high"]) == (0.3, 1.0)
    assert chosen["grid"] == (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def test_the_good_band_of_a_negative_loss_lies_above_it():
    chosen = choose(grid({0.1: [-0.96], 0.3: [-1.0], 1.0: [-0.9]})).loc[("sgd", 64)]
    assert (chosen["good_low"], chosen["good_high"]) == (0.1, 0.3)


def test_no_runs_give_empty_tables():
    chosen = choose([])
    assert len(chosen) == 0
    assert len(summarise([], chosen)) == 0


def test_reach_is_the_first_evaluation_at_the_target():
    run = make_result(losses=(2.0, 1.0, 0.5, 1.0))
    assert reach(run, ("loss", 1.0)) == {"epoch": 2, "step": 20, "seconds": 1.0}
    assert reach(run, ("loss", 0.4))["step"] == math.inf
    # The accuracies are 0.5, 0.75, 0.875, 0.75.
    assert reach(run, ("accuracy", 0.8))["epoch"] == 3
    assert reach(make_result(losses=(math.nan,)), ("loss", 1.0))["epoch"] == math.inf


def test_a_target_that_is_not_measured_is_named():
    with pytest.raises(TruestepError, match=r"'accuarcy' is not among .*accuracy.*or 'loss'\.$"):
        reach(make_result(), ("accuarcy", 0.5))


def finals(optimizer, lr, test_losses, **more):
    return [
        make_result(
            optimizer, lr, seed=seed, final=True, test={"loss": loss, "accuracy": 1 - loss}, **more
        )
        for seed, loss in test_losses.items()
    ]


@pytest.fixture
def race():
    selection = grid({0.1: [1.0, 1.0, 1.0], 0.3: [2.0, 2.0, 2.0]})
    selection += grid({0.01: [0.9, 0.8, 0.7]}, optimizer="adam")
    return [
        *selection,
        *finals("sgd", 0.1, {0: 0.5, 1: 0.6, 2: 0.7}, step_seconds=0.002, optimizer_bytes=0),
        *finals("sgd", 0.3, {0: 9.0, 1: 9.0, 2: 9.0}),  # for the thin line of a figure
        *finals("adam", 0.01, {2: 0.5, 1: 0.5, 0: 0.4}, step_seconds=0.003, optimizer_bytes=800),
    ]


def test_summary_reads_the_final_runs_of_the_chosen_learning_rate(race):
    table = summarise(race, choose(race))
    sgd, adam = table.loc[("sgd", 64)], table.loc[("adam", 64)]
    assert (sgd["lr"], adam["lr"]) == (0.1, 0.01)
    assert sgd[["test_loss", "test_loss_low", "test_loss_high"]].tolist() == pytest.approx(
        interval([0.5, 0.6, 0.7])
    )
    assert sgd["test_accuracy"] == pytest.approx(0.4)
    assert (sgd["seeds"], sgd["diverged_seeds"]) == (3, 0)


def test_summary_pairs_with_the_baseline_by_seed(race):
    table = summarise(race, choose(race))
    names = ["test_loss_difference", "test_loss_difference_low", "test_loss_difference_high"]
    assert table.loc[("adam", 64), names].tolist() == pytest.approx(interval([-0.1, -0.1, -0.2]))
    assert table.loc[("adam", 64), "pairs"] == 3
    assert table.loc[("sgd", 64), names].tolist() == [0, 0, 0]


def test_another_baseline_or_none(race):
    other = summarise(race, choose(race), baseline="adam")
    assert other.loc[("sgd", 64), "test_loss_difference"] == pytest.approx(0.4 / 3)
    missing = summarise(race, choose(race), baseline="adagrad")
    assert missing["test_loss_difference"].isna().all()
    assert missing["step_ratio"].isna().all()
    assert (missing["pairs"] == 0).all()


def test_summary_of_cost(race):
    adam = summarise(race, choose(race)).loc[("adam", 64)]
    assert adam["step_seconds"] == 0.003
    assert adam["step_ratio"] == pytest.approx(1.5)
    assert adam["bytes_per_parameter"] == 8.0


def test_summary_of_the_target_counts_seeds_that_never_reach_it():
    results = [
        make_result(seed=0, final=True, losses=(2.0, 1.0)),
        make_result(seed=1, final=True, losses=(1.0, 1.0)),
        make_result(seed=2, final=True, losses=(2.0, 2.0)),
    ]
    chosen = choose(grid({0.1: [1.0]}))
    row = summarise(results, chosen, target=("loss", 1.0)).loc[("sgd", 64)]
    assert row["reached"] == pytest.approx(2 / 3)
    assert row["epoch_to_target"] == 2
    assert row["step_to_target"] == 20
    assert row["seconds_to_target"] == 1.0
    row = summarise(results[1:], chosen, target=("loss", 1.0)).loc[("sgd", 64)]
    assert row["epoch_to_target"] == math.inf
    assert "reached" not in summarise(results, chosen).columns


def test_diverged_final_runs_are_counted_and_kept_out_of_the_mean():
    chosen = choose(grid({0.1: [1.0, 1.0, None]}))
    results = [
        *finals("sgd", 0.1, {0: 0.5, 1: 0.7}),
        *finals("sgd", 0.1, {2: 99.0}, status="diverged"),
    ]
    row = summarise(results, chosen).loc[("sgd", 64)]
    assert (row["seeds"], row["diverged_seeds"], row["pairs"]) == (3, 1, 2)
    assert row["test_loss"] == pytest.approx(0.6)


def test_an_optimizer_without_final_runs_keeps_its_row(race):
    results = [*race, *grid({0.1: [None]}, optimizer="dasgd")]
    row = summarise(results, choose(results), target=("loss", 1.0)).loc[("dasgd", 64)]
    assert row["seeds"] == 0
    assert row[["lr", "test_loss", "step_ratio", "reached"]].isna().all()


def test_the_summary_keeps_what_the_choice_says_of_itself(race):
    row = summarise(race, choose(race)).loc[("sgd", 64)]
    assert row["at_edge"]
    assert row["diverged"] == 0


def test_one_batch_sizes_learning_rates_for_all():
    results = grid({0.1: [1.0], 0.3: [2.0]}, batch_size=32)
    results += grid({0.1: [2.0], 0.3: [1.0]}, batch_size=64)
    results += grid({0.01: [2.0]}, optimizer="adam", batch_size=32)
    fixed = at_reference(choose(results), 64)
    assert fixed.loc["sgd", "lr"].to_dict() == {32: 0.3, 64: 0.3}
    assert math.isnan(fixed.loc[("adam", 32), "lr"])
    finals_ = finals("sgd", 0.3, {0: 5.0}, batch_size=32) + finals(
        "sgd", 0.1, {0: 1.0}, batch_size=32
    )
    assert summarise(finals_, fixed).loc[("sgd", 32), "test_loss"] == 5.0


def test_learning_curves_are_of_the_chosen_learning_rate_over_finished_seeds():
    chosen = choose(grid({0.1: [1.0]}))
    results = [
        make_result(seed=0, losses=(9.0, 9.0), final=False),  # repeated by the final run
        make_result(seed=0, losses=(3.0, 1.0), final=True),
        make_result(seed=1, losses=(5.0, 2.0), final=False),
        make_result(seed=2, losses=(7.0,), status="diverged"),
        make_result(seed=0, losses=(0.0, 0.0), lr=0.3),
    ]
    table = learning_curves(results, chosen, "loss")
    assert table["mean"].to_dict() == {("sgd", 64, 1): 4.0, ("sgd", 64, 2): 1.5}
    assert table.loc[("sgd", 64, 1)].tolist() == pytest.approx(interval([3.0, 5.0]))
    accuracy = learning_curves(results, chosen, "accuracy")
    assert accuracy.loc[("sgd", 64, 2), "mean"] == pytest.approx(1 - 1.5 / 4)
