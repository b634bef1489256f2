"""From activity to counts, corrected gradients or whole steps, in one pass over the parameters."""

import functools
import math
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from truestep.kernels.dispatch import (
    STORED,
    address_of,
    all_plain,
    device_of,
    finds_addresses,
    gpu,
    loops,
)
from truestep.kernels.threads import spread

__all__ = [
    "LINEAR",
    "LOOKUPS",
    "POSITIONS",
    "Entry",
    "Line",
    "Options",
    "Table",
    "addresses",
    "count",
    "number_of",
    "run",
    "takes",
]

# What loops reckon in, as arrays name it.
CODES = {torch.float32: "f", torch.float64: "d", torch.bfloat16: "f"}


# About how many nanoseconds one core took, on a Xeon, to update an element and, for each sample, to count it;
# and for each position of a sample, to look at an element and to lay out a row or column.
UPDATED, COUNTED, SEEN, LAID = 0.4, 0.0011, 0.0015, 0.06


# Kinds of entries, each with loops of its own, which are compiled when the first is met: samples without
# positions, or nothing to count; positions that are joined or that a window sees; embeddings.
LINEAR, POSITIONS, LOOKUPS = 1, 2, 4


class Entry(NamedTuple):
    """How compiled loops see the activity of some rows of a parameter; addresses hold nothing alive.

    Attributes:
        rows: J of ``[J, K]``, the outputs.
        columns: K, the inputs.
        outputs: address of packed words of the outputs, ``[words, J]``; 0 where all bits are on.
        inputs: address of packed words of the inputs; 0 where all bits are on.
        samples: how many.
        positions: of each, at the outputs.
        window: address of a convolution's numbers (`truestep.activity.Window.numbers`), or 0.
        apart: 1 if each position counts as a sample.
        entries: of an embedding, how many rows are looked up.
        looked_up: address of those rows, int32; 0 where the parameter is no embedding.
        owners: address of their samples, int32, in ascending order.
        by_entry: 1 if the outputs' bits are of entries, 0 if of samples.
        stored: address of the rows, int64, for which an embedding's sparse gradient has values, in order;
            0 where the gradient is dense. `rows` is 1 then: nobody shares the work.
        values: how many these are.
        counts: address of counts, int64 ``[J, K]``, that take the place of all this; or 0.
        kind: LINEAR, POSITIONS or LOOKUPS.
    """

    rows: int
    columns: int
    outputs: int = 0
    inputs: int = 0
    samples: int = 0
    positions: int = 1
    window: int = 0
    apart: int = 0
    entries: int = 0
    looked_up: int = 0
    owners: int = 0
    by_entry: int = 0
    stored: int = 0
    values: int = 0
    counts: int = 0
    kind: int = LINEAR


# Of a line of a table.
FRESH, N, ENTRY = 3, 4, 6
OUTPUTS, INPUTS = (ENTRY + Entry._fields.index(name) for name in ("outputs", "inputs"))
FIELDS = ENTRY + len(Entry._fields)


class Line:
    """What a table says of a parameter, but for N and addresses, which each step has anew.

    Args:
        shape: the parameter's.
        samples: how many may reach it.
        entry: its only one.
        held: what lives as long as its window is looked at, a convolution's.

    Attributes:
        plan: how lines of several batches, of which this was the last, became one (`truestep.succession`).
    """

    __slots__ = ("entry", "held", "kind", "numbers", "plan", "samples", "shape", "work")

    def __init__(self, shape: torch.Size, samples: int, entry: Entry, held: Any = None) -> None:
        self.shape, self.samples, self.kind, self.held = shape, samples, entry.kind, held
        self.entry = entry
        self.plan: Any = None
        each = _work(entry)
        self.work = entry.rows * each
        self.numbers = array("q", (0, 0, 0, 0, 0, each, *entry))


class Table:
    """What one pass has to do, for parameters of one dtype; addresses hold nothing alive.

    Args:
        size: bytes of an element.
    """

    __slots__ = ("kinds", "numbers", "size", "work")

    def __init__(self, size: int) -> None:
        self.numbers = array("q")
        self.kinds = 0
        self.work = 0  # about how many nanoseconds one core takes
        self.size = size

    def add(
        self,
        addresses: tuple[int, int, int],
        fresh: int,
        batch_size: int,
        entries: Sequence[Entry],
    ) -> int:
        """Adds a parameter and returns how many elements it has.

        Args:
            addresses: of the gradient; of the parameter, 0 to correct the gradient in place instead; of
                the momentum buffer, or 0.
            fresh: 1 if the buffer holds nothing yet.
            batch_size: N.
            entries: the activity.
        """
        gradient, parameter, buffer = addresses
        total = 0
        for entry in entries:
            rows, columns = entry[0], entry[1]
            elements = rows * columns
            if elements:
                work = _work(entry)
                self.numbers.extend((gradient, parameter, buffer, fresh, batch_size, work, *entry))
                self.kinds |= entry[-1]
                self.work += rows * work
                total += elements
                passed = elements * self.size
                gradient += passed
                parameter, buffer = parameter and parameter + passed, buffer and buffer + passed
        return total

    def add_line(
        self,
        line: Line,
        addresses: tuple[int, int, int],
        fresh: int,
        batch_size: int,
        bits: tuple[int, int],
    ) -> None:
        """`add` of a parameter that has elements, by its line.

        Args:
            line: the parameter's.
            addresses: see `add`.
            fresh: see `add`.
            batch_size: N.
            bits: addresses of its outputs' and of its inputs'.
        """
        numbers, place = self.numbers, len(self.numbers)
        numbers += line.numbers
        numbers[place], numbers[place + 1], numbers[place + 2] = addresses
        numbers[place + FRESH], numbers[place + N] = fresh, batch_size
        numbers[place + OUTPUTS], numbers[place + INPUTS] = bits
        self.kinds |= line.kind
        self.work += line.work


def number_of(size: int | Tensor, device: torch.device | None) -> int:
    """N as a table takes it: of one that is where kernels go, the negative address; it is looked at there.

    Args:
        size: N.
        device: of the kernels, None for the CPU's loops.
    """
    if device is not None and isinstance(size, Tensor) and device_of(size) == device:
        return -size.data_ptr()
    return int(size)


def _work(entry: Entry) -> int:
    """About how many nanoseconds one core takes for a row of an entry: threads are given shares of that."""
    rows, columns = entry[0], entry[1]
    each = columns * (UPDATED + COUNTED * entry[4])
    if entry.values:
        each *= entry.values
    elif entry[-1] == POSITIONS:
        each += entry[4] * entry[5] * (SEEN * columns + LAID * (1 + columns / rows))
    return int(each) + 1


class Options(NamedTuple):
    """What all parameters of a pass share: as in `torch.optim.SGD`, and eps and limit of the factor."""

    lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    eps: float = 1.0
    limit: float | None = None


def takes(*tensors: Tensor) -> bool:
    """Whether loops or kernels can read and write a parameter, its gradient and its buffer."""
    first = tensors[0]
    dtype, shape, device = first.dtype, first.shape, first.device
    if dtype not in STORED:
        return False
    for tensor in tensors:
        if tensor.dtype is not dtype or tensor.shape != shape or tensor.device != device:
            return False
    return all_plain(tensors)


def addresses(
    gradients: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[tuple[int, int]] | None:
    """Of many gradients and their parameters; None unless loops or kernels can go over each of them.

    It is `takes` of each pair in one look: small models' steps feel each call.
    """
    if not finds_addresses():
        return None
    found: list[tuple[int, int]] = []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        dtype = gradient.dtype
        if dtype not in STORED or dtype is not parameter.dtype or gradient.shape != parameter.shape:
            return None
        to, of = address_of(gradient), address_of(parameter)
        if not (to and of):
            return None
        found.append((to, of))
    return found


def run(
    table: Table, options: Options, dtype: torch.dtype, device: torch.device | None = None
) -> None:
    """Takes a step, or corrects gradients, g N / (m + eps), for all parameters in one call.

    Args:
        table: of one line or more for each parameter.
        options: see `Options`.
        dtype: of parameters, gradients and buffers.
        device: where they are, if not on the CPU.
    """
    if device is not None:
        gpu().step(table.numbers, _values(options), dtype, device)
    elif table.work:
        address, size = table.numbers.buffer_info()
        functions, _ = loops().functions_of(table.kinds, STORED[dtype].dtype.type).buffer_info()
        shared = _shared(options, dtype)
        place, _ = shared.buffer_info()
        spread(loops().step, table.work, table.work, address, size // FIELDS, functions, place)


@functools.lru_cache(maxsize=64)
def _shared(options: Options, dtype: torch.dtype) -> "array[float]":
    return array(CODES[dtype], _values(options))


def _values(options: Options) -> tuple[float, ...]:
    limit = math.inf if options.limit is None else options.limit
    return *options[:3], 1 - options.dampening, *options[4:-1], limit


def count(entries: Sequence[Entry], counts: Tensor) -> None:
    """Counts the samples that reach each element.

    Args:
        entries: of one parameter.
        counts: int64, shaped like the parameter, contiguous, where the entries are; is written to.
    """
    if device_of(counts) is not None:
        gpu().count(entries, counts)
        return
    options, place = array("f", [1] * 8), counts.data_ptr()
    shared, _ = options.buffer_info()
    for entry in entries:
        table = Table(8)
        elements = table.add((0, 0, 0), 0, 0, [entry])
        if elements:
            address, _ = table.numbers.buffer_info()
            functions, _ = loops().functions_of(entry.kind, np.float32).buffer_info()
            spread(loops().count, entry.rows, table.work, address, functions, shared, place)
            place += 8 * elements
