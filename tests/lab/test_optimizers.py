import hashlib
import importlib
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

import truestep
from truestep import TruestepError
from truestep.lab.optimizers import (
    NAMES,
    TRANSFORMS,
    build,
    find_optimizer,
    learning_rates,
    stored_name,
)

JOINS = ("asgd+dasgd", "asgd+adam", "dasgd+momentum", "asgd+dasgd+rmsprop")


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def step(model, optimizer, batch):
    generator = torch.Generator().manual_seed(batch)
    inputs = torch.randn(7, 4, generator=generator)
    targets = torch.randint(3, (7,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def weights_after(steps, name, lr=0.1):
    model = make_model()
    optimizer, counter = build(name, model, lr)
    for batch in range(steps):
        step(model, optimizer, batch)
    if counter is not None:
        counter.close()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a user's module with this source into the folder that truestep is called in."""

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()

    return write


@pytest.mark.parametrize("name", [*NAMES, *JOINS])
def test_every_optimizer_trains_every_parameter(name):
    before = nn.utils.parameters_to_vector(make_model().parameters()).detach()
    moved = weights_after(3, name) != before
    assert moved.all()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("sgd", lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
        ("momentum", lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)),
        (
            "nesterov",
            lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
        ),
        ("adagrad", lambda parameters: torch.optim.Adagrad(parameters, lr=0.1)),
        ("rmsprop", lambda parameters: torch.optim.RMSprop(parameters, lr=0.1)),
        ("adam", lambda parameters: torch.optim.Adam(parameters, lr=0.1)),
        ("adamw", lambda parameters: torch.optim.AdamW(parameters, lr=0.1)),
        ("dasgd", lambda parameters: truestep.DASGD(parameters, lr=0.1)),
        # Joins with plain SGD, from the other side.
        ("dasgd+sgd", lambda parameters: truestep.DASGD(parameters, lr=0.1)),
    ],
)
def test_a_name_means_this_optimizer(name, make):
    model = make_model()
    optimizer = make(model.parameters())
    for batch in range(3):
        step(model, optimizer, batch)
    expected = nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(weights_after(3, name), expected)


def test_asgd_and_dasgd_correct_before_they_boost():
    model = make_model()
    counter = truestep.SampleCounter(model)
    optimizer = truestep.DASGD(model.parameters(), lr=0.1)
    inner_step = optimizer.step

    def corrected_step():
        counter.correct_gradients()
        inner_step()

    optimizer.step = corrected_step
    for batch in range(3):
        step(model, optimizer, batch)
    counter.close()
    expected = nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(weights_after(3, "asgd+dasgd"), expected)
    assert not torch.allclose(weights_after(3, "asgd"), expected)
    assert not torch.allclose(weights_after(3, "dasgd"), expected)


def test_asgd_alone_equals_its_join_with_sgd():
    torch.testing.assert_close(weights_after(3, "asgd"), weights_after(3, "asgd+sgd"))


@pytest.mark.parametrize("name", [*NAMES, *JOINS])
def test_only_asgd_has_a_counter(name):
    _, counter = build(name, make_model(), 0.1)
    assert (counter is not None) == ("asgd" in name.split("+"))


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("adam+asgd", "asgd+adam"),
        ("dasgd + asgd", "asgd+dasgd"),
        ("momentum+dasgd+asgd", "asgd+dasgd+momentum"),
        ("my.module:Mine+dasgd", "dasgd+my.module:Mine"),
    ],
)
def test_the_parts_of_a_join_may_stand_in_any_order(written, name):
    assert find_optimizer(written).name == name


@pytest.mark.parametrize("name", ["adamm", "asgd+adamm", "", "sgd+", "Adam"])
def test_an_unknown_name_says_which_there_are(name):
    with pytest.raises(TruestepError) as error:
        find_optimizer(name)
    message = str(error.value)
    assert "\n" not in message
    assert all(known in message for known in (*NAMES, "my.module:MyOptimizer"))
    assert name in message


def test_the_closest_name_is_proposed():
    with pytest.raises(TruestepError, match=r"Did you mean rmsprop\?"):
        find_optimizer("rmspropp")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("sgd+adam", "joins two optimizers"),
        ("asgd+asgd", "asgd twice"),
        ("my.module:A+adam", "joins two optimizers"),
    ],
)
def test_impossible_joins_are_refused(name, complaint):
    with pytest.raises(TruestepError, match=complaint):
        find_optimizer(name)


@pytest.mark.parametrize("name", [*NAMES, *JOINS, "my.module:MyOptimizer"])
def test_every_optimizer_has_five_learning_rates(name):
    grid = learning_rates(name, {})
    assert len(grid) == 5
    assert grid == tuple(sorted(set(grid)))
    assert all(2.9 < high / low < 3.4 for low, high in pairwise(grid))


@pytest.mark.parametrize(
    ("name", "relative"),
    [
        ("sgd", "sgd"),
        ("dasgd", "sgd"),
        ("asgd+dasgd", "asgd"),
        ("asgd+sgd", "asgd"),
        ("asgd+adam", "adam"),
        ("dasgd+adamw", "adam"),
        ("nesterov", "momentum"),
    ],
)
def test_a_tasks_learning_rates_serve_the_next_of_kin(name, relative):
    grids = {other: (index + 1.0,) for index, other in enumerate((*NAMES, "x"))}
    if name != relative:
        grids.pop(name, None)
        grids.pop("adamw", None)
    assert learning_rates(name, grids) == grids[relative]


def test_asgd_before_momentum_does_not_take_momentums_learning_rates():
    # Its gradients are larger.
    assert max(learning_rates("asgd+momentum", {"momentum": (5.0,)})) < 0.1


def test_a_users_optimizer_is_built_by_import_path(module):
    module(
        "user_optimizer",
        "import torch\n"
        "class Mine(torch.optim.SGD):\n"
        "    def __init__(self, params, lr):\n"
        "        super().__init__(params, lr=10 * lr)\n",
    )
    torch.testing.assert_close(
        weights_after(2, "user_optimizer:Mine", lr=0.01), weights_after(2, "sgd", lr=0.1)
    )
    torch.testing.assert_close(
        weights_after(2, "asgd+user_optimizer:Mine", lr=0.01), weights_after(2, "asgd", lr=0.1)
    )


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("no_such_module:Mine", "no module 'no_such_module'"),
        ("user_broken:Mine", "ZeroDivisionError"),
        ("user_needs:Mine", "No module named 'no_such_requirement'"),
        ("user_fine:Missing", "its optimizers are Mine"),
        ("user_fine:number", "not of type int"),
        ("user_fine:Strange", "gave a Strange, not a torch.optim.Optimizer"),
        ("user_fine:Demanding", "missing 1 required positional argument: 'colour'"),
    ],
)
def test_an_import_path_that_leads_nowhere_is_one_line(module, path, complaint):
    module("user_broken", "1 / 0\n")
    module("user_needs", "import no_such_requirement\n")
    module(
        "user_fine",
        "import torch\n"
        "number = 3\n"
        "class Mine(torch.optim.SGD): pass\n"
        "class Strange:\n"
        "    def __init__(self, params, lr): pass\n"
        "def Demanding(params, lr, colour): pass\n",
    )
    with pytest.raises(TruestepError, match=complaint) as error:
        build(path, make_model(), 0.1)
    assert "\n" not in str(error.value)


def test_a_changed_user_optimizer_is_stored_as_another(module):
    source = "import torch\nclass Mine(torch.optim.SGD): pass\n"
    module("user_changes", source)
    before = stored_name("user_changes:Mine")
    assert before.startswith("user_changes:Mine#")
    assert stored_name("user_changes:Mine") == before
    module("user_changes", source + "# another comment\n")
    assert stored_name("user_changes:Mine") != before


def test_what_an_optimizers_module_imports_counts_too(module):
    source = "import torch\nclass Mine(torch.optim.SGD): pass\n"
    module("user_imports", source)
    alone = stored_name("user_imports:Mine")
    assert alone.endswith(f"#{hashlib.sha256(source.encode()).hexdigest()[:8]}")
    names = []
    for factor in (1, 2):
        module("user_factors", f"FACTOR = {factor}\n")
        module("user_imports", f"from user_factors import FACTOR\n{source}")
        names.append(stored_name("user_imports:Mine"))
    assert len({alone, *names}) == 3


@pytest.mark.parametrize("name", [*NAMES, *JOINS])
def test_built_in_optimizers_are_stored_by_their_names(name):
    assert stored_name(name) == name


def test_the_names_end_with_truesteps_own():
    assert set(NAMES[-2:]) == set(TRANSFORMS)
