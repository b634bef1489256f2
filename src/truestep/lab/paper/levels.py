"""Which setting gives the level of the aSGD paper's tables.

Nothing is said of the size of the training set, and "epoch" in the paper's Algorithm 1 counts
updates. Both are looked at here: trainings on fewer images, read after as many steps as 500 epochs
of so many steps have.
"""

import math
from typing import cast

import numpy as np
import pandas as pd

from truestep.lab.paper.claims import TABLE_1, TABLE_2, TUNED
from truestep.lab.paper.tables import best

__all__ = ["EPOCH_STEPS", "distances"]

Means = dict[tuple[str, float], dict[str, float]]

EPOCHS = 500
# Steps of an epoch that are looked at; 64 is the end of the trainings.
EPOCH_STEPS = (2, 4, 8, 12, 16, 24, 32, 48, 64)
ALL_IMAGES = 50_000  # of the main protocol, which is read at the same numbers of steps
COLUMNS = ("train_accuracy", "train_loss", "test_accuracy", "test_loss")


def distances(curves: pd.DataFrame) -> pd.DataFrame:
    """How far each setting is from the tables, at their selection by the lowest test loss.

    Args:
        curves: Of asgd-mnist, all variants.

    Returns:
        A row per setting and steps of an epoch: ``setting``, ``steps``, ``distance`` (root mean
        square, over the cells and columns of both tables, of the difference of means in the
        paper's standard deviations), ``distance asgd`` and ``distance sgd`` (over that method's
        rows alone), ``asgd`` and ``sgd`` (our test loss where the paper is tuned).
    """
    rows = []
    chosen = curves[(curves["variant"] == "") | curves["variant"].str.startswith("level")]
    for setting, part in chosen.groupby("variant", sort=False):
        images = int(part["train"].iloc[0]) or ALL_IMAGES
        label = str(setting).removeprefix("level: ")
        label = label or f"{images:,} images, start {part['start'].iloc[0]}"
        per_epoch = math.ceil(images / part["batch_size"].iloc[0])
        for steps in EPOCH_STEPS:
            lowest = best(part[part["epoch"] * per_epoch <= EPOCHS * steps], "test_loss")
            means = cast(
                "Means", lowest.groupby(["optimizer", "lr"])[list(COLUMNS)].mean().to_dict("index")
            )
            rows.append(
                {
                    "setting": label,
                    "steps": steps,
                    "distance": _distance(means, ("asgd", "sgd")),
                    "distance asgd": _distance(means, ("asgd",)),
                    "distance sgd": _distance(means, ("sgd",)),
                    "asgd": _at(means, "asgd"),
                    "sgd": _at(means, "sgd"),
                }
            )
    return pd.DataFrame(rows)


def _distance(means: Means, methods: tuple[str, ...]) -> float:
    away = [
        (means[cell][column] - value) / sd
        for cell, values in (TABLE_1 | TABLE_2).items()
        if cell in means and cell[0] in methods
        for column, (value, sd) in zip(COLUMNS, values, strict=True)
    ]
    return float(np.sqrt(np.mean(np.square(away)))) if away else math.nan


def _at(means: Means, name: str) -> float:
    return means.get((name, TUNED[name]), {}).get("test_loss", math.nan)
