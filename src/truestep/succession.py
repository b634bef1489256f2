"""Several backward passes, whose gradients are added up, as a compiled step sees them: as one."""

import ctypes
import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from truestep.kernels.packing import WORD, full_words
from truestep.kernels.stepping import LOOKUPS, Line
from truestep.way import Seen

__all__ = ["as_one"]

NONE = array("q", [0])


class _Side(NamedTuple):
    """Where the bits of one tensor's passes go, one pass's after the other's.

    Attributes:
        lengths: how many bits each pass has for a unit.
        units: how many.
        size: how many words all are.
    """

    lengths: tuple[int, ...]
    units: int
    size: int


class _Plan(NamedTuple):
    """How a parameter's lines become one.

    Attributes:
        exact: the line where all bits are on.
        padded: the same with samples, which are off, between the passes; None where there cannot be any.
        sides: the outputs and the inputs.
    """

    exact: Line
    padded: Line | None
    sides: tuple[_Side, _Side]


def as_one(passes: Sequence[dict[int, Seen]], held: list[object]) -> dict[int, Seen] | None:
    """How a compiled step sees parameters to which several backward passes have brought gradients.

    Their words are put one after the other. Samples without positions may end within a word: the rest of it
    is taken for samples that are off.

    Args:
        passes: each parameter in each of them, on a CPU.
        held: gets what the addresses in what is returned lead to.

    Returns:
        None where words cannot just follow each other.
    """
    places: dict[tuple[tuple[int, ...], _Side], int] = {}
    lines: list[tuple[int, Line, list[int | None]]] = []
    size = 0
    for key in passes[-1]:
        of_passes = [seen[key] for seen in passes]
        plan = _plan([line for _, line, _ in of_passes])
        line = None if plan is None else plan.exact
        found: list[int | None] = []
        for number in (0, 1):
            addresses = tuple([bits[number] for _, _, bits in of_passes])
            if plan is None or not any(addresses):
                found.append(None)
                continue
            line, side = plan.padded, plan.sides[number]
            place = places.setdefault((addresses, side), size)
            size += side.size if place == size else 0
            found.append(place)
        if line is None:
            return None
        lines.append((key, line, found))
    words = NONE * size
    start = words.buffer_info()[0]
    for (addresses, side), place in places.items():
        _append(addresses, side, words, start, place)
    held.append(words)
    return {
        key: (passes[-1][key][0], line, (_at(start, to), _at(start, of)))
        for key, line, (to, of) in lines
    }


def _at(start: int, place: int | None) -> int:
    return 0 if place is None else start + 8 * place


def _plan(lines: Sequence[Line]) -> _Plan | None:
    """How lines of one parameter become one; None where they differ in more than their samples.

    Most layers' last line is that of the step before, and keeps the plan.
    """
    last = lines[-1]
    if not all(_alike(line, last) for line in lines):
        return None
    sizes = tuple([(line.entry.samples, line.samples, line.kind) for line in lines])
    if last.plan is None or last.plan[0] != sizes:
        last.plan = sizes, _made(last, *zip(*sizes, strict=True))
    plan: _Plan = last.plan[1]
    return plan


def _made(
    last: Line, samples: Sequence[int], reached: Sequence[int], kinds: Sequence[int]
) -> _Plan:
    entry, window, positions = last.entry, last.held, last.entry.positions
    seen = positions if window is None else math.prod(window.size)
    read = entry.columns if window is None else window.channels
    sides = _side(samples, positions, entry.rows), _side(samples, seen, read)
    whole = all(length % WORD == 0 for side in sides for length in side.lengths[:-1])
    gaps = 0 if whole else sum(-count % WORD for count in samples[:-1])
    exact, padded = (
        Line(last.shape, sum(reached), entry._replace(samples=count, kind=max(kinds)), window)
        for count in (sum(samples), sum(samples) + gaps)
    )
    return _Plan(exact, padded if whole or positions == seen == 1 else None, sides)


def _side(samples: Sequence[int], positions: int, units: int) -> _Side:
    lengths = tuple(positions * count for count in samples)
    return _Side(lengths, units, sum(-(-length // WORD) for length in lengths) * units)


def _alike(line: Line, other: Line) -> bool:
    """Whether two lines differ in their samples alone."""
    one, two = line.entry, other.entry
    return line is other or (
        one.kind < LOOKUPS > two.kind
        and (one.rows, one.columns, one.positions) == (two.rows, two.columns, two.positions)
        and one.apart == two.apart
        and line.held == other.held
    )


def _append(
    addresses: Sequence[int], side: _Side, words: "array[int]", start: int, place: int
) -> None:
    """Puts the words of several passes one after the other.

    Args:
        addresses: where they are; 0 where all bits are on.
        side: see `_Side`.
        words: where they go.
        start: the address of that.
        place: of the first.
    """
    units = side.units
    for address, length in zip(addresses, side.lengths, strict=True):
        size = -(-length // WORD) * units
        if address:
            ctypes.memmove(start + 8 * place, address, 8 * size)
        else:
            words[place : place + size] = full_words(length, units)
        place += size
