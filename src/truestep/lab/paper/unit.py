"""Units of work: the smallest things that are run, kept and never run again.

A unit is a frozen dataclass whose fields decide its result. Its kind and fields are its key.
"""

import hashlib
import io
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ADDED",
    "Arrays",
    "Cost",
    "Outcome",
    "Record",
    "Unit",
    "key",
    "packed",
    "settings",
    "unpacked",
]

Arrays = Mapping[str, NDArray[Any]]
HASH_LENGTH = 20
# Metadata of a field that came after stores were filled: where it has its default, a unit is the old one.
ADDED = {"added": True}


@dataclass(frozen=True)
class Cost:
    """What a unit takes: updates of all its replicas together, and seconds on one core."""

    replica_steps: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What running a unit gave.

    Attributes:
        summary: Plain data that JSON can hold.
        arrays: Small arrays by name.
        engine: What computed it: ``"ensemble, compiled"``, ``"torch"``, ...
        replica_steps: Updates made, of all replicas together.
        train_seconds: Processor time of the trainings, measurements included; it is not part of
            what makes two outcomes equal.
    """

    summary: dict[str, Any]
    arrays: Arrays
    engine: str
    replica_steps: int
    train_seconds: float = math.nan


class Unit(Protocol):
    """What every kind of unit can do. Its fields are plain data."""

    kind: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def check(self) -> None:
        """Raises `TruestepError` for settings that the engine does not know; costs nothing."""
        ...

    def cost(self) -> Cost:
        """An estimate."""
        ...

    def data_sets(self) -> tuple[str, ...]:
        """The image data sets that it reads."""
        ...

    def run(self, data_dir: Path | None) -> Outcome:
        """Does the work: a pure function of the fields and the data."""
        ...


@dataclass(frozen=True)
class Record:
    """A finished unit as the store has it.

    Attributes:
        kind: The unit's.
        settings: Its fields.
        outcome: What it gave.
        seconds: How long it took.
        command: The command line that ran it.
        versions: Of truestep, torch, numpy, python; the machine; the git commit.
    """

    kind: str
    settings: dict[str, Any]
    outcome: Outcome
    seconds: float
    command: str
    versions: dict[str, str]

    @property
    def key(self) -> str:
        """The unit's key."""
        return _hash(self.kind, self.settings)


def settings(unit: Unit) -> dict[str, Any]:
    """A unit's fields as JSON gives them back, tuples as lists, but for `ADDED` ones at their default."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(unit)))
    for each in fields(unit):
        if each.metadata == ADDED and plain[each.name] == each.default:
            del plain[each.name]
    return plain


def key(unit: Unit) -> str:
    """A unit's key in the store: a hash of its kind and fields, in hex."""
    return _hash(unit.kind, settings(unit))


def packed(arrays: Arrays) -> bytes:
    """Arrays as compressed bytes, the same bytes for the same arrays.

    Example:
        >>> unpacked(packed({"loss": np.array([1.0, 0.5])}))
        {'loss': array([1. , 0.5])}
    """
    parts = []
    for name in sorted(arrays):
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(arrays[name]), allow_pickle=False)
        parts.append((name, buffer.getvalue()))
    head = json.dumps([[name, len(content)] for name, content in parts]).encode()
    body = b"".join(content for _, content in parts)
    return zlib.compress(len(head).to_bytes(4, "little") + head + body, 9)


def unpacked(content: bytes) -> dict[str, NDArray[Any]]:
    """The inverse of :func:`packed`."""
    raw = zlib.decompress(content)
    start = 4 + int.from_bytes(raw[:4], "little")
    arrays = {}
    for name, length in json.loads(raw[4:start]):
        arrays[name] = np.load(io.BytesIO(raw[start : start + length]), allow_pickle=False)
        start += length
    return arrays


def _hash(kind: str, plain: Mapping[str, Any]) -> str:
    text = json.dumps([kind, plain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]
