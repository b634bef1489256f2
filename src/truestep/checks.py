"""What arguments have to be, in one error each."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn

from truestep.errors import TruestepError

__all__ = [
    "check_batch_dim",
    "check_factor",
    "check_kind",
    "check_rules",
    "require_at_least_zero",
]


def require_at_least_zero(**values: Any) -> None:
    """Raises `TruestepError` unless each value is a finite number, or a tensor of one, of at least 0."""
    for name, value in values.items():
        found = value.detach() if isinstance(value, Tensor) else value
        number = isinstance(found, Real) or (isinstance(found, Tensor) and found.numel() == 1)
        if not (number and found >= 0 and math.isfinite(found)):
            raise TruestepError(f"{name} is {value!r}; use a finite number that is at least 0")


def check_factor(eps: Any, limit: Any) -> None:
    """Raises `TruestepError` unless ``N / (m + eps)`` is a factor for every m > 0, and a limit leaves one.

    Args:
        eps: see `truestep.AdaptiveBatchSGD`.
        limit: its `factor_limit`.
    """
    require_at_least_zero(eps=eps)
    if limit is not None and not (isinstance(limit, Real) and float(limit) > 0):
        raise TruestepError(f"factor_limit is {limit!r}; set a positive number or None")


def check_kind(value: Any, kind: type, name: str, instead: str) -> None:
    """Raises `TruestepError` unless a value is of a kind.

    Args:
        value: an argument.
        kind: its class.
        name: the argument's.
        instead: what to pass.
    """
    if not isinstance(value, kind):
        raise TruestepError(f"{name} is of type {type(value).__name__}; pass {instead}")


def check_rules(rules: Any) -> None:
    """Raises `TruestepError` unless rules are functions by layer classes, or those classes' dotted names."""
    check_kind(rules, Mapping, "rules", "a mapping, truestep.RULES | {MyLayer: my_rule}")
    for key, rule in rules.items():
        named = isinstance(key, str) or (isinstance(key, type) and issubclass(key, nn.Module))
        if not (named and callable(rule)):
            raise TruestepError(
                f"rules has {key!r}: {rule!r}; give functions by classes of layers, or by their dotted "
                "names, and leave out those without a rule"
            )


def check_batch_dim(batch_dim: Any, modules: Iterable[str]) -> None:
    """Raises `TruestepError` unless it is a dimension, or dimensions by names of modules.

    Args:
        batch_dim: see `truestep.SampleCounter`.
        modules: their names.
    """
    if isinstance(batch_dim, int):
        return
    check_kind(
        batch_dim, Mapping, "batch_dim", "a number, or a mapping from names of modules to it"
    )
    names = set(modules)
    for name, dim in batch_dim.items():
        if name not in names:
            raise TruestepError(
                f"batch_dim has {name!r}, which is no module of the model; its names are those of "
                "model.named_modules()"
            )
        if not (dim is None or isinstance(dim, int)):
            raise TruestepError(f"batch_dim has {dim!r} for {name!r}; set a number or None")
