"""Fetching one published file into a folder: checked, with progress, never half-written."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from truestep.errors import TruestepError

__all__ = ["DataFile", "fetch", "has_checksum"]

_CHUNK = 1 << 16
_TIMEOUT = 20.0  # seconds without a byte; longer and an unplugged machine seems to hang


@dataclass(frozen=True)
class DataFile:
    """One published file.

    Attributes:
        name: File name, without folders.
        urls: Where it is published, tried in order; empty if it cannot be downloaded.
        checksum: Of the file as published: "sha256:..." or "git:...", git's blob identifier
            (SHA-1 over a short header and the content), which is all that GitHub publishes.
            Empty if none is known: then only shape and counts are checked.
        content: SHA-256 of the uncompressed content, by which a recompressed local copy is
            recognised. Empty if it could not be known.
    """

    name: str
    urls: tuple[str, ...] = ()
    checksum: str = ""
    content: str = ""


def has_checksum(path: Path, checksum: str) -> bool:
    """Says whether the file at `path` has the given checksum (see `DataFile.checksum`)."""
    algorithm, _, expected = checksum.partition(":")
    if algorithm == "git":
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        digest = hashlib.new(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == expected


def fetch(file: DataFile, folder: Path, way_out: str, *, progress: bool = False) -> Path:
    """Downloads a file into a folder, or finds it there.

    The file appears under its name only whole and checked. A file that is there with another
    checksum is replaced, but not before the right one has arrived.

    Args:
        file: What to fetch.
        folder: Made if need be.
        way_out: What a reader can do where no address works, as a sentence without its full stop.
        progress: Show a progress bar on standard error.

    Returns:
        Path of the file.

    Raises:
        TruestepError: No address gave the right file (with the reason for each), or the folder
            cannot be written.
    """
    # requests takes 0.1 s to import: only those who download pay for it
    import pooch  # noqa: PLC0415
    import requests  # noqa: PLC0415

    path = folder / file.name
    reasons = []
    pooch.get_logger().setLevel("WARNING")  # its own "Downloading ..." line would break the bar
    try:
        if path.exists() and (not file.checksum or has_checksum(path, file.checksum)):
            return path
        folder.mkdir(parents=True, exist_ok=True)
        for url in file.urls:
            # pooch trusts any file of that name, so it gets a folder of its own
            with (
                TemporaryDirectory(dir=folder, prefix=".download-") as workplace,
                _progress_bar(file.name, shown=progress) as bar,
            ):
                download = _CheckedDownloader(
                    file.checksum,
                    pooch.HTTPDownloader(progressbar=bar, chunk_size=_CHUNK, timeout=_TIMEOUT),
                )
                try:
                    arrived = pooch.retrieve(
                        url, known_hash=None, fname=file.name, path=workplace, downloader=download
                    )
                except requests.RequestException as error:
                    reasons.append(f"{url}: {_reason(error)}")
                except _WrongChecksumError as error:
                    reasons.append(f"{url}: {error}")
                else:
                    return Path(arrived).replace(path)
    except OSError as error:
        raise TruestepError(
            f"{folder} cannot be written ({error.strerror or error}); "
            "free space there, or give another folder with --data-dir or TRUESTEP_DATA."
        ) from error
    raise TruestepError(f"{file.name} could not be downloaded ({'; '.join(reasons)}); {way_out}.")


class _WrongChecksumError(Exception):
    """What arrived is not the published file."""


@dataclass(frozen=True)
class _CheckedDownloader:
    """A pooch downloader that refuses a file with the wrong checksum.

    pooch's own check knows no git blob identifiers; checking here keeps one rule for all kinds.
    """

    checksum: str
    download: Any

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        self.download(url, output_file, pooch)
        if self.checksum and not has_checksum(Path(output_file), self.checksum):
            raise _WrongChecksumError(f"wrong checksum (not {self.checksum})")


def _reason(error: Exception) -> str:
    import requests  # noqa: PLC0415

    if isinstance(error, requests.HTTPError):
        return f"HTTP {error.response.status_code}" if error.response is not None else "HTTP error"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the transfer broke off"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return f"{type(error).__name__}: {error}"


@contextmanager
def _progress_bar(title: str, *, shown: bool) -> Iterator[Any]:
    if not shown:
        yield False
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _RichBar(progress, progress.add_task(title, total=None))


class _RichBar:
    """A rich task with the few names that pooch expects of a progress bar."""

    def __init__(self, progress: Any, task: Any) -> None:
        self._progress = progress
        self._task = task

    @property
    def total(self) -> float | None:
        total: float | None = self._progress.tasks[0].total
        return total

    @total.setter
    def total(self, size: int) -> None:
        self._progress.update(self._task, total=size or None)

    def update(self, size: int) -> None:
        self._progress.advance(self._task, size)

    def reset(self) -> None:
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """The `with` block around the bar closes it."""
