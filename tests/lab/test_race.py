import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from truestep import TruestepError
from truestep.lab import race as race_module
from truestep.lab import report, training
from truestep.lab.plan import Settings, UsageError
from truestep.lab.race import STORE, describe_failures, race
from truestep.lab.store import RunKey, Store
from truestep.lab.workers import Failure

TINY = Path(__file__).parent.parent / "tiny_task.py"
SCRIPT = Path(sys.executable).with_name("truestep")
SELECTION, FINALS = 2 * 2 * 3, 2 * 3
RUNS = SELECTION + FINALS

# A task that notes its trainings in a file, and at one of them kills the race. The parent also
# makes models, before the first training; those are not noted.
FATAL = """
import multiprocessing
import os
import signal
from dataclasses import replace
from truestep.lab import training

plain_train = training._train

def noting_train(*args, **kwargs):
    with open(os.environ["TINY_NOTES"], "a") as notes:
        notes.write(".")
    if os.path.getsize(os.environ["TINY_NOTES"]) >= int(os.environ.get("TINY_KILL", 1000)):
        if multiprocessing.parent_process() is None:
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    return plain_train(*args, **kwargs)

training._train = noting_train
"""


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=80)


@pytest.fixture
def light_report(monkeypatch):
    """Drawing figures takes longer than all runs together."""

    def write_report(folder, info, results, baseline):
        return {}

    monkeypatch.setattr(report, "write_report", write_report)


@pytest.fixture
def tiny(tmp_path):
    return Settings(str(TINY), out=tmp_path / "out", jobs=1)


@pytest.fixture
def trained(monkeypatch):
    """The keys of the runs that were really made."""
    keys = []
    plain = training._train

    def noting(task, splits, key, *args, **kwargs):
        keys.append(key)
        return plain(task, splits, key, *args, **kwargs)

    monkeypatch.setattr(training, "_train", noting)
    return keys


def stored(folder):
    """All results in a folder, without what may differ between two equal races."""
    with Store(folder / STORE) as store:
        (experiment,) = store.descriptions()
        return [
            replace(
                result,
                curve=[
                    {name: row[name] for name in row if name != "seconds"} for row in result.curve
                ],
                step_seconds=0.0,
                versions={},
            )
            for result in store.results(experiment)
        ]


def test_a_race_ends_with_a_table_and_a_report(tiny, console):
    outcome = race(tiny, console, "truestep race tiny_task.py")
    assert outcome.failures == []
    assert {place[0] for place in outcome.table.index} == {"sgd", "adam"}
    assert (outcome.folder / "report.html").is_file()
    task = outcome.data["task"]
    assert (task["train"], task["validation"], task["test"]) == (20, 12, 16)
    assert task["parameters"] == 37
    assert task["command"] == "truestep race tiny_task.py"
    results = stored(outcome.folder)
    assert len(results) == RUNS
    assert all(result.test.keys() == {"loss", "accuracy"} for result in results if result.key.final)
    assert "18/18 runs" in console.file.getvalue()


@pytest.mark.usefixtures("light_report")
def test_the_lowest_validation_loss_decides_and_only_it_is_tested(tiny, console):
    settings = replace(tiny, optimizers=("sgd",), learning_rates={"": (1e-6, 0.3)})
    outcome = race(settings, console)
    assert outcome.table["lr"].to_list() == [0.3]
    finals = [result.key for result in stored(outcome.folder) if result.key.final]
    assert [(key.lr, key.seed) for key in finals] == [(0.3, 0), (0.3, 1), (0.3, 2)]


@pytest.mark.usefixtures("light_report")
def test_nothing_is_run_twice(tiny, console, trained):
    race(tiny, console)
    assert len(trained) == len(set(trained)) == RUNS
    before = stored(tiny.out)
    race(tiny, console)
    assert len(trained) == RUNS
    assert stored(tiny.out) == before
    assert "18 of them were done earlier." in " ".join(console.file.getvalue().split())


@pytest.mark.usefixtures("light_report")
def test_a_wider_race_uses_what_is_there(tiny, console, trained):
    race(tiny, console)
    trained.clear()
    wider = race(replace(tiny, seeds=4, learning_rates={"sgd": (0.1, 0.3, 1.0)}), console)
    selection = [key for key in trained if not key.final]
    assert {(key.optimizer, key.lr, key.seed) for key in selection} == {
        ("sgd", 1.0, 0),
        ("sgd", 1.0, 1),
        ("sgd", 1.0, 2),
        ("sgd", 1.0, 3),
        ("sgd", 0.1, 3),
        ("sgd", 0.3, 3),
        ("adam", 0.01, 3),
        ("adam", 0.03, 3),
    }
    assert set(wider.table["seeds"]) == {4}
    # And the narrow one again has nothing to do with the others' seeds and learning rates.
    narrow = race(replace(tiny, seeds=2, optimizers=("adam",)), console)
    assert set(narrow.table["seeds"]) == {2}
    assert len(narrow.table) == 1


@pytest.mark.usefixtures("light_report")
def test_another_task_under_the_same_name_is_another_experiment(tiny, console, trained, tmp_path):
    race(tiny, console)
    changed = tmp_path / "changed.py"
    changed.write_text(TINY.read_text().replace("nn.Linear(4, 5)", "nn.Linear(4, 5, bias=False)"))
    race(replace(tiny, task=str(changed)), console)
    race(replace(tiny, epochs=1), console)
    assert len({key.experiment for key in trained}) == 3
    assert len(trained) == 3 * RUNS


@pytest.mark.usefixtures("light_report")
def test_several_batch_sizes_are_also_tested_at_the_references_choice(tiny, console):
    settings = replace(
        tiny, batch_sizes=(4, 8), seeds=1, optimizers=("sgd",), learning_rates={"": (0.01, 30.0)}
    )
    finals = {
        (result.key.batch_size, result.key.lr)
        for result in stored(race(settings, console).folder)
        if result.key.final
    }
    chosen = race(settings, console).table["lr"].to_dict()
    assert finals == {(size, lr) for (_, size), lr in chosen.items()} | {(4, chosen["sgd", 8])}


@pytest.mark.usefixtures("light_report")
def test_a_diverged_learning_rate_is_a_result(tiny, console):
    outcome = race(replace(tiny, learning_rates={"sgd": (0.1, 1e30)}), console)
    assert outcome.failures == []
    statuses = {
        result.key.lr: result.status
        for result in stored(outcome.folder)
        if result.key.optimizer == "sgd" and not result.key.final
    }
    assert statuses == {0.1: "done", 1e30: "diverged"}
    assert outcome.table["lr"]["sgd", 8] == 0.1


def test_an_optimizer_that_always_diverges_is_in_the_report(tiny, console):
    outcome = race(replace(tiny, learning_rates={"sgd": (1e30,)}, seeds=2), console)
    assert outcome.failures == []
    assert {place[0] for place in outcome.table.index} == {"sgd", "adam"}
    assert not [
        result
        for result in stored(outcome.folder)
        if result.key.final and result.key.optimizer == "sgd"
    ]


def test_a_race_in_which_everything_diverges_has_a_report(tiny, console):
    settings = replace(tiny, learning_rates={"": (1e30,)}, seeds=1, optimizers=("sgd",))
    assert (race(settings, console).folder / "report.html").is_file()


@pytest.fixture
def users_optimizer(tmp_path, monkeypatch):
    source = tmp_path / "user_race_optimizer.py"
    source.write_text(
        "import torch\n"
        "class Unlucky(torch.optim.SGD):\n"
        "    def step(self):\n"
        "        if torch.initial_seed() == 1:\n"
        "            raise ValueError('an unlucky seed')\n"
        "        super().step()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return source


@pytest.mark.usefixtures("light_report")
def test_a_failing_optimizer_fails_alone(tiny, console, users_optimizer, trained):
    name = "user_race_optimizer:Unlucky"
    settings = replace(tiny, optimizers=("sgd", name), learning_rates={name: (0.1, 0.3)})
    outcome = race(settings, console)
    failed = {(failure.key.lr, failure.key.seed, failure.key.final) for failure in outcome.failures}
    best = outcome.table["lr"][name, 8]
    assert failed == {(0.1, 1, False), (0.3, 1, False), (best, 1, True)}
    assert {failure.key.optimizer for failure in outcome.failures} == {name}
    assert {failure.reason for failure in outcome.failures} == {"ValueError: an unlucky seed"}
    assert "user_race_optimizer.py" in outcome.failures[0].trace
    assert len(stored(outcome.folder)) == RUNS - 3
    (line,) = describe_failures(outcome.failures)
    assert line.startswith(f"3 runs of {name} failed (lr ")
    # Mended, it is another optimizer: all of its runs are new, and nobody else's.
    trained.clear()
    users_optimizer.write_text(users_optimizer.read_text().replace("== 1", "== -1"))
    sys.modules.pop("user_race_optimizer")
    assert race(settings, console).failures == []
    assert {key.optimizer for key in trained} == {name}
    assert len(trained) == RUNS / 2


def test_a_race_without_any_result_is_an_error(tiny, console, monkeypatch):
    def failing(*args, **kwargs):
        raise ValueError("never")

    monkeypatch.setattr(training, "_train", failing)
    with pytest.raises(TruestepError, match=r"Every run failed. 6 runs of .* ValueError: never"):
        race(tiny, console)


def test_failures_of_one_kind_are_one_line():
    keys = [RunKey("e", "sgd", 0.1, 8, seed, final=False) for seed in range(2)]
    lines = describe_failures([Failure(keys[0], "A"), Failure(keys[1], "A"), Failure(keys[1], "B")])
    assert lines == [
        "2 runs of sgd failed (lr 0.1, batch size 8, seed 0, ...): A",
        "1 run of sgd failed (lr 0.1, batch size 8, seed 1): B",
    ]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"batch_sizes": (21,)}, "larger than the training data"),
        ({"optimizers": ("no.module:Mine",)}, "no module 'no'"),
        ({"optimizers": ("sgdd",)}, "Unknown optimizer"),
        ({"out": TINY}, "is a file"),
        ({"out": TINY / "below"}, "is a file"),
    ],
)
def test_wrong_usage_is_refused_before_anything_happens(tiny, console, trained, change, complaint):
    with pytest.raises(UsageError, match=complaint):
        race(replace(tiny, **change), console)
    assert trained == []
    assert not tiny.out.exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_happens(
    tiny, console, trained, monkeypatch
):
    # Not by its permissions: the superuser may write anywhere.
    def refused(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(UsageError, match="can't be written"):
        race(tiny, console)
    assert trained == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("nn.Linear(5, 2)", "nn.Linear(6, 2)", "RuntimeError: mat1 and mat2"),
        ("output.argmax(1)", "output.argmax(7)", "IndexError"),
        ("[:, 0] +", "[:, 0] + later(", "line 17: SyntaxError"),
    ],
)
def test_a_task_whose_own_code_fails_is_one_line(tiny, console, tmp_path, old, new, complaint):
    broken = tmp_path / "broken.py"
    broken.write_text(TINY.read_text().replace(old, new))
    with pytest.raises(TruestepError, match=complaint) as error:
        race(replace(tiny, task=str(broken)), console)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("light_report")
@pytest.mark.parametrize("stop", [KeyboardInterrupt, TruestepError])
def test_what_is_done_stays_when_a_race_is_stopped(tiny, console, monkeypatch, trained, stop):
    undisturbed = race(replace(tiny, out=tiny.out / "undisturbed"), console)
    trained.clear()
    add = race_module.Records.add

    def stopping(records, result):
        if len(trained) == 4:
            raise stop("The disk is full.")
        add(records, result)

    with monkeypatch.context() as patch:
        patch.setattr(race_module.Records, "add", stopping)
        with pytest.raises(stop):
            race(tiny, console)
    assert len(stored(tiny.out)) == 3
    race(tiny, console)
    assert len(trained) == 4 + RUNS - 3
    assert stored(tiny.out) == stored(undisturbed.folder)


def start(file, out, notes, jobs=1, **environment):
    return subprocess.Popen(  # noqa: S603 - truestep itself
        [SCRIPT, "race", file, "--out", out, "--jobs", str(jobs)],
        env=os.environ | {"TINY_NOTES": str(notes), "COLUMNS": "80"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def fatal(tmp_path):
    file = tmp_path / "fatal.py"
    file.write_text(TINY.read_text() + FATAL)
    return file


def noted(notes):
    return len(notes.read_text())


@pytest.mark.usefixtures("light_report")
def test_kill_9_costs_only_the_runs_that_go_on(fatal, tmp_path):
    done = 0
    for number, (jobs, kill) in enumerate([(2, 5), (1, 4), (1, 6)]):
        notes = tmp_path / f"notes-{number}"
        process = start(fatal, tmp_path / "out", notes, jobs, TINY_KILL=str(kill))
        # The workers hold the pipe too: this returns when the last one has ended.
        output, _ = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, output
        before, done = done, len(stored(tmp_path / "out"))
        # At most the runs that were going on are lost, and a result of each worker that was on its way.
        assert kill - 2 * jobs <= done - before <= kill
    notes = tmp_path / "notes-last"
    process = start(fatal, tmp_path / "out", notes)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"{done} of them were done earlier" in " ".join(output.split())
    assert noted(notes) == RUNS - done
    settings = Settings(str(TINY), out=tmp_path / "undisturbed", jobs=1)
    race(settings, Console(file=io.StringIO()))
    killed, undisturbed = stored(tmp_path / "out"), stored(tmp_path / "undisturbed")
    assert len(killed) == RUNS
    # The two files of tasks differ, and with them the experiments.
    experiment = undisturbed[0].key.experiment
    renamed = [replace(one, key=replace(one.key, experiment=experiment)) for one in killed]
    assert renamed == undisturbed


def test_two_races_share_one_file(fatal, tmp_path):
    notes = tmp_path / "notes"
    processes = [start(fatal, tmp_path / "out", notes) for _ in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert len(stored(tmp_path / "out")) == RUNS
    # Whoever comes first starts anywhere; only runs that begin at the same time are made twice.
    assert RUNS <= noted(notes) < 2 * RUNS
