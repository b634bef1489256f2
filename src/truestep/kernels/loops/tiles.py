"""Products of small matrices, tile by tile, with the sums in registers.

Networks of the ensemble are too small for BLAS: at 10 x 10 x 128 a call of `sgemm` takes four times
the arithmetic. Two loops do, since every product of a training step has either its columns or the
dimension that it sums over contiguous in memory:

- `outer`: ``C[m, :] = sum over k of S[m, k] * V[index[k], :]``, vectors along the columns of C;
- `inner`: ``C[m, n] = sum over k of U[m, k] * V[index[n], k]``, vectors along what is summed.

Rows of V are picked by an index, so that a mini-batch is read where its samples lie. Memory is given as
addresses and strides in bytes; rows of V, and of C in `outer`, are padded to whole vectors.
"""

from collections.abc import Iterable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import repeat

__all__ = ["LANES", "inner", "outer"]


def _lanes() -> int:
    """How many float32 numbers one register of this processor holds."""
    features = binding.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


LANES = _lanes()
VECTOR_BYTES = 4 * LANES
# A tile of inner products is reduced at once, to a vector of as many sums as it has lanes.
COLUMNS = 4
ROWS = LANES // COLUMNS

NUMBER, WORD, INDEX = ir.FloatType(), ir.IntType(64), ir.IntType(32)
VECTOR = ir.VectorType(NUMBER, LANES)


def _load(builder: Any, address: Any, kind: Any) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 4
    return value


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4


def _shuffle(builder: Any, first: Any, second: Any, lanes: Iterable[int]) -> Any:
    chosen = list(lanes)
    mask = ir.Constant(ir.VectorType(INDEX, len(chosen)), chosen)
    return builder.shuffle_vector(first, second, mask)


def _add_product(builder: Any, total: Any, first: Any, second: Any) -> None:
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    builder.store(builder.call(fma, [first, second, builder.load(total)]), total)


def _totals(builder: Any, rows: int, columns: int) -> list[list[Any]]:
    zero = ir.Constant(VECTOR, None)
    return [[cgutils.alloca_once_value(builder, zero) for _ in range(columns)] for _ in range(rows)]


def _outer_tile(rows: int, vectors: int) -> Any:
    """A tile of `outer`: so many rows of C, and so many vectors of each."""

    @intrinsic
    def tile(
        _context: Any,
        depth: Any,
        s: Any,
        s_row: Any,
        s_step: Any,
        v: Any,
        v_row: Any,
        index: Any,
        c: Any,
        c_row: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            depth, s, s_row, s_step, v, v_row, index, c, c_row = arguments
            totals = _totals(builder, rows, vectors)
            starts = [s]
            for _ in range(rows - 1):
                starts.append(builder.add(starts[-1], s_row))
            with cgutils.for_range(builder, depth) as loop:
                place = builder.add(index, builder.shl(loop.index, WORD(2)))
                row = builder.sext(_load(builder, place, INDEX), WORD)
                at = builder.add(v, builder.mul(row, v_row))
                read = [
                    _load(builder, builder.add(at, WORD(VECTOR_BYTES * n)), VECTOR)
                    for n in range(vectors)
                ]
                step = builder.mul(loop.index, s_step)
                for start, line in zip(starts, totals, strict=True):
                    number = _load(builder, builder.add(start, step), NUMBER)
                    factor = repeat(builder, number, VECTOR)
                    for vector, total in zip(read, line, strict=True):
                        _add_product(builder, total, factor, vector)
            for line in totals:
                for n, total in enumerate(line):
                    _store(builder, builder.load(total), builder.add(c, WORD(VECTOR_BYTES * n)))
                c = builder.add(c, c_row)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return tile


def _inner_tile(rows: int) -> Any:
    """A tile of `inner`: so many rows of C and four columns."""

    @intrinsic
    def tile(_context: Any, depth: Any, u: Any, v: Any, c: Any, c_row: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            depth, u, v, c, c_row = arguments
            left = cgutils.unpack_tuple(builder, u, rows)
            right = cgutils.unpack_tuple(builder, v, COLUMNS)
            totals = _totals(builder, rows, COLUMNS)
            with cgutils.for_range(builder, depth) as loop:
                step = builder.mul(loop.index, WORD(VECTOR_BYTES))
                read = [_load(builder, builder.add(row, step), VECTOR) for row in right]
                for row, line in zip(left, totals, strict=True):
                    vector = _load(builder, builder.add(row, step), VECTOR)
                    for other, total in zip(read, line, strict=True):
                        _add_product(builder, total, vector, other)
            sums = _sums(builder, [builder.load(total) for line in totals for total in line])
            for row in range(rows):
                part = _shuffle(builder, sums, sums, range(COLUMNS * row, COLUMNS * (row + 1)))
                _store(builder, part, c)
                c = builder.add(c, c_row)
            return context.get_dummy_value()

        addresses = [types.UniTuple(types.int64, count) for count in (rows, COLUMNS)]
        return types.void(types.int64, *addresses, types.int64, types.int64), generate

    return tile


def _sums(builder: Any, vectors: list[Any]) -> Any:
    """The sums of four vectors' lanes, or of as many vectors' as a vector has lanes, as one vector."""

    def folded(parts: list[Any], low: list[int], high: list[int]) -> list[Any]:
        return [
            builder.fadd(
                _shuffle(builder, first, second, low), _shuffle(builder, first, second, high)
            )
            for first, second in zip(parts[::2], parts[1::2], strict=True)
        ]

    # Within each quarter of 128 bits, where shuffles are cheapest, until it holds sums of four vectors.
    quarters = range(0, LANES, 4)
    low = [lane for q in quarters for lane in (q, LANES + q, q + 1, LANES + q + 1)]
    parts = folded(vectors, low, [lane + 2 for lane in low])
    low = [lane for q in quarters for lane in (q, q + 1, LANES + q, LANES + q + 1)]
    parts = folded(parts, low, [lane + 2 for lane in low])
    # Then neighbouring quarters.
    low = [lane for q in range(0, 2 * LANES, 8) for lane in range(q, q + 4)]
    while len(parts) > 1:
        parts = folded(parts, low, [lane + 4 for lane in low])
    if len(vectors) < LANES:
        total, width = parts[0], LANES
        while width > COLUMNS:
            width //= 2
            halves = range(width), range(width, 2 * width)
            total = builder.fadd(*(_shuffle(builder, total, total, half) for half in halves))
        return total
    return parts[0]


_outer_4_4, _outer_4_2, _outer_4_1 = (_outer_tile(4, vectors) for vectors in (4, 2, 1))
_outer_1_4, _outer_1_2, _outer_1_1 = (_outer_tile(1, vectors) for vectors in (4, 2, 1))
_inner_all, _inner_row = _inner_tile(ROWS), _inner_tile(1)


@internal
def outer(
    rows: Any,
    vectors: Any,
    depth: Any,
    s: Any,
    s_row: Any,
    s_step: Any,
    v: Any,
    v_row: Any,
    index: Any,
    c: Any,
    c_row: Any,
) -> None:
    """``C[m, :] = sum over k of S[m, k] * V[index[k], :]``.

    Args:
        rows: of C.
        vectors: in a row of C.
        depth: how many k.
        s: address of S.
        s_row: bytes from one m to the next.
        s_step: bytes from one k to the next.
        v: address of V.
        v_row: bytes from one row of V to the next.
        index: address of int32 ``[depth]``, the rows of V.
        c: address of C.
        c_row: bytes from one row of C to the next.
    """
    column = 0
    while column < vectors:
        left = vectors - column
        at, to = v + column * VECTOR_BYTES, c + column * VECTOR_BYTES
        row = 0
        while row < rows:
            four = row + 4 <= rows
            start, end = s + row * s_row, to + row * c_row
            if left >= 4:
                if four:
                    _outer_4_4(depth, start, s_row, s_step, at, v_row, index, end, c_row)
                else:
                    _outer_1_4(depth, start, s_row, s_step, at, v_row, index, end, c_row)
            elif left >= 2:
                if four:
                    _outer_4_2(depth, start, s_row, s_step, at, v_row, index, end, c_row)
                else:
                    _outer_1_2(depth, start, s_row, s_step, at, v_row, index, end, c_row)
            elif four:
                _outer_4_1(depth, start, s_row, s_step, at, v_row, index, end, c_row)
            else:
                _outer_1_1(depth, start, s_row, s_step, at, v_row, index, end, c_row)
            row += 4 if four else 1
        column += 4 if left >= 4 else 2 if left >= 2 else 1


@internal
def inner(
    rows: Any,
    columns: Any,
    vectors: Any,
    u: Any,
    u_row: Any,
    v: Any,
    v_row: Any,
    index: Any,
    c: Any,
    c_row: Any,
) -> None:
    """``C[m, n] = sum over k of U[m, k] * V[index[n], k]``.

    Four columns are written at a time: the last ones overlap with those before, and where there are
    fewer than four, up to three numbers behind a row are overwritten.

    Args:
        rows: of C.
        columns: of C.
        vectors: in a row of U and of V.
        u: address of U.
        u_row: bytes from one row of U to the next.
        v: address of V.
        v_row: bytes from one row of V to the next.
        index: address of int32 ``[columns]``, the rows of V.
        c: address of C.
        c_row: bytes from one row of C to the next.
    """
    last = columns - 1
    column = 0
    while column < columns:
        first = max(min(column, columns - 4), 0)
        right = (
            v + _row(index, first) * v_row,
            v + _row(index, min(first + 1, last)) * v_row,
            v + _row(index, min(first + 2, last)) * v_row,
            v + _row(index, min(first + 3, last)) * v_row,
        )
        row = 0
        while row < rows:
            if row + ROWS <= rows:
                at = u + row * u_row
                _inner_all(vectors, _starts(at, u_row), right, c + row * c_row + 4 * first, c_row)
                row += ROWS
            else:
                _inner_row(vectors, (u + row * u_row,), right, c + row * c_row + 4 * first, c_row)
                row += 1
        column += 4


@intrinsic
def _row(_context: Any, index: Any, place: Any) -> Any:
    """The int32 number at a place of those that begin at an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address = builder.add(arguments[0], builder.shl(arguments[1], WORD(2)))
        return builder.sext(_load(builder, address, INDEX), WORD)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _starts(_context: Any, first: Any, step: Any) -> Any:
    """The addresses of the rows of a tile of inner products."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        starts = [arguments[0]]
        for _ in range(ROWS - 1):
            starts.append(builder.add(starts[-1], arguments[1]))
        return context.make_tuple(builder, signature.return_type, starts)

    return types.UniTuple(types.int64, ROWS)(types.int64, types.int64), generate
