"""From runs to tables: which learning rate was chosen, and what it gave with which certainty.

Every function is pure. A seed is the unit of everything: means and intervals are over seeds, and
differences are taken within a seed, since runs of one seed share their start and their data order.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from truestep.errors import TruestepError
from truestep.lab.store import RunResult

__all__ = [
    "Difference",
    "Interval",
    "at_reference",
    "choose",
    "interval",
    "landscape",
    "learning_curves",
    "paired_difference",
    "reach",
    "summarise",
]

# A learning rate is good where its mean validation loss is this close to the best one's.
GOOD_WITHIN = 0.05


class Interval(NamedTuple):
    """A mean and the bounds of its confidence interval; nan bounds where there is none."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """A mean paired difference, the bounds of its interval, and the number of pairs."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Iterable[float], level: float = 0.95) -> Interval:
    """The mean with Student's t interval.

    Args:
        values: Independent values, one per seed.
        level: Confidence, between 0 and 1.

    Returns:
        The mean and the bounds. One value has no bounds (nan), nor have values that are not all
        finite; nan among the values makes the mean nan.

    Example:
        >>> interval([1.0, 2.0, 3.0])
        Interval(mean=2.0, low=-0.484..., high=4.484...)
        >>> interval([1.0])
        Interval(mean=1.0, low=nan, high=nan)
    """
    array = np.fromiter(values, dtype=float)
    if array.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    if array.size == 1 or not np.isfinite(array).all():
        with np.errstate(invalid="ignore"):  # inf - inf is nan, as it should be
            return Interval(float(array.mean()), math.nan, math.nan)
    mean = float(array.mean())
    # scipy.special has the quantile without the second that importing scipy.stats takes.
    quantile = float(stdtrit(array.size - 1, (1 + level) / 2))
    half = quantile * float(array.std(ddof=1)) / math.sqrt(array.size)
    return Interval(mean, mean - half, mean + half)


def paired_difference(
    a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95
) -> Difference:
    """The mean of a - b over the seeds that both have, with its t interval.

    Args:
        a: Value by seed.
        b: Value by seed.
        level: Confidence, between 0 and 1.

    Example:
        >>> paired_difference({0: 3.0, 1: 5.0, 2: 7.0}, {0: 1.0, 1: 3.0, 9: 0.0})
        Difference(mean=2.0, low=2.0, high=2.0, n=2)
    """
    seeds = sorted(a.keys() & b.keys())
    return Difference(*interval((a[seed] - b[seed] for seed in seeds), level), len(seeds))


def landscape(results: Sequence[RunResult]) -> pd.DataFrame:
    """The validation loss of each raced learning rate, from the selection runs.

    Returns:
        Index: ``optimizer``, ``batch_size``, ``lr``. Columns: ``loss``, ``low``, ``high`` (mean
        over seeds of the loss at each run's best evaluation; inf if any seed diverged),
        ``finished_loss`` (mean over the seeds that did not), ``seeds``, ``diverged`` (how many).
    """
    cells: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for result in results:
        key = result.key
        if not key.final:
            cells[key.optimizer, key.batch_size, key.lr].append(_validation_loss(result))
    rows = []
    for (optimizer, batch_size, lr), losses in sorted(cells.items()):
        finished = [loss for loss in losses if loss != math.inf]
        mean, low, high = interval(losses)
        rows.append(
            {
                "optimizer": optimizer,
                "batch_size": batch_size,
                "lr": lr,
                "loss": mean,
                "low": low,
                "high": high,
                "finished_loss": interval(finished).mean,
                "seeds": len(losses),
                "diverged": len(losses) - len(finished),
            }
        )
    columns = ["loss", "low", "high", "finished_loss", "seeds", "diverged"]
    return _table(rows, ["optimizer", "batch_size", "lr"], columns)


def choose(results: Sequence[RunResult]) -> pd.DataFrame:
    """Chooses each optimizer's learning rate at each batch size, on validation data alone.

    The lowest mean over seeds of the validation loss at each run's best evaluation wins, the
    smaller learning rate where two are equal. A diverged run counts as infinite; where every
    learning rate has one, the fewest diverged runs win, then the mean of the others.

    Args:
        results: Runs of one experiment; only selection runs (``final=False``) are looked at.

    Returns:
        Index: ``optimizer``, ``batch_size``. Columns: ``lr`` (nan if every run diverged),
        ``loss`` (its mean validation loss), ``seeds``, ``grid`` (the raced learning rates,
        ascending), ``at_edge`` (whether ``lr`` is an end of the grid, so that a better one may lie
        beyond), ``good_low`` and ``good_high`` (the ends of the unbroken row of raced learning
        rates around ``lr`` whose mean loss is within 5 % of the best), ``diverged`` (the share of
        the grid's runs that did).
    """
    rows = []
    table = landscape(results)
    for (optimizer, batch_size), cells in table.groupby(level=["optimizer", "batch_size"]):
        grid = [float(lr) for lr in cells.index.get_level_values("lr")]
        losses = [float(loss) for loss in cells["loss"]]
        order = cells[["loss", "diverged", "finished_loss"]].fillna(math.inf).to_numpy().tolist()
        best = min(range(len(grid)), key=order.__getitem__)
        lost = bool(cells["diverged"].iloc[best] == cells["seeds"].iloc[best])
        low, high = (best, best) if math.isinf(losses[best]) else _good_band(losses, best)
        rows.append(
            {
                "optimizer": optimizer,
                "batch_size": batch_size,
                "lr": math.nan if lost else grid[best],
                "loss": losses[best],
                "seeds": int(cells["seeds"].iloc[best]),
                "grid": tuple(grid),
                "at_edge": not lost and best in (0, len(grid) - 1),
                "good_low": math.nan if lost else grid[low],
                "good_high": math.nan if lost else grid[high],
                "diverged": float(cells["diverged"].sum() / cells["seeds"].sum()),
            }
        )
    columns = ["lr", "loss", "seeds", "grid", "at_edge", "good_low", "good_high", "diverged"]
    return _table(rows, ["optimizer", "batch_size"], columns)


def at_reference(chosen: pd.DataFrame, reference: int) -> pd.DataFrame:
    """Gives every batch size the learning rate that was chosen at one of them.

    Args:
        chosen: Of :func:`choose`.
        reference: The batch size whose learning rates are taken.

    Returns:
        Index: ``optimizer``, ``batch_size``, as in ``chosen``. Column: ``lr``, nan where the
        optimizer was not raced at ``reference``.
    """
    places = chosen.index.to_list()
    lrs = chosen["lr"].to_dict()
    taken = [lrs.get((optimizer, reference), math.nan) for optimizer, _ in places]
    return pd.DataFrame({"lr": taken}, index=chosen.index)


def learning_curves(
    results: Sequence[RunResult], chosen: pd.DataFrame, metric: str
) -> pd.DataFrame:
    """A validation metric over training at the chosen learning rates.

    Args:
        results: Runs of one experiment. Final runs are read where there are any; they repeat the
            selection runs up to their end.
        chosen: Of :func:`choose`.
        metric: ``"loss"``, or one of the task's metrics.

    Returns:
        Index: ``optimizer``, ``batch_size``, ``epoch``. Columns: ``mean``, ``low``, ``high`` over
        the seeds that did not diverge.
    """
    cells: dict[tuple[str, int, float], dict[int, float]] = defaultdict(dict)
    lrs = dict(zip(chosen.index.to_list(), chosen["lr"], strict=True))
    for result in sorted(results, key=lambda result: result.key.final):
        key = result.key
        if lrs.get((key.optimizer, key.batch_size)) == key.lr and result.status != "diverged":
            for row in result.curve:
                cells[key.optimizer, key.batch_size, row["epoch"]][key.seed] = row[metric]
    rows = [
        dict(zip(("optimizer", "batch_size", "epoch"), place, strict=True))
        | interval(by_seed.values())._asdict()
        for place, by_seed in sorted(cells.items())
    ]
    return _table(rows, ["optimizer", "batch_size", "epoch"], ["mean", "low", "high"])


def reach(result: RunResult, target: tuple[str, float]) -> dict[str, float]:
    """When a run first reached a validation target.

    Args:
        result: The run.
        target: ``("loss", value)``, reached at or below; or a metric and its value, reached at or
            above.

    Returns:
        ``epoch``, ``step`` and ``seconds`` of the first evaluation there; inf if there is none.

    Raises:
        TruestepError: The run's evaluations have no such metric.
    """
    name, value = target
    for row in result.curve:
        if name not in row:
            raise TruestepError(
                f"The target's metric {name!r} is not among what was measured "
                f"({', '.join(sorted(row))}). Name one of the task's metrics, or 'loss'."
            )
        if row[name] <= value if name == "loss" else row[name] >= value:
            return {unit: float(row[unit]) for unit in ("epoch", "step", "seconds")}
    return dict.fromkeys(("epoch", "step", "seconds"), math.inf)


def summarise(
    results: Sequence[RunResult],
    chosen: pd.DataFrame,
    baseline: str = "sgd",
    target: tuple[str, float] | None = None,
) -> pd.DataFrame:
    """What each optimizer gives at its chosen learning rate, from the final runs.

    Args:
        results: Runs of one experiment.
        chosen: Of :func:`choose`, or any table with its index and a column ``lr``.
        baseline: Optimizer that the others are compared with, at the same batch size.
        target: As in :func:`reach`.

    Returns:
        Index: ``optimizer``, ``batch_size``. Columns:

        - ``lr``; ``at_edge`` and ``diverged`` (share of the grid's runs) where ``chosen`` has them;
        - ``seeds`` and ``diverged_seeds``: of the final runs;
        - for each test metric NAME (``loss`` and the task's own) ``test_NAME``, ``test_NAME_low``,
          ``test_NAME_high``: mean and 95 % interval over the seeds that did not diverge;
        - ``test_NAME_difference``, ``..._low``, ``..._high``: the same of the difference to the
          baseline's run of the same seed; ``pairs``: how many seeds have both;
        - with a target ``epoch_to_target``, ``step_to_target``, ``seconds_to_target``: medians
          over seeds, where a seed that never gets there counts as inf; ``reached``: the share that
          does;
        - ``step_seconds`` (median), ``step_ratio`` (to the baseline's; nan if another
          engine trained that), ``bytes_per_parameter``.

        ``attrs["baseline"]`` is the baseline's name.
    """
    finals: dict[tuple[str, int, float], list[RunResult]] = defaultdict(list)
    for result in results:
        if result.key.final:
            key = result.key
            finals[key.optimizer, key.batch_size, key.lr].append(result)
    places = chosen.index.to_list()
    lrs = {place: float(lr) for place, lr in zip(places, chosen["lr"], strict=True)}
    kept = chosen[chosen.columns.intersection(["at_edge", "diverged"])]
    notes = cast("dict[tuple[str, int], dict[str, Any]]", kept.to_dict("index"))
    runs = {place: finals.get((*place, lr), []) for place, lr in lrs.items()}
    metrics = list(
        dict.fromkeys(name for some in runs.values() for run in some for name in run.test)
    )
    rows = []
    for (optimizer, batch_size), some in runs.items():
        base = runs.get((baseline, batch_size), [])
        row: dict[str, Any] = {
            "optimizer": optimizer,
            "batch_size": batch_size,
            "lr": lrs[optimizer, batch_size],
            **notes[optimizer, batch_size],
            "seeds": len(some),
            "diverged_seeds": sum(run.status == "diverged" for run in some),
        }
        for metric in metrics:
            row |= _compare(metric, _test_values(some, metric), _test_values(base, metric))
        if target is not None:
            row |= _to_target(some, target)
        step_seconds = _median(run.step_seconds for run in some)
        row["step_seconds"] = step_seconds
        alike = [run for run in base if {_engine(run)} == {_engine(one) for one in some}]
        row["step_ratio"] = step_seconds / _median(run.step_seconds for run in alike)
        row["bytes_per_parameter"] = _median(run.optimizer_bytes / run.parameters for run in some)
        rows.append(row)
    columns = list(rows[0])[2:] if rows else ["lr"]
    table = _table(rows, ["optimizer", "batch_size"], columns)
    table.attrs["baseline"] = baseline
    return table


def _engine(run: RunResult) -> str:
    return run.versions.get("engine", "")


def _validation_loss(result: RunResult) -> float:
    if result.status == "diverged":
        return math.inf
    return float(result.curve[result.best]["loss"])


def _good_band(losses: Sequence[float], best: int) -> tuple[int, int]:
    limit = losses[best] + GOOD_WITHIN * abs(losses[best])
    low = high = best
    while low > 0 and losses[low - 1] <= limit:
        low -= 1
    while high < len(losses) - 1 and losses[high + 1] <= limit:
        high += 1
    return low, high


def _test_values(runs: Sequence[RunResult], metric: str) -> dict[int, float]:
    return {
        run.key.seed: run.test[metric]
        for run in runs
        if run.status != "diverged" and metric in run.test
    }


def _compare(
    metric: str, values: Mapping[int, float], base: Mapping[int, float]
) -> dict[str, float]:
    mean, low, high = interval(values.values())
    difference = paired_difference(values, base)
    name = f"test_{metric}"
    return {
        name: mean,
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_difference": difference.mean,
        f"{name}_difference_low": difference.low,
        f"{name}_difference_high": difference.high,
        "pairs": difference.n,
    }


def _to_target(runs: Sequence[RunResult], target: tuple[str, float]) -> dict[str, float]:
    firsts = [reach(run, target) for run in runs]
    medians = {
        f"{unit}_to_target": _median(first[unit] for first in firsts)
        for unit in ("epoch", "step", "seconds")
    }
    reached = [math.isfinite(first["step"]) for first in firsts]
    return medians | {"reached": float(np.mean(reached)) if reached else math.nan}


def _median(values: Iterable[float]) -> float:
    array = np.fromiter(values, dtype=float)
    return float(np.median(array)) if array.size else math.nan


def _table(rows: list[dict[str, Any]], index: list[str], columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=[*index, *columns]).set_index(index)
