"""Activation functions as calls show them: when a unit is on, and where the function is a straight line.

A unit is *on* at a sample where its pre-activation z is positive, whatever the activation function. The
aSGD paper writes sigma(z) < 0 for a unit that is off; for ReLU, whose output is never negative, that has to
be read as z <= 0, and only z tells for functions such as GELU or sigmoid, which are hardly ever exactly 0.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Activation", "Piece", "find_activation"]


@dataclass(frozen=True)
class Piece:
    """Where an activation function is a straight line: slope * z + intercept for low <= z <= high."""

    low: float
    high: float
    slope: float
    intercept: float


@dataclass(frozen=True)
class Activation:
    """An activation function with its parameters.

    Attributes:
        name: as torch calls the function.
        pieces: where it is a straight line; none for smooth functions.
        rising: whether it never falls, so that the ends of its outputs come from the ends of its inputs.

    Example:
        >>> relu = find_activation("relu", (), {})
        >>> relu.line(torch.tensor([0.5, -1.0, -1.0]), torch.tensor([2.0, 2.0, 0.0]))[0]
        tensor([1., nan, 0.], dtype=torch.float64)
    """

    name: str
    pieces: tuple[Piece, ...] = ()
    rising: bool = False

    def line(self, lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
        """The straight line that units follow.

        Args:
            lowest: the smallest pre-activation of each unit, ``[units]``.
            highest: the largest, ``[units]``.

        Returns:
            Slopes and intercepts, float64 ``[units]``; nan for units on no single piece.
        """
        slopes = torch.full(lowest.shape, math.nan, dtype=torch.float64, device="cpu")
        intercepts = slopes.clone()
        for piece in self.pieces:
            inside = (lowest >= piece.low) & (highest <= piece.high)
            slopes[inside], intercepts[inside] = piece.slope, piece.intercept
        return slopes, intercepts


def find_activation(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Activation | None:
    """The activation function of a call, or None if the call is not one.

    Args:
        name: of the function called, without the underscore of an in-place variant.
        args: positional arguments after the pre-activation.
        kwargs: keyword arguments.
    """
    make = ACTIVATIONS.get(name)
    return None if make is None else make(args, kwargs)


_ZERO = Piece(-math.inf, 0.0, 0.0, 0.0)
_IDENTITY = Piece(0.0, math.inf, 1.0, 0.0)
_SIXTH = 1 / 6
_KNEE = 3.0  # of the hard variants
_SELU = 1.0507009873554805  # its scale


def _argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str, default: Any
) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _leaky(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation:
    slope = float(_argument(args, kwargs, 0, "negative_slope", 0.01))
    return Activation(
        "leaky_relu", (Piece(-math.inf, 0.0, slope, 0.0), _IDENTITY), rising=slope >= 0
    )


def _between(low: float, high: float) -> Activation:
    below, above = Piece(-math.inf, low, 0.0, low), Piece(high, math.inf, 0.0, high)
    name = {(0.0, 6.0): "relu6", (0.0, math.inf): "relu"}.get((low, high), "hardtanh")
    return Activation(name, (below, above, Piece(low, high, 1.0, 0.0)), rising=True)


def _hardtanh(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation:
    low = _argument(args, kwargs, 0, "min_val", -1.0)
    return _between(float(low), float(_argument(args, kwargs, 1, "max_val", 1.0)))


def _clamp(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation | None:
    """`clamp(min=0)` is a ReLU; with an upper end it is ReLU6's kind."""
    low, high = _argument(args, kwargs, 0, "min", None), _argument(args, kwargs, 1, "max", None)
    numbers = all(end is None or isinstance(end, int | float) for end in (low, high))
    if low is None or not numbers or low != 0:
        return None
    return _between(0.0, math.inf if high is None else float(high))


def _hardshrink(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation:
    """Beyond the ends it is the identity, but not at them."""
    end = float(_argument(args, kwargs, 0, "lambd", 0.5))
    return Activation("hardshrink", (Piece(-end, end, 0.0, 0.0),), rising=True)


def _softshrink(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation:
    end = float(_argument(args, kwargs, 0, "lambd", 0.5))
    below, above = Piece(-math.inf, -end, 1.0, end), Piece(end, math.inf, 1.0, -end)
    return Activation("softshrink", (below, above, Piece(-end, end, 0.0, 0.0)), rising=True)


def _threshold(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation:
    end = float(_argument(args, kwargs, 0, "threshold", 0.0))
    value = float(_argument(args, kwargs, 1, "value", 0.0))
    return Activation("threshold", (Piece(-math.inf, end, 0.0, value),), rising=value <= end)


def _always(activation: Activation) -> Callable[..., Activation]:
    return lambda _args, _kwargs: activation


_LOG_SIGMOID = _always(Activation("logsigmoid", rising=True))

# Some have another name where torch's own module calls them.
ACTIVATIONS: dict[str, Callable[[tuple[Any, ...], Mapping[str, Any]], Activation | None]] = {
    "relu": _always(Activation("relu", (_ZERO, _IDENTITY), rising=True)),
    "relu6": _always(_between(0.0, 6.0)),
    "hardtanh": _hardtanh,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "leaky_relu": _leaky,
    "prelu": _always(Activation("prelu", (_IDENTITY,))),
    "elu": _always(Activation("elu", (_IDENTITY,))),
    "celu": _always(Activation("celu", (_IDENTITY,))),
    "selu": _always(Activation("selu", (Piece(0.0, math.inf, _SELU, 0.0),))),
    "gelu": _always(Activation("gelu")),
    "silu": _always(Activation("silu")),
    "mish": _always(Activation("mish")),
    "softplus": _always(Activation("softplus", rising=True)),
    "softsign": _always(Activation("softsign", rising=True)),
    "logsigmoid": _LOG_SIGMOID,
    "log_sigmoid": _LOG_SIGMOID,
    "tanhshrink": _always(Activation("tanhshrink", rising=True)),
    "hardshrink": _hardshrink,
    "softshrink": _softshrink,
    "threshold": _threshold,
    "_threshold": _threshold,
    "sigmoid": _always(Activation("sigmoid", rising=True)),
    "tanh": _always(Activation("tanh", rising=True)),
    "hardsigmoid": _always(
        Activation(
            "hardsigmoid",
            (
                Piece(-math.inf, -_KNEE, 0.0, 0.0),
                Piece(-_KNEE, _KNEE, _SIXTH, 0.5),
                Piece(_KNEE, math.inf, 0.0, 1.0),
            ),
        )
    ),
    "hardswish": _always(
        Activation(
            "hardswish",
            (Piece(-math.inf, -_KNEE, 0.0, 0.0), Piece(_KNEE, math.inf, 1.0, 0.0)),
        )
    ),
}
