"""The one base error: every message says what is wrong, where, why, and what to do."""

__all__ = ["TruestepError"]


class TruestepError(Exception):
    """Anything truestep refuses to do; the message ends with the way out.

    Example:
        >>> import truestep
        >>> issubclass(truestep.TruestepError, Exception)
        True
    """
