"""Finished units in one SQLite file, a row each."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from truestep.lab.database import Database, Layout, now
from truestep.lab.paper.unit import Outcome, Record, packed, unpacked

__all__ = ["UnitStore"]

TABLES = (
    """CREATE TABLE units (
        key TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        settings TEXT NOT NULL,
        summary TEXT NOT NULL,
        arrays BLOB NOT NULL,
        engine TEXT NOT NULL,
        replica_steps INTEGER NOT NULL,
        train_seconds REAL,
        seconds REAL NOT NULL,
        command TEXT NOT NULL,
        versions TEXT NOT NULL,
        created TEXT NOT NULL
    )""",
)
# "TRSP": a race's store has another one, so that neither is taken for the other.
LAYOUT = Layout("units of papers", application_id=0x54525350, version=1, tables=TABLES)


class UnitStore:
    """Finished units. Each is one transaction: what is killed leaves whole units only.

    Args:
        path: The file; it and its folder are created where they do not exist.

    Raises:
        TruestepError: The folder can't be written, or the file is not such a store, of another
            version, or damaged; a damaged file is moved to ``NAME.corrupt-N`` beside it.

    Example:
        >>> import tempfile
        >>> outcome = Outcome({"loss": 0.5}, {}, engine="torch", replica_steps=10)
        >>> record = Record("points", {"lr": 0.1}, outcome, 1.0, command="", versions={})
        >>> with tempfile.TemporaryDirectory() as folder, UnitStore(Path(folder, "p.db")) as store:
        ...     store.add(record), store.add(record), record.key in store.keys()
        (True, False, True)
    """

    def __init__(self, path: Path) -> None:
        self._database = Database(path, LAYOUT)
        self.path = self._database.path

    def add(self, record: Record) -> bool:
        """Records a unit, unless the store has it already: the first one stays.

        Returns:
            Whether it was new.

        Raises:
            TruestepError: The disk is full or the file can't be written. Earlier units stay.
        """
        outcome = record.outcome
        row = (
            record.key,
            record.kind,
            json.dumps(record.settings, sort_keys=True),
            json.dumps(outcome.summary, sort_keys=True),
            packed(outcome.arrays),
            outcome.engine,
            outcome.replica_steps,
            outcome.train_seconds,  # SQLite keeps NaN as NULL
            record.seconds,
            record.command,
            json.dumps(record.versions),
            now(),
        )
        added = self._database.write(
            f"a unit of kind {record.kind}",
            "INSERT INTO units VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (key) DO NOTHING",
            row,
        )
        return added == 1

    def keys(self) -> set[str]:
        """The keys of all units.

        Raises:
            TruestepError: The file can't be read.
        """
        return {key for (key,) in self._database.read("SELECT key FROM units")}

    def records(self, keys: Iterable[str]) -> dict[str, Record]:
        """Those units of `keys` that are there, by key, in the order of `keys`.

        Raises:
            TruestepError: The file can't be read.
        """
        wanted = list(dict.fromkeys(keys))
        rows = self._database.read(
            "SELECT key, kind, settings, summary, arrays, engine, replica_steps, "
            "train_seconds, seconds, command, versions FROM units "
            "WHERE key IN (SELECT value FROM json_each(?))",
            (json.dumps(wanted),),
        )
        found = {row[0]: _record(row[1:]) for row in rows}
        return {key: found[key] for key in wanted if key in found}

    def close(self) -> None:
        """Closes the file; closing twice does nothing."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _record(row: tuple[Any, ...]) -> Record:
    kind, settings, summary, arrays, engine, steps, train_seconds, *rest = row
    seconds, command, versions = rest
    return Record(
        kind=kind,
        settings=json.loads(settings),
        outcome=Outcome(
            json.loads(summary),
            unpacked(arrays),
            engine,
            steps,
            math.nan if train_seconds is None else train_seconds,
        ),
        seconds=seconds,
        command=command,
        versions=json.loads(versions),
    )
