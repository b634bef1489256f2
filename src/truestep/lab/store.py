"""Results of runs in one SQLite file that several processes share and that survives kill -9."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from truestep.lab.database import Database, Layout, now

__all__ = ["RunKey", "RunResult", "Store"]

TABLES = (
    """CREATE TABLE experiments (
        hash TEXT PRIMARY KEY,
        description TEXT NOT NULL,
        created TEXT NOT NULL
    )""",
    """CREATE TABLE runs (
        experiment TEXT NOT NULL,
        optimizer TEXT NOT NULL,
        lr REAL NOT NULL,
        batch_size INTEGER NOT NULL,
        seed INTEGER NOT NULL,
        final INTEGER NOT NULL,
        status TEXT NOT NULL,
        curve TEXT NOT NULL,
        best INTEGER NOT NULL,
        test TEXT NOT NULL,
        step_seconds REAL,
        optimizer_bytes INTEGER NOT NULL,
        parameters INTEGER NOT NULL,
        versions TEXT NOT NULL,
        created TEXT NOT NULL,
        PRIMARY KEY (experiment, optimizer, lr, batch_size, seed, final)
    )""",
)
# "TRST": tells a store from any other program's SQLite file with the same user_version.
LAYOUT = Layout("runs", application_id=0x54525354, version=1, tables=TABLES)


@dataclass(frozen=True)
class RunKey:
    """What makes a run itself: the same key gives the same run.

    Attributes:
        experiment: Hex hash of everything else that decides the result (task, epochs, data, ...).
        optimizer: Name, such as ``"asgd+adam"``.
        lr: Learning rate.
        batch_size: Samples per step.
        seed: Decides the start and the order of the data.
        final: False for a selection run, which never touches test data; True for the repeat of a
            chosen one, which reads the test set once.
    """

    experiment: str
    optimizer: str
    lr: float
    batch_size: int
    seed: int
    final: bool


@dataclass(frozen=True)
class RunResult:
    """What one run gave.

    Attributes:
        key: The run.
        status: ``"done"``, or ``"diverged"`` where a training or validation loss was not finite.
        curve: One row per evaluation: ``epoch``, ``step``, ``seconds`` (of training so far),
            ``train_loss`` (mean since the last row), ``loss`` (validation) and the metrics
            (validation). A diverged run's curve ends where it diverged.
        best: Index into ``curve`` of the lowest validation loss; -1 if it diverged before any.
        test: Loss and metrics on the test set of the model at ``best``; empty unless final.
        step_seconds: Median duration of a training step, in seconds.
        optimizer_bytes: Peak memory of the optimizer's state and the counter's records.
        parameters: Number of trained values of the model.
        versions: Of truestep, torch, numpy and python; the machine; threads; the git commit.
    """

    key: RunKey
    status: str
    curve: list[dict[str, float]]
    best: int
    test: dict[str, float]
    step_seconds: float
    optimizer_bytes: int
    parameters: int
    versions: dict[str, str]


class Store:
    """Runs of any number of experiments in one SQLite file.

    Every run is one transaction, so a process that is killed leaves whole runs only, and any
    number of processes may read and write the same file.

    Args:
        path: The file; it and its folder are created where they do not exist.

    Raises:
        TruestepError: The folder can't be written, or the file is not a database, not a store,
            written by a truestep with another schema, or damaged. A damaged file is moved to
            ``NAME.corrupt-N`` beside it.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> key = RunKey("c0ffee", "sgd", lr=0.1, batch_size=64, seed=0, final=False)
        >>> result = RunResult(key, "diverged", [{"epoch": 1, "loss": float("nan")}], best=-1,
        ...     test={}, step_seconds=0.001, optimizer_bytes=0, parameters=10, versions={})
        >>> with tempfile.TemporaryDirectory() as folder, Store(Path(folder, "runs.db")) as store:
        ...     store.add(result), store.add(result), key in store.keys("c0ffee")
        (True, False, True)
    """

    def __init__(self, path: Path) -> None:
        self._database = Database(path, LAYOUT)
        self.path = self._database.path

    def experiment(self, hash: str, description: dict[str, Any]) -> None:
        """Records what an experiment's hash stands for; a later description replaces it.

        Args:
            hash: The value of ``RunKey.experiment``.
            description: Plain data: task, epochs, data source, ...

        Raises:
            TruestepError: The file can't be written.
        """
        self._database.write(
            f"experiment {hash}",
            "INSERT INTO experiments VALUES (?, ?, ?) "
            "ON CONFLICT (hash) DO UPDATE SET description = excluded.description",
            (hash, json.dumps(description), now()),
        )

    def add(self, result: RunResult) -> bool:
        """Records a run, unless the store has it already: the first one stays.

        Returns:
            Whether the run was new.

        Raises:
            TruestepError: The disk is full or the file can't be written. Earlier runs stay.
        """
        key = result.key
        row = (
            key.experiment,
            key.optimizer,
            key.lr,
            key.batch_size,
            key.seed,
            int(key.final),
            result.status,
            json.dumps(result.curve),
            result.best,
            json.dumps(result.test),
            result.step_seconds,  # SQLite keeps NaN as NULL
            result.optimizer_bytes,
            result.parameters,
            json.dumps(result.versions),
            now(),
        )
        # INSERT OR IGNORE would also swallow a row with a missing value.
        added = self._database.write(
            f"{key.optimizer} (lr {key.lr:g}, seed {key.seed})",
            "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (experiment, optimizer, lr, batch_size, seed, final) DO NOTHING",
            row,
        )
        return added == 1

    def keys(self, experiment: str) -> set[RunKey]:
        """The runs that the store has of an experiment.

        Raises:
            TruestepError: The file can't be read.
        """
        rows = self._database.read(
            "SELECT experiment, optimizer, lr, batch_size, seed, final FROM runs "
            "WHERE experiment = ?",
            (experiment,),
        )
        return {_key(row) for row in rows}

    def results(self, experiment: str) -> list[RunResult]:
        """All runs of an experiment with their results, ordered by key.

        Raises:
            TruestepError: The file can't be read.
        """
        rows = self._database.read(
            "SELECT experiment, optimizer, lr, batch_size, seed, final, status, curve, best, "
            "test, step_seconds, optimizer_bytes, parameters, versions FROM runs "
            "WHERE experiment = ? ORDER BY optimizer, batch_size, lr, seed, final",
            (experiment,),
        )
        return [_result(row) for row in rows]

    def descriptions(self) -> dict[str, dict[str, Any]]:
        """What each experiment's hash stands for, oldest first.

        Raises:
            TruestepError: The file can't be read.
        """
        rows = self._database.read(
            "SELECT hash, description FROM experiments ORDER BY created, hash"
        )
        return {hash_: json.loads(description) for hash_, description in rows}

    def close(self) -> None:
        """Closes the file; closing twice does nothing."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _key(row: tuple[Any, ...]) -> RunKey:
    experiment, optimizer, lr, batch_size, seed, final = row
    return RunKey(experiment, optimizer, lr, batch_size, seed, bool(final))


def _result(row: tuple[Any, ...]) -> RunResult:
    status, curve, best, test, step_seconds, optimizer_bytes, parameters, versions = row[6:]
    return RunResult(
        key=_key(row[:6]),
        status=status,
        curve=json.loads(curve),
        best=best,
        test=json.loads(test),
        step_seconds=float("nan") if step_seconds is None else step_seconds,
        optimizer_bytes=optimizer_bytes,
        parameters=parameters,
        versions=json.loads(versions),
    )
