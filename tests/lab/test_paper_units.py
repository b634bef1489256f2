import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from truestep import TruestepError, ensemble
from truestep.lab.paper import points as points_module
from truestep.lab.paper import torch_images
from truestep.lab.paper.curves import measured_epochs
from truestep.lab.paper.data import Vectors, at_hand, circles, spirals, splits_of
from truestep.lab.paper.engine import OPTIMIZERS, optimizer
from truestep.lab.paper.experiments import EXPERIMENTS, find_experiment
from truestep.lab.paper.images import Images, book_start
from truestep.lab.paper.options import changed, parse_options
from truestep.lab.paper.planned import SCALES
from truestep.lab.paper.points import ENDINGS, Points
from truestep.lab.paper.premise import Premise
from truestep.lab.paper.small import WIDTHS, Panels, Trajectories, parameter_names, per_sample
from truestep.lab.paper.torch_images import train_in_torch
from truestep.lab.paper.unit import key, packed, settings, unpacked

DTYPES = st.sampled_from([np.float16, np.float32, np.int32, np.uint64, np.uint8, np.bool_])


@given(
    st.dictionaries(
        st.text(max_size=8),
        DTYPES.flatmap(lambda kind: hnp.arrays(kind, hnp.array_shapes(min_side=0, max_dims=3))),
        max_size=4,
    )
)
def test_packed_arrays_come_back_bit_by_bit(arrays):
    found = unpacked(packed(arrays))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes()
    assert packed(dict(reversed(arrays.items()))) == packed(arrays)


def test_every_field_tells_units_apart():
    unit = Points("circles", "sgd", 0.1, 0, 4)
    others = {
        "data": "spirals", "optimizer": "asgd", "lr": 0.2, "first": 4, "replicas": 5, "steps": 7,
        "start": "torch", "eps": 2.0, "noise": 0.3, "shape": 0.8, "own_data": True,
        "loss": "squared_error",
    }  # fmt: skip
    assert others.keys() == {field.name for field in dataclasses.fields(Points)}
    keys = {key(dataclasses.replace(unit, **{name: value})) for name, value in others.items()}
    assert len(keys | {key(unit)}) == len(others) + 1


def test_a_key_is_the_same_before_and_after_the_store():
    unit = Premise("mnist", (0, 1), seed=3)
    assert json.loads(json.dumps(settings(unit))) == settings(unit)
    assert key(dataclasses.replace(unit)) == key(unit)


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
@pytest.mark.parametrize("scale", SCALES)
def test_plans_cost_something_and_begin_with_every_main_cell(experiment, scale):
    planned = experiment.units(scale)
    assert planned
    for item in planned:
        cost = item.unit.cost()
        assert cost.replica_steps > 0
        assert 0 < cost.seconds < 15 * 60, "an interruption loses minutes, not more"
    # Partial runs are balanced: no cell has its third seed before all have their first.
    seen, first = {}, {}
    for place, item in enumerate(planned):
        if item.variant or not hasattr(item.unit, "optimizer"):
            continue
        unit = item.unit
        cell = (unit.data, unit.optimizer, unit.lr, getattr(unit, "batch_size", 8))
        if cell[3] < 8:
            continue  # hours each: they come last, with fewer seeds
        seen[cell] = seen.get(cell, 0) + 1
        first.setdefault(cell, place)
        if seen[cell] == 3:
            assert max(first.values()) < place


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_more_seeds_keep_the_units_of_fewer(name):
    few = {key(item.unit) for item in EXPERIMENTS[name].units("smoke", 4)}
    many = {key(item.unit) for item in EXPERIMENTS[name].units("smoke", 8)}
    if name in {"asgd-backprop", "asgd-trajectories"}:
        return  # one unit of all starts
    assert few <= many


def test_an_unknown_experiment_names_the_nearest():
    with pytest.raises(TruestepError, match="Perhaps asgd-synthetic is meant"):
        find_experiment("asgd-synthetics")
    with pytest.raises(TruestepError, match="There are asgd-backprop"):
        find_experiment("xyz")


def test_options_change_the_main_protocol_only():
    planned = EXPERIMENTS["asgd-synthetic"].units("small")
    found = changed(planned, parse_options(["start=torch", "own_data=yes"]))
    assert len(found) == sum(not item.variant for item in planned)
    assert {item.unit.start for item in found} == {"torch"}
    assert all(item.unit.own_data for item in found)
    assert {item.variant for item in found} == {"start: torch, own_data: True"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("strat=torch", "Perhaps start"),
        ("eps=x", "give a number"),
        ("own_data=maybe", "true or f"),
        ("eps=nan", "give 0 or more"),
        ("noise=-1", "give 0 or more"),
        ("steps=0", "give 1 or more"),
    ],
)
def test_impossible_options_say_what_is_possible(text, complaint):
    with pytest.raises(TruestepError, match=complaint):
        parse_options([text])


def test_an_option_has_one_value():
    assert parse_options(["eps=1", "start=torch", "eps=1.0"]) == {"eps": 1.0, "start": "torch"}
    with pytest.raises(TruestepError, match=r"--option eps is 1\.0 and 2\.0: give one"):
        parse_options(["eps=1", "eps=2"])


def test_options_of_other_experiments_are_refused():
    with pytest.raises(TruestepError, match="has no option output"):
        changed(EXPERIMENTS["asgd-synthetic"].units("smoke"), {"output": "softmax"})
    # There, epochs are those at which weights are looked at: several.
    with pytest.raises(TruestepError, match=r"has no option epochs. It has train"):
        changed(EXPERIMENTS["dasgd-premise"].units("smoke"), {"epochs": 3})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_the_engine_does_not_know_is_refused_before_anything_runs(name):
    planned = EXPERIMENTS[name].units("smoke")
    for item in planned:
        item.unit.check()
    if name == "asgd-stabilised":
        with pytest.raises(TruestepError, match="made of variants only"):
            changed(planned, {"start": "torch"})
    elif name != "dasgd-premise":
        with pytest.raises(TruestepError, match=r"--option start=bar: .*choose one of torch"):
            changed(planned, {"start": "bar"})


def test_options_that_do_not_go_together_are_refused():
    planned = EXPERIMENTS["asgd-mnist"].units("smoke")
    with pytest.raises(TruestepError, match="goes with output='softmax', not 'sigmoid'"):
        changed(planned, {"output": "sigmoid", "loss": "cross_entropy"})
    with pytest.raises(TruestepError, match=r"--option schedule=bar: .*constant, cosine"):
        changed(planned, {"schedule": "bar"})


def test_circles_and_spirals_are_what_they_say():
    inputs, labels = circles(400, 0, noise=0.0001, factor=0.5)
    radius = np.hypot(*inputs.T)
    assert np.allclose(radius[labels == 1], 0.5, atol=0.01)
    assert np.allclose(radius[labels == 0], 1.0, atol=0.01)
    inputs, labels = spirals(400, 0, noise=1e-9, degrees=570.0)
    inputs = inputs * np.where(labels == 1, -1, 1)[:, None]
    radius = np.hypot(*inputs.T)
    assert radius.max() <= np.radians(570) + 1e-4
    angle = np.mod(np.arctan2(inputs[:, 1], inputs[:, 0]), 2 * np.pi)
    off = np.abs(np.mod(radius - angle + np.pi, 2 * np.pi) - np.pi)
    assert off.max() < 1e-3, "the radius of a point is its angle"
    assert abs(int(labels.sum()) - 200) <= 1


def test_points_say_where_each_training_stood(monkeypatch):
    unit = Points("circles", "asgd", 0.05, first=3, replicas=5, steps=400)
    kept = {}
    plain = ensemble.train

    def train(*args, **kwargs):
        kept["result"] = plain(*args, **kwargs)
        kept["seed"] = kwargs["seed"]
        return kept["result"]

    monkeypatch.setattr(points_module.ensemble, "train", train)
    arrays = unit.run(None).arrays
    result = kept["result"]
    assert kept["seed"] == 3
    names = list(ENDINGS)
    loss = result.loss["train"]
    for replica in range(5):
        under = np.flatnonzero(loss[replica] < 0.1)
        expected = under[0] if len(under) else len(result.steps) - 1
        place = names.index("loss under 0.1")
        assert arrays[f"{place} step"][replica] == result.steps[expected]
        lowest = names.index("lowest loss")
        assert arrays[f"{lowest} train_loss"][replica] == loss[replica].min()
    last = names.index("last step")
    # The masks, from the parameters at the end and plain torch.
    (inputs, _), _ = points_module.make_data("circles", 0, noise=0, shape=0)
    network = ensemble.Network(
        (2, *points_module.HIDDEN, 1), output="sigmoid", loss="squared_error"
    )
    for replica, parameters in enumerate(result.final):
        values, bits = torch.from_numpy(inputs), []
        for weight, bias in network.split(parameters)[:-1]:
            values = torch.relu(values @ torch.from_numpy(weight).T + torch.from_numpy(bias))
            bits += (values <= 0).all(0).tolist()
        mask = int(arrays[f"{last} true_dummies"][replica])
        assert [bool(mask >> k & 1) for k in range(50)] == bits


def test_own_data_differ_between_trainings_and_not_between_units():
    whole = Points("spirals", "sgd", 0.05, 0, 4, steps=20, own_data=True).run(None).arrays
    half = Points("spirals", "sgd", 0.05, 2, 2, steps=20, own_data=True).run(None).arrays
    assert np.array_equal(whole["4 train_loss"][2:], half["4 train_loss"])


def test_the_parts_of_a_gradient_are_the_papers_equations():
    random = np.random.default_rng(0)
    parameters = random.normal(size=20).astype(np.float32)
    points = random.normal(size=(30, 2)).astype(np.float32)
    labels = random.integers(0, 2, 30)
    found = per_sample(parameters, points, labels)
    w4 = found["w4"]
    # Equation 4: delta3 = (w4^T delta4) * ReLU'(z3); 5: dC/db = delta; 6: dC/dw = a delta.
    delta3 = (found["delta4"] @ w4) * (found["z3"] > 0)
    assert np.allclose(found["delta3"], delta3, atol=1e-6)
    assert np.allclose(found["db3"], found["delta3"], atol=1e-6)
    assert np.allclose(found["dw4"], found["a3"] * found["delta4"], atol=1e-6)
    assert np.allclose(found["a3"], np.maximum(found["z3"], 0))


def test_parameters_have_the_papers_names():
    names = parameter_names()
    assert len(names) == sum(i * o + o for i, o in pairwise(WIDTHS))
    assert names[9:17] == ["w3_11", "w3_12", "w3_13", "w3_21", "w3_22", "w3_23", "b3_1", "b3_2"]


def test_panels_show_the_dummy_second():
    outcome = Panels(0.05, replicas=60, steps=600).run(None)
    assert outcome.summary["with one dummy"] > 0
    off = (outcome.arrays["z3"] <= 0).all(0)
    assert off.tolist() == [False, True]


def test_trajectories_are_paired_and_measure_what_they_say():
    arrays = Trajectories(0.05, replicas=6, steps=200).run(None).arrays
    assert np.array_equal(arrays["asgd path"][0], arrays["sgd path"][0])
    shown = arrays["asgd path"]
    distances = np.ptp(shown, axis=0)
    assert any(np.allclose(row, distances, atol=1e-2) for row in arrays["asgd range"])


def test_sgd_may_have_a_rate_of_its_own():
    usual, faster = (
        Trajectories(0.01, replicas=3, steps=50, sgd_factor=factor).run(None).arrays
        for factor in (1.0, 3.0)
    )
    assert np.array_equal(usual["asgd range"], faster["asgd range"])
    assert (faster["sgd range"].sum(1) > usual["sgd range"].sum(1)).all()


def vectors_of(samples=96, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, samples)
    inputs = (random.random((samples, 784)) * 0.2).astype(np.float32)
    inputs[np.arange(samples), labels * 20] += 1.0
    test = inputs[:40].copy(), labels[:40].copy()
    return Vectors((inputs, labels), (inputs[80:], labels[80:]), test, "made up", "f00")


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr("truestep.lab.paper.images.vectors", lambda *_: vectors_of())
    monkeypatch.setattr("truestep.lab.paper.premise.vectors", lambda *_: vectors_of())


def plan(**changes):
    unit = Images(
        "mnist", (30, 20), "relu", "softmax", "cross_entropy", "sgd", 0.1, 16, 3, 0, train=64
    )
    return dataclasses.replace(unit, **changes)


def test_validation_is_the_last_part_and_may_be_taken_back():
    data = vectors_of()
    assert len(splits_of(data, 0)["train"][1]) == 80
    assert len(splits_of(data, 96)["train"][1]) == 96
    assert len(splits_of(data, 10)["train"][1]) == 10


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_in_the_engine(name):
    unit = plan(optimizer=name, lr=0.03 if "momentum" in name or "nesterov" in name else 0.3)
    outcome = unit.run(None)
    loss = outcome.arrays["train_loss"]
    assert outcome.engine.startswith("ensemble")
    assert outcome.arrays["epochs"].tolist() == measured_epochs(3, 5)
    assert loss[-1] < loss[0]
    assert outcome.replica_steps == 3 * 4


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("changes", [{"dropout": 0.2}, {"norm": "layer"}, {"norm": "batch"}])
@pytest.mark.parametrize("name", ["sgd", "asgd"])
def test_dropout_and_normalisation_learn_in_torch_the_same_way_twice(name, changes):
    unit = plan(optimizer=name, epochs=6, lr=0.1, **changes)
    first, second = unit.run(None), unit.run(None)
    assert first.engine == "torch"
    assert first.arrays["train_loss"][-1] < first.arrays["train_loss"][0]
    for measure, values in first.arrays.items():
        assert np.array_equal(values, second.arrays[measure])


@pytest.mark.parametrize("name", ["sgd", "asgd"])
def test_training_in_torch_equals_the_engines_from_the_same_start_and_order(name):
    unit, data = plan(optimizer=name, epochs=4, seed=3), vectors_of()
    curves = train_in_torch(unit, data)
    torch.manual_seed(unit.seed)
    start = torch.nn.utils.parameters_to_vector(torch_images._model(unit).parameters())

    def order(seed, epoch):
        return torch.cat(list(torch_images._batches(64, 16, seed, epoch + 1))).numpy()

    splits = splits_of(data, unit.train)
    result = ensemble.train(
        ensemble.Network((784, 30, 20, 10)),
        ensemble.Data(**{part: ensemble.Split(*pair) for part, pair in splits.items()}),
        replicas=1, epochs=4, batch_size=16, optimizer=optimizer(name, unit.lr), seed=[unit.seed],
        start=start.detach().numpy()[None], order=order, record=ensemble.Record(every_epoch=1),
    )  # fmt: skip
    for part in ("train", "validation", "test"):
        assert np.allclose(curves.arrays[f"{part}_loss"], result.loss[part][0], atol=1e-5)
        assert np.array_equal(curves.arrays[f"{part}_accuracy"], result.accuracy[part][0])


@pytest.mark.usefixtures("made_up")
def test_torch_refuses_what_only_the_engine_does():
    with pytest.raises(TruestepError, match="no schedule"):
        plan(dropout=0.1, schedule="cosine").run(None)


@pytest.mark.usefixtures("made_up")
def test_half_the_squared_error_is_half_in_loss_and_gradient():
    whole = plan(
        loss="squared_error",
        output="sigmoid",
        activation="sigmoid",
        lr=0.5,
        signs=True,
        start="book",
    )
    half = dataclasses.replace(whole, loss="half_squared_error", lr=1.0)
    a, b = whole.run(None).arrays, half.run(None).arrays
    assert np.allclose(a["test_loss"], 2 * b["test_loss"], rtol=1e-6)
    assert np.allclose(a["gradients"][:-1], 2 * b["gradients"][:-1], rtol=1e-6)
    assert np.array_equal(a["test_accuracy"], b["test_accuracy"])


def test_the_books_start_has_its_spread():
    start = book_start((784, 128, 10), 0)[0]
    assert abs(start[: 784 * 128].std() * 28 - 1) < 0.02
    assert start.size == 784 * 128 + 128 + 128 * 10 + 10


@pytest.mark.usefixtures("made_up")
def test_the_premise_grows_steadier_with_the_batch(monkeypatch):
    monkeypatch.setattr("truestep.lab.paper.premise.SIZES", (1, 16))
    outcome = Premise("mnist", (0, 1), seed=0, pairs=20).run(None)
    gradients, signs = outcome.arrays["gradients"], outcome.arrays["signs"]
    assert gradients.shape == signs.shape == (2, 2)
    assert (gradients[:, 1] < gradients[:, 0]).all()
    assert (signs[:, 1] > signs[:, 0]).all()


def test_an_unknown_optimizer_is_named():
    with pytest.raises(TruestepError, match="choose one of sgd"):
        optimizer("sgdd", 0.1)


def test_missing_data_say_where_to_put_it(cache, monkeypatch):
    monkeypatch.setattr("truestep.lab.datasets.fetch", _no_network)
    with pytest.raises(TruestepError, match="truestep data get mnist"):
        at_hand("mnist")


def _no_network(file, folder, way_out, *, progress):
    raise TruestepError(f"no connection; {way_out}.")
