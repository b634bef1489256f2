import math
from pathlib import Path

import pytest

from truestep import TruestepError
from truestep.lab.plan import Settings, UsageError, make_plan
from truestep.lab.store import RunKey
from truestep.lab.tasks import find_task

FILE = str(Path(__file__).parent.parent / "tiny_task.py")


def test_the_task_says_what_is_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = make_plan(Settings(FILE))
    assert plan.grids == {"sgd": (0.1, 0.3), "adam": (0.01, 0.03)}
    assert plan.batch_sizes == (8,)
    assert plan.task.epochs == 3
    assert plan.folder == Path("truestep-race/tiny")
    assert plan.file == Path(FILE)
    assert make_plan(Settings()).file is None


def test_settings_come_before_the_task():
    plan = make_plan(
        Settings(
            FILE,
            optimizers=("adam+asgd", "sgd", "asgd+adam"),
            learning_rates={"adam+asgd": (0.3, 0.1, 0.3), "": (2.0,)},
            batch_sizes=(4, 2, 4),
            epochs=7,
        )
    )
    assert plan.grids == {"asgd+adam": (0.1, 0.3), "sgd": (2.0,)}
    assert plan.batch_sizes == (2, 4)
    assert plan.task.epochs == 7


def test_a_folder_is_named_safely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.py").write_text(Path(FILE).read_text().replace('"tiny"', '"../a b/c"'))
    assert make_plan(Settings("odd.py")).folder == Path("truestep-race/..-a-b-c")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"seeds": 0}, "--seeds 0"),
        ({"epochs": 0}, "--epochs 0"),
        ({"jobs": -1}, "--jobs -1"),
        ({"batch_sizes": (8, 0)}, "--batch-size 0"),
        ({"learning_rates": {"": (0.1, 0.0)}}, "--lr 0 "),
        ({"learning_rates": {"": (-1.0,)}}, "--lr -1 "),
        ({"learning_rates": {"": (math.nan,)}}, "--lr nan"),
        ({"learning_rates": {"sgd": (math.inf,)}}, "--lr inf"),
        ({"learning_rates": {"momentum": (0.1,)}}, "momentum, which does not race"),
        ({"learning_rates": {"momentumm": (0.1,)}}, "Did you mean momentum"),
        ({"optimizers": ("sgd", "adamm")}, "Did you mean adam"),
        ({"task": "digitz"}, "digits"),
        ({"task": "missing.py"}, "missing.py"),
        ({"out": Path(FILE)}, "is a file"),
    ],
)
def test_impossible_settings_are_refused(settings, complaint):
    with pytest.raises(UsageError, match=complaint) as error:
        make_plan(Settings(**{"task": FILE} | settings))
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    assert isinstance(error.value, TruestepError)


def test_a_batch_larger_than_the_training_data_is_refused():
    splits = find_task(FILE).load(None)
    make_plan(Settings(FILE, batch_sizes=(20,))).check_data(splits)
    with pytest.raises(UsageError, match=r"Batch size 21 .* at most 20"):
        make_plan(Settings(FILE, batch_sizes=(4, 21))).check_data(splits)


def test_the_selection_is_every_combination_once():
    plan = make_plan(Settings(FILE, batch_sizes=(4, 8), seeds=3))
    keys = plan.selection("e")
    assert len(set(keys)) == len(keys) == 3 * 2 * (2 + 2)
    assert RunKey("e", "adam", 0.03, 4, 2, final=False) in keys
    assert {(key.optimizer, key.lr) for key in keys} == {
        ("sgd", 0.1),
        ("sgd", 0.3),
        ("adam", 0.01),
        ("adam", 0.03),
    }
    # Every optimizer has results before a second seed begins.
    assert [key.seed for key in keys] == sorted(key.seed for key in keys)


def test_final_runs_are_those_chosen():
    plan = make_plan(Settings(FILE, seeds=2))
    keys = plan.finals("e", {("sgd", 8): 0.3, ("adam", 8): math.nan})
    assert keys == [RunKey("e", "sgd", 0.3, 8, seed, final=True) for seed in range(2)]


@pytest.mark.parametrize(("batch_sizes", "reference"), [((4, 8, 16), 8), ((4, 16), 4)])
def test_other_batch_sizes_also_get_the_references_choice(batch_sizes, reference):
    plan = make_plan(Settings(FILE, batch_sizes=batch_sizes, seeds=1))
    assert plan.reference == reference
    chosen = {("sgd", size): 0.1 if size == reference else 0.3 for size in batch_sizes}
    found = {(key.batch_size, key.lr) for key in plan.finals("e", chosen)}
    others = {(size, 0.3) for size in batch_sizes if size != reference}
    assert found == others | {(size, 0.1) for size in batch_sizes}
    same = plan.finals("e", dict.fromkeys(chosen, 0.1))
    assert len(same) == len(set(same)) == len(batch_sizes)


def test_runs_of_wider_races_do_not_belong_to_the_plan():
    plan = make_plan(Settings(FILE, seeds=2))
    key = RunKey("e", "sgd", 0.1, 8, 1, final=False)
    assert plan.has(key)
    for change in (
        {"optimizer": "momentum"},
        {"lr": 0.2},
        {"batch_size": 4},
        {"seed": 2},
    ):
        assert not plan.has(RunKey(**{**vars(key), **change}))
