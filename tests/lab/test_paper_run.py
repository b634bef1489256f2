import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from truestep import TruestepError
from truestep.lab.paper import runner
from truestep.lab.paper.experiments import EXPERIMENTS
from truestep.lab.paper.overview import overview
from truestep.lab.paper.points import Points
from truestep.lab.paper.runner import Bench, run
from truestep.lab.paper.store import UnitStore
from truestep.lab.paper.unit import Outcome, Record, key, packed, settings
from truestep.lab.store import Store
from truestep.lab.workers import Failure

SCRIPT = Path(sys.executable).with_name("truestep")
UNIT = Points("circles", "sgd", 0.1, 0, 2, steps=20)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "papers.db"


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=80)


def record_of(unit=UNIT, **changes):
    outcome = Outcome({"a": 1.5}, {"loss": np.arange(3.0)}, "torch", 40, 0.5)
    record = Record(unit.kind, settings(unit), outcome, 0.25, "truestep paper run", {"torch": "2"})
    return replace(record, **changes)


def comparable(path):
    """All that must be the same in two stores that hold the same units."""
    with UnitStore(path) as store:
        records = store.records(store.keys())
    return {
        name: (
            record.kind,
            record.settings,
            record.outcome.summary,
            record.outcome.engine,
            record.outcome.replica_steps,
            {array: values.tobytes() for array, values in record.outcome.arrays.items()},
        )
        for name, record in records.items()
    }


def test_a_record_comes_back_as_it_went_in(path):
    with UnitStore(path) as store:
        assert store.add(record_of())
        assert not store.add(record_of(seconds=9.0))
    with UnitStore(path) as store:
        (found,) = store.records([key(UNIT), "unknown"]).values()
    assert (found.kind, found.settings, found.seconds) == ("points", settings(UNIT), 0.25)
    assert found.key == key(UNIT)
    assert found.outcome.summary == {"a": 1.5}
    assert found.outcome.train_seconds == 0.5
    assert np.array_equal(found.outcome.arrays["loss"], np.arange(3.0))


def test_records_come_in_the_order_that_was_asked_for(path):
    units = [replace(UNIT, first=first) for first in range(1200)]
    with UnitStore(path) as store:
        store._database._connection.execute("BEGIN")
        for unit in units:
            record = record_of(unit)
            store._database._connection.execute(
                "INSERT INTO units VALUES (?, ?, ?, '{}', ?, 'torch', 1, NULL, 1.0, '', '{}', '')",
                (record.key, record.kind, json.dumps(record.settings), packed({})),
            )
        store._database._connection.execute("COMMIT")
        asked = [key(unit) for unit in reversed(units)]
        assert list(store.records(asked)) == asked


def test_a_damaged_store_is_moved_aside_and_kept(path):
    with UnitStore(path) as store:
        for first in range(50):
            store.add(record_of(replace(UNIT, first=first)))
    content = bytearray(path.read_bytes())
    content[5000:9000] = b"\xff" * 4000
    path.write_bytes(content)
    with pytest.raises(TruestepError, match=r"moved to .*papers\.db.corrupt-1"):
        UnitStore(path)
    assert path.with_name("papers.db.corrupt-1").read_bytes() == content
    with UnitStore(path) as store:
        assert store.keys() == set()


def test_another_version_and_another_kind_of_store_are_left_alone(path, tmp_path):
    UnitStore(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(TruestepError, match="schema 7"):
        UnitStore(path)
    assert path.read_bytes() == before
    race = tmp_path / "results.db"
    Store(race).close()
    with pytest.raises(TruestepError, match="not one of truestep's units of papers"):
        UnitStore(race)
    text = tmp_path / "notes.txt"
    text.write_text("my own notes " * 100)
    with pytest.raises(TruestepError, match="not a database"):
        UnitStore(text)
    assert text.read_text().startswith("my own notes")


def test_nothing_is_run_twice_and_the_rest_goes_on(path, console, monkeypatch):
    units = [replace(UNIT, first=first) for first in (0, 2, 4)]
    with UnitStore(path) as store:
        store.add(record_of(units[1]))
        assert run(units, store, console, jobs=1) == []
        assert store.keys() == {key(unit) for unit in units}
        assert store.records([key(units[1])])[key(units[1])].outcome.engine == "torch"
        assert run(units, store, console, jobs=1) == []
    text = " ".join(console.file.getvalue().split())
    assert "3 units, 1 of them done earlier: about 1 s with 1 process." in text
    assert "3/3 units" in text
    assert "replica-steps/s" in text
    assert "All 3 units are in the store." in text


def test_a_unit_that_fails_costs_itself_alone(path, console):
    units = [UNIT, replace(UNIT, optimizer="nonsense"), replace(UNIT, first=2)]
    with UnitStore(path) as store:
        (failure,) = run(units, store, console, jobs=1)
        assert len(store.keys()) == 2
    assert isinstance(failure, Failure)
    assert failure.key == units[1]
    assert "'nonsense' is no optimizer" in failure.reason


def test_what_another_process_has_done_meanwhile_is_not_done_again(path):
    with UnitStore(path) as store:
        tally = runner.Tally(Console(file=io.StringIO()), 2, [UNIT, replace(UNIT, first=2)], 1)
        waiting = runner._still_missing([UNIT, replace(UNIT, first=2)], store, tally)
        store.add(record_of())
        assert [unit.first for unit in waiting] == [2]


def test_missing_data_end_a_run_before_it_begins(path, console, cache, monkeypatch):
    def fetch(file, folder, way_out, *, progress):
        raise TruestepError(f"no connection; {way_out}")

    monkeypatch.setattr("truestep.lab.datasets.fetch", fetch)
    units = [item.unit for item in EXPERIMENTS["asgd-mnist"].units("smoke")]
    with (
        UnitStore(path) as store,
        pytest.raises(TruestepError, match=r"put these files by hand into .*mnist.*data get mnist"),
    ):
        run(units, store, console)


def test_the_same_unit_gives_the_same_record_in_any_process(path, console):
    here = Bench(None, "").run(UNIT)
    with UnitStore(path) as store:
        run([UNIT], store, console, jobs=1)
        there = store.records([key(UNIT)])[key(UNIT)]
    assert here.outcome.summary == there.outcome.summary
    for name, values in here.outcome.arrays.items():
        assert np.array_equal(values, there.outcome.arrays[name])


COMMAND = (SCRIPT, "paper", "run", "asgd-synthetic", "--scale", "smoke", "--seeds", "16")


def start(path, *more):
    return subprocess.Popen(  # noqa: S603 - truestep itself
        [*COMMAND, "--store", path, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(runner.__file__).parents[3])},
    )


def units_in(path):
    if not path.is_file():
        return 0
    try:
        # A reader of its own, since a store that is being made may not have its table yet.
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
            return connection.execute("SELECT count(*) FROM units").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
    finally:
        if "connection" in locals():
            connection.close()


def test_killed_at_any_moment_the_same_command_ends_with_the_same_store(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed.db", tmp_path / "killed.db"
    process = start(undisturbed)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    whole = units_in(undisturbed)
    assert whole == 16
    # The moments are ones of progress, not of time: before the first unit, an early and a late one.
    for wanted, ending in ((0, signal.SIGKILL), (2, signal.SIGINT), (7, signal.SIGKILL)):
        process = start(killed)
        while units_in(killed) < wanted and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(ending)
        _, err = process.communicate(timeout=120)
        assert process.returncode in {0, -ending, 130}
        if process.returncode == 130:
            assert err.endswith("What is done is kept: the same command goes on.\n")
    process = start(killed, "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["units"] == whole
    assert comparable(killed) == comparable(undisturbed)


def test_the_overview_counts_what_is_done_and_makes_nothing(path, console):
    rows = {row["name"]: row for row in overview(path)}
    assert not path.exists()
    assert rows.keys() == EXPERIMENTS.keys()
    with UnitStore(path) as store:
        units = [item.unit for item in EXPERIMENTS["asgd-synthetic"].units("smoke")]
        run(units[:2], store, console, jobs=1)
    rows = {row["name"]: row for row in overview(path)}
    smoke, *_, paper = rows["asgd-synthetic"]["scales"]
    assert (smoke["done"], smoke["units"]) == (2, 8)
    assert paper["done"] == 0
