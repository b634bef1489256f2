import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from truestep.lab import ensembles, report
from truestep.lab.plan import Settings, UsageError
from truestep.lab.race import STORE, race
from truestep.lab.store import Store

TINY = Path(__file__).parent.parent / "tiny_task.py"
SCRIPT = Path(sys.executable).with_name("truestep")
# Where the tiny task's own metric would leave all runs to the torch loop.
KNOWN = """
from dataclasses import replace
from truestep.lab.tasks import accuracy
task = replace(task, metrics={"accuracy": accuracy})
"""


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / "known.py"
    file.write_text(TINY.read_text() + KNOWN)
    return Settings(str(file), optimizers=("sgd", "adam", "asgd"), out=tmp_path / "out", jobs=2)


@pytest.fixture
def light_report(monkeypatch):
    monkeypatch.setattr(report, "write_report", lambda *_: {})


def engines_of(folder):
    """By optimizer, what trained its runs."""
    with Store(folder / STORE) as store:
        (experiment,) = store.descriptions()
        results = store.results(experiment)
    found = {}
    for result in results:
        found.setdefault(result.key.optimizer, set()).add(result.versions["engine"])
    return found, len(results)


def test_both_engines_give_the_same_table(tiny, console):
    outcomes = {
        engine: race(replace(tiny, engine=engine, out=tiny.out / engine), console)
        for engine in ("auto", "torch")
    }
    ours, theirs = outcomes["auto"].table, outcomes["torch"].table
    measured = [name for name in ours if "second" not in name and "step_ratio" not in name]
    measured.remove("bytes_per_parameter")
    pd.testing.assert_frame_equal(ours[measured], theirs[measured], rtol=1e-4, atol=1e-6)
    assert outcomes["auto"].data["versions"]["engine"] == "truestep.ensemble"
    assert outcomes["torch"].data["versions"]["engine"] == "torch loop"
    assert "truestep.ensemble trains all runs" in (tiny.out / "auto" / "report.html").read_text()
    text = console.file.getvalue()
    assert "truestep.ensemble trains all runs, equal to the torch loop's to rounding.\n" in text
    assert "The torch loop trains all runs: asked for.\n" in text


@pytest.mark.usefixtures("light_report")
def test_the_torch_loop_trains_what_the_ensemble_cannot(tiny, console, tmp_path, monkeypatch):
    (tmp_path / "user_engine_optimizer.py").write_text("from torch.optim import SGD as Mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = "user_engine_optimizer:Mine"
    settings = replace(tiny, optimizers=("sgd", name), learning_rates={name: (0.1, 0.3)}, jobs=1)
    outcome = race(settings, console)
    by_optimizer, count = engines_of(tiny.out)
    assert count == 2 * (2 * 3 + 3)
    assert {key.partition("#")[0]: engines for key, engines in by_optimizer.items()} == {
        "sgd": {"truestep.ensemble"},
        name: {"torch loop"},
    }
    line = f"truestep.ensemble trains the runs of sgd, the torch loop those of {name} (an import path).\n"
    assert line in console.file.getvalue()
    # The same optimizer, but steps of two engines have no ratio.
    losses = outcome.table["test_loss"]
    assert losses[name, 8] == pytest.approx(losses["sgd", 8], rel=1e-4)
    assert outcome.table["step_ratio"].isna().to_list() == [False, True]


@pytest.mark.usefixtures("light_report")
def test_a_task_that_the_ensemble_cannot_train_says_why(tiny, console):
    settings = replace(tiny, task=str(TINY), jobs=1, seeds=1)
    race(settings, console)
    assert engines_of(tiny.out)[0]["sgd"] == {"torch loop"}
    assert (
        "The torch loop trains all runs: the ensemble engine knows only "
        "truestep.lab.tasks.accuracy as a metric with this loss; the task has its own: accuracy. "
    ) in " ".join(console.file.getvalue().split()) + " "
    with pytest.raises(
        UsageError, match="--engine ensemble can't train sgd, adam, asgd: the ensemble"
    ):
        race(replace(settings, engine="ensemble"), console)


@pytest.mark.usefixtures("light_report")
def test_an_interrupted_ensemble_goes_on(tiny, console, monkeypatch):
    plain = ensembles.Ensembles._train
    calls = []

    def interrupted(self, keys, starts, steps, record):
        calls.append(keys)
        # Rehearsals are of one key; of the calls with runs the third is interrupted.
        if sum(len(some) > 1 for some in calls) == 3:
            raise KeyboardInterrupt
        return plain(self, keys, starts, steps, record)

    monkeypatch.setattr(ensembles, "CALL_SECONDS", 0.0)
    # From the first run on: then all calls are of two runs.
    monkeypatch.setattr("secrets.randbelow", lambda _: 0)
    with monkeypatch.context() as patch:
        patch.setattr(ensembles.Ensembles, "_train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            race(tiny, console)
    assert engines_of(tiny.out)[1] == 4
    table = race(tiny, console).table
    text = console.file.getvalue()
    assert "4 of them were done earlier" in text
    undisturbed = race(replace(tiny, out=tiny.out / "undisturbed"), console)
    assert engines_of(tiny.out)[1] == engines_of(undisturbed.folder)[1]
    exact = ["lr", "test_loss", "test_accuracy"]
    pd.testing.assert_frame_equal(table[exact], undisturbed.table[exact], check_exact=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_ensemble_keeps_what_was_done(tiny, how):
    # As many runs as take many calls: 3 x 2000 of them, 2 s of replicas at a time.
    command = [SCRIPT, "race", tiny.task, "--out", tiny.out, "--epochs", "400", "--seeds", "400"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ)  # noqa: S603 - truestep
    wait_for_a_run(tiny.out / STORE, process)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    assert engines_of(tiny.out)[1] > 0


def wait_for_a_run(path, process):
    while process.poll() is None:
        if path.exists():
            with Store(path) as store:
                if any(store.keys(experiment) for experiment in store.descriptions()):
                    return
        time.sleep(0.02)
    raise AssertionError(process.stderr.read())
