"""Numbers with their certainty, in words."""

import math

from truestep.lab.paper.effects import Effect
from truestep.lab.tables import with_interval

__all__ = ["difference", "number", "p_value", "size"]


def number(effect: Effect) -> str:
    """A mean with half its interval.

    Example:
        >>> from truestep.lab.paper.effects import mean
        >>> number(mean("loss", [1.0, 1.1, 1.2]))
        '1.10 ± 0.25'
    """
    return with_interval(effect.mean, effect.low, effect.high) if effect.n else "not run"


def difference(effect: Effect) -> str:
    """A difference with interval, effect size and n; the p-value where there is one.

    Example:
        >>> from truestep.lab.paper.effects import mean
        >>> difference(mean("loss", [1.0, 1.1, 1.2]))
        '1.10 ± 0.25 (d 11, p 0.003, n 3)'
    """
    if not effect.n:
        return "not run"
    parts = [part for part in (size(effect), p_value(effect.corrected)) if part]
    return f"{number(effect)} ({', '.join([*parts, f'n {effect.n}'])})"


def size(effect: Effect) -> str:
    """The standardised size."""
    return f"d {effect.size:.3g}" if math.isfinite(effect.size) else ""


def p_value(p: float) -> str:
    """A p-value, in one digit."""
    if not math.isfinite(p):
        return ""
    return f"p {p:.1g}" if p >= 1e-4 else "p < 0.0001"  # noqa: PLR2004
