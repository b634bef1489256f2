import torch
from hypothesis import given
from hypothesis import strategies as st

from truestep.bits import pack


@given(st.integers(0, 200), st.integers(0, 9), st.floats(0, 1), st.integers(0, 99))
def test_packing_samples_loses_nothing(samples, units, density, seed):
    torch.manual_seed(seed)
    mask = torch.rand(samples, units) < density
    bits = pack(mask)
    assert torch.equal(bits.mask(), mask)
    assert (bits.samples, bits.units, bits.has_positions) == (samples, units, False)
    assert bits.words.shape == (-(-samples // 64), units)


@given(st.integers(0, 5), st.integers(0, 130), st.integers(0, 5), st.integers(0, 99))
def test_packing_positions_loses_nothing(samples, positions, units, seed):
    torch.manual_seed(seed)
    mask = torch.rand(samples, positions, units) < 0.5
    bits = pack(mask)
    assert torch.equal(bits.mask(), mask)
    assert (bits.samples, bits.units, bits.has_positions) == (samples, units, True)


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
    assert pack(torch.ones(640, 100, dtype=torch.bool)).words.nbytes * 8 == 640 * 100
