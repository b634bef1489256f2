import torch
from hypothesis import given
from hypothesis import strategies as st

from truestep.bits import pack
from truestep.kernels import dispatch


@given(st.integers(0, 200), st.integers(0, 9), st.floats(0, 1), st.integers(0, 99))
def test_packing_samples_loses_nothing(samples, units, density, seed):
    torch.manual_seed(seed)
    mask = torch.rand(samples, units) < density
    bits = pack(mask)
    assert torch.equal(bits.mask(), mask)
    assert (bits.samples, bits.units, bits.has_positions) == (samples, units, False)
    assert bits.dense().shape == (-(-samples // 64), units)


@given(st.integers(0, 5), st.integers(0, 130), st.integers(0, 5), st.integers(0, 99))
def test_packing_positions_loses_nothing(samples, positions, units, seed):
    torch.manual_seed(seed)
    mask = torch.rand(samples, positions, units) < 0.5
    bits = pack(mask)
    assert torch.equal(bits.mask(), mask if positions != 1 else mask.squeeze(1))
    assert (bits.samples, bits.units, bits.positions) == (samples, units, positions)
    assert torch.equal(bits.any_position().mask(), mask.any(1))
    assert torch.equal(bits.apart().mask(), mask.flatten(0, 1))


@given(st.integers(1, 70), st.integers(1, 5), st.sampled_from([0.4, 1.0]))
def test_and_or_or(samples, units, density):
    one, other = torch.rand(samples, units) < density, torch.rand(samples, units) < 0.5
    for a, b in ((one, other), (other, one)):
        assert torch.equal((pack(a) & pack(b)).mask(), a & b)
        assert torch.equal((pack(a) | pack(b)).mask(), a | b)


@given(st.integers(1, 150), st.data())
def test_a_range_of_samples_is_a_slice_of_the_mask(samples, data):
    start = data.draw(st.integers(0, samples))
    stop = data.draw(st.integers(start, samples))
    mask = torch.rand(samples, 3) < 0.5
    assert torch.equal(pack(mask).mask(start, stop), mask[start:stop])
    positions = torch.rand(samples, 2, 3) < 0.5
    assert torch.equal(pack(positions).mask(start, stop), positions[start:stop])


def test_a_mask_of_any_stride_packs_the_same():
    mask = torch.rand(7, 70) < 0.5
    assert torch.equal(pack(mask.T).mask(), mask.T)
    assert torch.equal(pack(mask[::2, ::3]).mask(), mask[::2, ::3])


def test_a_bit_takes_a_bit():
    mask = torch.ones(32, 20, 100, dtype=torch.bool)
    mask[0, 0, 0] = False
    assert pack(mask).words.nbytes * 8 == 640 * 100


def test_all_bits_on_take_none():
    bits = pack(torch.ones(70, 3))
    if dispatch.installed():
        assert bits.words is None
    assert torch.equal(bits.mask(5, 70), torch.ones(65, 3, dtype=torch.bool))
