"""One exchange between ranks: what their records say together.

The ranks agree, in one small collective, on what each has and how long its message about each parameter
is; then the messages move, several parameters at a time. A replicated parameter's
(DistributedDataParallel) are sent to every rank, or its counts are added up by an all-reduce, whichever
moves fewer bytes. A rank that owns some rows of a parameter (`fully_shard`) is told about those rows alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from truestep.activity import Activity
from truestep.combine import Counts, one_batch, total
from truestep.distributed import Ranks, is_sharded, local
from truestep.errors import TruestepError
from truestep.wire import Message, message, of_rows, read

__all__ = ["Exchange", "Share"]

# Messages about parameters with this many elements together travel at once: at most 64 MB per rank.
BUCKET_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Share:
    """What one rank knows about one parameter.

    Attributes:
        name: the parameter's.
        parameter: the parameter.
        wanted: whether the ranks want to know about it now; must be the same on all.
        activity: of this rank's samples; None if this rank did not count any use.
        batch_size: this rank's N.
    """

    name: str
    parameter: Tensor
    wanted: bool
    activity: Activity | None
    batch_size: int


class Exchange:
    """One exchange between ranks: `exchange.take(parameter)` gives the joint activity and N.

    All ranks must make it at the same point with the same parameters in the same order, and then take
    the same parameters in the same order.

    Args:
        ranks: who takes part.
        shares: what this rank knows, one for each of the model's parameters.
        strict: whether every rank must have counted what it wants, unless it may skip parameters.

    Raises:
        TruestepError: on every rank, if the ranks want different parameters, or one rank did not count
            what it had to.
    """

    def __init__(self, ranks: Ranks, shares: Sequence[Share], *, strict: bool) -> None:
        ranks.refuse_join()
        self._ranks, self._shares = ranks, shares
        self._rank, self._size = ranks.rank, ranks.size
        self._device = local(shares[0].parameter).device
        self._place = {share.parameter: index for index, share in enumerate(shares)}
        self._ranges = [_ranges(share.parameter, self._size) for share in shares]
        # For each parameter a message to each rank, or one to all; none where nothing was counted.
        self._messages = [
            _address(share, rows) for share, rows in zip(shares, self._ranges, strict=True)
        ]
        self._told = self._agree()
        self.counted = {
            share.parameter
            for index, share in enumerate(shares)
            if any(told.wanted and told.counted for told in self._told[index])
        }
        self._check(strict=strict)
        self._ready: dict[int, Activity] = {}

    def take(self, parameter: Tensor) -> tuple[Activity, int]:
        """The activity of all ranks' samples, for the rows that this rank owns, and their N.

        Args:
            parameter: one in `counted`. What was taken is not kept; taking it again moves it again.
        """
        index = self._place[parameter]
        if index not in self._ready:
            self._ready = self._move(self._bucket(index))
        return self._ready.pop(index), self._batch_size(index)

    def own_batch_size(self, parameter: Tensor) -> int:
        """This rank's N of a parameter."""
        return self._shares[self._place[parameter]].batch_size

    # Agreeing: one small collective.

    def _agree(self) -> list[list["_Told"]]:
        """For each parameter, what each rank says about it to this one."""
        table = [
            [_line(share, _to(messages, rank)) for share, messages in self._lines()]
            for rank in range(self._size)
        ]
        lines = torch.tensor(table, device=self._device)
        told = torch.empty_like(lines)
        if self._size > 1:
            dist.all_to_all_single(told, lines, group=self._ranks.group)
        else:
            told = lines
        return [[_Told(*line) for line in column] for column in told.transpose(0, 1).tolist()]

    def _lines(self) -> Iterator[tuple[Share, list[Message]]]:
        return zip(self._shares, self._messages, strict=True)

    def _check(self, *, strict: bool) -> None:
        for share, told in zip(self._shares, self._told, strict=True):
            wanted = [bool(line.wanted) for line in told]
            if any(wanted) and not all(wanted):
                raise TruestepError(
                    f"{share.name!r} has a gradient to correct on ranks {_where(wanted)} alone; give it "
                    "one on every rank, zeros where it was not used, or, where each rank's optimizer has "
                    "some of the parameters (ZeroRedundancyOptimizer), attach mean_effective_gradient() to "
                    "the one that has all"
                )
            missing = [not line.counted for line in told]
            lenient = not strict or self._ranks.may_skip or not any(wanted)
            if not lenient and any(missing) and not all(missing):
                raise TruestepError(
                    f"{share.name!r} has a gradient on all ranks, but no sample was counted for it on ranks "
                    f"{_where(missing)}: there it was used without calling its module, or .grad was set "
                    "by hand. Call the module; where ranks may leave it unused, tell "
                    "DistributedDataParallel with find_unused_parameters=True"
                )

    def _batch_size(self, index: int) -> int:
        return sum(told.batch_size for told in self._told[index])

    # Moving messages and counts.

    def _bucket(self, wanted: int) -> list[int]:
        """The parameters that travel with one; their order and size are the same on all ranks."""
        bucket: list[int] = []
        elements = 0
        for index, share in enumerate(self._shares):
            if share.parameter not in self.counted:
                continue
            elements += share.parameter.numel()
            if bucket and elements > BUCKET_ELEMENTS:
                if wanted in bucket:
                    break
                bucket, elements = [], share.parameter.numel()
            bucket.append(index)
        return bucket

    def _move(self, bucket: list[int]) -> dict[int, Activity]:
        reduced = [index for index in bucket if self._is_reduced(index)]
        told = [index for index in bucket if index not in reduced]
        return self._reduce(reduced) | self._tell(told)

    def _is_reduced(self, index: int) -> bool:
        """Whether an all-reduce of a replicated parameter's counts moves fewer bytes than messages.

        A message of w words of 8 bytes goes to W - 1 ranks; a ring all-reduce of E counts of 4 bytes
        sends 2 (W - 1) / W times those from each of W ranks. So messages move fewer bytes where all
        together have fewer words than the parameter has elements.
        """
        words = sum(told.header + told.length for told in self._told[index])
        return self._ranges[index] is None and words >= self._shares[index].parameter.numel()

    def _reduce(self, indices: list[int]) -> dict[int, Activity]:
        if not indices:
            return {}
        shapes = [self._shares[index].parameter.shape for index in indices]
        counts = torch.zeros(
            sum(shape.numel() for shape in shapes), dtype=torch.int32, device=self._device
        )
        parts = counts.split([shape.numel() for shape in shapes])
        for index, part in zip(indices, parts, strict=True):
            activity = self._shares[index].activity
            if activity is not None:
                part.copy_(activity.count().flatten())
        if self._size > 1:
            dist.all_reduce(counts, group=self._ranks.group)
        return {
            index: Counts(part.long().reshape(shape), self._batch_size(index))
            for index, part, shape in zip(indices, parts, shapes, strict=True)
        }

    def _tell(self, indices: list[int]) -> dict[int, Activity]:
        if not indices:
            return {}
        others = [rank for rank in range(self._size) if rank != self._rank]
        parcels = self._parcels(indices, others)
        inward = [
            0 if rank == self._rank else sum(self._told[index][rank].size for index in indices)
            for rank in range(self._size)
        ]
        received = torch.empty(sum(inward), dtype=torch.int64, device=self._device)
        if others:
            dist.all_to_all_single(
                received,
                torch.cat(parcels),
                inward,
                [len(parcel) for parcel in parcels],
                group=self._ranks.group,
            )
        parts = {index: self._own(index) for index in indices}
        for rank, parcel in zip(range(self._size), received.split(inward), strict=True):
            if rank != self._rank:
                for index, activity in self._open(indices, rank, parcel):
                    parts[index].append(activity)
        return {index: _added(_filled(found)) for index, found in parts.items()}

    def _parcels(self, indices: list[int], others: list[int]) -> list[Tensor]:
        """What each rank gets: the headers of all messages to it, then their words."""
        nothing = torch.empty(0, dtype=torch.int64, device=self._device)
        parcels = [nothing] * self._size
        same = all(self._ranges[index] is None for index in indices)
        for rank in others:
            if same and rank != others[0]:
                parcels[rank] = parcels[others[0]]
                continue
            messages = [found for i in indices for found in _to(self._messages[i], rank)]
            header = torch.tensor(
                [number for found in messages for number in found.header],
                dtype=torch.int64,
                device=self._device,
            )
            words = [part.reshape(-1) for found in messages for part in found.make()]
            parcels[rank] = torch.cat([header, *words])
        return parcels

    def _own(self, index: int) -> list[Activity]:
        activity, ranges = self._shares[index].activity, self._ranges[index]
        if activity is None:
            return []
        return [activity if ranges is None else of_rows(activity, *ranges[self._rank])]

    def _open(
        self, indices: list[int], rank: int, parcel: Tensor
    ) -> Iterator[tuple[int, Activity]]:
        counted = [index for index in indices if self._told[index][rank].counted]
        lines = [self._told[index][rank] for index in counted]
        place = sum(line.header for line in lines)
        numbers, first = parcel[:place].tolist(), 0
        for index, line in zip(counted, lines, strict=True):
            header = numbers[first : first + line.header]
            first += line.header
            shape, ranges = self._shares[index].parameter.shape, self._ranges[index]
            if ranges is not None:
                start, stop = ranges[self._rank]
                shape = torch.Size([stop - start, *shape[1:]])
            yield index, read(header, parcel[place : place + line.length], shape)
            place += line.length


class _Told(NamedTuple):
    """What a rank says about a parameter before messages move."""

    wanted: int
    counted: int
    batch_size: int
    header: int
    length: int

    @property
    def size(self) -> int:
        return self.header + self.length


def _line(share: Share, messages: list[Message]) -> list[int]:
    header, length = sum(len(m.header) for m in messages), sum(m.length for m in messages)
    return [share.wanted, bool(messages), share.batch_size, header, length]


def _address(share: Share, ranges: list[tuple[int, int]] | None) -> list[Message]:
    if not share.wanted or share.activity is None:
        return []
    if ranges is None:
        return [message(share.activity)]
    return [message(of_rows(share.activity, *rows)) for rows in ranges]


def _to(messages: list[Message], rank: int) -> list[Message]:
    return messages if len(messages) < 2 else [messages[rank]]  # noqa: PLR2004


def _filled(parts: list[Activity]) -> list[Activity]:
    """Without the parts of ranks whose batches are empty."""
    return [part for part in parts if part.samples] or parts[:1]


def _added(parts: list[Activity]) -> Activity:
    """The parts' total, for counting alone."""
    whole = one_batch(parts) if len(parts) > 1 else None
    return total(parts) if whole is None else whole


def _where(flags: list[bool]) -> list[int]:
    return [rank for rank, flag in enumerate(flags) if flag]


def _ranges(parameter: Tensor, size: int) -> list[tuple[int, int]] | None:
    """The rows that each rank owns, as `torch.chunk` deals them out; None where every rank owns all."""
    if not is_sharded(parameter):
        return None
    rows = parameter.shape[0]
    step = -(-rows // size)
    return [(min(rank * step, rows), min((rank + 1) * step, rows)) for rank in range(size)]
