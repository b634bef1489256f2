"""The DA-SGD paper's claims D1 to D5 against the data."""

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

from truestep.lab.paper.claims import CLAIMS
from truestep.lab.paper.effects import Effect, compare, holm, mean
from truestep.lab.paper.planned import LEARNING_RATE
from truestep.lab.paper.plans_dasgd import BATCHES, DASGD_DATA
from truestep.lab.paper.tables import by_seed, last, main_only
from truestep.lab.paper.verdict import Condition, Finding, corrected, judged
from truestep.lab.paper.words import difference

__all__ = ["chosen_factor", "d1", "d2", "d3", "d4", "d5", "gap", "matched_gap"]

LARGE = (32, 64, 128, 256)
SMALL = (1, 2, 4)
SLOPE_FROM = 8


def gap(curves: pd.DataFrame, data: str, batch_size: int, column: str = "test_accuracy") -> Effect:
    """DA-SGD minus SGD at the last epoch, at the listed learning rate."""
    return compare(f"{data}, batch {batch_size}", *_both(last_of(curves), data, batch_size, column))


def last_of(curves: pd.DataFrame) -> pd.DataFrame:
    """The last epoch of each training; nothing of nothing."""
    return last(curves) if len(curves) else curves


def d1(curves: pd.DataFrame, rivals: pd.DataFrame) -> Finding:
    """Large batches."""
    conditions = [
        Condition(f"{data} at {size}", gap(curves, data, size))
        for data in DASGD_DATA
        for size in LARGE
    ]
    conditions = corrected(conditions)
    ours = "accuracy gained: " + ", ".join(
        f"{condition.under} {difference(condition.effect)}"
        for condition in conditions
        if condition.effect.n and condition.under.endswith(("32", "256"))
    )
    matched = _matched(rivals, "test_accuracy", "accuracy gained")
    return judged(CLAIMS["D1"], conditions, ours, matched)


def d2(curves: pd.DataFrame) -> Finding:
    """Small batches; `curves` with SGD at other learning rates."""
    rows = last_of(main_only(curves))
    conditions = []
    for data in DASGD_DATA[:2]:
        for size in SMALL:
            ours, theirs = _both(rows, data, size, "test_accuracy")
            conditions.append(
                Condition(f"{data} at {size}", compare(f"{data} at {size}", theirs, ours))
            )
    conditions = corrected(conditions)
    text = "accuracy of SGD minus DA-SGD's: " + ", ".join(
        f"{condition.under} {difference(condition.effect)}"
        for condition in conditions
        if condition.effect.n
    )
    return judged(CLAIMS["D2"], conditions, text, _matched_small(curves))


def _matched_small(curves: pd.DataFrame) -> str:
    """SGD at the learning rate that validation chose, where several were run."""
    rivals = {
        (str(data), int(size)): part[part["variant"].isin(["", LEARNING_RATE])]
        for (data, size), part in (curves.groupby(["data", "batch_size"]) if len(curves) else ())
        if size in SMALL and (part["variant"] == LEARNING_RATE).any()
    }
    effects = holm([matched_gap(part, size) for (_, size), part in rivals.items()])
    words = [
        f"{data}, batch {size} (SGD at {chosen_factor(part, size):g} times the rate): "
        f"{difference(effect)}"
        for ((data, size), part), effect in zip(rivals.items(), effects, strict=True)
    ]
    return f"accuracy DA-SGD gained: {'; '.join(words)}" if words else "not run"


def d3(curves: pd.DataFrame, rivals: pd.DataFrame) -> Finding:
    """Slope of the gap."""
    conditions = corrected(
        [Condition(data, mean(data, list(_slopes(curves, data).values()))) for data in DASGD_DATA]
    )
    text = "accuracy gained per doubling of the batch: " + ", ".join(
        f"{condition.under} {difference(condition.effect)}"
        for condition in conditions
        if condition.effect.n
    )
    matched = _matched(rivals, "test_accuracy", "the gap")
    return judged(CLAIMS["D3"], conditions, text, matched)


def d4(rates: pd.DataFrame) -> Finding:
    """Learning rate 0.002 against 0.001."""
    rows = last_of(rates)
    effect = mean("accuracy", [])
    words = "not run"
    if len(rows):
        at = {lr: by_seed(rows, "test_accuracy", lr=lr) for lr in (0.001, 0.002)}
        effect = compare("accuracy", at[0.002], at[0.001])
        means = rows.groupby("lr")["validation_accuracy"].mean()
        words = f"the best of all ten, by validation: {float(means.idxmax()):g}"  # type: ignore[arg-type]
    return judged(
        CLAIMS["D4"],
        [Condition("0.002", effect)],
        f"accuracy at 0.002 minus at 0.001: {difference(effect)}",
        words,
    )


def d5(curves: pd.DataFrame, rivals: pd.DataFrame) -> Finding:
    """Accuracy averaged over the epochs."""
    areas = _areas(curves)
    conditions = [
        Condition(
            f"{data} at {size}",
            compare(f"{data} at {size}", *_both(areas, data, size, "area")),
        )
        for data in DASGD_DATA
        for size in LARGE
    ]
    conditions = corrected(conditions)
    ours = "mean accuracy over the epochs gained: " + ", ".join(
        f"{condition.under} {difference(condition.effect)}"
        for condition in conditions
        if condition.effect.n and condition.under.endswith(("32", "256"))
    )
    matched = _matched(_areas(rivals), "area", "mean accuracy gained")
    return judged(CLAIMS["D5"], conditions, ours, matched)


def matched_gap(rivals: pd.DataFrame, batch_size: int, column: str = "test_accuracy") -> Effect:
    """DA-SGD minus SGD at the factor of the learning rate that validation chose, Fashion-MNIST."""
    rows = last_of(rivals)
    lr = chosen_factor(rivals, batch_size) * BATCHES[batch_size]
    if not len(rows) or not np.isfinite(lr):
        return mean(f"batch {batch_size}", [])
    rows = rows[rows["batch_size"] == batch_size]
    ours = by_seed(rows, column, optimizer="dasgd")
    theirs = by_seed(rows[np.isclose(rows["lr"], lr)], column, optimizer="sgd")
    return compare(f"batch {batch_size}", ours, theirs)


def chosen_factor(rivals: pd.DataFrame, batch_size: int) -> float:
    """Of 1, 1.5 and 2: SGD's factor with the highest validation accuracy; nan if it was not run."""
    rows = last_of(rivals)
    if not len(rows):
        return float("nan")
    part = rows[(rows["batch_size"] == batch_size) & (rows["optimizer"] == "sgd")]
    if not len(part):
        return float("nan")
    means = part.groupby("lr")["validation_accuracy"].mean()
    return float(means.idxmax()) / BATCHES[batch_size]  # type: ignore[arg-type]


def _matched(rivals: pd.DataFrame, column: str, what: str) -> str:
    """DA-SGD beside SGD at its best rate at each batch size that was run."""
    effects = {size: matched_gap(rivals, size, column) for size in LARGE}
    effects = {size: effect for size, effect in effects.items() if effect.n}
    words = [
        f"{size} (SGD at {chosen_factor(rivals, size):g} times the rate): {difference(effect)}"
        for size, effect in zip(effects, holm(list(effects.values())), strict=True)
    ]
    return f"{what} on Fashion-MNIST, batch {'; '.join(words)}" if words else "not run"


def _both(
    rows: pd.DataFrame, data: str, batch_size: int, column: str
) -> tuple[dict[int, float], dict[int, float]]:
    if not len(rows):
        return {}, {}
    where = {"data": data, "batch_size": batch_size, "lr": BATCHES[batch_size]}
    ours = by_seed(rows, column, optimizer="dasgd", **where)
    return ours, by_seed(rows, column, optimizer="sgd", **where)


def _slopes(curves: pd.DataFrame, data: str) -> dict[int, float]:
    """By seed: least squares slope of the gap against log2 of the batch size."""
    rows = last_of(curves)
    gaps: dict[int, list[tuple[float, float]]] = {}
    for size in BATCHES:
        if size >= SLOPE_FROM:
            ours, theirs = _both(rows, data, size, "test_accuracy")
            for seed in ours.keys() & theirs.keys():
                gaps.setdefault(seed, []).append((np.log2(size), ours[seed] - theirs[seed]))
    # Two points would have any slope.
    usable = {seed: np.array(pairs).T for seed, pairs in gaps.items() if len(pairs) > 2}  # noqa: PLR2004
    return {seed: float(np.polyfit(x, y, 1)[0]) for seed, (x, y) in usable.items()}


def _areas(curves: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy averaged over epochs by the trapezoidal rule, a row per training."""
    if not len(curves):
        return curves
    ends = last(curves).set_index("unit")
    areas = {
        unit: trapezoid(part["test_accuracy"], part["epoch"]) / part["epoch"].max()
        for unit, part in curves.groupby("unit")
    }
    return ends.assign(area=pd.Series(areas)).reset_index()
