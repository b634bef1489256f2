"""A data set of nine random images, as its publisher would offer it."""

import gzip
import hashlib

import numpy as np

from truestep.lab.catalogue import DATASETS, Dataset
from truestep.lab.download import DataFile
from truestep.lab.idx import idx_bytes

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
    name: gzip.compress(idx_bytes(array), mtime=0)
    for name, array in zip(NAMES, ARRAYS, strict=True)
}


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
