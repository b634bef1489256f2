"""What a race says in sentences: who came first and by how much, and what to be careful about."""

import math
from collections.abc import Sequence

import pandas as pd

from truestep.lab.tables import Row, plain, sorted_rows, with_interval

__all__ = ["findings", "notes"]


def findings(summary: pd.DataFrame) -> list[str]:
    """A sentence or two per batch size: the lowest test loss, and its distance to the baseline's.

    Args:
        summary: Of :func:`truestep.lab.statistics.summarise`.
    """
    rows = [row for row in sorted_rows(summary) if math.isfinite(row.get("test_loss", math.nan))]
    baseline = str(summary.attrs["baseline"])
    sizes = sorted({row["batch_size"] for row in rows})
    return [
        (f"At batch size {size}, " if len(sizes) > 1 else "")
        + _first_and_distance([row for row in rows if row["batch_size"] == size], baseline)
        for size in sizes
    ]


def notes(summary: pd.DataFrame, chosen: pd.DataFrame) -> list[str]:
    """What a reader should know before believing the table, each with what to do about it.

    Args:
        summary: Of :func:`truestep.lab.statistics.summarise`.
        chosen: Of :func:`truestep.lab.statistics.choose`.
    """
    several = len(set(summary.index.get_level_values("batch_size"))) > 1
    grids = chosen["grid"].to_dict()
    told = []
    for row in sorted_rows(summary):
        name, size = row["optimizer"], row["batch_size"]
        place = f"{name} at batch size {size}" if several else name
        told += [f"{place}: {note}" for note in _notes_on(row, grids[name, size])]
    if summary["seeds"].max() <= 1:
        told.append(
            "One seed: there are no intervals, and any difference may be luck. Race three seeds "
            "or more: --seeds 3."
        )
    baseline = summary.attrs["baseline"]
    if baseline not in summary.index.get_level_values("optimizer"):
        told.append(
            f"{baseline} was not raced, so nothing is compared with it. Add it to --optimizers."
        )
    return told


def _first_and_distance(rows: Sequence[Row], baseline: str) -> str:
    first, *others = rows
    name = first["optimizer"]
    loss = with_interval(first["test_loss"], first["test_loss_low"], first["test_loss_high"])
    sentence = f"{name} has the lowest mean test loss, {loss}."
    if name == baseline and others:
        return f"{sentence} {others[0]['optimizer']}, the next, differs by {_distance(others[0])}."
    if baseline in {row["optimizer"] for row in others}:
        return f"{sentence} It differs from {baseline} by {_distance(first)}."
    return sentence


def _distance(row: Row) -> str:
    mean, low, high = (row[f"test_loss_difference{end}"] for end in ("", "_low", "_high"))
    text = with_interval(mean, low, high)
    if math.isnan(low):
        return f"{text} (no interval)"
    return f"{text}, which scatter between seeds could explain" if low <= 0 <= high else text


def _notes_on(row: Row, grid: Sequence[float]) -> list[str]:
    if math.isnan(row["lr"]):
        smaller = _option(row["optimizer"], (grid[0] / 100, grid[0] / 10))
        return [f"every run diverged. Race smaller learning rates: {smaller}."]
    told = []
    if row["at_edge"]:
        told.append(_edge(row["optimizer"], row["lr"], grid))
    if row["diverged_seeds"]:
        told.append(
            f"{row['diverged_seeds']} of {row['seeds']} seeds diverged even at the chosen learning "
            "rate; its means leave them out and flatter it. Race smaller learning rates: "
            f"{_option(row['optimizer'], (grid[0] / 10, *grid))}."
        )
    return told


def _edge(optimizer: str, lr: float, grid: Sequence[float]) -> str:
    if len(grid) == 1:
        around = _option(optimizer, (lr / 10, lr, lr * 10))
        return f"only one learning rate was raced, {plain(lr)}. Race others around it: {around}."
    if lr == grid[0]:
        end, wider = "smallest", (lr * lr / grid[1], *grid)
    else:
        end, wider = "largest", (*grid, lr * lr / grid[-2])
    return (
        f"the chosen learning rate, {plain(lr)}, is the {end} that was raced, so a better one may "
        f"lie beyond. Extend the grid: {_option(optimizer, wider)} (what is done is not repeated)."
    )


def _option(optimizer: str, grid: Sequence[float]) -> str:
    return f"--lr {optimizer}={','.join(f'{lr:.2g}' for lr in grid)}"
