"""Compiled loops and their twins in torch operations give the same, to the bit."""

import importlib
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import truestep
from devices import reckoned
from truestep.activity import Elements, Outer, Rows, Window
from truestep.bits import Bits, Packed, join, pack
from truestep.combine import Counts
from truestep.fused import Pass
from truestep.kernels import dispatch, packing, stepping, threads
from truestep.kernels.scanning import scan, scan_torch
from truestep.update import adaptive_factor, scale_
from zoo import ZOO

pytestmark = pytest.mark.skipif(not dispatch.installed(), reason="numba is not installed")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
STEPPED = [torch.float32, torch.float64, torch.bfloat16]
EVERY_KIND = [stepping.LINEAR, stepping.POSITIONS, stepping.LOOKUPS]


def words_of(values):
    """What `packing.pack` gives, with all bits on written out."""
    words = packing.pack(values)
    if words is None:
        assert values.all()
        return packing.pack_torch(torch.ones(values.shape))
    return words


@given(
    st.sampled_from([*DTYPES, torch.bool]),
    st.integers(0, 140),
    st.integers(0, 140),
    st.integers(0, 70),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from(["positions", "none", "channels first", "time first"]),
)
def test_packing_equals_its_twin(dtype, samples, positions, units, density, order):
    if order == "none":
        values = torch.randn(samples, units)
    elif order == "positions":
        values = torch.randn(samples % 9, positions, units)
    elif order == "channels first":
        values = torch.randn(samples % 9, units, positions).transpose(1, 2)
    else:
        values = torch.randn(positions, samples % 9, units).transpose(0, 1)
    values = (values * (torch.rand_like(values) < density)).to(dtype)
    assert torch.equal(words_of(values), packing.pack_torch(values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_zero(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    values = [[0.0], [-0.0], [torch.nan], [-torch.inf], [tiny], [-tiny]]
    assert packing.pack(torch.tensor(values, dtype=dtype)).item() == 0b111100


@given(
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(1, 9),
    st.integers(0, 140),
    st.integers(1, 5),
    st.sampled_from([1, 3, 65]),
    st.sampled_from(["rows", "groups"]),
    st.booleans(),
)
def test_packing_what_is_off_its_mean_equals_its_twin(
    dtype, samples, positions, groups, width, of, channels_first
):
    units = groups * width
    shape = (samples, units, positions) if channels_first else (samples, positions, units)
    values = torch.randint(-2, 3, shape).to(dtype)
    values[values == 2] = torch.tensor([-0.0, torch.nan, torch.inf])[torch.randint(3, ())]
    values = values.transpose(1, 2) if channels_first else values
    if positions == 0:  # without positions
        values = torch.randint(-2, 3, (samples, units)).to(dtype)
        means = torch.randint(-2, 3, (samples, 1 if of == "rows" else groups)).to(dtype)
    elif of == "rows":
        means = torch.randint(-2, 3, (samples, positions, 1)).to(dtype)
    else:
        means = torch.randint(-2, 3, (samples, 1, groups)).to(dtype)
    means[torch.rand(means.shape) < 0.1] = torch.inf
    found = packing.pack(values, means)
    expected = packing.pack_torch(values, means)
    assert torch.equal(expected, packing.pack_torch(packing.off_mean(values, means)))
    if found is None:
        assert packing.off_mean(values, means).all()
    else:
        assert torch.equal(found, expected)


def test_tables_have_the_columns_that_loops_read():
    fields = importlib.import_module("truestep.kernels.loops.fields")
    names = [name.upper() for name in stepping.Entry._fields]
    before = fields.FIELDS - len(names)
    assert [getattr(fields, name) for name in names] == list(range(before, fields.FIELDS))
    assert stepping.FIELDS == fields.FIELDS
    assert list(importlib.import_module("truestep.kernels.loops.step").KINDS) == EVERY_KIND
    numbers = importlib.import_module("truestep.kernels.loops.numbers")
    assert (packing.PACK_FIELDS, packing.PACK_PAIR) == (numbers.FIELDS, numbers.PAIR)
    ours = packing.PACK_ADDRESS, packing.PACK_MEANS, packing.PACK_WORDS, packing.PACK_FULL
    assert ours == (numbers.ADDRESS, numbers.MEANS, numbers.WORDS, numbers.FULL)
    ours = packing.ALONE, packing.ASKED, packing.REACHED
    assert ours == (numbers.ALONE, numbers.ASKED, numbers.REACHED)
    joins = importlib.import_module("truestep.kernels.loops.joins")
    columns = [
        getattr(joins, "ADDRESS" if name == "words" else name.upper())
        for name in packing.Join._fields
    ]
    assert columns == list(range(len(columns)))
    assert packing.JOIN_FIELDS == joins.FIELDS == len(columns) + 2


@pytest.mark.parametrize(
    ("layer", "inputs", "kinds"),
    [
        (nn.Linear(3, 2), torch.eye(3), stepping.LINEAR),
        (nn.Conv1d(1, 2, 2), torch.eye(3)[:, None], stepping.LINEAR | stepping.POSITIONS),
        (nn.Embedding(3, 2), torch.arange(3), stepping.LOOKUPS),
    ],
    ids=["linear", "convolution", "embedding"],
)
def test_loops_of_the_kinds_of_rows_that_a_model_has_are_compiled(
    monkeypatch, layer, inputs, kinds
):
    asked, loops = [], dispatch.loops()
    functions = loops.functions_of
    monkeypatch.setattr(
        loops, "functions_of", lambda kinds, stored: asked.append(kinds) or functions(kinds, stored)
    )
    counter = truestep.SampleCounter(layer)
    optimizer = truestep.AdaptiveBatchSGD(layer.parameters(), lr=0.1, counter=counter)
    layer(inputs).sum().backward()
    optimizer.step()
    assert asked == [kinds]
    for bit, address in zip(EVERY_KIND, functions(kinds, np.float32), strict=True):
        assert bool(address) == bool(kinds & bit)


def test_packing_takes_any_stride():
    values = torch.randn(140, 70) * (torch.rand(140, 70) < 0.5)
    for view in (
        values.T,
        values[::2, ::3],
        values.expand(2, 140, 70),
        values[:, None].expand(-1, 2, -1),
        values.reshape(10, 14, 70).permute(2, 0, 1),
    ):
        assert torch.equal(words_of(view), packing.pack_torch(view))


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 70),
    st.sampled_from([1, 3, 15, 16, 511, 513, 1030]),
    st.booleans(),
    st.sampled_from([0.0, 0.05]),
)
def test_scanning_equals_its_twin(dtype, rows, units, positions, odd):
    values = torch.randn(rows, 2, units) if positions else torch.randn(rows, units)
    values = (values * 2).round() / 2
    for number in (torch.nan, torch.inf, -torch.inf):
        values[torch.rand_like(values) < odd] = number
    values = values.to(dtype)
    dim = values.dim() - 1
    for ours, twin in zip(scan(values, dim), scan_torch(values, dim), strict=True):
        torch.testing.assert_close(ours, twin, rtol=0, atol=0, equal_nan=True)


def made(mask):
    """Bits of a mask, with words also where all are on."""
    return Bits(packing.pack_torch(mask), *mask.shape)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 130),
            st.integers(1, 140),
            st.integers(1, 9),
            st.sampled_from([0.02, 0.5, 1.0]),
            st.sampled_from([None, 0.5, 1.0]),
        ),
        max_size=4,
    )
)
def test_joining_positions_equals_its_twin(sizes):
    pairs, expected = [], []
    for samples, positions, units, density, other in sizes:
        mask = torch.rand(samples, positions, units) < density
        second = None if other is None else torch.rand(mask.shape) < other
        pairs.append((pack(mask), None if second is None else pack(second)))
        expected.append((mask if second is None else mask & second).any(1))
    for bits, mask in zip(join(pairs), expected, strict=True):
        assert bits.positions == 1
        assert torch.equal(bits.mask(), mask)
        # Words, or none where all are on.
        assert bits.words is not None or mask.all()


def test_what_is_joined_is_known_to_be_full():
    mask = torch.zeros(3, 4, 2, dtype=torch.bool)
    mask[:, 1, 0] = mask[:, 2, 1] = True
    one, other = made(mask), made(torch.ones(70, 1, 2, dtype=torch.bool))
    assert [bits.words for bits in join([(one, None), (other, other)])] == [None, None]


@given(st.integers(1, 70), st.integers(1, 140), st.integers(1, 9), st.sampled_from([0.02, 0.5, 1]))
def test_joining_in_torch_operations(samples, positions, units, density):
    mask = torch.rand(samples, positions, units) < density
    joined = packing.join_torch(packing.pack_torch(mask), samples, positions)
    if joined is None:
        assert mask.any(1).all()
    else:
        assert torch.equal(joined, packing.pack_torch(mask.any(1)))


DENSITY = st.sampled_from([0.0, 0.05, 0.4, 1.0])


def same_counts(activity):
    """Compiled counts and those by masks are the same, and so is what they do to a gradient."""
    assert activity.entries() is not None
    counts = activity.count_masks()
    assert torch.equal(activity.count(), counts)
    for dtype in STEPPED:
        gradient = torch.randn(activity.shape, dtype=dtype)
        size = activity.samples
        expected = gradient * adaptive_factor(counts, size, 1.0, 3.0, reckoned(dtype))
        assert stepping.takes(gradient)
        assert torch.equal(scale_(gradient, activity, size, 1.0, 3.0), expected.to(dtype))


@given(
    samples=st.integers(1, 300),
    positions=st.integers(1, 400),
    rows=st.sampled_from([1, 5, 8, 11, 16, 17, 33, 70]),
    columns=st.integers(1, 140),
    densities=st.tuples(DENSITY, DENSITY),
)
def test_linear_maps_equal_their_twin(samples, positions, rows, columns, densities):
    samples = samples if positions == 1 else samples % 9 + 1
    outputs = torch.rand(samples, positions, rows) < densities[0]
    inputs = torch.rand(samples, positions, columns) < densities[1]
    same_counts(Outer(torch.Size([rows, columns]), pack(outputs), pack(inputs)))
    same_counts(Elements(torch.Size([rows]), pack(outputs).any_position()))


AXIS = st.tuples(
    st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(1, 2), st.integers(0, 2)
)


@given(
    axes=st.lists(AXIS, min_size=1, max_size=3),
    long=st.sampled_from([0, 60, 130]),
    samples=st.integers(1, 3),
    channels=st.sampled_from([1, 2, 3, 9, 20]),
    groups=st.integers(1, 3),
    rows=st.sampled_from([1, 3, 6, 8, 9, 17, 33]),
    densities=st.tuples(DENSITY, DENSITY),
    by_position=st.booleans(),
)
def test_convolutions_equal_their_twin(
    axes, long, samples, channels, groups, rows, densities, by_position
):
    size, kernel, stride, dilation, padding = zip(*axes, strict=True)
    if len(size) == 1:
        size = (size[0] + long,)
    seen = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, d, p in zip(size, kernel, stride, dilation, padding, strict=True)
    ]
    if min(seen) < 1:
        return
    around = tuple(side for side in reversed(padding) for _ in range(2))
    inputs = channels * groups
    window = Window(
        *(size, tuple(seen), kernel, stride, dilation, around, "constant", inputs, groups),
        by_position=by_position,
    )
    outputs = torch.rand(samples, math.prod(seen), rows * groups) < densities[0]
    image = torch.rand(samples, math.prod(size), inputs) < densities[1]
    shape = torch.Size([rows * groups, channels, *kernel])
    same_counts(Outer(shape, pack(outputs), pack(image), window))


def convolved(dtype):
    """Convolutions of many samples, of units of all densities, whose channels or rows threads share."""
    for channels, groups, kernel, stride in (
        (3, 1, 3, 1),
        (20, 1, 3, 2),
        (36, 1, 1, 2),
        (24, 12, 3, 1),
    ):
        seen = (11 - kernel) // stride + 1
        square = [(size, size) for size in (11, seen, kernel, stride, 1)]
        window = Window(*square, (0,) * 4, "constant", channels, groups, by_position=False)
        rows = 3 * groups if groups > 1 else 37
        outputs = torch.rand(45, seen * seen, rows) < torch.rand(rows) ** 3
        image = torch.rand(45, 121, channels) < torch.rand(channels) ** 3
        image[::3, :, 0], outputs[::5], outputs[::7, :, 1] = False, False, True
        shape = torch.Size([rows, channels // groups, kernel, kernel])
        yield Outer(shape, pack(outputs.to(dtype)), pack(image.to(dtype)), window)


def test_convolutions_of_many_samples_equal_their_twin():
    torch.manual_seed(0)
    for activity in convolved(torch.float32):
        same_counts(activity)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("samples", [3, 70, 130])
def test_a_kernel_that_fits_in_one_place_equals_its_twin(samples, by_position):
    window = Window((3,), (1,), (3,), (1,), (1,), (0, 0), "constant", 4, 2, by_position)
    outputs, image = torch.rand(samples, 1, 6) < 0.5, torch.rand(samples, 3, 4) < 0.5
    same_counts(Outer(torch.Size([6, 2, 3]), pack(outputs), pack(image), window))
    full = pack(torch.ones_like(image))
    same_counts(Outer(torch.Size([6, 2, 3]), pack(outputs), full, window))


@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [((4, 0, 3), (4, 0, 8)), ((7, 3), (7, 0)), ((7, 0), (7, 3)), ((0, 3), (0, 3))],
)
def test_nothing_is_counted_in_tensors_without_elements(outputs, inputs):
    """Their words have no address, which is not that of bits that are all on."""
    shape = torch.Size([outputs[-1], inputs[-1]])
    activity = Outer(shape, pack(torch.ones(outputs)), pack(torch.ones(inputs)))
    assert torch.equal(activity.count(), torch.zeros(shape, dtype=torch.int64))
    assert torch.equal(activity.count_masks(), activity.count())
    assert torch.equal(scale_(torch.ones(shape), activity, 4), torch.ones(shape))


@given(
    samples=st.integers(1, 150),
    entries=st.integers(0, 80),
    by_entry=st.booleans(),
    density=DENSITY,
    shape=st.sampled_from([(6, 5), (500, 7), (3, 1100)]),
)
def test_embeddings_equal_their_twin(samples, entries, by_entry, density, shape):
    owners, rows = torch.randint(0, samples, (entries,)), torch.randint(0, shape[0], (entries,))
    outputs = pack(torch.rand(entries if by_entry else samples, shape[1]) < density)
    owners = owners.sort().values.int()
    same_counts(Rows(torch.Size(shape), samples, rows.int(), owners, outputs, by_entry))


@pytest.mark.parametrize("by_entry", [False, True])
def test_an_embedding_that_is_not_looked_up(by_entry):
    nothing = torch.zeros(0, dtype=torch.int32)
    outputs = pack(torch.zeros(0 if by_entry else 4, 5))
    same_counts(Rows(torch.Size([6, 5]), 4, nothing, nothing, outputs, by_entry))


@pytest.mark.parametrize("dtype", STEPPED)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("extra", [{}, {"dampening": 0.3}, {"nesterov": True}])
def test_a_fused_step_equals_the_step_of_torch(dtype, momentum, weight_decay, maximize, extra):
    if extra and not momentum:
        return
    torch.manual_seed(0)
    ours = [
        torch.randn(7, 9, dtype=dtype),
        torch.randn(5, dtype=dtype),
        torch.randn(3, dtype=dtype),
        torch.randn(400, 7, dtype=dtype),
    ]
    ours[3][::5] = -0.0
    wide = reckoned(dtype)
    theirs = [nn.Parameter(tensor.to(wide, copy=True)) for tensor in ours]
    settings = {"lr": 0.03, "momentum": momentum, "weight_decay": weight_decay}
    settings |= {"maximize": maximize, **extra}
    reference = torch.optim.SGD(theirs, foreach=False, **settings)
    buffers = [torch.empty_like(tensor) if momentum else None for tensor in ours]
    for number in range(3):
        mask = torch.rand(20, 7) < 0.3, torch.rand(20, 9) < 0.3
        weight = Outer(ours[0].shape, pack(mask[0]), pack(mask[1]))
        bias = Elements(ours[1].shape, pack(torch.rand(20, 5) < 0.2))
        # Many of the first rows, few of the last.
        places, owners = torch.randint(0, 400, (60,)) ** 2 // 400, torch.arange(60).int() // 3
        table = Rows(ours[3].shape, 20, places.int(), owners, pack(torch.rand(20, 7) < 0.5), False)
        found = [(weight, 20), (bias, 20), None, (table, 20)]
        whole = Pass(stepping.Options(**settings))
        for parameter, same, reached, buffer in zip(ours, theirs, found, buffers, strict=True):
            gradient = torch.randn_like(parameter)
            if len(gradient) == 400:  # most of a table's rows have none, of either sign
                gradient[torch.rand(400) < 0.8] *= 0
            same.grad = gradient.to(wide, copy=True)
            if reached is not None:
                same.grad *= adaptive_factor(reached[0].count_masks(), 20, dtype=wide)
            whole.add(gradient, reached, parameter, buffer, fresh=number == 0)
        whole.run()
        reference.step()
        for one, other, buffer in zip(ours, theirs, buffers, strict=True):
            kept = [(one, other.data)]
            if buffer is not None:
                kept.append((buffer, reference.state[other]["momentum_buffer"]))
            for mine, its in kept:
                its.copy_(its.to(dtype))
                assert torch.equal(mine, its.to(dtype))
                assert torch.equal(mine.signbit(), its.signbit())


@given(
    samples=st.integers(1, 150),
    entries=st.integers(1, 80),
    values=st.integers(0, 90),
    by_entry=st.booleans(),
    density=DENSITY,
    shape=st.sampled_from([(6, 5), (500, 7), (100_000, 33)]),
    maximize=st.booleans(),
    limit=st.sampled_from([None, 3.0]),
    dtype=st.sampled_from(STEPPED),
)
def test_a_step_of_a_sparse_gradient_equals_that_of_torch(
    samples, entries, values, by_entry, density, shape, maximize, limit, dtype
):
    rows = torch.randint(0, shape[0], (entries,))
    outputs = pack(torch.rand(entries if by_entry else samples, shape[1]) < density)
    owners = torch.randint(0, samples, (entries,)).sort().values.int()
    activity = Rows(torch.Size(shape), samples, rows.int(), owners, outputs, by_entry)
    # Rows that are looked up, several times too, and others.
    stored = torch.cat([rows, torch.randint(0, shape[0], (10,))])
    stored = stored[torch.randint(0, len(stored), (values,))]
    numbers = torch.randn(values, shape[1], dtype=dtype)
    gradient = torch.sparse_coo_tensor(stored.unsqueeze(0), numbers, shape, check_invariants=True)
    counts = activity.count_masks()[stored]
    assert torch.equal(activity.count_at(stored), counts)
    assert torch.equal(activity.count_at(rows), activity.count_masks()[rows])
    factor = adaptive_factor(counts, samples, factor_limit=limit, dtype=reckoned(dtype))
    ours = torch.randn(shape, dtype=dtype)
    theirs = ours.clone()
    for row, effective in zip(stored, numbers * factor, strict=True):
        theirs[row] = theirs[row].to(factor.dtype).add(effective, alpha=0.1 if maximize else -0.1)
    whole = Pass(stepping.Options(lr=0.1, maximize=maximize, limit=limit))
    assert whole.add_sparse(gradient, (activity, samples), ours) == (values > 0)
    whole.run()
    if values:
        assert torch.equal(ours, theirs)


@given(
    st.integers(1, 200),
    st.integers(1, 9),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([None, 3.0]),
    st.booleans(),
    st.sampled_from(STEPPED),
)
def test_counting_and_stepping_at_once(samples, rows, columns, eps, limit, corrects, dtype):
    activity = Outer(
        torch.Size([rows, columns]),
        pack(torch.rand(samples, rows) < 0.4),
        pack(torch.rand(samples, columns) < 0.2),
    )
    gradient, weight = (torch.randn(rows, columns, dtype=dtype) for _ in range(2))
    counts = activity.count_masks()
    wide = reckoned(dtype)
    effective = gradient * adaptive_factor(counts, samples, eps, limit, dtype=wide)
    stepped = weight.to(wide).add(effective, alpha=-0.1)
    whole = Pass(stepping.Options(lr=0.1, eps=eps, limit=limit))
    whole.add(gradient, (activity, samples), None if corrects else weight)
    whole.run()
    ours, theirs = (gradient, effective) if corrects else (weight, stepped)
    assert torch.equal(ours, theirs.to(dtype))


def test_numbers_are_rounded_to_bfloat16_as_torch_rounds_them():
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    _, exponents = torch.frexp(every.float())
    halves = torch.ldexp(torch.ones(len(every)), exponents - 9).to(torch.bfloat16)  # of last places
    found = Counts(torch.ones(len(every), dtype=torch.int64), 1), 1
    for gradient in (
        halves,
        -halves,
        3 * halves,
        0.75 * halves,
        every.flip(0),
        every[torch.randperm(2**16)],
    ):
        weight = every.clone()
        whole = Pass(stepping.Options(lr=-1.0, eps=0.0))
        whole.add(gradient, found, weight)
        whole.run()
        expected = (every.float() + gradient.float()).to(torch.bfloat16)
        assert ((weight == expected) | (weight.isnan() & expected.isnan())).all()


def test_counts_that_are_known_can_be_asked_for():
    known = torch.randint(0, 9, (3, 4))
    found = torch.zeros_like(known)
    stepping.count(Counts(known, 9).entries(), found)
    assert torch.equal(found, known)


def test_half_and_strided_gradients_take_the_twin():
    assert not stepping.takes(torch.ones(2, 2, dtype=torch.float16))
    assert not stepping.takes(torch.ones(2, 3).T)


def test_a_fused_step_is_seen_by_autograd():
    model = nn.Linear(3, 2)
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    loss = model(torch.randn(4, 3)).relu().square().sum()
    loss.backward(retain_graph=True)
    before = [parameter._version for parameter in model.parameters()]
    optimizer.step()
    assert all(p._version > v for p, v in zip(model.parameters(), before, strict=True))


def packed_together(pairs, pair=packing.ALONE):
    """Bits of pairs of tensors of one type, each with its rows, the first with means or None."""
    table, made = packing.PackTable(), []
    for (one, first, means), (other, second) in pairs:
        lines = packing.Lines(first, second, one.dtype, pair)
        at = 0 if means is None else means.data_ptr()
        table.add(lines, one.data_ptr(), other.data_ptr(), at)
        made += [lines.first, lines.second]
    packed = Packed(table.pack(), table.numbers, None)
    return [packed.bits(n * packing.PACK_FIELDS, rows) for n, rows in enumerate(made)]


def flat(values):
    """A tensor of samples without positions, and its rows."""
    return values, packing.Rows(len(values), 1, values.shape[1])


def all_loops(dtype):
    """What every loop that runs on several threads makes of the same numbers."""
    torch.manual_seed(0)
    masks = torch.rand(700, 40) < 0.4, torch.rand(7, 40, 100).transpose(1, 2) < 0.4
    found = [packing.pack(mask.to(dtype)) for mask in masks]
    found.append(packing.pack(torch.ones(700, 40, dtype=dtype)) is None)
    sizes = (1, 3), (130, 5), (64, 70), (700, 40)
    together = [(torch.rand(size) < 0.9).to(dtype) for size in sizes]
    together.append(torch.ones(700, 3, dtype=dtype))
    pairs = [((*flat(one), None), flat(other)) for one, other in pairwise(together)]
    found += [bits.dense() for bits in packed_together(pairs)]
    rows, wide = packing.Rows(130, 40, 70), reckoned(dtype)  # of norms in bfloat16 torch packs
    kept = torch.zeros(130, 40, dtype=wide)
    for by_unit in (False, True):
        given, delta = ((torch.rand(130, 2800) < 0.02).to(wide) for _ in range(2))
        whose = rows._replace(by_unit=by_unit)
        means = kept[:, :7].clone() if by_unit else kept
        first = whose._replace(groups=7 if by_unit else packing.EACH_ROW)
        pair = (given, first, means), (delta, whose)
        found += [bits.dense() for bits in packed_together([pair] * 2, packing.REACHED)]
    outputs, inputs = torch.rand(100, 40) < 0.4, torch.rand(100, 30) < 0.4
    activity = Outer(torch.Size([40, 30]), pack(outputs), pack(inputs))
    found += [activity.count(), scale_(torch.randn(40, 30, dtype=dtype), activity, 100)]
    for activity in convolved(dtype):
        gradient = torch.randn(activity.shape, dtype=dtype)
        found += [activity.count(), scale_(gradient, activity, activity.samples)]
    found += scan(torch.randn(50, 300, dtype=dtype), 1)
    parameters = [torch.nn.Parameter(torch.randn(90, 7, dtype=dtype)) for _ in range(3)]
    adam = torch.optim.Adam(parameters, lr=0.1)
    boost = truestep.directional_boost()
    truestep.attach(adam, boost)
    for optimizer in (truestep.DASGD(parameters, lr=0.1, weight_decay=0.1), adam):
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(90, 7, dtype=dtype)
            optimizer.step()
        found += [parameter.detach().clone() for parameter in parameters]
    return found


@pytest.mark.parametrize("dtype", STEPPED)
@pytest.mark.parametrize("kind", ["torch's threads", "own threads"])
def test_threads_give_the_same(kind, dtype, monkeypatch):
    expected = all_loops(dtype)
    ran = []
    if kind == "own threads":
        monkeypatch.setattr(threads, "teams", lambda: None)
    elif threads.teams() is None:
        pytest.skip("torch runs on another OpenMP than GNU's")
    else:
        run = threads._run
        monkeypatch.setattr(threads, "_run", lambda *args: (ran.append(1), run(*args))[1])
    monkeypatch.setattr(threads, "GRAIN", 1.0)
    monkeypatch.setattr(threads, "TEAM_GRAIN", 1.0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = all_loops(dtype)
    finally:
        torch.set_num_threads(before)
    assert bool(ran) == (kind == "torch's threads")
    for ours, single in zip(found, expected, strict=True):
        assert ours is single or torch.equal(ours, single)


def kinds(samples, dtype):
    """Tensors of all kinds, some of which are on everywhere: numbers, rows, means."""
    for units in (1, 7, 64, 65):
        yield *flat((torch.rand(samples, units) < 0.5).to(dtype)), None
    yield *flat(torch.ones(samples, 5, dtype=dtype)), None
    for positions, units in ((1, 4), (3, 4), (70, 6)):
        values = (torch.randn(samples, positions * units) * 2).round().to(dtype)
        by_row, by_group = values.new_zeros(samples * positions), values.new_zeros(samples, 2)
        for numbers in (by_row, by_group):
            numbers.flatten()[::2] = 1
        sizes = samples, positions, units
        yield values, packing.Rows(*sizes), None
        yield values, packing.Rows(*sizes, by_unit=True), None
        yield values, packing.Rows(*sizes, groups=packing.EACH_ROW), by_row
        yield values, packing.Rows(*sizes, by_unit=True, groups=2), by_group


@pytest.mark.parametrize("samples", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packing_many_equals_packing_each(samples, dtype):
    torch.manual_seed(0)
    second = flat(torch.randn(samples + 1, 3, dtype=dtype).relu())
    pairs = [(kind, second) for kind in kinds(samples, dtype)]
    expected = []
    for (values, rows, means), (other, flat_rows) in pairs:
        expected.append((packing.pack_rows(values, rows, means), rows))
        expected.append((packing.pack_rows(other, flat_rows), flat_rows))
    for bits, (words, rows) in zip(packed_together(pairs), expected, strict=True):
        assert (bits.samples, bits.positions, bits.units) == rows[:3]
        assert (bits.words is None) == (words is None)
        assert words is None or torch.equal(bits.words, words)


@given(
    samples=st.integers(1, 70),
    positions=st.integers(2, 70),
    units=st.tuples(st.integers(1, 130), st.integers(1, 70)),
    densities=st.tuples(DENSITY, DENSITY),
    on=st.sampled_from(["neither", "inputs", "outputs", "both", "all but a sample's"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_two_that_are_on_at_last_positions_need_no_more(
    samples, positions, units, densities, on, dtype
):
    masks = [
        torch.rand(samples, positions, count) < density
        for count, density in zip(units, densities, strict=True)
    ]
    for mask, kind in zip(masks, ("inputs", "outputs"), strict=True):
        if on not in {"neither", kind}:
            mask[:, -1] = True
    if on.startswith("all but"):
        masks[0][samples // 2, -1, units[0] // 2] = False
    first, second = (packing.Rows(samples, positions, count) for count in units)
    given, delta = (mask.to(dtype) for mask in masks)
    (inputs, outputs) = packed_together([((given, first, None), (delta, second))], packing.ASKED)
    if on == "both":
        assert inputs.words is None is outputs.words
    found = Outer(torch.Size([units[1], units[0]]), outputs, inputs).count()
    hits = torch.einsum("npj,npk->njk", masks[1].double(), masks[0].double()) > 0
    assert torch.equal(found, hits.sum(0))


@given(
    samples=st.sampled_from([1, 3, 63, 64, 65, 130]),
    positions=st.sampled_from([1, 2, 15, 16, 17, 64, 81, 150]),
    of_group=st.integers(1, 9),
    groups=st.sampled_from([1, 2, 7, 30]),
    means=st.sampled_from(["by unit", "by row", "each row"]),
    densities=st.tuples(DENSITY, DENSITY),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    more=st.booleans(),
)
def test_samples_that_reach_a_norm_equal_the_twin(
    samples, positions, of_group, groups, means, densities, dtype, more
):
    units, by_unit = of_group * groups, means == "by unit"
    off, on = (torch.rand(samples, positions, units) < density for density in densities)
    if means == "each row":
        kept, groups = torch.randn(samples, positions, 1, dtype=dtype), packing.EACH_ROW
        mean = kept.expand(off.shape)
    else:
        kept = torch.randn(samples, groups, dtype=dtype)
        mean = kept.repeat_interleave(of_group, 1).unsqueeze(1).expand(off.shape)
    given, delta = torch.where(off, mean + 1, mean), torch.where(on, -2.0, 0.0).to(dtype)
    if by_unit:
        given, delta = (t.transpose(1, 2).contiguous() for t in (given, delta))
    rows = packing.Rows(samples, positions, units, by_unit)
    pair = (given, rows._replace(groups=groups), kept), (delta, rows)
    found = packed_together([pair] * (1 + more), packing.REACHED)
    for bits, mask in zip(found, [off & on, on] * (1 + more), strict=True):
        assert (bits.samples, bits.positions, bits.units) == (samples, 1, units)
        expected = mask.any(1)
        assert (bits.words is None) == bool(expected.all())
        assert torch.equal(bits.mask(), expected)


@given(st.sampled_from([1, 3, 70]), st.integers(1, 9), st.booleans(), st.booleans())
def test_rows_are_what_they_say(positions, units, by_unit, centred):
    values = (torch.randn(5, positions * units) * 2).round()
    groups = (1 if by_unit else packing.EACH_ROW) if centred else 0
    rows = packing.Rows(5, positions, units, by_unit, groups)
    means = torch.randint(-1, 2, (5,) if by_unit else (5, positions)).float() if centred else None
    shaped = values.reshape((5, units, positions) if by_unit else (5, positions, units))
    if centred:
        shaped = shaped - means.reshape((5, 1, 1) if by_unit else (5, positions, 1))
    mask = (shaped.transpose(1, 2) if by_unit else shaped) != 0
    words = packing.pack_rows(values, rows, means)
    found = Bits(words, *rows[:3])
    assert torch.equal(found.mask().reshape(mask.shape), mask)


def test_masks_are_counted_exactly_under_autocast():
    bits = pack(torch.ones(333, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        counts = Outer(torch.Size([2, 2]), bits, bits).count_masks()
    assert counts.tolist() == [[333, 333], [333, 333]]


def test_zeros_without_memory_take_the_twin():
    zeros = torch._efficientzerotensor(3, 4)
    assert not pack(zeros).mask().any()
    assert not stepping.takes(zeros)


def test_what_does_not_belong_together_takes_the_twin():
    """Compiled loops would read past the end, where torch operations raise."""
    bits, shape = pack(torch.ones(5, 3)), torch.Size([3, 4])
    for inputs in (torch.ones(5, 2, 4), torch.ones(6, 4), torch.ones(5, 3)):
        assert Outer(shape, bits, pack(inputs)).entries() is None
    window = Window((4,), (2,), (3,), (1,), (1,), (0, 0), "constant", 4, 1, by_position=False)
    image = pack(torch.ones(5, 3, 4))
    assert Outer(torch.Size([3, 4, 3]), pack(torch.ones(5, 2, 3)), image, window).entries() is None
    assert Elements(torch.Size([4]), bits).entries() is None
    rows = torch.tensor([0, 1, 2, 0, 1])
    assert Rows(torch.Size([4, 3]), 5, rows, rows.int(), bits, by_entry=True).entries() is None
    assert not stepping.takes(torch.ones(3), torch.ones(4))


def test_subclasses_and_integers_take_the_twin():
    class Marked(torch.Tensor):
        pass

    assert not dispatch.compiled_loops(torch.ones(2).as_subclass(Marked))
    assert not dispatch.compiled_loops(torch.ones(2, dtype=torch.int64))
    assert dispatch.compiled_loops(nn.Parameter(torch.ones(2)))


def test_machine_code_is_kept_apart_for_each_version_of_the_loops(tmp_path):
    assert dispatch.machine_code(str(tmp_path)).parent == tmp_path
    place = dispatch.loops().step._cache._impl.locator.get_cache_path()
    assert (
        dispatch.machine_code("").name in place
        or dispatch.machine_code(str(tmp_path)).name in place
    )


def test_without_numba_nothing_goes_to_compiled_loops(monkeypatch):
    monkeypatch.setattr(dispatch, "installed", lambda: False)
    assert not stepping.takes(torch.ones(2, 2))


@pytest.mark.parametrize("name", ZOO)
def test_a_step_with_numba_is_bit_equal_to_one_without(name, monkeypatch):
    steps = []
    for installed in (True, False):
        monkeypatch.setattr(dispatch, "installed", lambda installed=installed: installed)
        torch.manual_seed(0)
        model, loss_fn, inputs, targets = ZOO[name]()
        counter = truestep.SampleCounter(model)
        optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
        steps.append([p.detach() for p in model.parameters()])
    for one, other in zip(*steps, strict=True):
        assert torch.equal(one, other)
