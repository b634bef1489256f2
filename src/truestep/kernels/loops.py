"""The compiled loops. The inner ones run over units from 0, which is what the compiler vectorises."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["pack", "pack_halves", "scale", "scale_rows"]

WORD = 64


@intrinsic
def _count_bits(_context: Any, word: Any) -> Any:
    """The number of bits that are on in an int64."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        function = builder.module.declare_intrinsic("llvm.ctpop", [ir.IntType(64)])
        return builder.call(function, arguments)

    return types.int64(types.int64), generate


@njit(cache=True, nogil=True)
def pack(values: Any, words: Any) -> None:
    """Packs ``[rows, length, units]`` to ``[rows, words, units]``."""
    rows, length, units = values.shape
    for row in range(rows):
        for word in range(words.shape[1]):
            target = words[row, word]
            target[:] = 0
            for bit in range(min(WORD, length - word * WORD)):
                source = values[row, word * WORD + bit]
                place = np.int64(1) << np.int64(bit)
                for unit in range(units):
                    target[unit] |= place if source[unit] != 0 else np.int64(0)


@njit(cache=True, nogil=True)
def pack_halves(values: Any, words: Any) -> None:
    """As `pack`, of 16-bit floats read as int16: all but the sign bit tells zero."""
    rows, length, units = values.shape
    for row in range(rows):
        for word in range(words.shape[1]):
            target = words[row, word]
            target[:] = 0
            for bit in range(min(WORD, length - word * WORD)):
                source = values[row, word * WORD + bit]
                place = np.int64(1) << np.int64(bit)
                for unit in range(units):
                    target[unit] |= place if source[unit] & 0x7FFF else np.int64(0)


@njit(cache=True, nogil=True)
def scale(gradient: Any, outputs: Any, inputs: Any, factors: Any) -> None:
    """Multiplies ``gradient[j, k]`` by ``factors[m]``, m the bits on in both output j and input k.

    Args:
        gradient: ``[J, K]``.
        outputs: int64 ``[words, J]``.
        inputs: int64 ``[words, K]``.
        factors: ``[largest m + 1]``, of the gradient's dtype.
    """
    rows, columns = gradient.shape
    counts = np.empty(columns, np.int64)
    for row in range(rows):
        counts[:] = 0
        for word in range(outputs.shape[0]):
            output = outputs[word, row]
            source = inputs[word]
            for column in range(columns):
                counts[column] += _count_bits(output & source[column])  # type: ignore[call-arg]
        target = gradient[row]
        for column in range(columns):
            target[column] *= factors[counts[column]]


@njit(cache=True, nogil=True)
def scale_rows(
    gradient: Any, rows: Any, owners: Any, outputs: Any, by_entry: Any, factors: Any
) -> None:
    """Multiplies the rows that are looked up by ``factors[m]``, m the samples that reach (row, column).

    Args:
        gradient: ``[V, D]``.
        rows: int64 ``[entries]``, the row that each entry looks up.
        owners: int64 ``[entries]``, the sample of each entry, in ascending order.
        outputs: int64 ``[words, D]``, bits of entries or of samples.
        by_entry: which of the two.
        factors: ``[largest m + 1]``, of the gradient's dtype.
    """
    columns = gradient.shape[1]
    place = np.full(gradient.shape[0], -1, np.int64)
    used = np.empty(min(len(rows), gradient.shape[0]), np.int64)
    found = 0
    for entry in range(len(rows)):
        if place[rows[entry]] < 0:
            place[rows[entry]] = found
            used[found] = rows[entry]
            found += 1
    counts = np.zeros((found, columns), np.int32)
    # The last sample counted: one that looks a row up twice counts once.
    latest = np.full((found, columns), -1, np.int32)
    for entry in range(len(rows)):
        sample = np.int32(owners[entry])
        bit = entry if by_entry else owners[entry]
        source = outputs[bit // WORD]
        shift = np.int64(bit % WORD)
        count, last = counts[place[rows[entry]]], latest[place[rows[entry]]]
        for column in range(columns):
            on = np.int32((source[column] >> shift) & 1)
            count[column] += on & np.int32(last[column] != sample)
            last[column] = sample if on else last[column]
    for index in range(found):
        target, count = gradient[used[index]], counts[index]
        for column in range(columns):
            target[column] *= factors[count[column]]
