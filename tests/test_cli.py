import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core import event

from truestep import cli, terminal
from truestep.cli import main
from truestep.lab import race as race_module
from truestep.lab import training

TINY = str(Path(__file__).parent / "tiny_task.py")
SCRIPT = Path(sys.executable).with_name("truestep")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Calls truestep in an empty folder; returns its exit code, its output and its errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("TRUESTEP_DATA", raising=False)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run


def test_the_version_is_the_packages(call):
    code, out, _ = call("--version")
    assert (code, out) == (0, f"truestep {importlib.metadata.version('truestep')}\n")


def test_python_runs_the_package():
    done = subprocess.run(
        [sys.executable, "-m", "truestep", "data", "list", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_names_the_commands(call, arguments):
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    assert "race" in out
    assert "data" in out


def test_help_of_a_race_says_what_can_be_given(call):
    code, out, _ = call("race", "--help")
    assert code == 0
    for option in (
        "--task",
        "--optimizers",
        "--lr",
        "--batch-size",
        "--seeds",
        "--epochs",
        "--out",
        "--data-dir",
        "--jobs",
        "--json",
        "--debug",
        "--quiet",
    ):
        assert option in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_race_prints_a_table_and_where_the_report_is(call, tmp_path):
    code, out, err = call("race", TINY, "--jobs", 1, "--seeds", 2)
    assert code == 0, err
    assert "sgd" in out
    assert "adam" in out
    assert "Report: truestep-race/tiny/report.html" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "8 runs to choose learning rates, then 4 on test data" in " ".join(err.split())
    assert err.splitlines()[-1] == "Writing the report."
    assert (tmp_path / "truestep-race/tiny/report.html").is_file()
    assert (tmp_path / "truestep-race/tiny/results.db").is_file()


def test_json_is_all_of_the_output(call, tmp_path):
    noisy = tmp_path / "noisy.py"
    noisy.write_text(Path(TINY).read_text() + "\nprint('a user may print')\n")
    arguments = ("--out", "here", "--jobs", 1, "--seeds", 1, "--lr", "sgd=0.1,1e30")
    code, out, err = call("race", noisy, *arguments, "--json")
    assert code == 0, err
    data = json.loads(out, parse_constant=pytest.fail)
    assert {row["optimizer"] for row in data["rows"]} == {"sgd", "adam"}
    assert data["failures"] == []
    assert data["folder"] == "here"
    assert data["task"]["command"] == (
        f"truestep race {noisy} --out here --jobs 1 --seeds 1 --lr sgd=0.1,1e30 --json"
    )
    assert "a user may print" in err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_has_none_for_what_is_not_finite(capsys, value):
    terminal.print_json({"a": [value, 1.5, {"b": (value,)}]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5, {"b": [None]}]}


@pytest.fixture
def settings(call, monkeypatch):
    """Calls `truestep race` and returns the settings that it would race with."""
    asked = []

    def stop(settings, console, command):
        asked.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(race_module, "race", stop)

    def run(*arguments):
        code, _, err = call("race", *arguments)
        assert code == 130, err
        return asked[-1]

    return run


def test_lists_may_hold_commas_or_be_repeated(settings):
    found = settings(
        *("--optimizers", "sgd,adam", "--optimizers", "asgd+adam"),
        *("--lr", "0.1, 0.3", "--lr", "1", "--lr", "adam=1e-3,0.003", "--lr", "adam=0.01"),
        *("--batch-size", "64,256", "--batch-size", "1024"),
    )
    assert found.optimizers == ("sgd", "adam", "asgd+adam")
    assert found.learning_rates == {"": (0.1, 0.3, 1.0), "adam": (0.001, 0.003, 0.01)}
    assert found.batch_sizes == (64, 256, 1024)


def test_what_is_not_given_is_the_tasks(settings):
    found = settings()
    assert found == type(found)(task="digits")


@pytest.mark.parametrize("arguments", [("mnist",), ("--task", "mnist")])
def test_a_task_may_stand_alone(settings, arguments):
    assert settings(*arguments).task == "mnist"


@pytest.mark.parametrize(
    "arguments",
    [
        ("race", "--seeds", "0"),
        ("race", "--seeds", "x"),
        ("race", "--epochs", "0"),
        ("race", "--jobs", "0"),
        ("race", "--batch-size", "0"),
        ("race", "--batch-size", "8.5"),
        ("race", "--batch-size", "21"),
        ("race", "--batch-size", ""),
        ("race", "--lr", "0"),
        ("race", "--lr", "nan"),
        ("race", "--lr", "inf"),
        ("race", "--lr", "x"),
        ("race", "--lr", "=0.1"),
        ("race", "--lr", "adamm=0.1"),
        ("race", "--lr", "momentum=0.1"),
        ("race", "--optimizers", "sgdd"),
        ("race", "--optimizers", "sgd,"),
        ("race", "--optimizers", "no.module:Mine"),
        ("race", "--out", TINY),
        ("race", "--out", f"{TINY}/below"),
        ("race", "--out", "/proc/x"),
        ("race", "--data-dir", "missing"),
        ("race", "--nonsense"),
        ("race", "--task", "mnist"),
        ("data", "get", "nothing"),
        ("data", "get"),
        ("data", "list", "--data-dir", "missing"),
        ("nonsense",),
        ("data",),
    ],
)
def test_wrong_usage_is_one_line(call, tmp_path, arguments):
    # The task comes last, where "--task" then names a second one.
    task = (TINY,) if arguments[0] == "race" else ()
    code, out, err = call(*arguments, *task)
    assert (code, out) == (2, "")
    assert err.startswith("truestep: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", ["digitz", "missing.py", "broken.py", "folder.py"])
def test_a_task_that_cannot_be_read_is_one_line(call, tmp_path, task):
    (tmp_path / "broken.py").write_text("task = 1 +\n")
    (tmp_path / "folder.py").mkdir()
    code, out, err = call("race", task)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert task in err


def test_results_that_are_not_results_are_one_line(call, tmp_path):
    (tmp_path / "results.db").write_text("my own results " * 100)
    code, out, err = call("race", TINY, "--out", tmp_path, "--jobs", 1)
    assert (code, out) == (1, "")
    assert err.count("truestep: ") == 1
    assert (tmp_path / "results.db").read_text().startswith("my own results")


def test_a_full_disk_is_one_line_and_loses_nothing(call, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "report.html")

    with monkeypatch.context() as patch:
        patch.setattr("truestep.lab.report.write_report", full)
        code, out, err = call("race", TINY, "--jobs", 1, "--quiet")
    assert (code, out) == (1, "")
    assert err == (
        "truestep: No space left on device (report.html). What is done is kept: the same command "
        "goes on.\n"
    )
    code, _, err = call("race", TINY, "--jobs", 1)
    assert code == 0
    assert "18 of them were done earlier." in " ".join(err.split())


def test_debug_shows_the_traceback(call):
    code, out, err = call("race", TINY, "--seeds", 0, "--debug")
    assert (code, out) == (2, "")
    assert "Traceback" in err
    assert err.splitlines()[-1] == "truestep: --seeds 0 is impossible. Give 1 or more."


def test_an_error_of_truesteps_own_keeps_its_traceback(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("truestep is wrong")

    monkeypatch.setattr(race_module, "race", broken)
    with pytest.raises(RuntimeError, match="truestep is wrong"):
        main(["race", TINY])


def test_a_failed_run_is_told_and_ends_with_1(call, monkeypatch):
    plain = training._train

    def unlucky(task, splits, key, *args, **kwargs):
        if key.seed == 1 and key.optimizer == "adam":
            raise ValueError("an unlucky seed")
        return plain(task, splits, key, *args, **kwargs)

    monkeypatch.setattr(training, "_train", unlucky)
    code, out, err = call("race", TINY, "--jobs", 1, "--quiet", "--json")
    assert code == 1
    data = json.loads(out)
    (line,) = data["failures"]
    assert line.endswith("ValueError: an unlucky seed")
    assert err == f"truestep: {line}\n"
    code, out, err = call("race", TINY, "--jobs", 1, "--quiet", "--debug")
    assert code == 1
    assert "Report: " in out
    assert "in unlucky" in err


def test_without_the_command_lines_packages_there_is_one_line():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['typer'] = None; import truestep.cli"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == "truestep: typer is not installed. Run in the clone: pip install '.[lab]'\n"
    )


def test_without_the_labs_packages_there_is_one_line(call, monkeypatch):
    monkeypatch.delitem(sys.modules, "truestep.lab.report", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, out, err = call("race", TINY)
    assert (code, out) == (1, "")
    assert err == "truestep: jinja2 is not installed. Run in the clone: pip install '.[lab]'\n"


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path):
    task = tmp_path / "interrupting.py"
    interrupt = (
        "import os, signal, multiprocessing\n"
        "from truestep.lab import training\n"
        "plain_train = training._train\n"
        "def interrupting(*args, **kwargs):\n"
        "    os.kill(os.getppid(), signal.SIGINT)\n"
        "    signal.pause()\n"
        "training._train = interrupting\n"
    )
    task.write_text(Path(TINY).read_text() + interrupt)
    process = subprocess.Popen(  # noqa: S603 - truestep itself
        [SCRIPT, "race", task, "--jobs", "2", "--quiet"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # The workers hold the pipes too: this returns when the last one has ended.
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert err == "truestep: interrupted. What is done is kept: the same command goes on.\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(  # noqa: S603 - truestep itself
        [SCRIPT, "data", "list", "--json"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_lacks_characters_is_no_error(tmp_path, encoding):
    done = subprocess.run(  # noqa: S603 - truestep itself
        [SCRIPT, "race", TINY, "--jobs", "1", "--seeds", "2", "--out", tmp_path / "größe"],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"Report: " in done.stdout
    name = "größe" if encoding == "latin-1" else "gr??e"
    assert name.encode(encoding) in done.stdout


def test_data_sets_are_listed(call):
    code, out, _ = call("data", "list")
    assert code == 0
    assert all(name in out for name in ("mnist", "kmnist10k", "CC BY-SA", "not here"))
    code, out, _ = call("data", "list", "--json")
    assert code == 0
    assert {row["name"] for row in json.loads(out)} >= {"mnist", "fashion-mnist", "kmnist"}


def test_a_data_set_that_is_here_is_named(call, monkeypatch):
    def get(name, data_dir):
        return Path("here", name)

    monkeypatch.setattr("truestep.lab.datasets.get", get)
    assert call("data", "get", "mnist")[:2] == (0, "here/mnist\n")
    code, out, _ = call("data", "get", "mnist", "--json")
    assert (code, json.loads(out)) == (0, {"name": "mnist", "folder": "here/mnist"})


def test_doctor_prints_what_is_installed_and_checks_itself(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert found["right"] is True
    assert set(found["self-check"].values()) == {"equals the oracle"}
    assert found["installed"]["extra lab"] == "complete"


def test_compiling_is_told_once_where_it_happens(call, monkeypatch):
    def compiling():
        for _ in range(2):
            with event.trigger_event("numba:run_pass"):
                pass
        return []

    monkeypatch.setattr("truestep.doctor.self_check", compiling)
    code, out, err = call("doctor", "--json")
    assert (code, json.loads(out)["right"]) == (0, True)
    assert err == "Compiling loops, once on this machine.\n"

    def race(*_):
        compiling()
        raise KeyboardInterrupt

    monkeypatch.setattr(race_module, "race", race)
    assert call("race", TINY)[2].startswith("Compiling loops, once on this machine.\n")
    assert call("race", TINY, "--quiet")[2].startswith("truestep: interrupted.")
    monkeypatch.setattr("truestep.doctor.self_check", list)
    assert call("doctor", "--json")[2] == ""
    monkeypatch.setattr("truestep.doctor.self_check", compiling)
    monkeypatch.setattr("truestep.kernels.dispatch.installed", lambda: False)
    assert call("doctor", "--json")[2] == ""


def test_doctor_exits_with_1_where_counts_are_wrong(monkeypatch, capsys):
    monkeypatch.setattr("truestep.doctor._largest_difference", lambda *_: 2)
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert "off by 2" in out
    assert "counts are wrong on this machine" in err
