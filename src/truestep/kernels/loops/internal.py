"""How loops are compiled that only other loops call."""

from functools import partial
from typing import Any

from numba import njit

__all__ = ["internal"]

# Without what Python needs to call them, which takes the compiler a quarter of its time.
internal: Any = partial(
    njit, cache=True, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True
)
