import json
import math
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import make_result

from truestep import TruestepError
from truestep.lab import database
from truestep.lab.store import RunKey, Store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.db"


def test_a_result_comes_back_as_it_went_in(path):
    result = make_result(final=True, lr=0.1 + 0.2, seed=3)
    with Store(path) as store:
        assert store.add(result)
        assert store.results("e0") == [result]
    with Store(path) as store:
        assert store.results("e0") == [result]
        assert store.keys("e0") == {result.key}


def test_only_the_asked_experiment_comes_back(path):
    with Store(path) as store:
        store.add(make_result(experiment="e0"))
        store.add(make_result(experiment="e1"))
        assert store.keys("e1") == {make_result(experiment="e1").key}
        assert [result.key.experiment for result in store.results("e1")] == ["e1"]
        assert store.keys("e2") == set()


def test_the_first_result_of_a_key_stays(path):
    with Store(path) as store:
        assert store.add(make_result(losses=(2.0, 1.0)))
        assert not store.add(make_result(losses=(5.0,)))
        assert [result.curve[0]["loss"] for result in store.results("e0")] == [2.0]


@pytest.mark.parametrize("field", ["optimizer", "lr", "batch_size", "seed", "final"])
def test_every_field_of_the_key_tells_runs_apart(path, field):
    other = {"optimizer": "adam", "lr": 0.2, "batch_size": 32, "seed": 1, "final": True}[field]
    first = make_result()
    second = replace(first, key=replace(first.key, **{field: other}))
    with Store(path) as store:
        assert store.add(first)
        assert store.add(second)
        assert store.keys("e0") == {first.key, second.key}


def test_nan_and_infinity_survive(path):
    result = make_result(
        losses=(math.nan, math.inf, -math.inf), status="diverged", step_seconds=math.nan
    )
    with Store(path) as store:
        store.add(result)
        (read,) = store.results("e0")
    losses = [row["loss"] for row in read.curve]
    assert math.isnan(losses[0])
    assert losses[1:] == [math.inf, -math.inf]
    assert math.isnan(read.step_seconds)
    assert (read.status, read.best) == ("diverged", -1)


def test_a_row_without_a_value_is_refused_not_dropped(path):
    with Store(path) as store:
        with pytest.raises(TruestepError, match="NOT NULL constraint failed"):
            store.add(make_result(optimizer_bytes=None))
        assert store.add(make_result())


def test_rows_carry_their_time_and_versions(path):
    with Store(path) as store:
        store.add(make_result())
    connection = sqlite3.connect(path)
    created, versions = connection.execute("SELECT created, versions FROM runs").fetchone()
    connection.close()
    assert created.endswith("+00:00")
    assert json.loads(versions)["git commit"] == "0123abc"


def test_the_last_description_of_an_experiment_counts(path):
    with Store(path) as store:
        store.experiment("e0", {"task": "digits"})
        store.experiment("e1", {"task": "mnist"})
        store.experiment("e0", {"task": "digits", "epochs": 3})
        assert store.descriptions() == {
            "e0": {"task": "digits", "epochs": 3},
            "e1": {"task": "mnist"},
        }


def test_missing_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b c" / "ü.db"
    with Store(path) as store:
        store.add(make_result())
    assert path.exists()


def test_an_empty_file_becomes_a_store(path):
    path.touch()
    with Store(path) as store:
        assert store.add(make_result())


# Several processes.

PREAMBLE = f"""
import os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from synthetic import make_result
from truestep import TruestepError
from truestep.lab.store import Store
path, *numbers = sys.argv[1:]
"""


def start(program, path, *numbers):
    return subprocess.Popen(  # noqa: S603 - this file's own programs
        [sys.executable, "-c", PREAMBLE + program, str(path), *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


WRITE = """
with Store(Path(path)) as store:
    print("open", flush=True)
    sys.stdin.readline()
    for seed in range(*map(int, numbers)):
        print(int(store.add(make_result(seed=seed, losses=(1.0,) * 2000))), flush=True)
"""


def test_processes_share_a_file_and_each_run_is_new_once(path):
    # All three also race to create the file; their ranges overlap.
    writers = [start(WRITE, path, first, first + 20) for first in (0, 10, 20)]
    for writer in writers:
        assert writer.stdout.readline() == "open\n"
    outputs = [writer.communicate("go\n")[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert sum(output.split().count("1") for output in outputs) == 40
    with Store(path) as store:
        assert {key.seed for key in store.keys("e0")} == set(range(40))


def test_kill_9_in_the_middle_of_writing_loses_nothing_that_was_recorded(path):
    recorded = 0
    for lines in (1, 2, 3, 5, 8):
        with start(WRITE, path, recorded, 1_000_000) as writer:
            assert writer.stdout.readline() == "open\n"
            writer.stdin.write("go\n")
            writer.stdin.flush()
            for _ in range(lines):
                assert writer.stdout.readline() == "1\n"
            writer.send_signal(signal.SIGKILL)
            confirmed = lines + len(writer.stdout.read().split())
        assert writer.returncode == -signal.SIGKILL
        with Store(path) as store:
            seeds = {key.seed for key in store.keys("e0")}
            assert all(len(result.curve) == 2000 for result in store.results("e0"))
        # The run being written when the signal came may or may not be in.
        assert len(seeds) - recorded - confirmed in (0, 1)
        assert seeds == set(range(len(seeds)))
        recorded = len(seeds)


HALF = """
store = Store(Path(path))
store.add(make_result(seed=0))
store._database._connection.execute("PRAGMA cache_size = 1")  # changed pages reach the file at once
store._database._connection.execute("BEGIN IMMEDIATE")
store._database._connection.execute("UPDATE runs SET status = 'half'")
store._database._connection.execute(
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 500) "
    "INSERT INTO experiments SELECT i, hex(zeroblob(2000)), '' FROM n"
)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_half_written_transaction_is_rolled_back(path):
    with start(HALF, path) as writer:
        pass
    assert writer.returncode == -signal.SIGKILL
    journal = path.with_name("results.db-journal")
    assert journal.stat().st_size > 0, "the test must leave work to roll back"
    with Store(path) as store:
        assert [result.status for result in store.results("e0")] == ["done"]
        assert store.descriptions() == {}
    assert not journal.exists()


def test_a_lock_that_stays_is_named(path, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.0)
    with Store(path) as store, Store(path) as other:
        other._database._connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(TruestepError, match="another process has kept it locked"):
            store.add(make_result())
        other._database._connection.execute("ROLLBACK")
        assert store.add(make_result())


# Files that are no store, and disks that don't take one.


def test_a_file_that_is_no_database_is_left_alone(path):
    text = "my notes\n" * 1000
    path.write_text(text)
    with pytest.raises(TruestepError, match=r"results\.db: it is not a database.*choose another"):
        Store(path)
    assert path.read_text() == text
    assert [file.name for file in path.parent.iterdir()] == ["results.db"]


def test_another_programs_database_is_left_alone(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE songs (name TEXT)")
    connection.execute("PRAGMA user_version = 1")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(TruestepError, match="not one of truestep's"):
        Store(path)
    assert path.read_bytes() == before


def test_another_schema_version_is_refused(path):
    with Store(path) as store:
        store.add(make_result())
        store._database._connection.execute("PRAGMA user_version = 7")
    before = path.read_bytes()
    with pytest.raises(TruestepError, match=r"\(schema 7; this one reads and writes schema 1\)"):
        Store(path)
    assert path.read_bytes() == before


def fill(path, runs=40):
    with Store(path) as store:
        for seed in range(runs):
            store.add(make_result(seed=seed, losses=(1.0,) * 50))


def damage(path):
    content = bytearray(path.read_bytes())
    content[4096:20480] = b"\xff" * 16384
    content[27] ^= 1  # the change counter, without which SQLite trusts its cache
    path.write_bytes(content)
    return bytes(content)


def test_a_damaged_file_is_moved_aside(path):
    for number in (1, 2):
        fill(path)
        content = damage(path)
        with pytest.raises(TruestepError, match=rf"moved to .*corrupt-{number}.*next run starts"):
            Store(path)
        assert path.with_name(f"results.db.corrupt-{number}").read_bytes() == content
        assert not path.exists()


def test_a_damaged_file_takes_its_journal_along(path):
    # Left behind, it would be played into the next file of this name if its writer were killed.
    fill(path)
    with Store(path) as writer:
        damage(path)
        writer._database._connection.execute("BEGIN IMMEDIATE")
        writer._database._connection.execute("PRAGMA user_version = 1")
        journal = path.with_name("results.db-journal")
        assert journal.exists()
        with pytest.raises(TruestepError, match=r"moved to"):
            Store(path)
        assert not journal.exists()
        assert path.with_name("results.db.corrupt-1-journal").exists()


def test_a_truncated_file_is_moved_aside(path):
    fill(path)
    path.write_bytes(path.read_bytes()[: 3 * 4096 + 100])
    with pytest.raises(TruestepError, match=r"corrupt-1"):
        Store(path)


def test_damage_found_later_is_named(path):
    fill(path)
    with Store(path) as store:
        damage(path)
        with pytest.raises(TruestepError, match=r"the file is damaged.*same command again"):
            store.results("e0")


def test_a_full_disk_is_named_and_earlier_results_stay(path):
    with Store(path) as store:
        assert store.add(make_result(seed=0))
        pages = store._database._pragma("page_count")
        store._database._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(TruestepError, match=r"record sgd.*seed 1.*disk is full.*free some"):
            store.add(make_result(seed=1, losses=(1.0,) * 5000))
        assert [key.seed for key in store.keys("e0")] == [0]
        store._database._connection.execute("PRAGMA max_page_count = 1000000")
        assert store.add(make_result(seed=1, losses=(1.0,) * 5000))
        assert len(store.results("e0")) == 2


LIMITED = """
with Store(Path(path)) as store:
    store.add(make_result(seed=0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    try:
        store.add(make_result(seed=1, losses=(1.0,) * 5000))
    except TruestepError as error:
        print(error)
    print(len(store.results("e0")))
"""


def test_a_disk_that_takes_no_more_bytes_is_named(path):
    # The kernel refuses the write itself here, not SQLite's own page limit.
    with start(LIMITED, path) as process:
        message, count = process.stdout.read().splitlines()
    assert "the disk" in message
    assert message.endswith("give the same command again to go on.")
    assert count == "1"
    with Store(path) as store:
        assert len(store.results("e0")) == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TruestepError, match=r"file/sub can't be made.*Choose a folder"):
        Store(tmp_path / "file" / "sub" / "results.db")


def test_a_path_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(TruestepError, match=r"can't be written \(unable to open.*Choose"):
        Store(tmp_path)


def test_a_read_only_store_can_be_read_and_says_why_it_takes_nothing(path):
    fill(path, runs=2)
    with Store(path) as store:
        store._database._connection.execute("PRAGMA query_only = ON")
        with pytest.raises(TruestepError, match="can't be written"):
            store.add(make_result(seed=9))
        assert len(store.keys("e0")) == 2


def test_closing_twice_is_fine(path):
    store = Store(path)
    store.close()
    store.close()


def test_keys_are_values():
    assert len({RunKey("e", "sgd", 0.1, 64, 0, final=False) for _ in range(2)}) == 1
