"""Some replicas of a training in the compiled loops: tables of where things lie, and one call a block."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truestep.ensemble.job import ORDER_NUMBERS, STATUSES, Job
from truestep.ensemble.settings import (
    ACTIVATIONS,
    LOSSES,
    OUTPUTS,
    RMSPROP_SMOOTHING,
    RULES,
    SPLITS,
    Optimizer,
)
from truestep.kernels.dispatch import loops

__all__ = ["Compiled"]

# From so many features on, inputs are read where their samples lie.
WIDE = 64
LINE = 64
PAD = 16
# At least so many samples are measured at once.
CHUNK = 64
# The loops write four numbers at a time, behind the end of short rows as well.
SLACK = 16


@dataclass(frozen=True)
class Compiled:
    """The tables of a job, made once and shared by all threads.

    Attributes:
        job: What is trained.
    """

    job: Job

    def train(
        self,
        replicas: range,
        go_on: Callable[[], bool],
        advance: Callable[[int], None],
    ) -> dict[str, NDArray[Any]]:
        """Trains some replicas to their end.

        Args:
            replicas: which ones.
            go_on: asked between blocks; what it ends has no results.
            advance: told how many replica-steps were taken, or are not needed.

        Returns:
            The fields of a result, without the measurements' places; empty if interrupted.
        """
        job, kernel, columns = self.job, loops().replicas, loops().tables
        scratch = _aligned(self._scratch_bytes)
        base = scratch.ctypes.data
        identity = np.arange(self._longest, dtype=np.int32)
        place = self._sizes.identity
        scratch[place : place + identity.nbytes] = identity.view(np.uint8)
        state, records = self._state(replicas), self._records(len(replicas))
        options, plan = self._options, self._plan
        began = time.thread_time()
        epochs, order = range(0), np.zeros((1, 1), np.int32)
        for block in job.blocks(len(replicas)):
            if not go_on():
                return {}
            if block.epochs != epochs:
                epochs, order = block.epochs, job.orders(replicas, block.epochs)
            schedules, state.settings[:, columns.SCHEDULE] = job.schedules(block, replicas)
            kernel.train(
                0,
                len(replicas),
                block.start,
                block.stop,
                base,
                options,
                plan,
                schedules,
                order,
                epochs.start * job.steps_per_epoch,
                state,
                records,
            )
            advance((block.stop - block.start) * len(replicas))
            if (state.progress[:, columns.STATUS] != columns.RUNNING).all():
                advance((job.steps - block.stop) * len(replicas))
                break
        return self._result(state, records, time.thread_time() - began)

    def prepare(self) -> None:
        """Makes what the threads share."""
        _ = self._plan, self._options, self._places

    def shared_bytes(self, threads: int) -> int:
        """What all replicas share, and the threads' own memory."""
        data = sum(int(split.inputs.nbytes) for split in self.job.data.splits.values())
        return data + threads * (self._scratch_bytes + 4 * ORDER_NUMBERS)

    @property
    def bytes_per_replica(self) -> int:
        """What a replica takes while it is trained, with its records."""
        job, record = self.job, self.job.record
        state = 1 + max(optimizer.memory for optimizer in job.optimizers) + record.gradients
        measured = len(job.measured) * (record.parameters + record.batch_sizes)
        nodes = (len(job.measured) + 1) * (record.nodes * job.network.hidden + 36)
        order = 0 if job.full else 4 * job.data.train.samples
        return 4 * self._numbers * (state + measured) + nodes + order

    @cached_property
    def _tables(self) -> tuple[NDArray[np.int64], Any, int, int]:
        """Layers, sizes, bytes of scratch and numbers of a replica's padded parameters."""
        job = self.job
        network, width = job.network, _up(max(job.batch_size, CHUNK), PAD)
        thin, wide = self._thin, self._wide
        row, word_count = 4 * width, -(-width // 64)
        scratch = parameters = 0

        def take(size: int) -> int:
            nonlocal scratch
            place, scratch = scratch, _up(scratch + size, LINE)
            return place

        widest = max(network.widths[1:])
        longest = max(network.widths)
        inputs_at = take(0 if wide else network.widths[0] * row)
        layers = []
        for number, (inputs, outputs) in enumerate(network.layers):
            stride = _up(inputs, PAD) if thin or (number == 0 and wide) else inputs
            weight, bias = parameters, parameters + outputs * stride
            parameters = _up(bias + outputs, PAD)
            values = take(outputs * row)
            sums = take(outputs * row) if network.activation == "gelu" else values
            bits = take(8 * word_count * stride)
            layers.append((inputs, outputs, stride, 4 * weight, 4 * bias, values, sums, bits))
        tall = max(widest, 4) * row
        # A group of rows has 4096 numbers, or four rows.
        largest = 4096 + 4 * max(stride for _, _, stride, *_ in layers)
        sizes = loops().tables.Sizes(
            width=width,
            samples=inputs_at,
            targets=take(network.widths[-1] * row),
            delta=take(tall),
            other=take(tall),
            gradient=take(4 * (largest + SLACK)),
            counts=take(4 * _up(longest, PAD)),
            bias_gradient=take(4 * widest),
            delta_bits=take(8 * word_count * widest),
            identity=take(4 * self._longest),
            lines=take(4 * PAD * _up(longest, PAD) if thin else 0),
            wide=int(wide),
            thin=int(thin),
            one=int(job.batch_size == 1 and not job.full),
            activation=ACTIVATIONS.index(network.activation),
            output=OUTPUTS.index(network.output),
            loss=LOSSES.index(network.loss),
        )
        return np.array(layers, np.int64), sizes, scratch, parameters

    @property
    def _thin(self) -> bool:
        """Whether vectors run along inputs rather than along the few samples of a batch."""
        return self.job.batch_size < PAD

    @property
    def _wide(self) -> bool:
        """Whether inputs are read where their samples lie."""
        return self._thin or self.job.network.widths[0] >= WIDE

    @property
    def _longest(self) -> int:
        """The length of the identity index: every sample, and every unit."""
        job = self.job
        samples = max(split.samples for split in job.data.splits.values())
        return max(*job.network.widths, samples, _up(max(job.batch_size, CHUNK), PAD))

    @property
    def _sizes(self) -> Any:
        return self._tables[1]

    @property
    def _scratch_bytes(self) -> int:
        return self._tables[2]

    @property
    def _numbers(self) -> int:
        return self._tables[3]

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        """Where each parameter lies among the padded ones."""
        places = []
        for inputs, outputs, stride, weight, bias, *_ in self._tables[0].tolist():
            rows = weight // 4 + stride * np.arange(outputs)[:, None] + np.arange(inputs)
            places += [rows.ravel(), bias // 4 + np.arange(outputs)]
        return np.concatenate(places)

    @cached_property
    def _arrays(self) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        """Inputs, padded where they are wide, and targets of each split; the tables hold addresses."""
        arrays = {}
        for name, split in self.job.data.splits.items():
            sets, samples, features = split.inputs.shape
            stride = _up(features, PAD) if self._wide else features
            padded = split.inputs
            if stride != features:
                padded = _aligned(4 * sets * samples * stride).view(np.float32)
                padded = padded.reshape(sets, samples, stride)
                padded[..., :features] = split.inputs
            kind = np.int32 if split.classes else np.float32
            arrays[name] = padded, np.ascontiguousarray(split.targets, kind)
        return arrays

    @cached_property
    def _plan(self) -> Any:
        columns, splits = loops().tables, np.zeros((3, 9), np.int64)
        for name, (inputs, targets) in self._arrays.items():
            line, classes = splits[SPLITS.index(name)], self.job.data.splits[name].classes
            line[columns.X], line[columns.X_STEP] = inputs.ctypes.data, inputs[0].nbytes
            line[columns.X_ROW], line[columns.COUNT] = inputs[0, 0].nbytes, inputs.shape[1]
            line[columns.LABELS if classes else columns.TARGETS_AT] = targets.ctypes.data
            line[columns.LABELS_STEP if classes else columns.TARGETS_STEP] = targets[0].nbytes
            line[columns.WANTED] = name in self.job.wanted
        return loops().tables.Plan(self._tables[0], self._sizes, splits, self.job.measured)

    @cached_property
    def _options(self) -> Any:
        job, record, stop = self.job, self.job.record, self.job.stop
        return loops().tables.Options(
            steps=job.steps,
            batch_size=job.batch_size,
            stop_split=-1 if stop is None else SPLITS.index(stop.split),
            stop_loss=-np.inf if stop is None or stop.loss is None else float(stop.loss),
            patience=0 if stop is None or stop.patience is None else stop.patience,
            under=-np.inf if record.under is None else float(record.under),
            with_nodes=int(record.nodes),
            with_batch_sizes=int(record.batch_sizes),
            with_gradients=int(record.gradients),
            with_parameters=int(record.parameters),
            parameters=job.network.parameters,
        )

    def _state(self, replicas: range) -> Any:
        job, count = self.job, len(replicas)
        optimizers = [job.optimizers[replica] for replica in replicas]
        settings = np.array([_settings(optimizer) for optimizer in optimizers])
        progress = np.zeros((count, 6), np.int64)
        progress[:, loops().tables.FIRST_UNDER] = -1
        levels = np.zeros((count, 2))
        levels[:, loops().tables.BEST] = np.inf
        parameters = self._zeros(count)
        for row, replica in zip(parameters, replicas, strict=True):
            row[self._places] = job.start(replica)
        states = [optimizer.memory - optimizer.dasgd for optimizer in optimizers]
        return loops().tables.State(
            settings,
            np.array(replicas, np.int64) % job.data.data_sets,
            progress,
            levels,
            parameters,
            self._zeros(count if any(optimizer.dasgd for optimizer in optimizers) else 0),
            self._zeros(count if max(states) > 0 else 0),
            self._zeros(count if max(states) > 1 else 0),
            self._zeros(count if job.record.gradients else 0),
        )

    def _zeros(self, count: int) -> NDArray[np.float32]:
        numbers = _aligned(4 * count * self._numbers).view(np.float32)
        return numbers.reshape(count, self._numbers)

    def _records(self, count: int) -> Any:
        job, record = self.job, self.job.record
        measured = len(job.measured)
        nothing = np.nan
        return loops().tables.Records(
            np.full((count, 3, measured + 1), nothing, np.float32),
            np.full((count, 3, measured + 1), nothing, np.float32),
            np.full((count, measured + 1), nothing, np.float32),
            np.full((count * record.nodes, measured + 1, job.network.hidden), 255, np.uint8),
            np.full((count * record.batch_sizes, measured, self._numbers), -1, np.int32),
            np.full((count * record.gradients, measured, 2), nothing, np.float32),
            np.full((count * record.parameters, measured, self._numbers), nothing, np.float32),
        )

    def _result(self, state: Any, records: Any, seconds: float) -> dict[str, NDArray[Any]]:
        record, columns = self.job.record, loops().tables
        done = state.progress[:, columns.DONE]
        share = done / max(int(done.sum()), 1)
        result = {
            "loss": records.losses,
            "accuracy": records.accuracies,
            "batch_loss": records.batch_losses[:, :-1],
            "final": state.parameters[:, self._places],
            "stopped_at": done.copy(),
            "first_under": state.progress[:, columns.FIRST_UNDER].copy(),
            "status": np.array(STATUSES)[state.progress[:, columns.STATUS]],
            "seconds": seconds * share,
        }
        if record.nodes:
            result["nodes"] = records.nodes
        if record.batch_sizes:
            result["batch_sizes"] = records.batch_sizes[..., self._places]
        if record.gradients:
            result["gradients"] = records.gradients
        if record.parameters:
            result["parameters"] = records.parameters[..., self._places]
        return result


def _settings(optimizer: Optimizer) -> list[float]:
    """A row of the table of optimizers; which schedule is set at each block."""
    columns = loops().tables
    row = [0.0] * (columns.SCHEDULE + 1)
    row[columns.RULE] = RULES.index(optimizer.name)
    row[columns.LR] = optimizer.lr
    row[columns.MOMENTUM] = optimizer.momentum
    row[columns.NESTEROV] = optimizer.nesterov
    row[columns.WEIGHT_DECAY] = optimizer.weight_decay
    row[columns.BETA_1], row[columns.BETA_2] = optimizer.betas
    if optimizer.name == "rmsprop":
        row[columns.BETA_2] = RMSPROP_SMOOTHING
    row[columns.EPS] = optimizer.eps or 0.0
    row[columns.ADAPTIVE] = optimizer.asgd
    row[columns.ADAPTIVE_EPS] = optimizer.asgd_eps
    limit = optimizer.factor_limit
    row[columns.FACTOR_LIMIT] = math.inf if limit is None else limit
    row[columns.BOOST] = optimizer.dasgd
    return row


def _aligned(size: int) -> NDArray[np.uint8]:
    """Zeroed bytes that begin with a cache line."""
    memory = np.zeros(size + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + size]


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
