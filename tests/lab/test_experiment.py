import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from truestep.lab.experiment import describe, fingerprint, hash_of
from truestep.lab.tasks import TASKS, Split, Splits, find_task

FILE = Path(__file__).parent.parent / "tiny_task.py"
TASK = find_task(str(FILE))
SPLITS = TASK.load(None)
PLAIN = hash_of(describe(TASK, SPLITS))


def scaled(output, targets, scale):
    return scale * nn.functional.cross_entropy(output, targets)


def zeros():
    model = TASK.model()
    nn.init.zeros_(model[0].weight)
    return model


def with_other(part, name):
    split = getattr(SPLITS, part)
    changed = getattr(split, name).clone()
    changed[3] += 1
    return replace(SPLITS, **{part: replace(split, **{name: changed})})


def test_the_hash_is_always_the_same():
    assert hash_of(describe(TASK, TASK.load(None))) == PLAIN
    assert hash_of(describe(find_task(str(FILE)), SPLITS)) == PLAIN
    int(PLAIN, base=16)


def test_a_description_is_plain_data():
    description = describe(TASK, SPLITS, FILE)
    assert json.loads(json.dumps(description)) == description
    assert description["task"] == "tiny"
    assert description["samples"] == [20, 12, 16]


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 4},
        {"evaluations": 2},
        {"name": "other"},
        {"loss": scaled},
        {"loss": partial(scaled, scale=2)},
        {"loss": partial(scaled, scale=3)},
        {"metrics": {"accuracy": scaled}},
        {"model": lambda: nn.Linear(4, 2)},
        {"model": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))},
        {"model": zeros},
    ],
)
def test_what_decides_a_result_changes_the_hash(change):
    changed = hash_of(describe(replace(TASK, **change), SPLITS))
    assert changed != PLAIN
    assert changed == hash_of(describe(replace(TASK, **change), SPLITS))


def test_arguments_of_a_loss_are_told_apart():
    hashes = {
        hash_of(describe(replace(TASK, loss=partial(scaled, scale=scale)), SPLITS))
        for scale in (2, 3)
    }
    assert len(hashes) == 2


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("name", ["inputs", "targets"])
def test_one_changed_value_of_the_data_changes_the_hash(part, name):
    assert hash_of(describe(TASK, with_other(part, name))) != PLAIN


def test_titles_leave_the_hash_as_it_is():
    splits = replace(SPLITS, source="elsewhere")
    assert hash_of(describe(replace(TASK, title="Another"), splits)) == PLAIN


def test_defaults_of_a_race_leave_the_hash_as_it_is():
    # They are in the key, or decide which keys there are.
    task = replace(TASK, batch_size=5, optimizers=("asgd",), learning_rates={})
    assert hash_of(describe(task, SPLITS)) == PLAIN


def test_a_users_file_counts_by_its_content(tmp_path):
    copy, changed = tmp_path / "copy.py", tmp_path / "changed.py"
    copy.write_text(FILE.read_text())
    changed.write_text(FILE.read_text() + "\n")
    hashes = [hash_of(describe(TASK, SPLITS, file)) for file in (FILE, copy, changed)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_file_that_imports_nothing_of_its_users_has_no_imports():
    assert "imports" not in describe(TASK, SPLITS, FILE)
    assert describe(TASKS["digits"], SPLITS).keys() == describe(TASK, SPLITS).keys()


def test_what_a_users_file_imports_counts_by_its_content(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "importing_task.py"
    file.write_text(f"import own_losses\n{FILE.read_text()}")
    own = {"own_losses": "from own_numbers import SCALE\n", "own_numbers": "SCALE = 1\n"}

    def imports():
        for name, source in own.items():
            (tmp_path / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, name, raising=False)
        task = find_task(str(file))
        return describe(task, SPLITS, file)

    before = imports()
    assert list(before["imports"]) == ["own_losses", "own_numbers"]
    assert hash_of(imports()) == hash_of(before)
    own["own_numbers"] = "SCALE = 3\n"
    assert hash_of(imports()) != hash_of(before)


def test_addresses_of_objects_do_not_count():
    class Odd(nn.Module):
        def extra_repr(self):
            return repr(object())

        def forward(self, inputs):
            return inputs

    class Loss:
        def __call__(self, output, targets):
            return output.sum()

    def description():
        return describe(replace(TASK, model=Odd, loss=Loss()), SPLITS)

    kept_alive = [Loss() for _ in range(3)]
    assert hash_of(description()) == hash_of(description())
    del kept_alive


def test_models_with_buffers_and_mixed_types_have_a_fingerprint():
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).to(torch.bfloat16)
    assert describe(replace(TASK, model=lambda: model), SPLITS)["start"]


def test_fingerprints_know_types_and_shapes():
    zeros = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(4, dtype=torch.bool),
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(4, dtype=torch.bfloat16),
    ]
    assert len({fingerprint(tensor) for tensor in zeros}) == len(zeros)
    matrix = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(matrix.T) == fingerprint(matrix.T.contiguous())


def test_built_in_tasks_have_different_hashes():
    split = Split(torch.zeros(3, 784), torch.zeros(3, dtype=torch.int64))
    splits = Splits(split, split, split, source="")
    names = ("mnist", "fashion-mnist", "kmnist")
    assert len({hash_of(describe(TASKS[name], splits)) for name in names}) == 3
