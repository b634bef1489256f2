"""`train`: checks, shares replicas out to threads, and gathers what they give."""

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from truestep.checks import check_kind
from truestep.ensemble.compiled import Compiled
from truestep.ensemble.data import Data
from truestep.ensemble.job import Block, Job, Order
from truestep.ensemble.progress import show
from truestep.ensemble.result import Part, Result
from truestep.ensemble.settings import Network, Optimizer, Record, Stop, whole
from truestep.ensemble.stacked import Stacked
from truestep.ensemble.store import Store
from truestep.errors import TruestepError
from truestep.kernels.dispatch import installed

__all__ = ["train"]

BACKENDS = ("compiled", "torch")
# An item, the replicas that a thread takes at once, takes about so many multiplications: some seconds.
ITEM_PRODUCTS = 1e11
LOOK_SECONDS = 0.25
LARGEST_SEED = 2**63 - 1

Progress = Callable[[int, int, float], None]


def train(
    network: Network,
    data: Data,
    *,
    replicas: int,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    seed: int | Sequence[int] = 0,
    start: ArrayLike | None = None,
    order: Order | None = None,
    record: Record | None = None,
    stop: Stop | None = None,
    store: str | Path | None = None,
    threads: int | None = None,
    memory: int = 2**30,
    progress: Progress | bool | None = None,
    backend: str | None = None,
) -> Result:
    """Trains many replicas of a small network, each with its own start, order of data and optimizer.

    Replica r equals one training with torch from the same start, in the same order, to float32 rounding. Its
    result depends on nothing but the arguments and its seed: not on threads, memory, or how many other
    replicas there are.

    Args:
        network: What is trained.
        data: What on. Replica r learns from data set ``r % data_sets``.
        replicas: How many.
        steps: How many updates each makes.
        epochs: Or how many passes over the training split.
        batch_size: Samples of a batch; the last batch of an epoch may be smaller. All samples by default.
        optimizer: One for all or a sequence with one for each; SGD with lr=0.01 by default.
        seed: That of replica 0, others follow; or one for each. It decides start and order of data, so equal
            seeds under two optimizers make a pair.
        start: Parameters to begin with, ``[replicas, parameters]`` as `Network.split` takes them.
        order: A function of a seed and an epoch that returns a permutation of the samples, instead of the
            built-in order.
        record: What to measure; loss and accuracy at the start and the end by default.
        stop: When a replica ends early.
        store: A folder. Results go there as soon as some replicas have ended, and what is there is not
            trained again: after an interruption of any kind the same call goes on.
        threads: How many; `torch.get_num_threads` by default.
        memory: Bytes that replicas in training may take, all threads together. The result needs more, unless
            there is a store.
        progress: True for a line on stderr with replica-steps per second and what is left, or a function that
            is called about four times a second, and at the end, with replica-steps done, those that this call
            has to do, and seconds since the start.
        backend: "compiled" (numba), or "torch"; compiled by default where numba is installed.

    Returns:
        What was measured.

    Example:
        >>> from truestep.ensemble import Data, Network, Optimizer, Split
        >>> points = np.random.default_rng(0).standard_normal((64, 2))
        >>> data = Data(Split(points, (points[:, 0] > 0).astype(int)))
        >>> network = Network((2, 8, 1), output="sigmoid", loss="binary_cross_entropy")
        >>> result = train(network, data, replicas=3, steps=50, optimizer=Optimizer("adam", lr=0.1))
        >>> result.loss["train"].shape
        (3, 2)

    Raises:
        TruestepError: Numbers are impossible, shapes don't fit, labels are out of range, there is not
            enough memory, or the store holds something else; all before any training. Later only where the
            store can't be written any more: what is there stays, and the same call goes on.
    """
    job = _job(
        network,
        data,
        replicas,
        steps,
        epochs,
        batch_size,
        optimizer,
        seed,
        start,
        order,
        record,
        stop,
    )
    count = torch.get_num_threads() if threads is None else whole("train", "threads", threads, 1)
    engine = _engine(job, backend)
    bound = whole("train", "memory", memory, 1)
    _check_memory(engine, bound, count, in_memory=store is None)
    # Before there are threads, each of which would make them.
    engine.prepare()
    count = min(count, bound // engine.bytes_per_replica)
    kept = None if store is None else Store(Path(store), job)
    parts: dict[range, Part] = {} if kept is None else dict(kept.parts())
    items = _items(engine, _missing(len(job.seeds), list(parts)), bound, count)
    told = show if progress is True else progress or None
    work = _Work(engine, sum(len(item) for item in items) * job.steps, told)
    for item, fields in work.run(items, count):
        parts[item] = fields if kept is None else kept.add(item, fields)
    chosen = [(parts[part], rows) for part, rows in _cover(len(job.seeds), list(parts))]
    name = "torch" if isinstance(engine, Stacked) else "compiled"
    return Result(chosen, job.measured, [n for n in job.wanted if n in data.splits], name)


class _Work:
    """Items on their way through threads."""

    def __init__(
        self,
        engine: Compiled | Stacked,
        total: int,
        progress: Progress | None,
    ) -> None:
        self._engine, self._total, self._progress = engine, total, progress
        self._began, self._done = time.perf_counter(), 0
        self._lock, self._ended = threading.Lock(), threading.Event()

    def run(self, items: list[range], threads: int) -> Any:
        """Each item's results, as it ends."""
        waiting = list(reversed(items))
        running: dict[Future[dict[str, NDArray[Any]]], range] = {}
        with ThreadPoolExecutor(min(threads, max(len(items), 1))) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < threads:
                        item = waiting.pop()
                        running[pool.submit(self._train, item)] = item
                    ended, _ = wait(running, LOOK_SECONDS, FIRST_COMPLETED)
                    if self._done < self._total:
                        self._report()
                    for future in ended:
                        yield running.pop(future), future.result()
                self._report()
            finally:
                self._ended.set()

    def _train(self, item: range) -> dict[str, NDArray[Any]]:
        return self._engine.train(item, lambda: not self._ended.is_set(), self._advance)

    def _advance(self, steps: int) -> None:
        with self._lock:
            self._done += steps

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, time.perf_counter() - self._began)


def _job(
    network: Network,
    data: Data,
    replicas: int,
    steps: int | None,
    epochs: int | None,
    batch_size: int | None,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    seed: int | Sequence[int],
    start: ArrayLike | None,
    order: Order | None,
    record: Record | None,
    stop: Stop | None,
) -> Job:
    check_kind(network, Network, "network", "truestep.ensemble.Network")
    check_kind(data, Data, "data", "truestep.ensemble.Data")
    if record is not None:
        check_kind(record, Record, "record", "truestep.ensemble.Record")
    if stop is not None:
        check_kind(stop, Stop, "stop", "truestep.ensemble.Stop")
    if order is not None and not callable(order):
        raise TruestepError(f"train(order={order!r}): give a function of a seed and an epoch.")
    data.check(network)
    samples = data.train.samples
    replicas = whole("train", "replicas", replicas, 1)
    steps = None if steps is None else whole("train", "steps", steps, 1)
    epochs = None if epochs is None else whole("train", "epochs", epochs, 1)
    size = samples if batch_size is None else whole("train", "batch_size", batch_size, 1)
    if (steps is None) == (epochs is None):
        raise TruestepError("train() takes steps= or epochs=, one of them.")
    # A seed and an optimizer for each, before anything is made of them.
    _check_room(16 * replicas)
    if size > samples:
        raise TruestepError(
            f"train(batch_size={size}): there are {samples} training samples. Give at most so many."
        )
    if steps is None:
        steps = (epochs or 0) * math.ceil(samples / size)
    job = Job(
        network=network,
        data=data,
        optimizers=_each(Optimizer() if optimizer is None else optimizer, replicas),
        seeds=_seeds(seed, replicas),
        steps=steps,
        batch_size=size,
        record=record or Record(),
        stop=stop,
        starts=None if start is None else _starts(start, replicas, network.parameters),
        order=order,
    )
    lacking = [name for name in job.wanted if name not in data.splits]
    if lacking:
        raise TruestepError(
            f"train(): there is no {lacking[0]} split to measure on. Give Data one, or leave it out of "
            "record and stop."
        )
    _ = job.measured
    job.schedules(Block(0, 1, range(1)), range(replicas))
    if order is not None:
        job.permutation(int(job.seeds[0]), 0)
    return job


def _each(given: Optimizer | Sequence[Optimizer], replicas: int) -> Sequence[Optimizer]:
    if isinstance(given, Optimizer):
        return [given] * replicas
    several = isinstance(given, Sequence) and all(isinstance(one, Optimizer) for one in given)
    if not several or len(given) != replicas:
        what = f"there are {len(given)}" if several else f"it is {given!r}"
        raise TruestepError(
            f"train(optimizer=...): {what} for {replicas} replicas. Give an Optimizer, or a sequence "
            "with one for each."
        )
    return list(given)


def _seeds(seed: int | Sequence[int], replicas: int) -> NDArray[np.int64]:
    if isinstance(seed, int | np.integer):
        seed = range(int(seed), int(seed) + replicas)
    seeds = np.asarray(seed)
    if seeds.dtype.kind not in "iu" or (seeds.size and seeds.max() > LARGEST_SEED):
        raise TruestepError("train(seed=...): give whole numbers below 2**63.")
    seeds = seeds.astype(np.int64)
    if seeds.shape != (replicas,):
        raise TruestepError(
            f"train(seed=...): seeds have the shape {list(seeds.shape)} for {replicas} replicas. Give one "
            "for each, or a single one."
        )
    if (seeds < 0).any():
        raise TruestepError(f"train(seed=...): {seeds.min()} is below 0; give seeds from 0 on.")
    return seeds


def _starts(start: ArrayLike, replicas: int, parameters: int) -> NDArray[np.float32]:
    values = start.detach().cpu() if isinstance(start, torch.Tensor) else start
    starts = np.array(values, np.float32)
    if starts.shape != (replicas, parameters):
        raise TruestepError(
            f"train(start=...): it has the shape {list(starts.shape)}; {replicas} replicas of this network "
            f"need [{replicas}, {parameters}]."
        )
    if not np.isfinite(starts).all():
        raise TruestepError("train(start=...): not all numbers are finite.")
    return starts


def _engine(job: Job, backend: str | None) -> Compiled | Stacked:
    if backend is not None and backend not in BACKENDS:
        raise TruestepError(f"train(backend={backend!r}): choose one of {', '.join(BACKENDS)}.")
    if backend == "compiled" and not installed():
        raise TruestepError(
            "train(backend='compiled') needs numba. Run in the clone: pip install '.[fast]', or take "
            "backend='torch', which gives the same results more slowly."
        )
    return Compiled(job) if installed() and backend != "torch" else Stacked(job)


def _check_memory(
    engine: Compiled | Stacked, memory: int, threads: int, *, in_memory: bool
) -> None:
    job = engine.job
    each, replicas = engine.bytes_per_replica, len(job.seeds)
    if each > memory:
        raise TruestepError(
            f"train(memory={memory:,}): one replica takes {each:,} bytes with what is recorded. Record "
            "less, at fewer steps, or give more memory."
        )
    result = in_memory * replicas * _result_bytes(job)
    _check_room(min(memory, each * replicas) + result + engine.shared_bytes(threads))


def _check_room(needed: int) -> None:
    there = _memory()
    if needed > there:
        raise TruestepError(
            f"train(): {needed / 1e9:.1f} GB are needed and {there / 1e9:.1f} GB are free. Record less, "
            "train fewer replicas, or give store= a folder, which takes results out of memory."
        )


def _memory() -> int:
    """Bytes that are free, where Linux tells, or that the machine has."""
    told = Path("/proc/meminfo")
    if told.exists():
        free = [line for line in told.read_text().splitlines() if line.startswith("MemAvailable:")]
        return 1024 * int(free[0].split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _result_bytes(job: Job) -> int:
    record, measured = job.record, len(job.measured)
    large = 1 + measured * (record.parameters + record.batch_sizes)
    small = (measured + 1) * (28 + record.nodes * job.network.hidden)
    return 4 * job.network.parameters * large + small


def _missing(replicas: int, done: list[range]) -> list[range]:
    """The ranges between those that are done."""
    covered, gaps = 0, []
    for part in sorted(done, key=lambda part: part.start):
        if part.start > covered:
            gaps.append(range(covered, part.start))
        covered = max(covered, part.stop)
    if covered < replicas:
        gaps.append(range(covered, replicas))
    return gaps


def _cover(replicas: int, parts: list[range]) -> list[tuple[range, slice]]:
    """Each replica once: of which parts which rows, in the order of the replicas."""
    covered, chosen = 0, []
    for part in sorted(parts, key=lambda part: (part.start, -part.stop)):
        end = min(part.stop, replicas)
        if end > covered:
            chosen.append((part, slice(covered - part.start, end - part.start)))
            covered = end
    return chosen


def _items(
    engine: Compiled | Stacked, ranges: list[range], memory: int, threads: int
) -> list[range]:
    """The replicas in portions, each short and small enough."""
    job = engine.job
    fitting = memory // (threads * engine.bytes_per_replica)
    lasting = math.ceil(ITEM_PRODUCTS / (job.products * job.steps))
    fair = math.ceil(sum(len(part) for part in ranges) / threads)
    size = max(1, min(fitting, lasting, fair))
    return [
        range(start, min(start + size, part.stop))
        for part in ranges
        for start in range(part.start, part.stop, size)
    ]
