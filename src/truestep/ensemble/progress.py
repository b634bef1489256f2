"""How far an ensemble is, on one line of the terminal."""

import sys

__all__ = ["describe", "show"]

MINUTE, HOUR = 60, 3600
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def describe(done: int, total: int, seconds: float) -> str:
    """Share, speed and time left, in at most 79 characters.

    Args:
        done: replica-steps that are done.
        total: replica-steps in all.
        seconds: how long that took.

    Example:
        >>> describe(2_500_000, 10_000_000, 5.0)
        ' 25 %  2.5M of 10.0M replica-steps  500.0k/s  15 s left'
    """
    rate = done / seconds if seconds > 0 else 0.0
    left = "no estimate yet"
    if rate or not total:
        left = _time((total - done) / rate if rate else 0) + " left"
    share = f"{done / total if total else 1:4.0%}".replace("%", " %")
    return f"{share}  {_number(done)} of {_number(total)} replica-steps  {_number(rate)}/s  {left}"


def show(done: int, total: int, seconds: float) -> None:
    """Writes `describe` over the line before, to stderr; a new line begins when all is done."""
    end = "\n" if done >= total else ""
    sys.stderr.write("\r" + describe(done, total, seconds).ljust(79) + end)
    sys.stderr.flush()


def _number(value: float) -> str:
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def _time(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < MINUTE:
        return f"{seconds} s"
    if seconds < HOUR:
        return f"{seconds // MINUTE} min {seconds % MINUTE} s"
    return f"{seconds // HOUR} h {seconds % HOUR // MINUTE} min"
