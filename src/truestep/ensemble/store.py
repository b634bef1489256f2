"""Results of an ensemble in a folder: one file for each range of replicas, written whole or not at all."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truestep.ensemble.job import Job
from truestep.errors import TruestepError
from truestep.files import replacing, write_whole

__all__ = ["Store"]

DESCRIPTION = "ensemble.json"
# A schedule is known by its factors at so many steps.
SCHEDULE_PLACES = 1000


class Store:
    """The finished replicas of a training.

    Args:
        folder: Made if it isn't there.
        job: Whose results it holds.

    Raises:
        TruestepError: The folder holds something else, or can't be made.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self._folder, self._job = folder, job
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TruestepError(
                f"{folder} can't hold results ({error.strerror}). Give store= a folder that can be made."
            ) from error
        description, path = _description(job), folder / DESCRIPTION
        # One look: another process may begin at any moment.
        names = [one.name for one in folder.iterdir()]
        if DESCRIPTION in names:
            self._compare(path, description)
        elif not all(name.endswith(".part") for name in names):
            raise TruestepError(
                f"{folder} holds files, but no ensemble's. Give store= an empty or a new folder."
            )
        else:
            with _told(path):
                write_whole(path, json.dumps(description, indent=1).encode())

    def add(self, replicas: range, fields: dict[str, NDArray[Any]]) -> Path:
        """Keeps the results of some replicas.

        Args:
            replicas: which ones.
            fields: as the backends give them.

        Returns:
            The file.

        Raises:
            TruestepError: The disk is full, or the folder can't be written. Earlier files stay.
        """
        path = self._folder / f"replicas-{replicas.start:07d}-{replicas.stop:07d}.npz"
        with _told(path), replacing(path) as part, part.open("wb") as file:
            arrays: dict[str, Any] = {"keys": np.array(_keys(self._job, replicas)), **fields}
            np.savez_compressed(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        return path

    def parts(self) -> dict[range, Path]:
        """The files that there are, by their replicas; damaged ones are moved aside, with a warning.

        A file may hold more replicas than the job has; two may hold the same ones, if processes of
        different numbers of threads have worked on the folder.

        Raises:
            TruestepError: Replicas had other seeds or optimizers, or a damaged file can't be moved.
        """
        parts = {}
        for path in sorted(self._folder.glob("replicas-*.npz")):
            first, last = (int(number) for number in path.stem.split("-")[1:])
            replicas = range(first, last)
            try:
                with path.open("rb") as file, np.load(file) as fields:
                    keys = fields["keys"].tolist()
                    for name in fields.files:
                        fields[name]
            except Exception as error:  # noqa: BLE001 - numpy, zipfile and zlib have no list of theirs
                _move_aside(path, error)
                continue
            asked = range(first, min(last, len(self._job.seeds)))
            if keys[: len(asked)] != _keys(self._job, asked):
                raise TruestepError(
                    f"{path} has replicas with other seeds, starts, orders or optimizers. Give the same "
                    "ones to go on, or store= another folder."
                )
            if asked:
                parts[replicas] = path
        return parts

    def _compare(self, path: Path, description: dict[str, Any]) -> None:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise TruestepError(
                f"{path} can't be read ({error}). Give store= another folder; this one was left as it is."
            ) from error
        different = [
            name for name in {**description, **found} if found.get(name) != description.get(name)
        ]
        if different:
            raise TruestepError(
                f"{self._folder} holds another training: it differs in {', '.join(different)}. "
                "Give the same settings to go on, or store= another folder."
            )


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Says the way out where a file can't be written."""
    try:
        yield
    except OSError as error:
        raise TruestepError(
            f"{path} can't be written ({error.strerror}). Every file that is there is safe: make space, or "
            "make the folder writable, and the same call goes on."
        ) from error


def _move_aside(path: Path, reason: Exception) -> None:
    aside = path.with_suffix(".damaged")
    try:
        path.replace(aside)
    except FileNotFoundError:
        return  # another process has done so
    except OSError as error:
        raise TruestepError(
            f"{path} is damaged ({reason}) and can't be moved aside ({error.strerror}). Move it yourself, or "
            "give store= another folder."
        ) from error
    warnings.warn(
        f"{path} is damaged ({reason}): moved to {aside.name}; its replicas are trained again.",
        stacklevel=2,
    )


def _description(job: Job) -> dict[str, Any]:
    """What decides results besides seeds and optimizers, in plain values."""
    data = hashlib.sha256()
    for name, split in job.data.splits.items():
        data.update(f"{name} {split.inputs.shape} {split.targets.dtype}".encode())
        data.update(split.inputs.tobytes())
        data.update(split.targets.tobytes())
    description = {
        "truestep": version("truestep"),
        "network": asdict(job.network),
        "data": data.hexdigest(),
        "steps": job.steps,
        "batch_size": job.batch_size,
        "record": asdict(job.record),
        "stop": None if job.stop is None else asdict(job.stop),
        "own order": job.order is not None,
    }
    return dict(json.loads(json.dumps(description)))


def _keys(job: Job, replicas: range) -> list[str]:
    """What decides each replica's result besides the description."""
    return [_key(job, replica) for replica in replicas]


def _key(job: Job, replica: int) -> str:
    optimizer, seed = job.optimizers[replica], int(job.seeds[replica])
    digest = hashlib.sha256(f"{seed} {replace(optimizer, schedule='constant')}".encode())
    if isinstance(optimizer.schedule, str):
        digest.update(optimizer.schedule.encode())
    else:
        steps = np.unique(np.linspace(0, job.steps - 1, SCHEDULE_PLACES).astype(np.int64))
        digest.update(np.array([optimizer.schedule(int(step)) for step in steps]).tobytes())
    if job.starts is not None:
        digest.update(job.starts[replica].tobytes())
    if job.order is not None:
        for epoch in range(min(2, -(-job.steps // job.steps_per_epoch))):
            digest.update(job.permutation(seed, epoch).astype(np.int64).tobytes())
    return digest.hexdigest()
