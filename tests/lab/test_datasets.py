"""Data sets: local folders, honest sources, the table of what is where."""

import gzip
import os
from pathlib import Path

import pytest
from tiny import (
    LABELS,
    NAMES,
    PUBLISHED,
    TEST,
    TRAIN,
    assert_is_tiny,
    fill,
    tiny,
)

from truestep import TruestepError
from truestep.lab.catalogue import DATASETS, find_dataset
from truestep.lab.datasets import data_table, get, load_images
from truestep.lab.idx import idx_bytes


def test_plain_and_compressed_files(cache, tmp_path, monkeypatch):
    tiny(monkeypatch)
    plain = {name.removesuffix(".gz"): gzip.decompress(PUBLISHED[name]) for name in NAMES[:2]}
    fill(tmp_path / "tiny", plain | {name: PUBLISHED[name] for name in NAMES[2:]})
    images = load_images("tiny", tmp_path)
    assert_is_tiny(images)
    assert "not the published" not in images.source
    monkeypatch.setenv("TRUESTEP_DATA", str(tmp_path))
    assert_is_tiny(load_images("tiny"))


def test_other_content_is_named_in_the_source(cache, tmp_path, monkeypatch):
    tiny(monkeypatch)
    fill(tmp_path / "tiny", PUBLISHED | {NAMES[1]: gzip.compress(idx_bytes(LABELS[:TRAIN] ^ 1))})
    assert "not the published files" in load_images("tiny", tmp_path).source


@pytest.mark.parametrize(
    ("labels", "problem"),
    [(LABELS[: TRAIN - 1], "6 images but 5 labels"), (LABELS[:TRAIN] + 10, "label 1")],
)
def test_labels_that_do_not_fit(cache, tmp_path, monkeypatch, labels, problem):
    tiny(monkeypatch)
    fill(tmp_path / "tiny", PUBLISHED | {NAMES[1]: gzip.compress(idx_bytes(labels))})
    with pytest.raises(TruestepError, match=problem):
        load_images("tiny", tmp_path)


def test_an_incomplete_local_folder(cache, tmp_path, monkeypatch):
    tiny(monkeypatch)
    fill(tmp_path / "tiny", {NAMES[0]: PUBLISHED[NAMES[0]]})
    with pytest.raises(TruestepError) as error:
        load_images("tiny", tmp_path)
    assert f"lacks {', '.join(NAMES[1:])} of Tiny" in str(error.value)
    rows = {row["name"]: row for row in data_table(tmp_path)}
    assert rows["tiny"]["where"] == "not here"


def test_a_data_folder_that_is_none(cache, tmp_path, monkeypatch):
    with pytest.raises(TruestepError, match=r"nowhere \(--data-dir\)"):
        load_images("mnist", tmp_path / "nowhere")
    monkeypatch.setenv("TRUESTEP_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(TruestepError, match=r"elsewhere \(TRUESTEP_DATA\)"):
        load_images("mnist")


def test_what_is_not_published_says_where_to_put_it(cache, tmp_path, monkeypatch):
    tiny(monkeypatch)
    with pytest.raises(TruestepError) as error:
        load_images("tiny", tmp_path)
    assert str(error.value).endswith(f"put {', '.join(NAMES)} into {tmp_path / 'tiny'}.")


def test_a_stand_in_is_named_as_what_it_is(server, cache, tmp_path, monkeypatch):
    server.publish(PUBLISHED)
    tiny(monkeypatch, name="smaller", folders=("smaller",), remark="not comparable with Tiny")
    tiny(monkeypatch, server.address, stand_ins=("smaller",))
    fill(tmp_path / "data" / "smaller")
    source = load_images("tiny", tmp_path / "data").source
    assert source.startswith("smaller: 6 training and 3 test images")
    assert "standing in for tiny" in source
    assert "not comparable with Tiny" in source
    assert server.asked == []
    # asked for by name, it is nobody's stand-in, and what is at hand needs no download
    assert get("smaller", tmp_path / "data") == tmp_path / "data" / "smaller"
    assert "standing in" not in load_images("smaller", tmp_path / "data").source
    # `get` wants the real one, which is then preferred
    get("tiny", progress=False)
    assert load_images("tiny", tmp_path / "data").source.startswith("tiny:")


def test_unknown_names():
    with pytest.raises(TruestepError, match=r"did you mean 'kmnist'\?.*choose one of: mnist, "):
        find_dataset("kmnits")
    with pytest.raises(TruestepError, match=r"no data set '\?'; choose"):
        load_images("?")


def test_the_catalogue_is_consistent():
    addresses = [
        url for dataset in DATASETS.values() for file in dataset.files for url in file.urls
    ]
    assert addresses
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        assert dataset.folders[0] == name
        assert len(dataset.classes) == 10
        assert all(stand_in in DATASETS for stand_in in dataset.stand_ins)
        for file in dataset.files:
            algorithm, _, value = file.checksum.partition(":")
            assert bool(file.urls) == bool(file.checksum)
            assert len(value) == {"sha256": 64, "git": 40, "": 0}[algorithm]
            assert len(file.content) in {0, 64}
            assert all(url.endswith(f"/{file.name}") for url in file.urls)


def test_the_table(cache, tmp_path, monkeypatch):
    tiny(monkeypatch, "http://127.0.0.1/")
    rows = {row["name"]: row for row in data_table(tmp_path)}
    assert list(rows) == list(DATASETS)
    assert rows["tiny"]["where"] == "not here"
    assert rows["kmnist10k"]["checksum"] == "none published"
    fill(cache / "tiny")
    assert {row["name"]: row["where"] for row in data_table()}["tiny"] == str(cache / "tiny")
    fill(tmp_path / "tiny")
    row = {row["name"]: row for row in data_table(tmp_path)}["tiny"]
    assert row["where"] == str(tmp_path / "tiny")
    assert (row["train"], row["test"], row["checksum"]) == (TRAIN, TEST, "sha256")
    assert [file["name"] for file in row["files"]] == list(NAMES)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"),
        ("fashion-mnist", "fashion-mnist"),
        ("kmnist10k", "kmnist10k"),
        ("kmnist-test", "kmnist-test"),
        ("quickdraw10-other", "quickdraw10"),
    ],
)
def test_real_files(name, folder):
    data = os.environ.get("TRUESTEP_DATA")
    if not data or not (Path(data) / folder).is_dir():
        pytest.skip(f"no folder {folder} under TRUESTEP_DATA")
    images = load_images(name, Path(data))
    dataset = find_dataset(name)
    assert images.train.images.shape == (dataset.train, 28, 28)
    assert images.test.images.shape == (dataset.test, 28, 28)
    assert "not the published" not in images.source
    assert set(images.test.labels.tolist()) == set(range(10))
    assert images.test.images.mean() < 100
