"""Between the experiments' names and `truestep.ensemble`'s."""

from typing import Any

from truestep import ensemble
from truestep.errors import TruestepError

__all__ = ["OPTIMIZERS", "named", "optimizer"]

# What each of the papers' optimizers is to the engine.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "asgd": {"asgd": True},
    "dasgd": {"dasgd": True},
    "momentum 0.5": {"momentum": 0.5},
    "momentum 0.9": {"momentum": 0.9},
    "nesterov 0.9": {"momentum": 0.9, "nesterov": True},
    "asgd, momentum 0.9": {"asgd": True, "momentum": 0.9},
}


def optimizer(
    name: str, lr: float, *, eps: float = 1.0, schedule: str = "constant"
) -> ensemble.Optimizer:
    """An optimizer of the engine.

    Args:
        name: A key of `OPTIMIZERS`.
        lr: Learning rate.
        eps: Of the mean effective gradient; says nothing to others.
        schedule: ``"constant"`` or ``"cosine"``.

    Raises:
        TruestepError: There is no such optimizer.
    """
    if name not in OPTIMIZERS:
        raise TruestepError(f"{name!r} is no optimizer; choose one of {', '.join(OPTIMIZERS)}.")
    options = OPTIMIZERS[name]
    if options.get("asgd"):
        options = options | {"asgd_eps": eps}
    return ensemble.Optimizer("sgd", lr=lr, schedule=schedule, **options)


def named(result: ensemble.Result) -> str:
    """What computed a result, for the record."""
    return f"ensemble, {result.backend}"
