import io

import pytest
from rich.console import Console
from synthetic import make_result

from truestep.lab.board import Board, duration
from truestep.lab.store import RunKey
from truestep.lab.training import Cost

COSTS = {("sgd", 8): Cost(10.0, 1.0), ("adam", 8): Cost(20.0, 1.0), ("sgd", 4): Cost(40.0, 1.0)}


def key(optimizer="sgd", batch_size=8, seed=0, *, final=False):
    return RunKey("e", optimizer, 0.1, batch_size, seed, final=final)


def finished(run, seconds):
    row = {"epoch": 1, "step": 5, "seconds": seconds, "train_loss": 1.0, "loss": 1.0}
    return make_result(curve=[row], best=0, final=run.final)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=80)


def test_what_is_left_is_the_cost_of_the_runs_that_are_left(console):
    board = Board(console, COSTS, jobs=2)
    board.expect("", [key(), key("adam"), key(batch_size=4)], done=0)
    assert board.seconds_left == (11 + 21 + 41) / 2
    board.count(key("adam"))
    assert board.seconds_left == (11 + 41) / 2


def test_what_runs_really_take_corrects_the_estimate(console):
    board = Board(console, COSTS, jobs=1)
    runs = [key(seed=seed) for seed in range(3)]
    board.expect("", runs, done=0)
    board.count(runs[0], finished(runs[0], seconds=30.0))
    # Three times the estimated 10 s; evaluations stay as they were.
    assert board.seconds_left == 2 * (3 * 10 + 1)


def test_the_bar_says_how_many_runs_are_done(console):
    with Board(console, COSTS, jobs=2) as board:
        board.expect("testing", [key(), key(seed=1)], done=3)
        board.count(key())
        board.count(key(seed=1))
    assert "testing" in console.file.getvalue()
    assert "5/5 runs" in console.file.getvalue()


def announced(console, left, selection=4, finals=1):
    Board(console, COSTS, jobs=2).announce(selection, finals, left)
    return " ".join(console.file.getvalue().split())


def test_a_long_race_says_how_long_it_will_take(console):
    runs = [key(seed=seed, batch_size=4) for seed in range(4)]
    text = announced(console, [*runs, key(final=True)])
    # 4 * 41 + 11 seconds on two processes.
    assert text == (
        "4 runs to choose learning rates, then 1 on test data: about 1 min with 2 processes. "
        "Interrupt at any time: the same command goes on."
    )


def test_a_resumed_race_says_what_is_there(console):
    text = announced(console, [key(), key(final=True)])
    assert text == (
        "4 runs to choose learning rates, then 1 on test data; 3 of them were done earlier: "
        "about 12 s with 2 processes."
    )


def test_a_finished_race_has_nothing_left_to_estimate(console):
    text = announced(console, [])
    assert text.endswith("then 1 on test data; 5 of them were done earlier.")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "about 1 s"),
        (59.5, "about 60 s"),
        (60, "about 1 min"),
        (3599, "about 60 min"),
        (3600, "about 1 h 0 min"),
        (90_000, "about 25 h 0 min"),
    ],
)
def test_durations_are_rough(seconds, text):
    assert duration(seconds) == text
