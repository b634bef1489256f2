"""Means, paired differences, effect sizes and corrected p-values of the papers' claims.

A seed is the unit of everything. Units of one seed share their start and the order of their data,
so differences are taken within a seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from truestep.lab.statistics import interval

__all__ = ["Effect", "compare", "holm", "mean"]


@dataclass(frozen=True)
class Effect:
    """A mean, or a mean paired difference, with what is known of it.

    Attributes:
        name: What it is of.
        mean: The mean.
        low: Lower end of the 95 % interval; nan for one value.
        high: Its upper end.
        n: How many seeds.
        size: Standardised: the mean over the standard deviation (Cohen's d_z of differences).
        p: Two-sided, of the paired t-test against 0; nan for one value.
        sd: Standard deviation.
        corrected: p after Holm's correction within its family; p itself where nobody corrected it.
    """

    name: str
    mean: float
    low: float
    high: float
    n: int
    size: float
    p: float
    sd: float
    corrected: float

    @property
    def above(self) -> bool:
        """Whether interval and corrected p-value say that it is above 0."""
        return self.low > 0 and self.corrected < 0.05  # noqa: PLR2004

    @property
    def below(self) -> bool:
        """Whether interval and corrected p-value say that it is below 0."""
        return self.high < 0 and self.corrected < 0.05  # noqa: PLR2004


def mean(name: str, values: ArrayLike) -> Effect:
    """A mean with its 95 % interval, Student's.

    Args:
        name: What the values are.
        values: One per seed.

    Example:
        >>> found = mean("loss", [1.0, 2.0, 3.0])
        >>> found.mean, round(found.low, 2), found.n, found.size
        (2.0, -0.48, 3, 2.0)
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0 or not np.isfinite(array).all():
        nan = math.nan
        return Effect(name, nan, nan, nan, array.size, nan, nan, nan, nan)
    centre, low, high = interval(array)
    if array.size == 1:
        nan = math.nan
        return Effect(name, centre, nan, nan, 1, nan, nan, nan, nan)
    sd = float(array.std(ddof=1))
    if sd == 0:
        # All seeds agree exactly: the test has nothing to divide by.
        p, size = (1.0, 0.0) if centre == 0 else (0.0, math.copysign(math.inf, centre))
    else:
        p, size = float(stats.ttest_1samp(array, 0.0).pvalue), centre / sd
    return Effect(name, centre, low, high, array.size, size, p, sd, p)


def compare(name: str, a: "dict[int, float]", b: "dict[int, float]") -> Effect:
    """The mean of a - b over the seeds that both have.

    Example:
        >>> compare("steps", {0: 3.0, 1: 5.5, 7: 1.0}, {0: 1.0, 1: 3.0}).mean
        2.25
    """
    seeds = sorted(a.keys() & b.keys())
    return mean(name, [a[seed] - b[seed] for seed in seeds])


def holm(effects: Sequence[Effect]) -> list[Effect]:
    """The same with p-values corrected for how many there are (Holm's step-down method).

    Example:
        >>> found = [replace(mean("", [1.0, 2.0]), p=p) for p in (0.01, 0.04, 0.03)]
        >>> [round(effect.corrected, 3) for effect in holm(found)]
        [0.03, 0.06, 0.06]
    """
    known = [index for index, effect in enumerate(effects) if math.isfinite(effect.p)]
    order = sorted(known, key=lambda index: effects[index].p)
    corrected = list(effects)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * effects[index].p))
        corrected[index] = replace(effects[index], corrected=highest)
    return corrected
