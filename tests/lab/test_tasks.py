"""Tasks: shapes, determinism, honest splits, and errors that a user can act on."""

import math
import os
import pickle
import runpy
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from truestep import TruestepError
from truestep.lab import language_id
from truestep.lab.language_id import LANGUAGES, LanguageNetwork
from truestep.lab.task import Split, Splits, Task
from truestep.lab.tasks import TASKS, find_task, perceptron

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_task.py"
FOLDERS = {
    "mnist": "mnist",
    "fashion-mnist": "fashion-mnist",
    "kmnist": "kmnist10k",
    "quickdraw10": "quickdraw10",
}
SIZES = {
    "digits": (1077, 360, 360),
    "circles": (512, 512, 2048),
    "spirals": (512, 512, 2048),
    "mnist": (50_000, 10_000, 10_000),
    "fashion-mnist": (50_000, 10_000, 10_000),
    "kmnist": (6_667, 1_333, 2_000),
    "quickdraw10": (26_667, 5_333, 8_000),
    "language-id": (76_800, 9_600, 9_600),
}
loaded: dict[str, Splits] = {}


def load(name):
    """The data of a built-in task, read once; image tasks need their folder under TRUESTEP_DATA."""
    folder = FOLDERS.get(name)
    data = os.environ.get("TRUESTEP_DATA")
    if folder and not (data and (Path(data) / folder).is_dir()):
        pytest.skip(f"no folder {folder} under TRUESTEP_DATA")
    if name not in loaded:
        loaded[name] = TASKS[name].load(None)
    return loaded[name]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """What this machine has downloaded before must not matter."""
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / project)


every_task = pytest.mark.parametrize("name", sorted(TASKS))


def parts(splits):
    return (splits.train, splits.validation, splits.test)


def same(one, other):
    return all(
        torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
        for a, b in zip(parts(one), parts(other), strict=True)
    )


@every_task
def test_shapes_and_numbers(name):
    task, splits = TASKS[name], load(name)
    assert tuple(len(part.inputs) for part in parts(splits)) == SIZES[name]
    classes = (
        len(LANGUAGES) if name == "language-id" else 2 if "circles spirals".count(name) else 10
    )
    torch.manual_seed(0)
    model = task.model()
    for part in parts(splits):
        assert part.targets.dtype == torch.int64
        assert sorted(part.targets.unique().tolist()) == list(range(classes))
        output = model(part.inputs[:500])
        assert output.shape == (len(part.inputs[:500]), 1 if classes == 2 else classes)
        loss = task.loss(output, part.targets[:500])
        assert loss.shape == ()
        # an untrained model knows about as much as one that says nothing
        assert 0.5 * math.log(classes) < loss.item() < 2 * math.log(classes)
        for metric in task.metrics.values():
            assert 0 <= metric(output, part.targets[:500]).item() <= 1
    if part.inputs.dtype.is_floating_point and classes == 10:
        assert (part.inputs.min(), part.inputs.max()) == (0, 1)


@every_task
def test_learning_helps(name):
    task, splits = TASKS[name], load(name)
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    inputs, targets = splits.train.inputs[:256], splits.train.targets[:256]
    before = task.loss(model(inputs), targets).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < before - 0.05


@every_task
def test_the_same_every_time(name):
    task, splits = TASKS[name], load(name)
    assert same(splits, task.load(None))
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(torch.cat([p.flatten() for p in task.model().parameters()]))
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


@pytest.mark.parametrize("name", ["circles", "spirals", "digits"])
def test_no_sample_is_in_two_splits(name):
    rows = torch.cat([part.inputs for part in parts(load(name))])
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_validation_is_the_end_of_the_training_images(name):
    from truestep.lab.datasets import load_images  # noqa: PLC0415

    splits, images = load(name), load_images(name)
    rejoined = torch.cat((splits.train.inputs, splits.validation.inputs)) * 255
    assert torch.equal(
        rejoined.round().to(torch.uint8), torch.from_numpy(images.train.images).flatten(1)
    )
    assert splits.source == images.source


def test_sources_that_are_not_the_published_sets_say_so():
    assert load("kmnist").source.startswith("kmnist10k: 8,000 training and 2,000 test images")
    assert "not comparable with published KMNIST figures" in load("kmnist").source
    assert load("quickdraw10").source.startswith("quickdraw10-other: 32,000 training")
    assert "rainbow: not the classes or the size" in load("quickdraw10").source


@every_task
def test_defaults(name):
    task = TASKS[name]
    assert set(task.optimizers) == set(task.learning_rates)
    for rates in task.learning_rates.values():
        assert len(rates) >= 5
        assert list(rates) == sorted(set(rates))
        ratios = [b / a for a, b in pairwise(rates)]
        assert max(ratios) < 4
    assert pickle.loads(pickle.dumps(task)).name == name  # noqa: S301


# Language identification


def test_features_are_ranked_on_training_words_only():
    inputs = load("language-id").train.inputs
    counts = torch.bincount(inputs.flatten(), minlength=language_id.FEATURES + 2)
    features = counts[: language_id.FEATURES]
    assert features.min() > 0
    assert (features.diff() <= 0).all()
    assert counts[language_id.FEATURES] == len(inputs)
    per_word = (inputs < language_id.FEATURES).sum(dim=1).float().mean()
    assert 16 < per_word < 18


def test_every_word_has_one_language():
    words, targets = language_id._labelled_words()
    assert len(set(words)) == len(words) == 96_000
    assert set(Counter(targets).values()) == {6_000}
    language = {word: LANGUAGES[target][0] for word, target in zip(words, targets, strict=True)}
    assert [language[word] for word in ("the", "und", "nie", "och", "és", "için")] == [
        "en", "de", "pl", "sv", "hu", "tr",
    ]  # fmt: skip


def test_ngrams():
    assert language_id._ngrams("aa") == {"<a", "aa", "a>", "<aa", "aa>", "<aa>"}
    assert language_id._ngrams("aaa") >= {"aa", "aaa", "<aaa", "aaa>"}


def test_ties_are_broken_alphabetically():
    vocabulary = language_id._vocabulary([{"b", "c"}, {"c", "a"}])
    assert vocabulary == {"c": 0, "a": 1, "b": 2}


def test_the_network_is_a_linear_layer_on_indicators():
    torch.manual_seed(0)
    network = LanguageNetwork().double()
    inputs = load("language-id").train.inputs[:50]
    weight = network.features.weight.detach()
    linear = nn.Linear(language_id.FEATURES, 32).double()
    with torch.no_grad():
        linear.weight.copy_(weight[:-2].T)
        linear.bias.copy_(weight[-2])
    indicators = torch.zeros(50, language_id.FEATURES + 2, dtype=torch.float64)
    indicators.scatter_(1, inputs, 1)
    torch.testing.assert_close(network.features(inputs), linear(indicators[:, :-2]))
    # and starts like one
    bound = 1 / math.sqrt(language_id.FEATURES)
    assert weight[:-1].abs().max() <= bound
    assert weight[:-1].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    network(inputs).sum().backward()
    assert not weight[-1].any()
    assert not network.features.weight.grad[-1].any()


def test_without_wordfreq(monkeypatch):
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(TruestepError, match=r"run in the clone: pip install '\.\[lab\]'\.$"):
        TASKS["language-id"].load(None)


# Tasks of one's own


def test_the_example(capsys):
    task = find_task(str(EXAMPLE))
    assert task.name == "wine"
    splits = task.load(None)
    assert [len(part.inputs) for part in parts(splits)] == [100, 39, 39]
    assert task.model()(splits.train.inputs).shape == (100, 3)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "100 wines" in capsys.readouterr().out


def test_a_dataclass_in_a_task_file(tmp_path):
    # dataclasses look their module up by name
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from truestep.lab.tasks import find_task\n"
        "@dataclass\n"
        "class Sizes:\n"
        "    width: int = 3\n"
        "task = find_task('digits')\n"
    )
    assert find_task(str(file)) is TASKS["digits"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = 1\n\ntask = Task(", "line 3: SyntaxError: "),
        ("import math\ntask = math.floor('a')\n", "line 2: TypeError: "),
        ("def f():\n    return 1 / 0\n\ntask = f()\n", "line 2: ZeroDivisionError: "),
        (
            "import no_such_module\n",
            "line 1: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("raise SystemExit('bye')\n", "line 1: SystemExit: bye"),
        ("x = 1\n", "has no `task`"),
        ("task = 'digits'\n", "has a `task` that is a str"),
        (
            "from truestep.lab.tasks import find_task\ntask = find_task('digit')\n",
            "line 2: Trueste",
        ),
        ("task = '\0'\n", "null bytes"),
        (b"x = '\xff'\n", "SyntaxError"),
    ],
)
def test_broken_task_files(tmp_path, text, problem):
    file = tmp_path / "mine.py"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TruestepError, match=problem) as error:
        find_task(str(file))
    assert str(error.value).startswith(f"Task file {file}")
    assert "truestep_task_mine" not in sys.modules or "has " in str(error.value)


def test_names_that_are_none(tmp_path):
    with pytest.raises(TruestepError, match=r"did you mean 'digits'\?.*choose one of: digits, "):
        find_task("digit")
    with pytest.raises(TruestepError, match=r"no task 'quux'; choose one of: .*language-id"):
        find_task("quux")
    for path in (tmp_path / "mine.py", tmp_path / "mine", tmp_path):
        with pytest.raises(TruestepError, match="There is no task file"):
            find_task(str(path))
    with pytest.raises(TruestepError, match="There is no task file mine"):
        find_task("mine.py")
    (tmp_path / "notes.txt").write_text("task")
    with pytest.raises(TruestepError, match="is not Python; give a file that ends in"):
        find_task(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"batch_size": 0}, "batch_size is 0; give 1 or more"),
        ({"epochs": -1}, "epochs is -1"),
        ({"evaluations": 0}, "evaluations is 0"),
        ({"target": ("accuracies", 0.9)}, "choose one of: accuracy, loss"),
        ({"learning_rates": {"sgd": ()}}, "learning rates of sgd"),
        ({"learning_rates": {"adam": (0.1, 0.0)}}, "learning rates of adam"),
        ({"learning_rates": {"adam": (math.nan,)}}, "learning rates of adam"),
    ],
)
def test_impossible_tasks(changes, problem):
    values = {name: getattr(TASKS["digits"], name) for name in Task.__dataclass_fields__}
    with pytest.raises(TruestepError, match=problem):
        Task(**(values | changes))


def test_impossible_splits():
    with pytest.raises(TruestepError, match="3 inputs and 2 targets"):
        Split(torch.zeros(3, 1), torch.zeros(2))
    with pytest.raises(TruestepError, match="0 inputs"):
        Split(torch.zeros(0, 1), torch.zeros(0))


def test_a_perceptron_has_no_activation_at_its_end():
    assert [type(layer).__name__ for layer in perceptron(4, 3, 2)] == ["Linear", "ReLU", "Linear"]
