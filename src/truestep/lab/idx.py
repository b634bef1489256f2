"""Strict reading of image files: IDX (plain or gzip) and npz archives.

Arrays are [samples, height, width] for images and [samples] for labels. Whatever is not exactly
what the format says is refused with the file's name, since a half-read file trains without a word.
"""

import gzip
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from truestep.errors import TruestepError

__all__ = ["idx_bytes", "read_idx", "read_npz"]

_UNSIGNED_BYTE = 0x08  # the type code of the IDX format; the other types never hold images here
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: Path, dimensions: int, way_out: str) -> NDArray[np.uint8]:
    """Reads an IDX file of unsigned bytes, gzip-compressed or not.

    Args:
        path: The file; compression is recognised by content, not by name.
        dimensions: How many axes the array must have (3 for images, 1 for labels).
        way_out: What the reader of an error message can do, as a sentence without its full stop.

    Returns:
        The array, with the shape that the file's header states.

    Raises:
        TruestepError: The file is unreadable, truncated, corrupt, of another type or number of
            axes, or longer than its header says.
    """
    data = _read_bytes(path, way_out)
    if len(data) < 4 or data[:2] != b"\0\0":  # noqa: PLR2004
        raise _refusal(path, "is not an IDX file (it must start with two zero bytes)", way_out)
    kind, axes = data[2], data[3]
    if kind != _UNSIGNED_BYTE:
        raise _refusal(
            path,
            f"holds IDX type 0x{kind:02x} where unsigned bytes (0x{_UNSIGNED_BYTE:02x}) belong",
            way_out,
        )
    if axes != dimensions:
        raise _refusal(path, f"has {axes} axes where {dimensions} belong", way_out)
    start = 4 + 4 * axes
    if len(data) < start:
        raise _refusal(path, "is truncated: it ends inside its header", way_out)
    shape = tuple(int(size) for size in np.frombuffer(data[4:start], dtype=">u4"))
    expected, found = math.prod(shape), len(data) - start
    if found != expected:
        problem = "is truncated" if found < expected else "is longer than its header says"
        sizes = " x ".join(str(size) for size in shape)
        raise _refusal(
            path, f"{problem}: {found} bytes of data where {sizes} = {expected} belong", way_out
        )
    # a copy, since torch warns of arrays that cannot be written
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape).copy()


def read_npz(
    path: Path, images_key: str, labels_key: str, way_out: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Reads images and labels from an npz archive.

    Args:
        path: The archive.
        images_key: Name of the array of images, [samples, height, width].
        labels_key: Name of the array of labels, [samples].
        way_out: What the reader of an error message can do, as a sentence without its full stop.

    Returns:
        Images and labels as unsigned bytes. Arrays of another number type are accepted if every
        value is a whole number from 0 to 255, since archives of images saved as floats are common.

    Raises:
        TruestepError: The archive is unreadable or corrupt, lacks an array, or holds one of
            another type, range or number of axes.
    """
    try:
        # numpy leaves a file that it opened itself open if it is not a whole archive
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise _refusal(path, "is a single array, not an npz archive", way_out)
            missing = [key for key in (images_key, labels_key) if key not in archive]
            if missing:
                raise _refusal(
                    path,
                    f"has no array {missing[0]!r} (it holds: {', '.join(archive) or 'nothing'})",
                    way_out,
                )
            images, labels = archive[images_key], archive[labels_key]
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
        raise _refusal(path, f"cannot be read as an npz archive ({error})", way_out) from error
    return (
        _as_bytes(images, 3, f"array {images_key!r}", path, way_out),
        _as_bytes(labels, 1, f"array {labels_key!r}", path, way_out),
    )


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    """Writes an array as the content of an IDX file, the inverse of `read_idx`."""
    sizes = np.array(array.shape, dtype=">u4").tobytes()
    return bytes((0, 0, _UNSIGNED_BYTE, array.ndim)) + sizes + array.tobytes()


def _read_bytes(path: Path, way_out: str) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror})", way_out) from error
    if not raw.startswith(_GZIP_MAGIC):
        if path.suffix == ".gz":
            raise _refusal(path, "is not a gzip file", way_out)
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = "it ends too early" if isinstance(error, EOFError) else str(error)
        raise _refusal(path, f"is truncated or corrupt ({reason})", way_out) from error


def _as_bytes(
    array: NDArray[np.generic], axes: int, what: str, path: Path, way_out: str
) -> NDArray[np.uint8]:
    if array.ndim != axes:
        raise _refusal(path, f"{what} has {array.ndim} axes where {axes} belong", way_out)
    if array.dtype == np.uint8:
        return array.astype(np.uint8, copy=False)
    if array.dtype.kind not in "iuf":
        raise _refusal(path, f"{what} is of type {array.dtype} where numbers belong", way_out)
    with np.errstate(invalid="ignore"):  # NaN: the comparison below refuses it
        as_bytes = array.astype(np.int64).astype(np.uint8)
    if not np.array_equal(as_bytes, array):
        raise _refusal(path, f"{what} has values that are not whole numbers in 0..255", way_out)
    return as_bytes


def _refusal(path: Path, problem: str, way_out: str) -> TruestepError:
    return TruestepError(f"{path}: {problem}; {way_out}.")
