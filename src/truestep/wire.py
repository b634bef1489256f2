"""Activity as 64-bit words: what one rank tells another about the samples that reach a parameter.

A message is a short header of numbers, which says what the words are, and the words themselves, which are
the tensors that the activity holds. Whatever bits cannot say in fewer bytes is sent as counts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from truestep.activity import Activity, Elements, Outer, Rows, Window
from truestep.bits import Bits, pack
from truestep.blocks import Blocks
from truestep.combine import Counts, Joint, Shared, Total, nbytes

__all__ = ["Message", "message", "of_rows", "read"]

# What a message may be made of; the place in this tuple stands for the class.
KINDS = (Bits, Window, Elements, Outer, Rows, Blocks, Joint, Total, Shared)
NOTHING, NUMBER, TEXT, SEQUENCE, MAPPING, WORDS, HALF_WORDS, OBJECT, COUNTS = range(9)


@dataclass(frozen=True)
class Message:
    """An activity ready to be sent.

    Attributes:
        header: what the words are.
        length: how many words there are.
        make: makes the words, int64 tensors of any shape.
    """

    header: list[int]
    length: int
    make: Callable[[], list[Tensor]]

    @property
    def size(self) -> int:
        """Header and words, in 64-bit words."""
        return len(self.header) + self.length


def message(activity: Activity) -> Message:
    """The activity in the fewest bytes: its bits, or its counts as 32-bit integers.

    Example:
        >>> bits = pack(torch.eye(64, 100))
        >>> message(Outer(torch.Size([100, 100]), bits, bits)).length
        200
        >>> message(Outer(torch.Size([2, 2]), bits, bits)).length
        2
    """
    header: list[int] = []
    tensors: list[Tensor] = []
    half = _words_of_halves(activity.shape.numel())
    if _write(activity, header, tensors):
        length = sum(tensor.numel() for tensor in tensors)
        if len(header) + length < half + 2:
            return Message(header, length, lambda: tensors)
    counts = [COUNTS, activity.samples]
    return Message(counts, half, lambda: [_halves(activity.count())])


def read(header: list[int], words: Tensor, shape: torch.Size) -> Activity:
    """The activity that a message holds.

    Args:
        header: the message's.
        words: the message's words, one after the other, int64 ``[length]``.
        shape: the parameter's, or that of its rows which the message is about.
    """
    if header[0] == COUNTS:
        return Counts(_narrow(words, shape.numel()).long().reshape(shape), header[1])
    activity: Activity = _read(iter(header), _Tape(words))
    return activity


def of_rows(activity: Activity, start: int, stop: int) -> Activity:  # noqa: PLR0911
    """What the activity says about some rows of its parameter (its first dimension).

    Args:
        activity: of the whole parameter.
        start: the first row.
        stop: the row after the last.
    """
    shape = torch.Size([stop - start, *activity.shape[1:]])
    if start == stop:
        return _nobody(activity, shape)
    match activity:
        case Elements():
            width = activity.shape[1:].numel()
            return Elements(shape, _units(activity.bits, start * width, stop * width))
        case Outer() if activity.window is None or activity.window.groups == 1:
            outputs = _units(activity.outputs, start, stop)
            return replace(activity, shape=shape, outputs=outputs)
        case Rows():
            entries = activity.spread()
            kept = (entries.rows >= start) & (entries.rows < stop)
            rows, owners = entries.rows[kept] - start, entries.owners[kept]
            mask = pack(entries.outputs.mask()[kept])
            return replace(entries, shape=shape, rows=rows, owners=owners, outputs=mask)
        case Blocks():
            parts = {
                max(first, start) - start: of_rows(
                    part, max(start - first, 0), min(stop - first, part.shape[0])
                )
                for first, part in activity.parts.items()
                if first < stop and start < first + part.shape[0]
            }
            return Blocks(shape, parts) if parts else _nobody(activity, shape)
        case Joint():
            return Joint(tuple(of_rows(use, start, stop) for use in activity.uses))
        case Total():
            batches = tuple(of_rows(part, start, stop) for part in activity.parts)
            return Total(batches, sum(map(nbytes, batches)))
        case Shared():
            return Shared(of_rows(activity.use, start, stop), activity.times)
        case _:
            return Counts(activity.count()[start:stop], activity.samples)


def _nobody(activity: Activity, shape: torch.Size) -> Activity:
    counts = torch.zeros(shape, dtype=torch.int64, device=activity.device)
    return Counts(counts, activity.samples)


def _units(bits: Bits, start: int, stop: int) -> Bits:
    words = bits.words if bits.words is None else bits.words[:, start:stop].contiguous()
    return Bits(words, bits.samples, bits.positions, stop - start)


def _write(value: Any, header: list[int], tensors: list[Tensor]) -> bool:
    """Appends a value; False, with the rest left out, where a message cannot hold it."""
    match value:
        case None:
            header.append(NOTHING)
        case int():
            header += [NUMBER, int(value)]
        case str():
            header += [TEXT, len(value), *map(ord, value)]
        case tuple():
            header += [SEQUENCE, len(value)]
            return all(_write(item, header, tensors) for item in value)
        case dict():
            header += [MAPPING, len(value)]
            return all(_write(pair, header, tensors) for pair in value.items())
        case Tensor():
            if value.dtype not in {torch.int64, torch.int32}:
                return False
            narrow = value.dtype == torch.int32
            header += [HALF_WORDS if narrow else WORDS, value.dim(), *value.shape]
            tensors.append(_halves(value) if narrow else value)
        case _ if is_dataclass(value) and (kind := _kind(value)) in KINDS:
            header += [OBJECT, KINDS.index(kind)]
            parts = [getattr(value, field.name) for field in fields(value)]
            return all(_write(part, header, tensors) for part in parts)
        case _:
            return False
    return True


def _kind(value: Any) -> type:
    """What a value arrives as: bits that lie among others' as bits of their own."""
    return Bits if isinstance(value, Bits) else type(value)


class _Tape:
    """Words that are read one piece after the other."""

    def __init__(self, words: Tensor) -> None:
        self._words, self._place = words, 0

    def take(self, length: int) -> Tensor:
        piece = self._words[self._place : self._place + length]
        self._place += length
        return piece


def _read(numbers: Iterator[int], tape: _Tape) -> Any:  # noqa: PLR0911
    tag = next(numbers)
    if tag == NUMBER:
        return next(numbers)
    if tag == TEXT:
        return "".join(chr(next(numbers)) for _ in range(next(numbers)))
    if tag == SEQUENCE:
        return tuple(_read(numbers, tape) for _ in range(next(numbers)))
    if tag == MAPPING:
        return dict(_read(numbers, tape) for _ in range(next(numbers)))
    if tag in {WORDS, HALF_WORDS}:
        shape = torch.Size([next(numbers) for _ in range(next(numbers))])
        if tag == WORDS:
            return tape.take(shape.numel()).reshape(shape)
        halves = tape.take(_words_of_halves(shape.numel()))
        return _narrow(halves, shape.numel()).reshape(shape)
    if tag == OBJECT:
        kind = KINDS[next(numbers)]
        values = {field.name: _read(numbers, tape) for field in fields(kind)}
        if "shape" in values:
            values["shape"] = torch.Size(values["shape"])
        return kind(**values)
    return None


def _words_of_halves(length: int) -> int:
    return -(-length // 2)


def _halves(numbers: Tensor) -> Tensor:
    """Numbers of 32 bits, two in a word."""
    halves = numbers.flatten().to(torch.int32)
    return torch.nn.functional.pad(halves, (0, len(halves) % 2)).view(torch.int64)


def _narrow(words: Tensor, length: int) -> Tensor:
    return words.contiguous().view(torch.int32)[:length]
