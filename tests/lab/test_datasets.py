"""Data sets: strict reading, downloads from a server on the loopback address, honest sources."""

import gzip
import hashlib
import io
import os
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from truestep import TruestepError
from truestep.lab.catalogue import DATASETS, Dataset, find_dataset
from truestep.lab.datasets import data_table, get, load_images
from truestep.lab.download import DataFile, has_checksum
from truestep.lab.idx import idx_bytes, read_idx

TRAIN, TEST = 6, 3
NAMES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
NUMBERS = np.random.default_rng(0)
IMAGES = NUMBERS.integers(0, 100, (TRAIN + TEST, 28, 28)).astype(np.uint8)
LABELS = NUMBERS.integers(0, 10, TRAIN + TEST).astype(np.uint8)
ARRAYS = (IMAGES[:TRAIN], LABELS[:TRAIN], IMAGES[TRAIN:], LABELS[TRAIN:])
PUBLISHED = {
    name: gzip.compress(idx_bytes(array)) for name, array in zip(NAMES, ARRAYS, strict=True)
}


@dataclass
class Server:
    """What a web server on the loopback address answers, and what it was asked."""

    address: str
    answers: dict[str, tuple[int, bytes, int]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def publish(self, files):
        for name, body in files.items():
            self.answers[f"/{name}"] = (200, body, len(body))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answers.asked.append(self.path.lstrip("/"))
            status, body, length = answers.answers.get(self.path, (404, b"", 0))
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    answers = Server(f"http://127.0.0.1:{listener.server_port}/")
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield answers
    listener.shutdown()
    listener.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The download cache, empty; no local copies."""
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.delenv("TRUESTEP_DATA", raising=False)
    return tmp_path / "cache" / "truestep"


def tiny(monkeypatch, *addresses, checksum="sha256", **changes):
    """A data set of nine images under the name "tiny", published at the given addresses."""
    files = tuple(
        DataFile(
            name,
            tuple(address + name for address in addresses),
            f"{checksum}:{digest(PUBLISHED[name], checksum)}" if addresses else "",
            hashlib.sha256(idx_bytes(array)).hexdigest(),
        )
        for name, array in zip(NAMES, ARRAYS, strict=True)
    )
    values = {
        "name": "tiny",
        "title": "Tiny",
        "licence": "public domain",
        "train": TRAIN,
        "test": TEST,
        "classes": tuple("0123456789"),
        "files": files,
        "folders": ("tiny",),
    }
    dataset = Dataset(**(values | changes))
    monkeypatch.setitem(DATASETS, dataset.name, dataset)
    return dataset


def digest(data, algorithm):
    if algorithm == "git":
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return hashlib.new(algorithm, data).hexdigest()


def fill(folder, files=PUBLISHED):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def assert_is_tiny(images):
    found = (images.train.images, images.train.labels, images.test.images, images.test.labels)
    for array, expected in zip(found, ARRAYS, strict=True):
        np.testing.assert_array_equal(array, expected)


def contents(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# Downloads


@pytest.mark.parametrize("checksum", ["sha256", "md5", "git"])
def test_downloads_once(server, cache, monkeypatch, checksum):
    server.publish(PUBLISHED)
    tiny(monkeypatch, server.address, checksum=checksum)
    assert_is_tiny(load_images("tiny"))
    assert contents(cache) == sorted(NAMES)
    assert_is_tiny(load_images("tiny"))
    assert sorted(server.asked) == sorted(NAMES)


def test_get_downloads_into_a_given_folder(server, cache, tmp_path, monkeypatch):
    server.publish(PUBLISHED)
    tiny(monkeypatch, server.address)
    (tmp_path / "data").mkdir()
    assert get("tiny", tmp_path / "data", progress=False) == tmp_path / "data" / "tiny"
    assert contents(tmp_path / "data") == sorted(NAMES)
    assert not cache.exists()
    assert_is_tiny(load_images("tiny", tmp_path / "data"))


def test_get_finds_a_local_copy(server, cache, tmp_path, monkeypatch):
    tiny(monkeypatch, server.address)
    folder = fill(tmp_path / "data" / "tiny")
    monkeypatch.setenv("TRUESTEP_DATA", str(tmp_path / "data"))
    assert get("tiny", progress=False) == folder
    assert server.asked == []


def test_progress_names_each_file(server, cache, monkeypatch, capsys):
    server.publish(PUBLISHED)
    tiny(monkeypatch, server.address)
    get("tiny", progress=True)
    shown = capsys.readouterr()
    assert all(name in shown.err for name in NAMES)
    assert not shown.out


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, b"something else", 14), "wrong checksum"),
        ((200, PUBLISHED[NAMES[2]][:-9], len(PUBLISHED[NAMES[2]]) - 9), "wrong checksum"),
        ((200, PUBLISHED[NAMES[2]][:100], len(PUBLISHED[NAMES[2]])), "the transfer broke off"),
        ((404, b"", 0), "HTTP 404"),
        ((500, b"", 0), "HTTP 500"),
    ],
    ids=["other file", "short file", "broken transfer", "not found", "server error"],
)
def test_a_bad_download_leaves_nothing_behind(server, cache, monkeypatch, answer, reason):
    server.publish(PUBLISHED)
    server.answers[f"/{NAMES[2]}"] = answer
    tiny(monkeypatch, server.address)
    with pytest.raises(TruestepError) as error:
        load_images("tiny")
    message = str(error.value)
    assert f"{NAMES[2]} could not be downloaded" in message
    assert reason in message
    assert str(cache / "tiny") in message
    assert all(name in message for name in NAMES)
    assert contents(cache) == sorted(NAMES[:2])
    # and the next attempt goes on with the missing files only
    server.publish(PUBLISHED)
    del server.asked[:]
    assert_is_tiny(load_images("tiny"))
    assert server.asked == list(NAMES[2:])


def test_without_a_network(cache, monkeypatch, server):
    free = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    address = f"http://127.0.0.1:{free.server_port}/"
    free.server_close()
    tiny(monkeypatch, address)
    with pytest.raises(TruestepError) as error:
        load_images("tiny")
    message = str(error.value)
    assert "no connection" in message
    assert f"put these files by hand into {cache / 'tiny'}: {', '.join(NAMES)}" in message
    assert contents(cache) == []
    # following the message is enough
    fill(cache / "tiny")
    assert_is_tiny(load_images("tiny"))


def test_the_error_names_the_users_own_data_folder(server, cache, tmp_path, monkeypatch):
    tiny(monkeypatch, server.address)
    (tmp_path / "data").mkdir()
    with pytest.raises(TruestepError, match="by hand into") as error:
        load_images("tiny", tmp_path / "data")
    assert f"by hand into {tmp_path / 'data' / 'tiny'}" in str(error.value)


def test_the_second_address_is_tried(server, cache, monkeypatch):
    server.publish({f"mirror/{name}": data for name, data in PUBLISHED.items()})
    tiny(monkeypatch, server.address, f"{server.address}mirror/")
    assert_is_tiny(load_images("tiny"))
    assert server.asked == [path for name in NAMES for path in (name, f"mirror/{name}")]


@pytest.mark.parametrize("checksum", ["sha256", "git"])
def test_a_damaged_file_in_the_cache_is_fetched_again(server, cache, monkeypatch, checksum):
    server.publish(PUBLISHED)
    dataset = tiny(monkeypatch, server.address, checksum=checksum)
    damaged = fill(cache / "tiny") / NAMES[0]
    damaged.write_bytes(PUBLISHED[NAMES[0]][:50])
    with pytest.raises(TruestepError, match=r"; run `truestep data get tiny`\.$"):
        load_images("tiny")
    assert get("tiny", progress=False) == cache / "tiny"
    assert server.asked == [NAMES[0]]
    assert has_checksum(damaged, dataset.files[0].checksum)


def test_what_is_there_stays_until_the_right_file_has_arrived(server, cache, monkeypatch):
    tiny(monkeypatch, server.address)
    by_hand = {name: gzip.compress(gzip.decompress(PUBLISHED[name]), 1) for name in NAMES}
    fill(cache / "tiny", by_hand)
    with pytest.raises(TruestepError, match="HTTP 404"):
        get("tiny", progress=False)
    assert_is_tiny(load_images("tiny"))
    assert contents(cache) == sorted(NAMES)


def test_a_cache_that_cannot_be_written(server, cache, monkeypatch):
    server.publish(PUBLISHED)
    tiny(monkeypatch, server.address)
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    with pytest.raises(TruestepError, match="cannot be written") as error:
        load_images("tiny")
    assert str(cache / "tiny") in str(error.value)
    assert "--data-dir" in str(error.value)


def test_git_blob_identifiers(tmp_path):
    # git hash-object of these contents
    (tmp_path / "hello").write_bytes(b"hello\n")
    (tmp_path / "empty").write_bytes(b"")
    assert has_checksum(tmp_path / "hello", "git:ce013625030ba8dba906f756967f9e9ca394464a")
    assert has_checksum(tmp_path / "empty", "git:e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")
    assert not has_checksum(tmp_path / "empty", "git:ce013625030ba8dba906f756967f9e9ca394464a")


# Local folders


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


PIXELS = IMAGES[:TRAIN].tobytes()


def idx(kind=8, axes=3, sizes=(TRAIN, 28, 28), data=PIXELS):
    header = bytes((0, 0, kind, axes)) + np.array(sizes, dtype=">u4").tobytes()
    return gzip.compress(header + data)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (PUBLISHED[NAMES[0]][:-500], "ends too early"),
        (PUBLISHED[NAMES[0]][:8], "truncated or corrupt"),
        (PUBLISHED[NAMES[0]][:-8] + bytes(8), "truncated or corrupt"),
        (PUBLISHED[NAMES[0]][:40] + b"\xff" * 40 + PUBLISHED[NAMES[0]][80:], "corrupt"),
        (b"", "not a gzip file"),
        (b"<html>not found</html>", "not a gzip file"),
        (gzip.compress(b""), "not an IDX file"),
        (gzip.compress(b"\x93NUMPY and so on"), "not an IDX file"),
        (gzip.compress(b"\0\0\x08\x03\0\0"), "ends inside its header"),
        (idx(kind=0x0D), "type 0x0d"),
        (idx(axes=1, sizes=(TRAIN * 784,)), "has 1 axes where 3 belong"),
        (idx(data=PIXELS[:-1]), "is truncated: 4703 bytes"),
        (idx(data=PIXELS + b"\0"), "longer than its header"),
        (idx(sizes=(2**32 - 1, 2**32 - 1, 2**32 - 1)), "is truncated"),
        (idx(sizes=(TRAIN - 1, 28, 28), data=IMAGES[1:TRAIN].tobytes()), "5 x 28 x 28 images"),
        (idx(sizes=(TRAIN, 14, 56)), "6 x 14 x 56 images"),
    ],
)
def test_damaged_images(cache, tmp_path, monkeypatch, data, problem):
    tiny(monkeypatch)
    fill(tmp_path / "tiny", PUBLISHED | {NAMES[0]: data})
    with pytest.raises(TruestepError) as error:
        load_images("tiny", tmp_path)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "tiny" / NAMES[0]))
    assert problem in message
    assert message.endswith("replace the file.")
    with pytest.raises(TruestepError, match="replace the file"):
        get("tiny", tmp_path)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [(LABELS[: TRAIN - 1], "6 images but 5 labels"), (LABELS[:TRAIN] + 10, "label 1")],
)
def test_labels_that_do_not_fit(cache, tmp_path, monkeypatch, labels, problem):
    tiny(monkeypatch)
    fill(tmp_path / "tiny", PUBLISHED | {NAMES[1]: gzip.compress(idx_bytes(labels))})
    with pytest.raises(TruestepError, match=problem):
        load_images("tiny", tmp_path)


def test_reading_is_the_inverse_of_writing(tmp_path):
    for axes, array in ((3, IMAGES), (1, LABELS), (1, LABELS[:0])):
        (tmp_path / "plain").write_bytes(idx_bytes(array))
        np.testing.assert_array_equal(read_idx(tmp_path / "plain", axes, "go home"), array)


def test_an_unreadable_file(tmp_path):
    with pytest.raises(TruestepError, match=r"nothing: cannot be read .*; go home\.$"):
        read_idx(tmp_path / "nothing", 3, "go home")


def test_an_incomplete_local_folder(cache, tmp_path, monkeypatch):
    tiny(monkeypatch)
    fill(tmp_path / "tiny", {NAMES[0]: PUBLISHED[NAMES[0]]})
    with pytest.raises(TruestepError) as error:
        load_images("tiny", tmp_path)
    assert f"lacks {', '.join(NAMES[1:])} of Tiny" in str(error.value)
    rows = {row["name"]: row for row in data_table(tmp_path)}
    assert rows["tiny"]["where"] == "not here"


def test_get_completes_a_folder(server, cache, tmp_path, monkeypatch):
    server.publish(PUBLISHED)
    tiny(monkeypatch, server.address)
    fill(tmp_path / "tiny", {NAMES[0]: PUBLISHED[NAMES[0]]})
    get("tiny", tmp_path, progress=False)
    assert server.asked == list(NAMES[1:])
    assert_is_tiny(load_images("tiny", tmp_path))


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


# Archives


def archive(images=IMAGES[:TRAIN], labels=LABELS[:TRAIN], **others):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **({"a": images, "b": labels} | others))
    return buffer.getvalue()


@pytest.fixture
def archives(cache, tmp_path, monkeypatch):
    files = (DataFile("train-ubyte.npz"), DataFile("test-ubyte.npz"))
    tiny(monkeypatch, files=files)
    return fill(tmp_path / "tiny", {"test-ubyte.npz": archive(IMAGES[TRAIN:], LABELS[TRAIN:])})


@pytest.mark.parametrize(
    "data",
    [
        archive(),
        archive(IMAGES[:TRAIN].astype(np.float64), LABELS[:TRAIN].astype(np.int64)),
        archive(255 - IMAGES[:TRAIN]),
    ],
    ids=["bytes", "whole numbers of other types", "black on white"],
)
def test_archives(archives, data):
    (archives / "train-ubyte.npz").write_bytes(data)
    assert_is_tiny(load_images("tiny", archives.parent))


def single_array():
    buffer = io.BytesIO()
    np.save(buffer, IMAGES)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (archive()[:-200], "cannot be read as an npz archive"),
        (archive()[:300] + bytes(100) + archive()[400:], "cannot be read as an npz archive"),
        (b"<html>not found</html>", "cannot be read as an npz archive"),
        (b"", "cannot be read as an npz archive"),
        (single_array(), "single array"),
        (archive(labels=np.array([{}] * TRAIN)), "cannot be read as an npz archive"),
        (archive(labels=np.array(["a"] * TRAIN)), "type <U1 where numbers belong"),
        (archive(IMAGES[:TRAIN] / 255), "not whole numbers in 0..255"),
        (archive(IMAGES[:TRAIN] * -1.0), "not whole numbers in 0..255"),
        (archive(np.full((TRAIN, 28, 28), np.nan)), "not whole numbers in 0..255"),
        (archive(IMAGES[:TRAIN].reshape(TRAIN, 784)), "has 2 axes where 3 belong"),
    ],
)
def test_damaged_archives(archives, data, problem):
    (archives / "train-ubyte.npz").write_bytes(data)
    with pytest.raises(TruestepError) as error:
        load_images("tiny", archives.parent)
    assert str(error.value).startswith(str(archives / "train-ubyte.npz"))
    assert problem in str(error.value)
    assert str(error.value).endswith("replace the file.")


def test_an_archive_without_labels(archives):
    buffer = io.BytesIO()
    np.savez(buffer, a=IMAGES[:TRAIN], c=LABELS[:TRAIN])
    (archives / "train-ubyte.npz").write_bytes(buffer.getvalue())
    with pytest.raises(TruestepError, match=r"no array 'b' \(it holds: a, c\)"):
        load_images("tiny", archives.parent)


# Stand-ins and the table


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
