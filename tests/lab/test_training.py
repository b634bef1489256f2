import copy
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from truestep.lab import training
from truestep.lab.store import RunKey
from truestep.lab.tasks import Split, Splits, find_task
from truestep.lab.training import batches, evaluate, rehearse, train

TASK = find_task(str(Path(__file__).parent.parent / "tiny_task.py"))
SPLITS = TASK.load(None)
KEY = RunKey("experiment", "sgd", lr=0.1, batch_size=8, seed=0, final=False)
TIMES = ("seconds",)


class Untouchable:
    """A test split that no selection run may look at."""

    def __getattr__(self, name):
        raise AssertionError(f"the test split's {name} was read")


def without_times(curve):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in curve]


def recording(task):
    """The task, and the targets of every batch whose loss is computed in training."""
    seen = []

    def loss(output, targets):
        if torch.is_grad_enabled():
            seen.append(targets.tolist())
        return task.loss(output, targets)

    return replace(task, loss=loss), seen


def test_every_epoch_is_another_permutation_with_a_smaller_last_batch():
    found = list(batches(samples=20, batch_size=8, epochs=2, seed=3))
    assert [len(index) for index in found] == [8, 8, 4, 8, 8, 4]
    first, second = torch.cat(found[:3]), torch.cat(found[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
    assert first.tolist() != second.tolist()


def test_the_order_depends_on_the_seed_and_not_on_other_draws():
    first = torch.cat(list(batches(20, 8, 1, seed=3))).tolist()
    torch.rand(5)
    assert torch.cat(list(batches(20, 8, 1, seed=3))).tolist() == first
    assert torch.cat(list(batches(20, 8, 1, seed=4))).tolist() != first


def test_the_order_of_samples_is_the_same_for_all_batch_sizes():
    assert torch.equal(
        torch.cat(list(batches(20, 8, 2, seed=3))), torch.cat(list(batches(20, 5, 2, seed=3)))
    )


def test_optimizers_see_the_same_data_with_the_same_seed():
    # Dropout draws from torch's generator in every step, which must not shift the order.
    task = replace(TASK, model=lambda: nn.Sequential(nn.Dropout(), nn.Linear(4, 2)))
    orders = []
    for optimizer, lr in (("sgd", 0.1), ("adam", 0.01), ("asgd+dasgd", 0.05)):
        recorded, seen = recording(task)
        train(recorded, SPLITS, replace(KEY, optimizer=optimizer, lr=lr))
        orders.append(seen)
    assert orders[0] == orders[1] == orders[2]
    recorded, seen = recording(task)
    train(recorded, SPLITS, replace(KEY, seed=1))
    assert seen != orders[0]


def test_optimizers_start_from_the_same_weights_with_the_same_seed():
    starts = []

    def model():
        starts.append(made := TASK.model())
        return copy.deepcopy(made)

    for optimizer, seed in (("sgd", 0), ("adam", 0), ("sgd", 1)):
        train(replace(TASK, model=model), SPLITS, replace(KEY, optimizer=optimizer, seed=seed))
    first, second, other = (nn.utils.parameters_to_vector(made.parameters()) for made in starts)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "asgd", "dasgd"])
def test_the_same_key_gives_the_same_run(optimizer):
    key = replace(KEY, optimizer=optimizer)
    first, second = train(TASK, SPLITS, key), train(TASK, SPLITS, key)
    assert without_times(first.curve) == without_times(second.curve)
    assert first.status == "done"


def test_training_lowers_the_loss_and_says_so():
    result = train(replace(TASK, epochs=30), SPLITS, KEY)
    assert result.curve[-1]["train_loss"] < result.curve[0]["train_loss"]
    assert result.curve[result.best]["loss"] == min(row["loss"] for row in result.curve)
    assert result.parameters == 4 * 5 + 5 + 5 * 2 + 2
    assert result.step_seconds > 0


def test_a_selection_run_never_touches_test_data():
    splits = Splits(SPLITS.train, SPLITS.validation, Untouchable(), source="")
    assert train(TASK, splits, KEY).test == {}
    rehearse(TASK, splits, KEY)
    with pytest.raises(AssertionError, match="test split"):
        train(TASK, splits, replace(KEY, final=True))


@pytest.mark.parametrize("optimizer", ["sgd", "asgd+dasgd", "adam"])
def test_a_final_run_repeats_its_selection_run(optimizer):
    key = replace(KEY, optimizer=optimizer)
    selection, final = train(TASK, SPLITS, key), train(TASK, SPLITS, replace(key, final=True))
    assert without_times(final.curve) == without_times(selection.curve)
    assert final.best == selection.best
    assert final.test.keys() == {"loss", "accuracy"}


def test_test_data_meets_the_weights_of_the_best_evaluation():
    task = replace(TASK, epochs=40)
    key = replace(KEY, optimizer="adam", final=True)
    overfitted = train(task, SPLITS, key)
    assert overfitted.best < len(overfitted.curve) - 1, "the task no longer overfits"
    # A run that ends at the best evaluation has nothing to go back to.
    stopped = train(replace(task, epochs=overfitted.best + 1), SPLITS, key)
    assert overfitted.test == stopped.test


@pytest.mark.parametrize(
    ("evaluations", "steps"),
    [
        (1, [3, 6, 9]),
        (2, [1, 3, 4, 6, 7, 9]),
        (3, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (7, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_evaluations_are_spread_over_the_epoch(evaluations, steps):
    result = train(replace(TASK, evaluations=evaluations), SPLITS, KEY)
    assert [row["step"] for row in result.curve] == steps
    assert [row["epoch"] for row in result.curve] == [step / 3 for step in steps]
    seconds = [row["seconds"] for row in result.curve]
    assert seconds == sorted(seconds)


def test_train_loss_is_the_mean_over_samples_since_the_last_row():
    # A learning rate that leaves the weights where they are.
    result = train(TASK, SPLITS, replace(KEY, lr=1e-30))
    torch.manual_seed(KEY.seed)
    expected = evaluate(TASK, TASK.model(), SPLITS.train)["loss"]
    assert [row["train_loss"] for row in result.curve] == pytest.approx([expected] * 3)


@pytest.mark.parametrize("final", [False, True])
def test_a_run_ends_where_its_training_loss_is_not_finite(final):
    recorded, seen = recording(replace(TASK, epochs=50))
    result = train(recorded, SPLITS, replace(KEY, lr=1e30, final=final))
    assert result.status == "diverged"
    assert len(seen) < 50 * 3
    assert result.curve[-1]["step"] == len(seen)
    assert not math.isfinite(result.curve[-1]["train_loss"])
    assert not math.isfinite(result.curve[-1]["loss"])
    assert result.test == {}


def test_a_run_ends_where_its_validation_loss_is_not_finite():
    spoiled = Split(torch.full_like(SPLITS.validation.inputs, math.nan), SPLITS.validation.targets)
    result = train(TASK, Splits(SPLITS.train, spoiled, SPLITS.test, source=""), KEY)
    assert (result.status, result.best, len(result.curve)) == ("diverged", -1, 1)
    assert math.isfinite(result.curve[0]["train_loss"])
    assert math.isnan(result.curve[0]["loss"])


@pytest.mark.parametrize(
    ("optimizer", "tensors", "scalars"),
    [("sgd", 0, 0), ("momentum", 1, 0), ("adagrad", 1, 1), ("adam", 2, 1), ("dasgd", 1, 0)],
)
def test_optimizer_memory_is_all_its_state(optimizer, tensors, scalars):
    result = train(TASK, SPLITS, replace(KEY, optimizer=optimizer))
    # Four float32 parameters; some optimizers also keep their step as a scalar of each.
    assert result.optimizer_bytes == 4 * (tensors * result.parameters + scalars * 4)


def test_the_counters_records_are_optimizer_memory():
    alone = train(TASK, SPLITS, replace(KEY, optimizer="asgd")).optimizer_bytes
    with_adam = train(TASK, SPLITS, replace(KEY, optimizer="asgd+adam")).optimizer_bytes
    adam = train(TASK, SPLITS, replace(KEY, optimizer="adam")).optimizer_bytes
    assert 0 < alone == with_adam - adam


def test_evaluation_is_in_chunks_without_gradients_and_in_evaluation_mode(monkeypatch):
    modes = []

    class Model(nn.Module):
        def forward(self, inputs):
            modes.append((len(inputs), torch.is_grad_enabled(), self.training))
            return inputs[:, :2]

    model = Model()
    whole = evaluate(TASK, model, SPLITS.validation)
    monkeypatch.setattr(training, "EVALUATION_CHUNK", 5)
    parts = evaluate(TASK, model, SPLITS.validation)
    assert modes == [(size, False, False) for size in (12, 5, 5, 2)]
    assert parts == pytest.approx(whole)
    assert model.training
    model.eval()
    evaluate(TASK, model, SPLITS.validation)
    assert not model.training


def test_a_metric_may_return_a_plain_number():
    def share_of_ones(output, targets):
        return (output.argmax(1) == 1).float().mean().item()

    task = replace(TASK, metrics=TASK.metrics | {"ones": share_of_ones})
    model = TASK.model()
    expected = share_of_ones(model(SPLITS.validation.inputs), None)
    assert evaluate(task, model, SPLITS.validation)["ones"] == pytest.approx(expected)


def test_counters_are_closed_whatever_happens(monkeypatch):
    closed = []

    def close(counter):
        closed.append(counter)

    monkeypatch.setattr("truestep.SampleCounter.close", close)
    train(TASK, SPLITS, replace(KEY, optimizer="asgd"))
    assert len(closed) == 1

    def failing(output, targets):
        raise ValueError("no")

    for run in (train, rehearse):
        with pytest.raises(ValueError, match="no"):
            run(replace(TASK, loss=failing), SPLITS, replace(KEY, optimizer="asgd"))
    assert len(closed) == 3


def test_a_rehearsal_costs_more_where_there_is_more_to_do(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(training, "REHEARSAL_SECONDS", math.inf)
    cost = rehearse(TASK, SPLITS, KEY)
    # Every measured piece takes one tick: 3 epochs of 3 steps, and 3 evaluations.
    assert (cost.training, cost.evaluation) == (9, 3)
    doubled = rehearse(replace(TASK, epochs=6, evaluations=2), SPLITS, KEY)
    assert (doubled.training, doubled.evaluation) == (18, 12)


def test_a_run_tells_what_it_was_computed_with():
    versions = train(TASK, SPLITS, KEY).versions
    assert versions["torch"] == torch.__version__
    assert {"truestep", "numpy", "python", "machine", "threads"} <= versions.keys()


def test_the_git_commit_is_that_of_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert not training._git_commit()
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "One"]):
        subprocess.run([shutil.which("git"), *command], check=True)  # noqa: S603 - fixed words
    assert re.fullmatch("[0-9a-f]{40}", training._git_commit())


def test_a_first_step_that_compiles_says_nothing_about_the_others(monkeypatch):
    durations = iter([60.0, 0.1, 0.1, 0.1])
    monkeypatch.setattr(
        training, "_steps", lambda *_: ((0.0, 1, duration) for duration in durations)
    )
    task = find_task("circles")
    splits = task.load(None)
    cost = rehearse(task, splits, RunKey("", "sgd", 0.1, 32, 0, final=False))
    steps = task.epochs * -(-len(splits.train.targets) // 32)
    assert cost.training == pytest.approx(0.1 * steps)
