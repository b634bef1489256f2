import math

import pytest
from synthetic import make_race, make_result

from truestep.lab.findings import findings, notes
from truestep.lab.statistics import choose, summarise


def told(results, baseline="sgd"):
    chosen = choose(results)
    summary = summarise(results, chosen, baseline)
    return findings(summary), notes(summary, chosen)


def grid(optimizer, losses, *, seeds=2, best=None):
    """Selection runs, and final runs at the best, all finishing."""
    best = min(losses, key=losses.get) if best is None else best
    return [
        make_result(optimizer, lr, seed=seed, losses=(loss,))
        for lr, loss in losses.items()
        for seed in range(seeds)
    ] + [
        make_result(
            optimizer,
            best,
            seed=seed,
            final=True,
            losses=(losses[best],),
            test={"loss": losses[best] + 0.01 * seed},
        )
        for seed in range(seeds)
    ]


INSIDE = {0.1: 2.0, 0.3: 1.0, 1.0: 2.0}


def test_the_first_and_its_distance_to_the_baseline():
    (sentence,), _ = told(make_race(("sgd", "adam", "asgd")))
    assert sentence.startswith("adam has the lowest mean test loss, 1.0")
    assert "It differs from sgd by -0.096 ± 0.023" in sentence
    assert "scatter" not in sentence


def test_a_baseline_that_wins_is_said_to_win():
    (sentence,), _ = told(grid("sgd", INSIDE) + grid("adam", {0.1: 3.0, 0.3: 1.5, 1.0: 2.0}))
    assert sentence.startswith("sgd has the lowest")
    assert "adam, the next, differs by 0.5" in sentence


def test_a_difference_within_the_scatter_is_said_to_be():
    sgd, adam = grid("sgd", INSIDE), grid("adam", INSIDE)
    adam[-1] = make_result("adam", 0.3, seed=1, final=True, losses=(1.0,), test={"loss": 1.0})
    (sentence,), _ = told(sgd + adam)
    assert sentence.startswith("adam has the lowest")
    assert sentence.endswith("which scatter between seeds could explain.")


def test_several_batch_sizes_have_a_sentence_each():
    sentences, _ = told(make_race(("sgd", "adam"), (64, 256)))
    assert [sentence[:19] for sentence in sentences] == [
        "At batch size 64, a",
        "At batch size 256, ",
    ]


def test_one_optimizer_is_not_compared_with_itself():
    (sentence,), told_notes = told(grid("sgd", INSIDE))
    assert sentence == "sgd has the lowest mean test loss, 1.005 ± 0.064."
    assert told_notes == []


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({0.1: 1.0, 0.3: 2.0}, ["0.1, is the smallest", "--lr sgd=0.033,0.1,0.3 "]),
        ({0.1: 2.0, 0.3: 1.0}, ["0.3, is the largest", "--lr sgd=0.1,0.3,0.9 "]),
        ({0.1: 1.0}, ["only one learning rate was raced, 0.1", "--lr sgd=0.01,0.1,1."]),
    ],
)
def test_a_choice_at_the_edge_comes_with_the_option_that_extends_the_grid(losses, expected):
    _, (note,) = told(grid("sgd", losses))
    assert note.startswith("sgd: ")
    for part in expected:
        assert part in note


def test_a_place_names_its_batch_size_where_there_are_several():
    _, told_notes = told(make_race(("sgd",), (64, 4096), grid=(0.0, 0.5, 1.0)))
    assert any(note.startswith("sgd at batch size ") for note in told_notes)


def test_divergence_everywhere_and_at_the_choice_is_told():
    lost = [
        make_result("adam", lr, seed=seed, losses=(math.nan,), status="diverged")
        for lr in (0.1, 1.0)
        for seed in range(2)
    ]
    partly = [
        make_result("asgd", 0.3, seed=seed, final=final, losses=(loss,), status=status)
        for final in (False, True)
        for seed, loss, status in [(0, 1.0, "done"), (1, math.nan, "diverged")]
    ]
    sentences, told_notes = told(grid("sgd", INSIDE) + lost + partly)
    adam, *asgd = sorted(told_notes)
    assert adam == ("adam: every run diverged. Race smaller learning rates: --lr adam=0.001,0.01.")
    assert any("1 of 2 seeds diverged even at the chosen" in note for note in asgd)
    assert "adam" not in sentences[0]


def test_one_seed_and_a_missing_baseline_are_told():
    _, told_notes = told(grid("adam", INSIDE, seeds=1))
    assert any(note.startswith("One seed:") for note in told_notes)
    assert any(note.startswith("sgd was not raced") for note in told_notes)
