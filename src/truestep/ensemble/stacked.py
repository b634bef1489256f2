"""The twin of the compiled loops in torch operations: replicas stacked along a first dimension."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from truestep.ensemble.formulas import ACTIVATIONS, SLOPES, descend, loss_and_gradient
from truestep.ensemble.job import (
    DIVERGED,
    FINISHED,
    ORDER_NUMBERS,
    RUNNING,
    STATUSES,
    STOPPED,
    Job,
)
from truestep.ensemble.settings import SPLITS, Stop

__all__ = ["Stacked"]

# Samples that are measured at once.
CHUNK = 256


@dataclass(frozen=True)
class Stacked:
    """A job whose replicas are trained in step by products of stacked matrices.

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
        """Trains some replicas to their end; as `Compiled.train`."""
        run = _Run(self.job, self._tensors, replicas)
        began = time.perf_counter()
        epochs = range(0)
        order = np.zeros((1, 1), np.int32)
        for block in self.job.blocks(len(replicas)):
            if not go_on():
                return {}
            if block.epochs != epochs:
                epochs, order = block.epochs, self.job.orders(replicas, block.epochs)
            schedules, which = self.job.schedules(block, replicas)
            offset = epochs.start * self.job.steps_per_epoch
            for step in range(block.start, block.stop):
                run.look(step)
                if not len(run.alive):
                    break
                index = torch.from_numpy(self._batch(order, step, offset)).long()
                run.step(step, index, schedules[which, step - block.start])
            advance((block.stop - block.start) * len(replicas))
            if not len(run.alive):
                advance((self.job.steps - block.stop) * len(replicas))
                break
        run.look(self.job.steps)
        return run.result(time.perf_counter() - began)

    def prepare(self) -> None:
        """Makes what the threads share."""
        _ = self._tensors

    def shared_bytes(self, threads: int) -> int:
        """What all replicas share, and the orders of data."""
        data = sum(int(split.inputs.nbytes) for split in self.job.data.splits.values())
        return 2 * data + threads * 4 * ORDER_NUMBERS

    @property
    def bytes_per_replica(self) -> int:
        """What a replica takes while it is trained, with its records."""
        job, record = self.job, self.job.record
        state = 4 + max(optimizer.memory for optimizer in job.optimizers) + record.gradients
        measured = len(job.measured) * (record.parameters + record.batch_sizes)
        units = sum(job.network.widths)
        values = 4 * units * max(job.batch_size, CHUNK)
        nodes = (len(job.measured) + 1) * (record.nodes * job.network.hidden + 36)
        # Splits are measured for all replicas at once, on copies.
        values += max(int(split.inputs[0].nbytes) for split in job.data.splits.values())
        return 4 * job.network.parameters * (state + measured) + 4 * values + nodes

    def _batch(self, order: NDArray[np.int32], step: int, offset: int) -> NDArray[np.int32]:
        job = self.job
        if job.full:
            return order
        samples, size, a_pass = job.data.train.samples, job.batch_size, job.steps_per_epoch
        batch = step % a_pass
        place = (step - offset) // a_pass * samples + batch * size
        return order[:, place : place + min(size, samples - batch * size)]

    @cached_property
    def _tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        outputs = self.job.network.widths[-1]
        tensors = {}
        for name, split in self.job.data.splits.items():
            targets = torch.from_numpy(split.targets)
            if split.classes and outputs > 1:
                targets = functional.one_hot(targets, outputs)
            elif split.classes:
                targets = targets[..., None]
            tensors[name] = torch.from_numpy(split.inputs), targets.float()
        return tensors


class _Run:
    """Some replicas on their way."""

    def __init__(
        self, job: Job, tensors: dict[str, tuple[Tensor, Tensor]], replicas: range
    ) -> None:
        self.job, self.tensors = job, tensors
        self.data = torch.tensor(replicas) % job.data.data_sets
        self.optimizers = [job.optimizers[replica] for replica in replicas]
        count, measured = len(replicas), len(job.measured)
        self.parameters = torch.from_numpy(np.stack([job.start(replica) for replica in replicas]))
        self.state = {
            name: torch.zeros_like(self.parameters) for name in ("previous", "first", "second")
        }
        self.before = torch.zeros_like(self.parameters)
        self.alive = torch.arange(count)
        self.cursor = 0
        self.best, self.waited = np.full(count, np.inf), np.zeros(count, np.int64)
        self.sums, self.samples = np.zeros(count), 0
        record = job.record
        shape = (count, measured)
        self.records: dict[str, NDArray[Any]] = {
            "loss": np.full((count, 3, measured + 1), np.nan, np.float32),
            "accuracy": np.full((count, 3, measured + 1), np.nan, np.float32),
            "batch_loss": np.full(shape, np.nan, np.float32),
            "status": np.zeros(count, np.int64),
            "stopped_at": np.zeros(count, np.int64),
            "first_under": np.full(count, -1, np.int64),
        }
        if record.nodes:
            hidden = job.network.hidden
            self.records["nodes"] = np.full((count, measured + 1, hidden), 255, np.uint8)
        if record.batch_sizes:
            self.records["batch_sizes"] = np.full((*shape, job.network.parameters), -1, np.int32)
        if record.gradients:
            self.records["gradients"] = np.full((*shape, 2), np.nan, np.float32)
        if record.parameters:
            self.records["parameters"] = np.full(
                (*shape, job.network.parameters), np.nan, np.float32
            )

    def look(self, step: int) -> None:
        """Measures, if it is time, and ends what has reached its end; `alive` are those that go on."""
        job, rows = self.job, self.alive.numpy()
        if not len(rows):
            return
        due = self.cursor < len(job.measured) and job.measured[self.cursor] == step
        status = np.zeros(len(rows), np.int64)
        every_step = job.full and (
            job.record.under is not None or (job.stop is not None and job.stop.split == "train")
        )
        if every_step and not due and step < job.steps:
            loss, _, _ = self._measure("train")
            self._judge_train(step, rows, loss, status)
        if due:
            if self.samples:
                self.records["batch_loss"][rows, self.cursor] = self.sums[rows] / self.samples
            self.sums[:], self.samples = 0, 0
            self._measure_all(rows, self.cursor)
            loss = self.records["loss"][rows, 0, self.cursor]
            if job.full:
                self._judge_train(step, rows, loss, status)
            elif job.record.under is not None:
                self._note_under(step, rows, loss)
            if job.stop is not None:
                self._judge(job.stop, rows, status)
            if job.record.parameters:
                self.records["parameters"][rows, self.cursor] = self.parameters[self.alive]
        if step == job.steps:
            status[:] = FINISHED
        self.place = self.cursor if due else -1
        self.cursor += due
        self._end(step, rows, status)

    def step(self, step: int, index: Tensor, factors: NDArray[np.float64]) -> None:
        """One step of those that go on.

        Args:
            step: how many there were before.
            index: ``[replicas or 1, n]``, the samples of the batch.
            factors: of the learning rates, by replica.
        """
        rows = self.alive
        index = index.expand(len(self.data), -1)[rows]
        inputs, targets = (
            tensor[self.data[rows][:, None], index] for tensor in self.tensors["train"]
        )
        values, sums = self._forward(inputs)
        loss, delta = loss_and_gradient(self.job.network, sums[-1], targets)
        size = inputs.shape[1]
        gradient, counts = self._backward(values, sums, delta / size)
        finite = loss.isfinite()
        if not finite.all():
            self._end(step, rows.numpy(), np.where(finite.numpy(), RUNNING, DIVERGED))
            gradient, counts, loss = gradient[finite], counts[finite], loss[finite]
            rows = self.alive
        self.sums[rows.numpy()] += loss.double().numpy()
        self.samples += size
        self._note(rows, gradient, counts)
        for row, replica in enumerate(rows.tolist()):
            self._descend(
                replica,
                gradient[row],
                counts[row],
                size,
                self.optimizers[replica].lr * float(factors[replica]),
                step,
            )

    def result(self, seconds: float) -> dict[str, NDArray[Any]]:
        """What `Compiled.train` returns."""
        done = self.records["stopped_at"]
        status = np.array(STATUSES)[self.records["status"]]
        return self.records | {
            "final": self.parameters.numpy().copy(),
            "status": status,
            "seconds": seconds * done / max(int(done.sum()), 1),
        }

    def _end(self, step: int, rows: NDArray[np.int64], status: NDArray[np.int64]) -> None:
        ended = status != RUNNING
        if not ended.any():
            return
        gone = rows[ended]
        self.records["status"][gone] = status[ended]
        self.records["stopped_at"][gone] = step
        everyone, self.alive = self.alive, torch.from_numpy(gone)
        self._measure_all(gone, self.records["loss"].shape[2] - 1)
        self.alive = everyone[torch.from_numpy(~ended)]

    def _measure_all(self, rows: NDArray[np.int64], place: int) -> None:
        for number, name in enumerate(SPLITS):
            nodes = self.job.record.nodes and name == "train"
            if name not in self.job.wanted and not nodes:
                continue
            if name not in self.tensors:
                continue
            loss, accuracy, active = self._measure(name)
            if name in self.job.wanted:
                self.records["loss"][rows, number, place] = loss
                self.records["accuracy"][rows, number, place] = accuracy
            if nodes:
                samples = self.tensors[name][0].shape[1]
                kinds = np.where(active == 0, 1, np.where(active == samples, 2, 0))
                self.records["nodes"][rows, place] = kinds

    def _measure(self, name: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Loss, accuracy, and for how many samples each hidden unit is on, of those that go on."""
        job = self.job
        inputs, targets = (tensor[self.data[self.alive]] for tensor in self.tensors[name])
        labels = self.job.data.splits[name].targets[self.data[self.alive].numpy()]
        classes = self.job.data.splits[name].classes
        total = torch.zeros(len(self.alive), dtype=torch.float64)
        right = np.zeros(len(self.alive))
        active = torch.zeros(len(self.alive), self.job.network.hidden, dtype=torch.int64)
        samples = inputs.shape[1]
        for start in range(0, samples, CHUNK):
            part = slice(start, start + CHUNK)
            _, sums = self._forward(inputs[:, part])
            loss, _ = loss_and_gradient(job.network, sums[-1], targets[:, part])
            total += loss.double()
            if classes:
                right += (self._chosen(sums[-1]) == labels[:, part]).sum(1)
            if self.job.network.hidden:
                active += torch.cat([z > 0 for z in sums[:-1]], 2).sum(1)
        accuracy = right / samples if classes else np.full(len(right), np.nan)
        return (total / samples).numpy(), accuracy, active.numpy()

    def _chosen(self, z: Tensor) -> NDArray[np.int64]:
        if z.shape[-1] > 1:
            return z.argmax(2).numpy()
        border = 0.0 if self.job.network.output == "sigmoid" else 0.5
        return (z[..., 0] > border).long().numpy()

    def _judge_train(
        self, step: int, rows: NDArray[np.int64], loss: NDArray[Any], status: NDArray[np.int64]
    ) -> None:
        """What full batches tell at each step; the last step has no batch."""
        self._note_under(step, rows, loss)
        if step == self.job.steps:
            return
        stop = self.job.stop
        if stop is not None and stop.split == "train" and stop.loss is not None:
            status[loss < stop.loss] = STOPPED

    def _note_under(self, step: int, rows: NDArray[np.int64], loss: NDArray[Any]) -> None:
        if self.job.record.under is not None:
            first = self.records["first_under"]
            new = rows[(loss < self.job.record.under) & (first[rows] < 0)]
            first[new] = step

    def _judge(self, stop: Stop, rows: NDArray[np.int64], status: NDArray[np.int64]) -> None:
        loss = self.records["loss"][rows, SPLITS.index(stop.split), self.cursor]
        better = loss < self.best[rows]
        self.best[rows] = np.where(better, loss, self.best[rows])
        self.waited[rows] = np.where(better, 0, self.waited[rows] + 1)
        ended = np.zeros(len(rows), bool)
        if stop.loss is not None:
            ended |= loss < stop.loss
        if stop.patience is not None:
            ended |= self.waited[rows] >= stop.patience
        status[ended] = STOPPED

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        parts = self.job.network.split(self.parameters[self.alive].numpy())
        return [(torch.from_numpy(weight), torch.from_numpy(bias)) for weight, bias in parts]

    def _forward(self, inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Each layer's inputs and its sums, ``[replicas, n, units]``."""
        values, sums = [inputs], []
        for weight, bias in self._layers():
            sums.append(torch.baddbmm(bias[:, None], values[-1], weight.mT))
            values.append(ACTIVATIONS[self.job.network.activation](sums[-1]))
        return values[:-1], sums

    def _backward(
        self, values: list[Tensor], sums: list[Tensor], delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients and adaptive batch sizes, ``[replicas, parameters]``; none if nobody needs them."""
        counting = self.job.record.batch_sizes or any(
            self.optimizers[replica].asgd for replica in self.alive.tolist()
        )
        gradients: list[Tensor] = []
        counts = [delta[:, 0, :0]]
        slope = SLOPES[self.job.network.activation]
        for (weight, _), below, z in zip(
            reversed(self._layers()), reversed(values), reversed([None, *sums[:-1]]), strict=True
        ):
            gradients[:0] = [(delta.mT @ below).flatten(1), delta.sum(1)]
            if counting:
                on = (delta != 0).float()
                counts[:0] = [(on.mT @ (below != 0).float()).flatten(1), on.sum(1)]
            if z is not None:
                delta = slope(delta @ weight, z)
        return torch.cat(gradients, 1), torch.cat(counts, 1)

    def _note(self, rows: Tensor, gradient: Tensor, counts: Tensor) -> None:
        if self.job.record.batch_sizes and self.place >= 0:
            self.records["batch_sizes"][rows.numpy(), self.place] = counts.int()
        if self.job.record.gradients:
            before = self.before[rows]
            if self.place >= 0:
                agree = (gradient.sign() == before.sign()) & (gradient != 0)
                noted = torch.stack([gradient.abs().mean(1), agree.float().mean(1)], 1)
                self.records["gradients"][rows.numpy(), self.place] = noted
            self.before[rows] = gradient

    def _descend(
        self,
        replica: int,
        gradient: Tensor,
        counts: Tensor,
        size: int,
        lr: float,
        step: int,
    ) -> None:
        optimizer, weights = self.optimizers[replica], self.parameters[replica]
        state = {name: tensor[replica] for name, tensor in self.state.items()}
        if optimizer.asgd:
            factor = size / (counts + optimizer.asgd_eps)
            if optimizer.factor_limit is not None:
                factor.clamp_(max=optimizer.factor_limit)
            gradient = torch.where(counts > 0, gradient * factor, gradient)
        if optimizer.dasgd:
            previous = state["previous"]
            agree = (gradient.sign() == previous.sign()) & (gradient != 0)
            boosted = torch.where(agree, gradient + (gradient + previous) * 0.5, gradient)
            previous.copy_(gradient)
            gradient = boosted
        if optimizer.name == "adamw":
            weights.mul_(1 - lr * optimizer.weight_decay)
        elif optimizer.weight_decay:
            gradient = gradient.add(weights, alpha=optimizer.weight_decay)
        descend(optimizer, weights, gradient, state["first"], state["second"], lr, step)
