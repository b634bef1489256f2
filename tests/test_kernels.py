"""Compiled loops and their twins in torch operations give the same, to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import truestep
from properties import assert_counts_equal_oracle, assert_step_equals_oracle
from truestep.activity import Elements, Outer, Rows
from truestep.bits import pack
from truestep.kernels import dispatch, packing, scaling
from truestep.update import adaptive_factor, scale_
from zoo import ZOO

pytestmark = pytest.mark.skipif(not dispatch.installed(), reason="numba is not installed")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(0, 140),
    st.integers(0, 9),
    st.floats(0, 1),
)
def test_packing_equals_its_twin(dtype, lead, length, units, density):
    values = torch.randn(*lead, length, units).to(dtype)
    values *= torch.rand(*lead, length, units) < density
    assert torch.equal(packing.pack(values), packing.pack_torch(values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_zero(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    values = [[0.0], [-0.0], [torch.nan], [-torch.inf], [tiny], [-tiny]]
    assert packing.pack(torch.tensor(values, dtype=dtype)).item() == 0b111100


def test_packing_takes_any_stride():
    values = torch.randn(140, 70) * (torch.rand(140, 70) < 0.5)
    for view in (
        values.T,
        values[::2, ::3],
        values.expand(2, 140, 70),
        values[:, None].expand(-1, 2, -1),
    ):
        assert torch.equal(packing.pack(view), packing.pack_torch(view))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(samples=st.integers(1, 200), rows=st.integers(1, 5), columns=st.integers(1, 9))
def test_scaling_equals_its_twin(dtype, samples, rows, columns):
    shape = torch.Size([rows, columns])
    outputs, inputs = torch.rand(samples, rows) < 0.4, torch.rand(samples, columns) < 0.4
    for activity in (
        Outer(shape, pack(outputs), pack(inputs)),
        Elements(shape, pack(torch.rand(samples, rows * columns) < 0.4)),
    ):
        gradient = torch.randn(shape, dtype=dtype)
        factor = adaptive_factor(activity.count(), samples, 1.0, 3.0, dtype)
        expected = gradient * factor
        assert scaling.can_scale(gradient)
        assert torch.equal(scale_(gradient, activity, samples, 1.0, 3.0), expected)


@given(
    dtype=st.sampled_from([torch.float32, torch.float64]),
    samples=st.integers(1, 150),
    entries=st.integers(0, 80),
    by_entry=st.booleans(),
    ordered=st.booleans(),
)
def test_scaling_rows_equals_its_twin(dtype, samples, entries, by_entry, ordered):
    owners, rows = torch.randint(0, samples, (entries,)), torch.randint(0, 6, (entries,))
    owners = owners.sort().values if ordered else owners
    outputs = pack(torch.rand(entries if by_entry else samples, 5) < 0.5)
    activity = Rows(torch.Size([6, 5]), samples, rows, owners, outputs, by_entry)
    gradient = torch.randn(6, 5, dtype=dtype)
    expected = gradient * adaptive_factor(activity.count(), samples, 1.0, None, dtype)
    assert torch.equal(scale_(gradient, activity, samples), expected)


def test_half_and_strided_gradients_take_the_twin():
    assert not scaling.can_scale(torch.ones(2, 2, dtype=torch.bfloat16))
    assert not scaling.can_scale(torch.ones(2, 3).T)


def test_subclasses_and_integers_take_the_twin():
    class Marked(torch.Tensor):
        pass

    assert not dispatch.compiled_loops(torch.ones(2).as_subclass(Marked))
    assert not dispatch.compiled_loops(torch.ones(2, dtype=torch.int64))
    assert dispatch.compiled_loops(nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_without_numba(name, monkeypatch):
    monkeypatch.setattr(dispatch, "installed", lambda: False)
    assert not scaling.can_scale(torch.ones(2, 2))
    assert_counts_equal_oracle(*ZOO[name]())
    assert_step_equals_oracle(*ZOO[name]())


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
