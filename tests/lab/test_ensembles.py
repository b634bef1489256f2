import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from truestep import TruestepError
from truestep.lab import ensembles
from truestep.lab.ensembles import Ensembles, Orders, network_of, optimizer_of
from truestep.lab.optimizers import BASES
from truestep.lab.store import RunKey
from truestep.lab.tasks import Split, Splits, accuracy, binary_accuracy, binary_loss, find_task
from truestep.lab.training import batches, train
from truestep.lab.workers import Failure

TASK = replace(
    find_task(str(Path(__file__).parent.parent / "tiny_task.py")),
    metrics={"accuracy": accuracy},
    evaluations=2,
)
SPLITS = TASK.load(None)
KEY = RunKey("e", "sgd", lr=0.1, batch_size=8, seed=0, final=False)
NAMES = (*BASES, "asgd", "dasgd", "asgd+dasgd", "asgd+adam", "dasgd+momentum")


def runs(keys, task=TASK, splits=SPLITS, threads=1):
    found = Ensembles(task, splits, threads)
    for key in keys:
        found.rehearse(key)
    return list(found.run(keys))


def with_parts(change):
    """The splits with each part changed."""
    parts = [change(part) for part in (SPLITS.train, SPLITS.validation, SPLITS.test)]
    return Splits(*parts, source="changed")


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_equals_the_torch_loops(name, final):
    # 20 samples in batches of 8: the last batch of an epoch is smaller.
    keys = [replace(KEY, optimizer=name, lr=0.01, seed=seed, final=final) for seed in (3, 0)]
    for found in runs(keys, threads=2):
        expected = train(TASK, SPLITS, found.key)
        assert (found.status, found.best) == (expected.status, expected.best)
        assert found.parameters == expected.parameters
        assert len(found.curve) == len(expected.curve) == 2 * TASK.epochs
        for row, other in zip(found.curve, expected.curve, strict=True):
            assert row.keys() == other.keys()
            assert row | {"seconds": 0} == pytest.approx(other | {"seconds": 0}, rel=1e-5)
        assert found.test == pytest.approx(expected.test, rel=1e-5)
        assert found.versions["engine"] == ensembles.ENGINE
        assert expected.versions["engine"] == "torch loop"
        assert 0 < found.step_seconds < 1
        assert found.curve[-1]["seconds"] == pytest.approx(9 * found.step_seconds)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adagrad", "dasgd"])
def test_the_optimizers_state_is_as_large_as_torchs(name):
    key = replace(KEY, optimizer=name)
    (found,) = runs([key])
    # torch's also has a number of steps for each parameter.
    assert 0 <= train(TASK, SPLITS, key).optimizer_bytes - found.optimizer_bytes <= 4 * 4


def test_one_logit_and_numbers_are_learned_too():
    binary = replace(
        TASK,
        model=partial(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))),
        loss=binary_loss,
        metrics={"right": binary_accuracy},
        target=("right", 0.6),
    )
    numbers = replace(
        TASK, loss=nn.functional.mse_loss, metrics={}, target=("loss", 0.5), learning_rates={}
    )
    of_numbers = with_parts(lambda part: Split(part.inputs, part.inputs[:, :2].abs()))
    for task, splits in ((binary, SPLITS), (numbers, of_numbers)):
        key = replace(KEY, final=True)
        (found,), expected = runs([key], task, splits), train(task, splits, key)
        assert found.curve[-1].keys() == expected.curve[-1].keys()
        assert found.test == pytest.approx(expected.test, rel=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_divergence_ends_a_run_where_the_torch_loops_ends(name):
    key = replace(KEY, optimizer=name, lr=1e30, final=True)
    (found,), expected = runs([key]), train(TASK, SPLITS, key)
    assert found.status == expected.status == "diverged"
    assert found.best == expected.best
    assert [row["step"] for row in found.curve] == [row["step"] for row in expected.curve]
    assert not math.isfinite(found.curve[-1]["loss"])
    assert found.test == {}


def test_a_validation_loss_that_is_not_finite_ends_a_run():
    def model():
        # The second layer's sum is infinite less infinite: no number, which no activation may hide.
        model = nn.Sequential(
            nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)
        )
        nn.init.constant_(model[0].weight, 1.0)
        model[2].weight.data[:] = torch.tensor([1.0, -1.0])
        return model

    task = replace(TASK, model=model)
    huge = torch.tensor([[3e38, 3e38, 0.0, 0.0]]).repeat(5, 1)
    splits = replace(SPLITS, validation=Split(huge, SPLITS.validation.targets[:5]))
    (found,), expected = runs([KEY], task, splits), train(task, splits, KEY)
    assert found.status == expected.status == "diverged"
    assert len(found.curve) == len(expected.curve) == 1
    assert found.best == expected.best == -1


def test_selection_runs_never_see_the_test_split():
    found = Ensembles(TASK, SPLITS, 1)
    assert found._selection.test is None
    assert found._final.test is not None
    found.rehearse(KEY)
    (result,) = found.run([KEY])
    assert result.test == {}


def test_orders_are_those_of_the_torch_loop_in_any_sequence():
    orders = Orders(20)
    expected = torch.cat(list(batches(20, 8, 4, seed=7))).view(4, 20).numpy()
    for epoch in (2, 0, 3, 1, 2):
        np.testing.assert_array_equal(orders(7, epoch), expected[epoch])


def test_calls_are_of_one_optimizer_and_no_longer_than_allowed(monkeypatch):
    calls = []
    plain = Ensembles._train

    def noting(self, keys, starts, steps, record):
        calls.append([(key.optimizer, key.seed) for key in keys])
        return plain(self, keys, starts, steps, record)

    found = Ensembles(TASK, SPLITS, 2)
    keys = [
        replace(KEY, optimizer=name, seed=seed) for name in ("sgd", "adam") for seed in range(3)
    ]
    for key in keys[::3]:
        found.rehearse(key)
    monkeypatch.setattr(Ensembles, "_train", noting)
    monkeypatch.setattr(ensembles, "CALL_SECONDS", 0.0)
    assert len(list(found.run(keys))) == 6
    pairs = [("sgd", 0), ("sgd", 1)], [("sgd", 2)], [("adam", 0), ("adam", 1)], [("adam", 2)]
    assert calls == list(pairs)


def test_a_model_that_fails_or_changes_costs_its_own_run():
    def model():
        seed = torch.initial_seed()
        if seed == 1:
            raise ValueError("an unlucky seed")
        return nn.Sequential(
            nn.Linear(4, 6 if seed == 2 else 5), nn.ReLU(), nn.Linear(6 if seed == 2 else 5, 2)
        )

    outcomes = {
        outcome.key.seed: outcome
        for outcome in runs_of_seeds(replace(TASK, model=model), seeds=range(4))
    }
    assert isinstance(outcomes[1], Failure)
    assert outcomes[1].reason == "ValueError: an unlucky seed"
    assert isinstance(outcomes[2], Failure)
    assert "other layers" in outcomes[2].reason
    assert outcomes[0].status == outcomes[3].status == "done"


def runs_of_seeds(task, seeds):
    found = Ensembles(task, SPLITS, 1)
    found.rehearse(KEY)
    return found.run([replace(KEY, seed=seed) for seed in seeds])


def hooked():
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].register_forward_hook(lambda *_: None)
    return model


def frozen():
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].bias.requires_grad_(requires_grad=False)
    return model


def twice():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 2))


def sequence(*layers):
    return {"model": lambda: nn.Sequential(*layers)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": lambda: nn.Linear(4, 2)}, "a Linear, not an nn.Sequential"),
        (sequence(nn.Linear(4, 2, bias=False)), "nn.Linear with a bias"),
        (sequence(nn.Linear(4, 5), nn.Linear(5, 2)), "ends with"),
        (sequence(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 2)), "one kind of activation"),
        (
            sequence(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)),
            "one kind of activation",
        ),
        (sequence(nn.Linear(4, 5), nn.LeakyReLU(0.2), nn.Linear(5, 2)), "another form"),
        (sequence(nn.Linear(4, 5), nn.GELU("tanh"), nn.Linear(5, 2)), "another form"),
        (sequence(nn.Linear(4, 5).double(), nn.ReLU(), nn.Linear(5, 2)), "not float32"),
        ({"model": hooked}, "hooks"),
        ({"model": frozen}, "frozen"),
        ({"model": twice}, "stands twice"),
        (sequence(nn.Linear(4, 1)), "1 outputs don't go with"),
        ({"loss": nn.functional.nll_loss}, "the loss nll_loss is none of cross_entropy"),
        (
            {"metrics": {"mine": max}, "target": ("mine", 1)},
            "only truestep.lab.tasks.accuracy as a metric .* its own: mine",
        ),
        ({"loss": nn.functional.mse_loss}, "knows no metric"),
    ],
)
def test_what_the_ensemble_cannot_train_has_a_reason(change, reason):
    with pytest.raises(TruestepError, match=reason):
        network_of(replace(TASK, **change), SPLITS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda part: Split(part.inputs.double(), part.targets), "not dense float32"),
        (lambda part: Split(part.inputs.to_sparse(), part.targets), "not dense float32"),
        (
            lambda part: Split(part.inputs[:, None], part.targets),
            "not dense float32 .samples, features.",
        ),
        (lambda part: Split(part.inputs, part.targets.float()), "not classes"),
        (lambda part: Split(part.inputs, part.targets - 100), "go from -100 to"),
        (lambda part: Split(part.inputs / 0, part.targets), "not finite"),
    ],
)
def test_data_that_the_ensemble_does_not_take_has_a_reason(change, reason):
    with pytest.raises(TruestepError, match=reason):
        Ensembles(TASK, with_parts(change), 1)


def test_import_paths_are_not_the_ensembles():
    with pytest.raises(TruestepError, match="an import path"):
        optimizer_of("asgd+my.module:Mine", 0.1)


def test_without_numba_there_is_no_ensemble(monkeypatch):
    monkeypatch.setattr(ensembles, "installed", lambda: False)
    with pytest.raises(TruestepError, match="numba is not installed"):
        Ensembles(TASK, SPLITS, 1)
