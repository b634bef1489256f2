"""The image data sets: what they are, where they are on this machine, and how to get them.

Images are unsigned bytes, [samples, 28, 28], white (255) on black (0); labels are [samples].
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from truestep.errors import TruestepError
from truestep.lab.catalogue import DATASETS, Dataset, find_dataset
from truestep.lab.download import DataFile, fetch
from truestep.lab.idx import idx_bytes, read_idx, read_npz

__all__ = [
    "DATASETS",
    "Dataset",
    "Images",
    "Part",
    "data_table",
    "find_dataset",
    "get",
    "load_images",
]


@dataclass(frozen=True)
class Part:
    """Images of one part of a data set, unsigned bytes [samples, 28, 28], and their labels."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


@dataclass(frozen=True)
class Images:
    """A data set in memory: its two parts as published, and a sentence on where they came from."""

    train: Part
    test: Part
    source: str


def load_images(name: str, data_dir: Path | None = None, *, progress: bool = False) -> Images:
    """Reads a data set from this machine, or downloads it first.

    Looks in `data_dir` (or the folder that the environment variable TRUESTEP_DATA names), then in
    the download cache, then for a stand-in at either place, and only then on the network: what is
    at hand is used the same way with and without a network.

    Args:
        name: A key of `DATASETS`.
        data_dir: Folder of local copies, one folder per data set.
        progress: Show a progress bar while downloading.

    Returns:
        Training and test images; `source` names a stand-in as what it is.

    Raises:
        TruestepError: A file is missing, corrupt or of other size than published, or nothing is
            at hand and nothing can be downloaded; the message says which files to put where.
    """
    wanted = find_dataset(name)
    data_dir = _data_folder(data_dir)
    for dataset in (wanted, *map(find_dataset, wanted.stand_ins)):
        folder = _at_hand(dataset, data_dir)
        if folder is not None:
            return _read(dataset, folder, wanted)
    return _read(
        wanted, _download(wanted, _cache() / wanted.name, data_dir, progress=progress), wanted
    )


def get(name: str, data_dir: Path | None = None, *, progress: bool = True) -> Path:
    """Makes sure that a data set itself, not a stand-in, is on this machine and readable.

    Files that the download cache has with another checksum than published are fetched again.

    Args:
        name: A key of `DATASETS`.
        data_dir: Where to put it, in a folder of its own; the download cache if None.
        progress: Show a progress bar while downloading.

    Returns:
        The folder that holds its files.

    Raises:
        TruestepError: It cannot be downloaded, or what is there is corrupt.
    """
    dataset = find_dataset(name)
    local = data_dir if data_dir is not None else _data_folder(None)
    folder = None if local is None else _local_folder(dataset, local, strict=False)
    if folder is None:
        root = data_dir if data_dir is not None else _cache()
        folder = _download(dataset, root / dataset.name, data_dir, progress=progress)
    _read(dataset, folder, dataset)
    return folder


def data_table(data_dir: Path | None = None) -> list[dict[str, object]]:
    """Describes every data set and where it is on this machine, as plain data.

    Args:
        data_dir: Folder of local copies; None looks where TRUESTEP_DATA says.

    Returns:
        One dict per data set with name, title, train, test, licence, where (a folder or "not
        here"), checksum (the kind that downloads are held to, or "none published"), files (name,
        checksum and addresses of each) and remark.
    """
    data_dir = _data_folder(data_dir)
    return [
        {
            "name": dataset.name,
            "title": dataset.title,
            "train": dataset.train,
            "test": dataset.test,
            "licence": dataset.licence,
            "where": str(_at_hand(dataset, data_dir, strict=False) or "not here"),
            "checksum": dataset.files[0].checksum.partition(":")[0] or "none published",
            "files": [
                {"name": file.name, "checksum": file.checksum, "urls": list(file.urls)}
                for file in dataset.files
            ],
            "remark": dataset.remark,
        }
        for dataset in DATASETS.values()
    ]


def _data_folder(data_dir: Path | None) -> Path | None:
    named = os.environ.get("TRUESTEP_DATA")
    folder = data_dir if data_dir is not None else Path(named) if named else None
    if folder is not None and not folder.is_dir():
        origin = "--data-dir" if data_dir is not None else "TRUESTEP_DATA"
        raise TruestepError(
            f"The data folder {folder} ({origin}) is not a folder; name one that exists, "
            f"or leave {origin} out."
        )
    return folder


def _cache() -> Path:
    import pooch  # noqa: PLC0415  # 0.1 s that tasks without image files need not pay

    return Path(pooch.os_cache("truestep"))


def _at_hand(dataset: Dataset, data_dir: Path | None, *, strict: bool = True) -> Path | None:
    """The folder that holds the whole data set, if there is one."""
    local = None if data_dir is None else _local_folder(dataset, data_dir, strict=strict)
    if local is not None:
        return local
    cached = _cache() / dataset.name
    # an interrupted download leaves some files in the cache: not an error, just not there yet
    return None if _missing(dataset, cached) else cached


def _local_folder(dataset: Dataset, data_dir: Path, *, strict: bool = True) -> Path | None:
    for name in dataset.folders:
        folder = data_dir / name
        missing = _missing(dataset, folder)
        if not missing:
            return folder
        if strict and len(missing) < len(dataset.files):
            raise TruestepError(
                f"{folder} lacks {', '.join(missing)} of {dataset.title}; "
                "put the missing files there, or move the folder away."
            )
    return None


def _missing(dataset: Dataset, folder: Path) -> list[str]:
    return [file.name for file in dataset.files if _existing(folder, file) is None]


def _existing(folder: Path, file: DataFile) -> Path | None:
    candidates = (folder / file.name, folder / file.name.removesuffix(".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _download(dataset: Dataset, folder: Path, data_dir: Path | None, *, progress: bool) -> Path:
    by_hand = (data_dir / dataset.name) if data_dir is not None else folder
    names = ", ".join(file.name for file in dataset.files)
    if not dataset.files[0].urls:
        if not _missing(dataset, folder):
            return folder
        raise TruestepError(
            f"{dataset.title} is not on this machine and is not published for download; "
            f"put {names} into {by_hand}."
        )
    origin = dataset.files[0].urls[0].rpartition("/")[0]
    way_out = f"try again, or put these files by hand into {by_hand}: {names} (from {origin}/)"
    for file in dataset.files:
        fetch(file, folder, way_out, progress=progress)
    return folder


def _read(dataset: Dataset, folder: Path, wanted: Dataset) -> Images:
    fetched = folder.parent == _cache() and dataset.files[0].urls
    way_out = f"run `truestep data get {dataset.name}`" if fetched else "replace the file"
    paths = [_existing(folder, file) or folder / file.name for file in dataset.files]
    if dataset.files[0].name.endswith(".npz"):
        pairs = [read_npz(path, "a", "b", way_out) for path in paths]
        owners, as_published = paths, True
    else:
        arrays = [read_idx(path, 3 if "images" in path.name else 1, way_out) for path in paths]
        pairs = list(zip(arrays[::2], arrays[1::2], strict=True))
        owners = paths[::2]
        as_published = all(map(_as_published, dataset.files, arrays))
    if not dataset.train:
        pairs.insert(0, (pairs[0][0][:0], pairs[0][1][:0]))
        owners.insert(0, owners[0])
    parts = [
        _checked(images, labels, count, dataset, path=owner, way_out=way_out)
        for (images, labels), count, owner in zip(
            pairs, (dataset.train, dataset.test), owners, strict=True
        )
    ]
    return Images(parts[0], parts[1], _source(dataset, wanted, as_published=as_published))


def _checked(
    images: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    count: int,
    dataset: Dataset,
    *,
    path: Path,
    way_out: str,
) -> Part:
    problem = ""
    if images.shape != (count, 28, 28):
        sizes = " x ".join(str(size) for size in images.shape)
        problem = f"holds {sizes} images where {dataset.title} has {count} x 28 x 28"
    elif labels.shape != (count,):
        problem = f"has {count} images but {len(labels)} labels"
    elif count and labels.max() >= len(dataset.classes):
        problem = f"has label {labels.max()} in a data set of {len(dataset.classes)} classes"
    if problem:
        raise TruestepError(f"{path}: {problem}; {way_out}.")
    # The script that made QuickDraw10 inverts Google's white-on-black bitmaps, its README shows
    # them white on black: either way the paper covers more than the ink
    if count and images.mean() > 127.5:  # noqa: PLR2004
        images = 255 - images
    return Part(images, labels)


def _source(dataset: Dataset, wanted: Dataset, *, as_published: bool) -> str:
    counts = f"{dataset.train:,} training and {dataset.test:,} test images"
    parts = [f"{dataset.name}: {counts}, {dataset.licence}"]
    if dataset is not wanted:
        parts.append(f"standing in for {wanted.name}, which `truestep data get {wanted.name}` gets")
    if dataset.remark:
        parts.append(dataset.remark)
    if not as_published:
        parts.append("not the published files (checksums differ)")
    return "; ".join(parts)


def _as_published(file: DataFile, array: NDArray[np.uint8]) -> bool:
    """Whether a local copy, recompressed or not, has the published content, as far as is known."""
    return not file.content or hashlib.sha256(idx_bytes(array)).hexdigest() == file.content
