"""Elementary functions of float32 that the compiler vectorises, to about one unit in the last place.

Calls of the C library's would keep the loops around them scalar. Arguments are reduced and the
polynomials evaluated as in the Cephes library.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["erf", "exp", "log", "sigmoid", "tanh"]

F = np.float32
LARGEST, SMALLEST = F(88.3762626647949), F(-87.3365478515625)
LOG2_E, LN2_HIGH, LN2_LOW = F(1.44269504088896341), F(0.693359375), F(-2.12194440e-4)
SQRT_HALF = F(0.707106781186547524)
EXPONENT_ONE, MANTISSA = 127, 23


@intrinsic
def _as_float(_context: Any, word: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _as_int(_context: Any, number: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@njit(cache=True, nogil=True, error_model="numpy")
def exp(x: Any) -> Any:
    """``e ** x``, 0 below -87.3 and infinite above 88.3."""
    clipped = min(max(x, SMALLEST), LARGEST)
    whole = np.floor(clipped * LOG2_E + F(0.5))
    r = clipped - whole * LN2_HIGH - whole * LN2_LOW
    p = F(1.9875691500e-4)
    p = p * r + F(1.3981999507e-3)
    p = p * r + F(8.3334519073e-3)
    p = p * r + F(4.1665795894e-2)
    p = p * r + F(1.6666665459e-1)
    p = p * r + F(5.0000001201e-1)
    p = p * r * r + r + F(1)
    scale = _as_float(np.int32((np.int32(whole) + np.int32(EXPONENT_ONE)) << np.int32(MANTISSA)))
    value = p * scale
    value = F(np.inf) if x > LARGEST else value
    value = F(0) if x < SMALLEST else value
    return value if x == x else x  # noqa: PLR0124 - not a number


@njit(cache=True, nogil=True, error_model="numpy")
def log(x: Any) -> Any:
    """The natural logarithm of a positive, normal number; infinity stays."""
    word = _as_int(x)
    exponent = F((word >> np.int32(MANTISSA)) - np.int32(EXPONENT_ONE - 1))
    fraction = _as_float(np.int32((word & np.int32(0x007FFFFF)) | np.int32(0x3F000000)))
    small = fraction < SQRT_HALF
    exponent = exponent - F(1) if small else exponent
    r = (fraction + fraction if small else fraction) - F(1)
    square = r * r
    p = F(7.0376836292e-2)
    p = p * r + F(-1.1514610310e-1)
    p = p * r + F(1.1676998740e-1)
    p = p * r + F(-1.2420140846e-1)
    p = p * r + F(1.4249322787e-1)
    p = p * r + F(-1.6668057665e-1)
    p = p * r + F(2.0000714765e-1)
    p = p * r + F(-2.4999993993e-1)
    p = p * r + F(3.3333331174e-1)
    p = p * r * square + exponent * LN2_LOW - F(0.5) * square
    value = r + p + exponent * LN2_HIGH
    return value if x < F(np.inf) else x


@njit(cache=True, nogil=True, error_model="numpy")
def sigmoid(x: Any) -> Any:
    """``1 / (1 + e ** -x)``."""
    return F(1) / (F(1) + exp(-x))


@njit(cache=True, nogil=True, error_model="numpy")
def tanh(x: Any) -> Any:
    """The hyperbolic tangent: a polynomial near 0, where the quotient would cancel."""
    square = x * x
    p = F(-5.70498872745e-3)
    p = p * square + F(2.06390887954e-2)
    p = p * square + F(-5.37397155531e-2)
    p = p * square + F(1.33314422036e-1)
    p = p * square + F(-3.33332819422e-1)
    near = p * square * x + x
    size = abs(x)
    far = F(1) - F(2) / (exp(size + size) + F(1))
    far = far if x > F(0) else -far
    return near if size < F(0.625) else far


@njit(cache=True, nogil=True, error_model="numpy")
def erf(x: Any) -> Any:
    """The error function: a rational approximation on [-4, 4], where it reaches one in float32."""
    clipped = min(max(x, F(-4)), F(4))
    square = clipped * clipped
    p = F(-2.72614225801306e-10)
    p = p * square + F(2.77068142495902e-08)
    p = p * square + F(-2.10102402082508e-06)
    p = p * square + F(-5.69250639462346e-05)
    p = p * square + F(-7.34990630326855e-04)
    p = p * square + F(-2.95459980854025e-03)
    p = p * square + F(-1.60960333262415e-02)
    q = F(-1.45660718464996e-05)
    q = q * square + F(-2.13374055278905e-04)
    q = q * square + F(-1.68282697438203e-03)
    q = q * square + F(-7.37332916720468e-03)
    q = q * square + F(-1.42647390514189e-02)
    value = clipped * p / q
    return value if x == x else x  # noqa: PLR0124 - not a number
