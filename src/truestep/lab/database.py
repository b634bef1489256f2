"""A SQLite file of results that several processes share and that survives kill -9.

What is in it is its owner's business; this is how it is opened, checked, read, written and explained.
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from truestep.errors import TruestepError

__all__ = ["Database", "Layout", "now"]

# Longer than any transaction on a slow network disk, short enough to end in a message.
BUSY_SECONDS = 60.0

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
class Layout:
    """What tells one kind of file from another, and what is made in a new one.

    Attributes:
        contents: What the file holds, for messages: ``"runs"``.
        application_id: SQLite's, so that another program's file is not taken for one of these.
        version: Of the tables; a file with another one is refused.
        tables: Statements that create them.
    """

    contents: str
    application_id: int
    version: int
    tables: tuple[str, ...]


class Database:
    """An open file. Every write is one transaction, so a killed process leaves whole rows only.

    Args:
        path: The file; it and its folder are created where they do not exist.
        layout: What it holds.

    Raises:
        TruestepError: The folder can't be written, or the file is not a database, not of this
            layout, or damaged. A damaged file is moved to ``NAME.corrupt-N`` beside it.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = Path(path).absolute()
        self._layout = layout
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

    def read(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query.

        Raises:
            TruestepError: The file can't be read.
        """
        with self._explained("read"):
            return self._connection.execute(query, values).fetchall()

    def write(self, what: str, statement: str, values: Sequence[Any]) -> int:
        """Carries out one statement in a transaction of its own.

        Args:
            what: Is recorded, for messages.
            statement: SQL.
            values: For its question marks.

        Returns:
            How many rows it changed.

        Raises:
            TruestepError: The disk is full or the file can't be written. Earlier rows stay.
        """
        with self._explained(f"record {what} in"), self._transaction():
            return self._connection.execute(statement, values).rowcount

    def close(self) -> None:
        """Closes the file; closing twice does nothing."""
        self._connection.close()

    def _check_or_create(self) -> None:
        if not self._is_new():
            self._check()
            return
        with self._transaction():
            # Another process may have made the tables while this one waited for the lock.
            if self._is_new():
                for statement in self._layout.tables:
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA application_id = {self._layout.application_id}")
                self._connection.execute(f"PRAGMA user_version = {self._layout.version}")
        self._check()

    def _is_new(self) -> bool:
        tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        return tables == 0 and self._pragma("application_id") == 0

    def _check(self) -> None:
        problem = self._pragma("quick_check(1)")
        if problem != "ok":
            # Python has no public way to make an error with SQLite's code.
            raise _Damaged(str(problem))
        if self._pragma("application_id") != self._layout.application_id:
            raise TruestepError(
                f"{self.path} is a SQLite database, but not one of truestep's {self._layout.contents}. "
                "Choose another file or folder for the results."
            )
        version = self._pragma("user_version")
        if version != self._layout.version:
            raise TruestepError(
                f"{self.path} was written by another version of truestep (schema {version}; this "
                f"one reads and writes schema {self._layout.version}). Use that version, or choose "
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
            f"`sqlite3 {aside.name} .recover` may save {self._layout.contents}; the next "
            "run starts a new file."
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


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
