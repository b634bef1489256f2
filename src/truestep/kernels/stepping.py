"""From activity to counts, corrected gradients or whole steps, in one compiled pass over the parameters."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from truestep.kernels.dispatch import PLAIN, compiled_loops, loops
from truestep.kernels.threads import spread

__all__ = ["Entry", "Options", "Task", "count", "run", "takes"]

REAL = {torch.float32: np.float32, torch.float64: np.float64}


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
        counts: address of counts, int64 ``[J, K]``, that take the place of all this; or 0.
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
    counts: int = 0


class Task(NamedTuple):
    """One parameter's part in a pass.

    Attributes:
        gradient: address.
        parameter: address; 0 to correct the gradient in place instead.
        buffer: address of the momentum buffer, or 0.
        fresh: 1 if the buffer holds nothing yet.
        batch_size: N.
        entry: the activity.
    """

    gradient: int
    parameter: int
    buffer: int
    fresh: int
    batch_size: int
    entry: Entry


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


FIELDS = len(Task._fields) - 1 + len(Entry._fields)


def takes(first: Tensor, *others: Tensor) -> bool:
    """Whether compiled loops can read and write these parameters, gradients and buffers."""
    dtype, shape = first.dtype, first.shape
    if dtype not in REAL or not (compiled_loops(first) and first.is_contiguous()):
        return False
    if first.data_ptr() == 0:  # no elements, or zeros that autograd makes up
        return False
    return all(
        tensor.dtype is dtype
        and tensor.shape == shape
        and type(tensor) in PLAIN
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        for tensor in others
    )


def _work(entry: Entry) -> float:
    """About how many nanoseconds one core takes."""
    each = 0.4 * entry.samples if entry.positions > 1 else 0.003 * entry.samples
    return entry.rows * entry.columns * (0.5 + each)


def run(tasks: Sequence[Task], options: Options, dtype: torch.dtype) -> None:
    """Takes a step, or corrects gradients, g N / (m + eps), for all parameters in one call.

    Args:
        tasks: one or more for each parameter.
        options: see `Options`.
        dtype: of parameters, gradients and buffers.
    """
    table, length, work = array("q"), 0, 0.0
    for task in tasks:
        entry = task.entry
        elements = entry.rows * entry.columns
        if elements:
            table.extend(task[:-1])
            table.extend(entry)
            length += elements
            work += _work(entry)
    if not length:
        return
    limit = np.inf if options.limit is None else options.limit
    kept = 1 - options.dampening
    numbers = (*options[:3], kept, *options[4:-1], limit)
    shared = np.array(numbers, REAL[dtype])
    fields = np.frombuffer(table, np.int64).reshape(-1, FIELDS)
    spread(loops().step, length, work, fields, shared)


def count(entries: Sequence[Entry], counts: Tensor) -> None:
    """Counts the samples that reach each element.

    Args:
        entries: of one parameter.
        counts: int64, shaped like the parameter, contiguous; is written to.
    """
    options, place = np.ones(8, np.float32), counts.data_ptr()
    for entry in entries:
        if not entry.rows * entry.columns:
            continue
        table = np.array([(0, 0, 0, 0, 0, *entry)], np.int64)
        spread(loops().count, entry.rows, _work(entry), table, options, place)
        place += 8 * entry.rows * entry.columns
