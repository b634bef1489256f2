"""Strict reading: whatever is not exactly what the format says is refused by name."""

import gzip
import io

import numpy as np
import pytest
from tiny import IMAGES, LABELS, NAMES, PUBLISHED, TRAIN, assert_is_tiny, fill, tiny

from truestep import TruestepError
from truestep.lab.datasets import get, load_images
from truestep.lab.download import DataFile
from truestep.lab.idx import idx_bytes, read_idx

PIXELS = IMAGES[:TRAIN].tobytes()


def idx(kind=8, axes=3, sizes=(TRAIN, 28, 28), data=PIXELS):
    header = bytes((0, 0, kind, axes)) + np.array(sizes, dtype=">u4").tobytes()
    return gzip.compress(header + data, mtime=0)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (PUBLISHED[NAMES[0]][:-500], "ends too early"),
        (PUBLISHED[NAMES[0]][:8], "truncated or corrupt"),
        (PUBLISHED[NAMES[0]][:-8] + bytes(8), "truncated or corrupt"),
        (PUBLISHED[NAMES[0]][:40] + b"\xff" * 40 + PUBLISHED[NAMES[0]][80:], "corrupt"),
        (b"", "not a gzip file"),
        (b"<html>not found</html>", "not a gzip file"),
        (gzip.compress(b"", mtime=0), "not an IDX file"),
        (gzip.compress(b"\x93NUMPY and so on", mtime=0), "not an IDX file"),
        (gzip.compress(b"\0\0\x08\x03\0\0", mtime=0), "ends inside its header"),
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


def test_reading_is_the_inverse_of_writing(tmp_path):
    for axes, array in ((3, IMAGES), (1, LABELS), (1, LABELS[:0])):
        (tmp_path / "plain").write_bytes(idx_bytes(array))
        np.testing.assert_array_equal(read_idx(tmp_path / "plain", axes, "go home"), array)


def test_an_unreadable_file(tmp_path):
    with pytest.raises(TruestepError, match=r"nothing: cannot be read .*; go home\.$"):
        read_idx(tmp_path / "nothing", 3, "go home")


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
