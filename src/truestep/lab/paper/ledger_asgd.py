"""The aSGD paper's claims A1 to A7 against the data."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from truestep.lab.paper.claims import CLAIMS, TABLE_1, TABLE_2, TUNED
from truestep.lab.paper.effects import Effect, compare, holm, mean
from truestep.lab.paper.points import HIDDEN
from truestep.lab.paper.tables import best, by_seed
from truestep.lab.paper.verdict import Condition, Finding, corrected, judged
from truestep.lab.paper.words import difference, number

__all__ = [
    "ENDING",
    "Tuned",
    "a1",
    "a2",
    "a3",
    "a4",
    "a5",
    "a6",
    "a7",
    "tuned",
    "tuned_points",
]

# "We stop training with minimal loss or 10,000 batches."
ENDING = "loss under 0.01"
MOST_STEPS = 10_000  # what a shorter training that did not converge is counted as
COLUMNS = ("train_accuracy", "train_loss", "test_accuracy", "test_loss")
NODE_MARGIN = 0.05
TIME_MARGIN = 1.05


class Tuned(NamedTuple):
    """An optimizer's chosen learning rate, and the rows of its trainings there."""

    lr: float
    rows: pd.DataFrame


def tuned(curves: pd.DataFrame, by: str) -> dict[str, Tuned]:
    """For aSGD and SGD the learning rate with the lowest mean over seeds of the lowest ``by``.

    Args:
        curves: Of one variant.
        by: ``"test_loss"``, as the paper chooses, or ``"validation_loss"``.
    """
    chosen = {}
    rows = best(curves, by)
    for name, part in rows.groupby("optimizer"):
        lr = float(part.groupby("lr")[by].mean().idxmin())  # type: ignore[arg-type]
        chosen[str(name)] = Tuned(lr, part[part["lr"] == lr])
    return chosen


def a1(curves: pd.DataFrame) -> Finding:
    """Equal learning rates, all columns of Table 1."""
    conditions = []
    rows = best(curves, "test_loss") if len(curves) else curves
    for lr in sorted({lr for _, lr in TABLE_1}):
        for column in COLUMNS:
            effect = _better(rows, column, lr, lr)
            conditions.append(Condition(f"{column.replace('_', ' ')} at {lr:g}", effect))
    conditions = corrected(conditions)
    shown = [c.effect for c in conditions if c.under.startswith("test loss")]
    ours = "; ".join(
        f"SGD's test loss minus aSGD's at {lr:g}: {difference(effect)}"
        for lr, effect in zip(sorted({lr for _, lr in TABLE_1}), shown, strict=True)
        if effect.n
    )
    return judged(CLAIMS["A1"], conditions, ours, _matched_mnist(curves))


def a2(curves: pd.DataFrame) -> Finding:
    """Tuned, as the paper selects; beside it, selected on validation."""
    chosen = tuned(curves, "test_loss") if len(curves) else {}
    if chosen.keys() != {"asgd", "sgd"}:
        return judged(CLAIMS["A2"], [], "")
    losses = {name: by_seed(chosen[name].rows, "test_loss") for name in chosen}
    accuracies = {name: by_seed(chosen[name].rows, "test_accuracy") for name in chosen}
    conditions = [
        Condition("test loss", compare("test loss", losses["sgd"], losses["asgd"])),
        Condition("accuracy", compare("accuracy", accuracies["asgd"], accuracies["sgd"])),
    ]
    for name in chosen:
        paper, sd = TABLE_2[name, TUNED[name]][3]
        away = [sd - abs(value - paper) for value in losses[name].values()]
        conditions.append(Condition(f"{name}'s level", mean(f"{name}'s level", away)))
    ours = ", ".join(
        f"{name} {chosen[name].lr:g}: {number(mean('', list(losses[name].values())))} (accuracy "
        f"{number(mean('', list(accuracies[name].values())))})"
        for name in chosen
    )
    ours = f"test loss of {ours}"
    return judged(CLAIMS["A2"], conditions, ours, _matched_mnist(curves))


def a3(curves: pd.DataFrame) -> Finding:
    """Epochs to the lowest test loss."""
    rows = best(curves, "test_loss") if len(curves) else curves
    epochs = {
        name: by_seed(rows, "epoch", optimizer=name, lr=lr) if len(rows) else {}
        for name, lr in TUNED.items()
    }
    ratio = _log_ratio(epochs["sgd"], epochs["asgd"])
    ours = ", ".join(f"{name} {number(mean('', list(epochs[name].values())))}" for name in epochs)
    matched = "not run"
    chosen = tuned(curves, "validation_loss") if len(curves) else {}
    if chosen.keys() == {"asgd", "sgd"}:
        at = {name: by_seed(chosen[name].rows, "epoch") for name in chosen}
        matched = "epochs of the lowest validation loss at the learning rate chosen by it: "
        matched += ", ".join(
            f"{name} {chosen[name].lr:g} {number(mean('', list(at[name].values())))}"
            for name in chosen
        )
    condition = Condition("twice the epochs", ratio, threshold=1.0)
    return judged(CLAIMS["A3"], [condition], f"epochs {ours}", matched)


def a4(points: pd.DataFrame, rates: pd.DataFrame, ending: str = ENDING) -> Finding:
    """Steps to convergence; `points` of one variant, `rates` with the grid of learning rates."""
    steps = {
        (data, name): _points(points, data, name, ending, "steps")
        for data in ("circles", "spirals")
        for name in ("asgd", "sgd")
    }
    conditions = []
    for name in ("asgd", "sgd"):
        converged = _points(points, "circles", name, ending, "converged")
        taken = [
            value if converged[seed] else max(value, MOST_STEPS)
            for seed, value in steps["circles", name].items()
        ]
        conditions.append(
            Condition(f"{name} on circles", mean(name, [1000 - value for value in taken]))
        )
    sooner = compare("spirals", steps["spirals", "sgd"], steps["spirals", "asgd"])
    conditions.append(Condition("spirals, 750 steps sooner", sooner, threshold=750))
    conditions = corrected(conditions)
    ours = ", ".join(
        f"{name} on {data} {number(mean('', list(values.values())))}"
        for (data, name), values in steps.items()
        if values
    )
    ours = f"mean steps of {ours}"
    if sooner.n:
        ours += f"; on spirals sooner by {difference(conditions[-1].effect)}"
    ours += _medians_and_shares(points, ending, steps)
    matched = _matched_points(rates, ending, "steps", "steps")
    return judged(CLAIMS["A4"], conditions, ours, matched)


def a5(points: pd.DataFrame, rates: pd.DataFrame, ending: str = ENDING) -> Finding:
    """Accuracy and loss at the end."""
    conditions = []
    for data in ("circles", "spirals"):
        for column in COLUMNS:
            sign = -1 if column.endswith("loss") else 1
            ours, theirs = (
                _points(points, data, name, ending, column, sign) for name in ("asgd", "sgd")
            )
            effect = compare(column, ours, theirs)
            conditions.append(Condition(f"{column.replace('_', ' ')} on {data}", effect))
    conditions = corrected(conditions)
    ours_text = "aSGD better by " + ", ".join(
        f"{difference(condition.effect)} ({condition.under})"
        for condition in conditions
        if condition.under.startswith("test") and condition.effect.n
    )
    ours_text += _left_out(points, ending)
    matched = _matched_points(rates, ending, "test_loss", "test loss")
    return judged(CLAIMS["A5"], conditions, ours_text, matched)


def a6(points: pd.DataFrame, rates: pd.DataFrame, ending: str = ENDING) -> Finding:
    """Number and places of true dummy nodes."""
    conditions, words = [], []
    for data, more in (("circles", 5.0), ("spirals", 3.0)):
        counts = {name: _points(points, data, name, ending, "dummies") for name in ("asgd", "sgd")}
        effect = compare(data, counts["asgd"], counts["sgd"])
        conditions.append(Condition(f"more on {data}", effect, threshold=more / 2))
        layers = [
            _points(points, data, "asgd", ending, f"layer {k}") for k in range(1, len(HIDDEN) + 1)
        ]
        conditions.append(Condition(f"nearer the output on {data}", _slope(layers)))
        conditions.append(
            Condition(
                f"even within layers on {data}",
                _evenness(points, data, ending),
                threshold=-NODE_MARGIN,
            )
        )
        if effect.n > 1:
            shares = np.array([list(layer.values()) for layer in layers]) / HIDDEN[0]
            error = 1.96 * shares.std(1, ddof=1).max() / math.sqrt(shares.shape[1])
            words.append(
                f"{data}: {difference(effect)} more; probabilities in the hidden layers, first to "
                f"last: {', '.join(f'{share:.3f}' for share in shares.mean(1))}, each ± "
                f"{error:.3f} or less"
            )
    matched = _matched_points(rates, ending, "dummies", "true dummy nodes")
    return judged(CLAIMS["A6"], conditions, "; ".join(words), matched)


def a7(times: pd.DataFrame) -> Finding:
    """Seconds of a step."""
    conditions, words = [], []
    for kind, label in (("points", "2-10-10-10-10-10-1"), ("images", "784-30-20-10, batch 64")):
        part = times[(times["kind"] == kind)] if len(times) else times
        logs = [
            math.log(ours / theirs)
            for _, cell in (part.groupby(["data", "lr", "seed"]) if len(part) else ())
            if {"asgd", "sgd"} <= set(cell["optimizer"])
            for ours, theirs in [_medians(cell)]
        ]
        effect = mean(kind, [-value for value in logs])
        conditions.append(Condition(label, effect, threshold=-math.log(TIME_MARGIN)))
        if effect.n:
            low, high = math.exp(-effect.high), math.exp(-effect.low)
            words.append(
                f"{label}: {math.exp(-effect.mean):.2f} times SGD's ({low:.2f} to {high:.2f}, "
                f"n = {effect.n})"
            )
    matched = "the same: time has no learning rate"
    return judged(CLAIMS["A7"], conditions, "; ".join(words), matched)


def _medians_and_shares(
    points: pd.DataFrame, ending: str, steps: dict[tuple[str, str], dict[int, float]]
) -> str:
    """What box plots show, and how many trainings converged at all."""
    words = []
    for (data, name), values in steps.items():
        if values:
            share = np.mean(list(_points(points, data, name, ending, "converged").values()))
            median = np.median(list(values.values()))
            words.append(f"{name} on {data} {median:.0f}, {100 * share:.0f} % converged")
    return f"; medians: {', '.join(words)}" if words else ""


def tuned_points(rates: pd.DataFrame, ending: str = ENDING) -> dict[tuple[str, str], float]:
    """Each optimizer's learning rate with the fewest mean steps, over the first half of the seeds.

    The other half is for the comparison: it takes no part in the choice.
    """
    half = rates["seed"].max() / 2
    part = rates[(rates["ending"] == ending) & (rates["seed"] <= half)]
    steps = part.groupby(["data", "optimizer", "lr"])["steps"].mean().reset_index()
    lowest = steps.loc[steps.groupby(["data", "optimizer"])["steps"].idxmin()]
    return {
        (str(row["data"]), str(row["optimizer"])): float(row["lr"]) for _, row in lowest.iterrows()
    }


def _matched_points(rates: pd.DataFrame, ending: str, column: str, what: str) -> str:
    chosen = tuned_points(rates, ending) if len(rates) else {}
    part = (
        rates[(rates["ending"] == ending) & (rates["seed"] > rates["seed"].max() / 2)]
        if chosen
        else rates
    )
    effects = {
        data: compare(
            f"{what} on {data}",
            *(
                by_seed(part, column, data=data, optimizer=name, lr=chosen[data, name])
                for name in ("asgd", "sgd")
            ),
        )
        for data in ("circles", "spirals")
        if {(data, "asgd"), (data, "sgd")} <= chosen.keys()
    }
    words = [
        f"{data} (aSGD {chosen[data, 'asgd']:g}, SGD {chosen[data, 'sgd']:g}): {difference(effect)}"
        for data, effect in zip(effects, holm(list(effects.values())), strict=True)
    ]
    return f"{what}, aSGD minus SGD: {'; '.join(words)}" if words else "not run"


def _matched_mnist(curves: pd.DataFrame) -> str:
    chosen = tuned(curves, "validation_loss") if len(curves) else {}
    if chosen.keys() != {"asgd", "sgd"}:
        return "not run"
    effect = compare(
        "test loss",
        *(by_seed(chosen[name].rows, "test_loss") for name in ("asgd", "sgd")),
    )
    return (
        f"chosen on validation: aSGD {chosen['asgd'].lr:g} minus SGD {chosen['sgd'].lr:g}, test "
        f"loss {difference(effect)}"
    )


def _better(rows: pd.DataFrame, column: str, asgd_lr: float, sgd_lr: float) -> Effect:
    """How much better aSGD is, in pairs."""
    if not len(rows):
        return mean(column, [])
    ours = by_seed(rows, column, optimizer="asgd", lr=asgd_lr)
    theirs = by_seed(rows, column, optimizer="sgd", lr=sgd_lr)
    lower_is_better = column.endswith("loss")
    return compare(column, theirs, ours) if lower_is_better else compare(column, ours, theirs)


def _log_ratio(a: dict[int, float], b: dict[int, float]) -> Effect:
    """Of epochs, to base 2; an epoch 0 counts as 1."""
    seeds = sorted(a.keys() & b.keys())
    return mean(
        "epochs, log2 of the ratio",
        [math.log2(max(a[seed], 1) / max(b[seed], 1)) for seed in seeds],
    )


def _points(
    points: pd.DataFrame, data: str, name: str, ending: str, column: str, sign: int = 1
) -> dict[int, float]:
    if not len(points):
        return {}
    found = by_seed(points, column, data=data, optimizer=name, ending=ending)
    return {seed: sign * value for seed, value in found.items()}


def _left_out(points: pd.DataFrame, ending: str) -> str:
    """How many pairs have no loss, since one of the two diverged."""
    words = []
    for data in ("circles", "spirals"):
        losses = [_points(points, data, name, ending, "test_loss") for name in ("asgd", "sgd")]
        steps = [_points(points, data, name, ending, "steps") for name in ("asgd", "sgd")]
        lost = len(steps[0].keys() & steps[1].keys()) - len(losses[0].keys() & losses[1].keys())
        if lost:
            words.append(f"{lost} pairs on {data}")
    return f"; left out, since one of the two diverged: {', '.join(words)}" if words else ""


def _slope(layers: Sequence[dict[int, float]]) -> Effect:
    """Of the number of dummy nodes against the layer's number, by least squares, in each training."""
    seeds = sorted(set.intersection(*(set(layer) for layer in layers)))
    counts = np.array([[layer[seed] for layer in layers] for seed in seeds])
    away = np.arange(len(layers)) - (len(layers) - 1) / 2
    return mean("slope", list(counts @ away / (away @ away)) if seeds else [])


def _evenness(points: pd.DataFrame, data: str, ending: str) -> Effect:
    """Minus the largest distance of a node's probability from its layer's mean, under aSGD."""
    rows = points[
        (points["data"] == data) & (points["optimizer"] == "asgd") & (points["ending"] == ending)
    ] if len(points) else points  # fmt: skip
    if len(rows) < 2:  # noqa: PLR2004
        return mean("evenness", [])
    bits = (
        rows["mask"].to_numpy()[:, None] >> np.arange(sum(HIDDEN), dtype=np.uint64)
    ) & np.uint64(1)
    share = bits.mean(0).reshape(len(HIDDEN), HIDDEN[0])
    away = np.abs(share - share.mean(1, keepdims=True))
    worst = float(away.max())
    p = float(share.flat[int(away.argmax())])
    half = 1.96 * math.sqrt(p * (1 - p) / len(rows))
    nan = math.nan
    return Effect("evenness", -worst, -worst - half, -worst + half, len(rows), nan, nan, nan, nan)


def _medians(cell: pd.DataFrame) -> tuple[float, float]:
    times = cell.groupby("optimizer")["seconds_per_step"].median()
    return float(times["asgd"]), float(times["sgd"])
