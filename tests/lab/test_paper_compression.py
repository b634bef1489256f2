import dataclasses
import io
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from papers_made_up import fill
from test_paper_units import vectors_of

from truestep import find_dummy_nodes
from truestep.lab.paper import compression
from truestep.lab.paper.comparison_compression import compression_tables
from truestep.lab.paper.compression import MEASURES, Compression
from truestep.lab.paper.evidence import gather
from truestep.lab.paper.figures_compression import accuracy_and_size, by_rate, settings
from truestep.lab.paper.planned import Planned
from truestep.lab.paper.points import HIDDEN, Points
from truestep.lab.paper.store import UnitStore
from truestep.lab.paper.tables import of_compression
from truestep.lab.paper.unit import Record, key
from truestep.lab.paper.unit import settings as unit_settings

POINTS = Compression("circles", HIDDEN, "asgd", 0.05, 128, 400, 3, 4)


@pytest.mark.parametrize(("data", "lr"), [("circles", 0.05), ("spirals", 0.1)])
@pytest.mark.parametrize("name", ["asgd", "sgd"])
def test_the_engine_counts_the_dummy_nodes_that_find_dummy_nodes_finds(data, lr, name):
    """So asgd-synthetic's counts, which are the engine's, are those of `find_dummy_nodes`."""
    unit = dataclasses.replace(POINTS, data=data, optimizer=name, lr=lr, epochs=1000)
    splits, _ = compression.splits_at(unit, None)
    result = compression.trained(unit, splits)
    network = compression.network_of(unit)
    for parameters, counted in zip(result.final, result.end_nodes, strict=True):
        model = compression._model(network, parameters)
        found = find_dummy_nodes(model, torch.from_numpy(splits["train"][0]).split(50))
        true = torch.cat([layer.true for layer in found]).numpy()
        pseudo = torch.cat([layer.pseudo for layer in found]).numpy()
        assert np.array_equal(counted == 1, true)
        assert np.array_equal(counted == 2, pseudo)
    assert (result.end_nodes == 1).any()
    assert (result.end_nodes == 2).any()


def test_its_networks_are_those_of_asgd_synthetic():
    points = Points("circles", "asgd", 0.05, 3, 4, steps=400).run(None).arrays
    arrays = POINTS.run(None).arrays
    masks = points["4 true_dummies"]
    assert arrays["true"].tolist() == [int(mask).bit_count() for mask in masks]


def test_a_unit_keeps_what_compression_did_to_each_network():
    outcome = POINTS.run(None)
    arrays = outcome.arrays
    assert arrays.keys() == set(MEASURES)
    assert all(values.shape == (4,) for values in arrays.values())
    assert outcome.engine == "ensemble, compiled, then torch"
    before = outcome.summary["before"]
    assert before["parameters"] == 2 * 10 + 10 + 4 * 110 + 11
    assert (arrays["parameters"] < before["parameters"]).all()
    assert (arrays["removed"] >= arrays["true"] - 1).all()
    assert (arrays["difference"] <= 1e-5 * arrays["largest"]).all()
    assert (arrays["accuracy"] == arrays["accuracy_before"]).all()
    again = POINTS.run(None)
    assert all(np.array_equal(values, again.arrays[name]) for name, values in arrays.items())
    assert outcome.replica_steps == 4 * 400


def test_images_are_trained_and_compressed_too(monkeypatch):
    monkeypatch.setattr(compression, "vectors", lambda *_: vectors_of())
    unit = Compression("mnist", (30, 20), "sgd", 0.1, 16, 3, 0, 2, train=64)
    outcome = unit.run(None)
    assert outcome.summary["source"] == "made up"
    assert outcome.summary["train"] == 64
    assert (outcome.arrays["accuracy"] == outcome.arrays["accuracy_before"]).all()
    assert unit.data_sets() == ("mnist",)
    assert POINTS.data_sets() == ()


def test_a_training_that_diverged_has_no_numbers(monkeypatch):
    def trained(unit, splits, plain=compression.trained):
        result = plain(unit, splits)
        status = np.array(["diverged", "done", "done", "diverged"])
        kept = {
            name: getattr(result, name) for name in ("final", "stopped_at", "seconds", "backend")
        }
        return SimpleNamespace(status=status, **kept)

    monkeypatch.setattr(compression, "trained", trained)
    outcome = POINTS.run(None)
    for values in outcome.arrays.values():
        assert np.isnan(values).tolist() == [True, False, False, True]
    kept = Record(POINTS.kind, unit_settings(POINTS), outcome, 1.0, "", {})
    table = of_compression([(Planned(POINTS), kept)])
    assert table["seed"].tolist() == [3, 4, 5, 6]
    assert table["parameters"].isna().tolist() == [True, False, False, True]


def test_every_field_tells_units_apart():
    others = {
        "data": "spirals", "hidden": (5,), "optimizer": "sgd", "lr": 0.2, "batch_size": 64,
        "epochs": 7, "first": 4, "replicas": 5, "train": 9, "start": "torch", "eps": 2.0,
    }  # fmt: skip
    assert others.keys() == {field.name for field in dataclasses.fields(Compression)}
    keys = {key(dataclasses.replace(POINTS, **{name: value})) for name, value in others.items()}
    assert len(keys | {key(POINTS)}) == len(others) + 1


def table_of(rows):
    """By optimizer and learning rate: validation losses of seeds."""
    return pd.DataFrame(
        [
            {
                "variant": "", "data": "circles", "optimizer": name, "lr": lr, "seed": seed,
                "validation_loss": value, "accuracy": value, "accuracy_before": value,
                "parameters": 100 * lr + seed,
            }
            for (name, lr), values in rows.items()
            for seed, value in enumerate(values)
        ]
    )  # fmt: skip


def test_learning_rates_are_equal_or_each_optimizers_best():
    table = table_of(
        {
            ("asgd", 0.1): [0.1, 0.1], ("asgd", 0.2): [0.1, 0.2], ("asgd", 0.5): [0.0, math.nan],
            ("sgd", 0.1): [0.3, 0.3], ("sgd", 0.2): [0.2, 0.2], ("sgd", 0.5): [0.5, 0.5],
        }
    )  # fmt: skip
    found = settings(table, "circles")
    rates = {name: (setting.optimizer, setting.lr) for name, setting in found.items()}
    assert rates == {
        "asgd": ("asgd", 0.1),
        "sgd at asgd's": ("sgd", 0.1),
        "sgd": ("sgd", 0.2),
        "asgd at sgd's": ("asgd", 0.2),
    }
    assert settings(table, "mnist") == {}
    assert settings(table[table["optimizer"] == "sgd"], "circles") == {}


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    with UnitStore(tmp_path_factory.mktemp("papers") / "papers.db") as units:
        fill(units, "smoke", names=["asgd-compression"])
        return gather(units)


def test_figures_and_tables_have_every_data_set(evidence):
    table = evidence.compression
    for figure in (accuracy_and_size(table), by_rate(table)):
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        assert {"circles", "spirals", "mnist", "fashion-mnist"} <= set(titles)
        figure.savefig(io.BytesIO())
    left, apart = compression_tables(evidence)
    assert {row[0].text for row in left.rows} == {"circles", "spirals", "mnist", "fashion-mnist"}
    assert all(len(row) == len(left.heads) for row in left.rows)
    assert all(len(row) == len(apart.heads) for row in apart.rows)
    assert len(apart.rows) == 4 * 3
