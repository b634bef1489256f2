"""Results of runs in one SQLite file that several processes share and that survives kill -9."""

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from truestep.errors import TruestepError

__all__ = ["RunKey", "RunResult", "Store"]

SCHEMA_VERSION = 1
# "TRST": tells a store from any other program's SQLite file with the same user_version.
APPLICATION_ID = 0x54525354
# Longer than any transaction on a slow network disk, short enough to end in a message.
BUSY_SECONDS = 60.0

SCHEMA = (
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

# By SQLite's error code: what happened and the way out.
EXPLANATIONS = {
    sqlite3.SQLITE_CORRUPT: "the file is damaged ({error}). Give the same command again: it moves "
    "the file aside and starts a new one.",
    sqlite3.SQLITE_NOTADB: "it is not a database. It was left as it is; choose another file or "
    "folder for the results.",
    sqlite3.SQLITE_FULL: "the disk is full. Every earlier result is safe; free some space and "
    "give the same command again to go on.",
    sqlite3.SQLITE_IOERR: "the disk fails to read or write it ({error}). Every earlier result is "
    "safe; see that the disk has space and is well, and give the same command again to go on.",
    sqlite3.SQLITE_BUSY: f"another process has kept it locked for {BUSY_SECONDS:.0f} s. End that "
    "process, then give the same command again.",
} | dict.fromkeys(
    (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM),
    "it can't be written ({error}). Choose a folder that you can write to.",
)
OTHER_EXPLANATION = "{error}. Choose another file or folder for the results."


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
        self.path = Path(path).absolute()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TruestepError(
                f"The folder {self.path.parent} can't be made: {error.strerror}. "
                "Choose a folder that you can write to."
            ) from error
        with self._explained("open"):
            # No implicit transactions: each method says where its own begins and ends.
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None
            )
        try:
            with self._explained("open"):
                self._check_or_create()
        except BaseException:
            self._connection.close()
            raise

    def experiment(self, hash: str, description: dict[str, Any]) -> None:
        """Records what an experiment's hash stands for; a later description replaces it.

        Args:
            hash: The value of ``RunKey.experiment``.
            description: Plain data: task, epochs, data source, ...

        Raises:
            TruestepError: The file can't be written.
        """
        with self._explained(f"record experiment {hash} in"), self._transaction():
            self._connection.execute(
                "INSERT INTO experiments VALUES (?, ?, ?) "
                "ON CONFLICT (hash) DO UPDATE SET description = excluded.description",
                (hash, json.dumps(description), _now()),
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
            _now(),
        )
        doing = f"record {key.optimizer} (lr {key.lr:g}, seed {key.seed}) in"
        with self._explained(doing), self._transaction():
            # INSERT OR IGNORE would also swallow a row with a missing value.
            cursor = self._connection.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (experiment, optimizer, lr, batch_size, seed, final) DO NOTHING",
                row,
            )
            return cursor.rowcount == 1

    def keys(self, experiment: str) -> set[RunKey]:
        """The runs that the store has of an experiment.

        Raises:
            TruestepError: The file can't be read.
        """
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT experiment, optimizer, lr, batch_size, seed, final FROM runs "
                "WHERE experiment = ?",
                (experiment,),
            ).fetchall()
        return {_key(row) for row in rows}

    def results(self, experiment: str) -> list[RunResult]:
        """All runs of an experiment with their results, ordered by key.

        Raises:
            TruestepError: The file can't be read.
        """
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT experiment, optimizer, lr, batch_size, seed, final, status, curve, best, "
                "test, step_seconds, optimizer_bytes, parameters, versions FROM runs "
                "WHERE experiment = ? ORDER BY optimizer, batch_size, lr, seed, final",
                (experiment,),
            ).fetchall()
        return [_result(row) for row in rows]

    def descriptions(self) -> dict[str, dict[str, Any]]:
        """What each experiment's hash stands for, oldest first.

        Raises:
            TruestepError: The file can't be read.
        """
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT hash, description FROM experiments ORDER BY created, hash"
            ).fetchall()
        return {hash_: json.loads(description) for hash_, description in rows}

    def close(self) -> None:
        """Closes the file; closing twice does nothing."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_or_create(self) -> None:
        if not self._is_new():
            self._check()
            return
        with self._transaction():
            # Another process may have made the tables while this one waited for the lock.
            if self._is_new():
                for statement in SCHEMA:
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._check()

    def _is_new(self) -> bool:
        tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        return tables == 0 and self._pragma("application_id") == 0

    def _check(self) -> None:
        problem = self._pragma("quick_check(1)")
        if problem != "ok":
            # Python has no public way to make an error with SQLite's code.
            raise _Damaged(str(problem))
        if self._pragma("application_id") != APPLICATION_ID:
            raise TruestepError(
                f"{self.path} is a SQLite database, but not one of truestep's. "
                "Choose another file or folder for the results."
            )
        version = self._pragma("user_version")
        if version != SCHEMA_VERSION:
            raise TruestepError(
                f"{self.path} was written by another version of truestep (schema {version}; this "
                f"one reads and writes schema {SCHEMA_VERSION}). Use that version, or choose "
                "another file or folder for the results."
            )

    def _pragma(self, name: str) -> object:
        value: object = self._connection.execute(f"PRAGMA {name}").fetchone()[0]
        return value

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE takes the write lock at the start, where waiting for it is possible.
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            # SQLite has already rolled back after some errors, a full disk among them.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._explain(doing, error) from error

    def _explain(self, doing: str, error: sqlite3.Error) -> TruestepError:
        # The low byte is the kind; the bytes above it only refine it.
        kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if isinstance(error, _Damaged):
            kind = sqlite3.SQLITE_CORRUPT
        if kind == sqlite3.SQLITE_CORRUPT and doing == "open":
            return self._move_aside(error)
        explanation = EXPLANATIONS.get(kind, OTHER_EXPLANATION).format(error=error)
        return TruestepError(f"Can't {doing} {self.path}: {explanation}")

    def _move_aside(self, reason: sqlite3.Error) -> TruestepError:
        self._connection.close()
        try:
            aside = _reserve(self.path)
            # Another writer's journal would, if that writer died, be played into the next file.
            journal = self.path.with_name(f"{self.path.name}-journal")
            if journal.exists():
                journal.replace(aside.with_name(f"{aside.name}-journal"))
            self.path.replace(aside)
        except OSError as error:
            return TruestepError(
                f"{self.path} is damaged ({reason}) and can't be moved aside ({error.strerror}). "
                "Move it yourself, or choose another file or folder for the results."
            )
        return TruestepError(
            f"{self.path} is damaged ({reason}). It was moved to {aside}, from which "
            f"`sqlite3 {aside.name} .recover` may save runs; give the same command again to "
            "start a new file."
        )


class _Damaged(sqlite3.DatabaseError):
    """SQLite's own check found the file damaged."""


def _reserve(path: Path) -> Path:
    number = 1
    while True:
        aside = path.with_name(f"{path.name}.corrupt-{number}")
        try:
            # Creating it exclusively keeps two processes from choosing the same name.
            os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            number += 1
        else:
            return aside


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


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
