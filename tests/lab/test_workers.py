from dataclasses import replace
from pathlib import Path

import pytest
import torch

from truestep import TruestepError
from truestep.lab.store import RunKey
from truestep.lab.tasks import find_task
from truestep.lab.workers import Assignment, Failure, Here, Workers, one_line, one_thread

FILE = Path(__file__).parent.parent / "tiny_task.py"
KEY = RunKey("e", "sgd", 0.1, 8, seed=0, final=False)
# What a model does that knows its seed: others are well behaved.
KILLED, RAISES = 1, 2

TROUBLE = f"""
import os
import signal
from dataclasses import replace

print("a user's file may print")
well_behaved = task

def load(data_dir):
    trouble = os.environ.get("TINY_LOAD")
    if trouble == "exits":
        os._exit(3)
    if trouble == "raises":
        raise ValueError("no data\\ntoday")
    return well_behaved.load(data_dir)

def model():
    print("a model may print")
    if torch.initial_seed() == {KILLED}:
        os.kill(os.getpid(), signal.SIGKILL)
    if torch.initial_seed() == {RAISES}:
        raise ValueError("an unlucky seed\\nwith details")
    return well_behaved.model()

task = replace(well_behaved, load=load, model=model)
"""


@pytest.fixture
def trouble(tmp_path):
    file = tmp_path / "trouble.py"
    file.write_text(FILE.read_text() + TROUBLE)
    return str(file)


def comparable(outcome):
    """An outcome without what may differ: times, the git commit, the lines of a traceback."""
    if isinstance(outcome, Failure):
        return replace(outcome, trace="")
    curve = [{name: row[name] for name in row if name != "seconds"} for row in outcome.curve]
    return replace(outcome, curve=curve, step_seconds=0.0, versions={})


def test_a_run_that_fails_or_dies_costs_itself_alone(trouble, capfd):
    keys = [replace(KEY, seed=seed) for seed in range(4)] + [replace(KEY, optimizer="adam")]
    good = [key for key in keys if key.seed not in {KILLED, RAISES}]
    with Workers(Assignment(trouble), jobs=1) as workers:
        outcomes = {outcome.key: outcome for outcome in workers.run(keys)}
        again = list(workers.run(good[:1]))
        (process,) = workers._processes.values()
        assert process.is_alive()
    assert not process.is_alive()
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "a user's file may print" in printed.err
    assert outcomes.keys() == set(keys)
    for key, outcome in outcomes.items():
        if key.seed == KILLED:
            assert "SIGKILL" in outcome.reason
        elif key.seed == RAISES:
            assert outcome.reason == "ValueError: an unlucky seed"
            assert "with details" in outcome.trace
    with Here(find_task(trouble), find_task(trouble).load(None)) as here:
        expected = list(here.run(good))
    assert [comparable(outcomes[key]) for key in good] == [
        comparable(result) for result in expected
    ]
    assert comparable(again[0]) == comparable(expected[0])


@pytest.mark.parametrize(
    ("how", "complaint"),
    [("exits", "ended while it started .exit code 3."), ("raises", "ValueError: no data")],
)
def test_a_worker_that_cannot_start_ends_the_race(trouble, monkeypatch, how, complaint):
    monkeypatch.setenv("TINY_LOAD", how)
    with (
        Workers(Assignment(trouble), jobs=1) as workers,
        pytest.raises(TruestepError, match=complaint) as error,
    ):
        list(workers.run([KEY]))
    assert "\n" not in str(error.value)


def test_runs_here_go_on_after_a_failure(trouble, capsys):
    task = find_task(trouble)
    with Here(task, task.load(None)) as here:
        outcomes = list(here.run([replace(KEY, seed=RAISES), KEY]))
    assert isinstance(outcomes[0], Failure)
    assert outcomes[0].key.seed == RAISES
    assert outcomes[1].status == "done"


def test_runs_here_use_one_thread_and_leave_the_others_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        task = find_task(str(FILE))
        used = []

        def loss(output, targets):
            used.append(torch.get_num_threads())
            return task.loss(output, targets)

        with Here(replace(task, loss=loss), task.load(None)) as here:
            list(here.run([KEY]))
        assert set(used) == {1}
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), one_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_workers_get_the_epochs_of_the_race():
    assert Assignment(str(FILE), epochs=9).find().epochs == 9
    assert Assignment(str(FILE)).find().epochs == 3


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError("\n one"), "ValueError: one"),
        (KeyError(), "KeyError"),
        (TruestepError("What to do."), "What to do."),
    ],
)
def test_errors_become_one_line(error, line):
    assert one_line(error) == line
