"""From activity to counts, corrected gradients or whole steps, in one compiled pass over the parameters."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from truestep.kernels.dispatch import compiled_loops, loops
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

    @property
    def work(self) -> float:
        """About how many nanoseconds one core takes."""
        each = 0.4 * self.samples if self.positions > 1 else 0.003 * self.samples
        return self.rows * self.columns * (0.5 + each)


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


def takes(*tensors: Tensor) -> bool:
    """Whether compiled loops can read and write these parameters, gradients and buffers."""
    dtype = tensors[0].dtype
    return dtype in REAL and all(
        tensor.dtype == dtype and compiled_loops(tensor) and tensor.is_contiguous()
        for tensor in tensors
    )


def run(tasks: Iterable[Task], options: Options, dtype: torch.dtype) -> None:
    """Takes a step, or corrects gradients, g N / (m + eps), for all parameters in one call.

    Args:
        tasks: one or more for each parameter.
        options: see `Options`.
        dtype: of parameters, gradients and buffers.
    """
    table = [(*task[:-1], *task[-1]) for task in tasks]
    if not table:
        return
    length, work = 0, 0.0
    for task in tasks:
        length += task.entry.rows * task.entry.columns
        work += task.entry.work
    limit = np.inf if options.limit is None else options.limit
    kept = 1 - options.dampening
    numbers = (*options[:3], kept, *options[4:-1], limit)
    shared = np.array(numbers, REAL[dtype])
    spread(loops().step, length, work, np.array(table, np.int64), shared)


def count(entries: Sequence[Entry], counts: Tensor) -> None:
    """Counts the samples that reach each element.

    Args:
        entries: of one parameter.
        counts: int64, shaped like the parameter, contiguous; is written to.
    """
    options, place = np.ones(8, np.float32), counts.data_ptr()
    for entry in entries:
        table = np.array([(0, 0, 0, 0, 0, *entry)], np.int64)
        spread(loops().count, entry.rows, entry.work, table, options, place)
        place += 8 * entry.rows * entry.columns
