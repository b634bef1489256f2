"""A race: every optimizer x learning rate x batch size x seed, then the chosen ones on test data.

What the store has is never run again, so the same command goes on after any interruption.
"""

import os
import secrets
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from truestep.errors import TruestepError
from truestep.files import unwritable
from truestep.lab.board import Board
from truestep.lab.engines import Engines, choose_engines
from truestep.lab.ensembles import Ensembles
from truestep.lab.experiment import describe, hash_of
from truestep.lab.optimizers import build, stored_name
from truestep.lab.plan import Plan, Settings, UsageError, make_plan
from truestep.lab.store import RunKey, RunResult, Store
from truestep.lab.tasks import Splits
from truestep.lab.training import Cost, rehearse
from truestep.lab.workers import Assignment, Failure, Here, Workers, one_line, one_thread

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Outcome", "race"]

STORE = "results.db"
# Too small to change weights before a rehearsal has measured what it must.
MINUTE_LR = 1e-9


@dataclass(frozen=True)
class Outcome:
    """What a race gave.

    Attributes:
        table: One row per optimizer and batch size, as `truestep.lab.statistics.summarise` makes
            it.
        data: The table and what the report says of the task, as plain data.
        failures: Runs that ended with an exception in user code, or whose process died.
        folder: Where results.db, report.html and the figures are.
    """

    table: "pd.DataFrame"
    data: dict[str, Any]
    failures: list[Failure]
    folder: Path


def race(settings: Settings, console: Console, command: str = "") -> Outcome:
    """Runs what the store doesn't have yet, chooses learning rates, and writes the report.

    Args:
        settings: What to race.
        console: Gets the progress.
        command: How the race was called, for the report.

    Returns:
        The table and what failed. A failed run costs nothing but itself.

    Raises:
        UsageError: The settings are impossible; nothing was run.
        TruestepError: Data is missing, the task's own code fails, every run failed, or results
            can't be written.
    """
    plan = make_plan(settings)
    _check_optimizers(plan)
    _check_folder(plan.folder)
    with console.status(f"loading {plan.task.name}"):
        splits = plan.task.load(settings.data_dir)
        plan.check_data(splits)
        with one_thread():
            costs = _rehearse(plan, splits)
        description = describe(plan.task, splits, plan.file)
    experiment = hash_of(description)
    jobs = settings.jobs or _processors()
    assignment = Assignment(settings.task, settings.epochs, settings.data_dir)
    loop = Here(plan.task, splits) if jobs == 1 else Workers(assignment, jobs)
    engines = choose_engines(plan, splits, settings.engine, loop, jobs)
    console.print(engines.told, highlight=False)
    if engines.ensemble is not None:
        with console.status("estimating what runs cost"):
            costs |= _rehearse_ensemble(plan, engines.ensemble, engines.reasons)
    with Store(plan.folder / STORE) as store:
        store.experiment(experiment, description)
        records = Records(store, experiment, plan)
        workers = "processes" if engines.ensemble is None else "threads"
        with loop, Board(console, costs, jobs, workers) as board:
            failures = _run_all(plan, records, engines, board)
        results = records.results()
    if not results:
        raise TruestepError(f"Every run failed. {describe_failures(failures)[0]}")
    console.print("Writing the report.", highlight=False)
    table, data = _report(
        plan, splits, results, experiment=experiment, command=command, engines=engines.told
    )
    return Outcome(table, data, failures, plan.folder)


def describe_failures(failures: Iterable[Failure]) -> list[str]:
    """One line for each optimizer and reason: how many runs, and the key of the first."""
    groups: dict[tuple[str, str], list[RunKey]] = {}
    for failure in failures:
        groups.setdefault((failure.key.optimizer, failure.reason), []).append(failure.key)
    return [
        f"{len(keys)} run{'s' * (len(keys) > 1)} of {optimizer} failed"
        f" (lr {keys[0].lr:g}, batch size {keys[0].batch_size}, seed {keys[0].seed}"
        f"{', ...' * (len(keys) > 1)}): {reason}"
        for (optimizer, reason), keys in groups.items()
    ]


class Records:
    """The runs of one experiment in a store, under the names that the plan has for optimizers."""

    def __init__(self, store: Store, experiment: str, plan: Plan) -> None:
        self.experiment = experiment
        self._store = store
        self._stored = {name: stored_name(name) for name in plan.grids}
        self._names = {stored: name for name, stored in self._stored.items()}
        self._plan = plan

    def missing(self, keys: Iterable[RunKey]) -> list[RunKey]:
        """Those of the keys that the store doesn't have."""
        there = self._store.keys(self.experiment)
        return [key for key in keys if self._to_store(key) not in there]

    def add(self, result: RunResult) -> None:
        """Stores a run."""
        self._store.add(replace(result, key=self._to_store(result.key)))

    def results(self) -> list[RunResult]:
        """The runs that belong to the plan; a store may have others from earlier, wider ones."""
        named = (
            replace(result, key=replace(result.key, optimizer=self._names[result.key.optimizer]))
            for result in self._store.results(self.experiment)
            if result.key.optimizer in self._names
        )
        return [result for result in named if self._plan.has(result.key)]

    def _to_store(self, key: RunKey) -> RunKey:
        return replace(key, optimizer=self._stored[key.optimizer])


def _run_all(plan: Plan, records: Records, engines: Engines, board: Board) -> list[Failure]:
    selection = plan.selection(records.experiment)
    pending = records.missing(selection)
    # Until the learning rates are chosen, none (0) stands for them: it is how many that counts.
    chosen = dict.fromkeys(plan.places, 0.0) if pending else _choose(records)
    finals = plan.finals(records.experiment, chosen)
    board.announce(len(selection), len(finals), pending + records.missing(finals))
    failures = _run(pending, records, engines, board)

    finals = plan.finals(records.experiment, _choose(records))
    pending = records.missing(finals)
    board.expect("testing", pending, done=len(selection) + len(finals) - len(pending))
    return failures + _run(pending, records, engines, board)


def _choose(records: Records) -> dict[tuple[str, int], float]:
    from truestep.lab.statistics import choose  # noqa: PLC0415 - pandas, and workers run meanwhile

    lrs = choose(records.results())["lr"]
    return dict(zip(lrs.index.to_list(), lrs.to_list(), strict=True))


def _run(keys: list[RunKey], records: Records, engines: Engines, board: Board) -> list[Failure]:
    failures = []
    for runner, some in engines.share(keys):
        for outcome in runner.run(_still_missing(some, records, board)):
            if isinstance(outcome, Failure):
                failures.append(outcome)
                board.count(outcome.key)
            else:
                records.add(outcome)
                board.count(outcome.key, outcome)
    return failures


def _still_missing(keys: list[RunKey], records: Records, board: Board) -> Iterator[RunKey]:
    """The keys from a random place on, without those that another process has done by then."""
    start = secrets.randbelow(len(keys)) if keys else 0
    for key in keys[start:] + keys[:start]:
        if records.missing([key]):
            yield key
        else:
            board.count(key)


def _rehearse(plan: Plan, splits: Splits) -> dict[tuple[str, int], Cost]:
    """What runs cost.

    Raises:
        TruestepError: The task's own code fails.
    """
    costs = {}
    for batch_size in plan.batch_sizes:
        key = RunKey("", "sgd", MINUTE_LR, batch_size, seed=0, final=False)
        try:
            plain = rehearse(plan.task, splits, key)
        except Exception as error:
            raise TruestepError(
                f"The model, loss or metrics of {plan.task.name} fail on a first batch of "
                f"{batch_size}: {one_line(error)}. Correct the task, then try again."
            ) from error
        for name in plan.grids:
            # One that fails here fails in its runs too, which say so with their keys.
            costs[name, batch_size] = plain
            with suppress(Exception):
                costs[name, batch_size] = rehearse(plan.task, splits, replace(key, optimizer=name))
    return costs


def _rehearse_ensemble(
    plan: Plan, ensemble: Ensembles, left_out: Container[str]
) -> dict[tuple[str, int], Cost]:
    """What the ensemble's runs cost.

    Raises:
        TruestepError: The ensemble can't train, as where memory is short.
    """
    try:
        return {
            (name, batch_size): ensemble.rehearse(
                RunKey("", name, MINUTE_LR, batch_size, seed=0, final=False)
            )
            for name, batch_size in plan.places
            if name not in left_out
        }
    except TruestepError as error:
        raise TruestepError(f"{error} Or give --engine torch.") from error


def _check_optimizers(plan: Plan) -> None:
    """Builds each optimizer once.

    Raises:
        UsageError: An import path leads nowhere, or a counter can't count the model.
    """
    model = plan.task.model()
    for name, grid in plan.grids.items():
        try:
            _, counter = build(name, model, grid[0])
        except TruestepError as error:
            raise UsageError(str(error)) from error
        if counter is not None:
            counter.close()


def _check_folder(folder: Path) -> None:
    """Sees whether the folder can be made and written; the store makes it.

    Raises:
        UsageError: It can't.
    """
    reason = unwritable(folder)
    if reason:
        raise UsageError(f"{folder} can't hold results: {reason}. Give --out another folder.")


def _report(
    plan: Plan,
    splits: Splits,
    results: list[RunResult],
    *,
    experiment: str,
    command: str,
    engines: str,
) -> "tuple[pd.DataFrame, dict[str, Any]]":
    # Not before the runs: matplotlib and the like take a second that workers can use.
    from truestep.lab.report import write_report  # noqa: PLC0415
    from truestep.lab.statistics import choose, summarise  # noqa: PLC0415

    task = plan.task
    baseline = "sgd" if "sgd" in plan.grids else next(iter(plan.grids))
    info = {
        "name": task.name,
        "title": task.title,
        "source": splits.source,
        "epochs": task.epochs,
        "metrics": list(task.metrics),
        "target": list(task.target),
        "command": command,
        "engines": engines,
        "reference_batch_size": plan.reference if len(plan.batch_sizes) > 1 else None,
        "train": len(splits.train.targets),
        "validation": len(splits.validation.targets),
        "test": len(splits.test.targets),
        "parameters": results[0].parameters,
        "experiment": experiment,
    }
    data = write_report(plan.folder, info, results, baseline)
    return summarise(results, choose(results), baseline, task.target), data


def _processors() -> int:
    # Those that this process may use, where the system tells.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
