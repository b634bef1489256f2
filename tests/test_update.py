import numpy as np
import pytest
import torch

from truestep.combine import Counts
from truestep.fused import Pass
from truestep.record import any_on
from truestep.update import adaptive_factor, boosted, booster, mean_effective, scale_


def test_factor_is_n_over_m_plus_eps_and_one_where_no_sample_contributed():
    counts = torch.tensor([0, 1, 3, 8])
    factor = adaptive_factor(counts, 8, eps=2.0, dtype=torch.float64)
    assert factor.tolist() == [1.0, 8 / 3, 8 / 5, 8 / 10]


def test_factor_without_eps_is_the_exact_mean():
    assert adaptive_factor(torch.tensor([0, 4]), 8, eps=0.0).tolist() == [1.0, 2.0]


def test_factor_limit_caps_the_factor():
    factor = adaptive_factor(torch.tensor([0, 1, 100]), 4096, factor_limit=16.0)
    assert factor.tolist() == [1.0, 16.0, 16.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scale_keeps_the_gradients_dtype_and_place(dtype):
    gradient = torch.tensor([3.0, 3.0], dtype=dtype)
    scaled = scale_(gradient, Counts(torch.tensor([0, 1]), 4), 4)
    assert scaled is gradient
    assert gradient.dtype == dtype
    assert gradient.tolist() == [3.0, 6.0]


@pytest.mark.parametrize("limit", [None, 2.0])
@pytest.mark.parametrize(
    "gradient",
    [
        torch.randn(40, 30).half(),
        torch.randn(40, 30).bfloat16(),
        torch.randn(30, 40).T,
        torch.randn(30, 40).double().T,
        torch.randn(40, 3, 5, 2).permute(0, 3, 1, 2),
        torch.randn(40, 3, 5, 2).permute(0, 3, 1, 2).bfloat16(),
    ],
)
def test_other_gradients_are_scaled_as_in_torch_operations(gradient, limit, monkeypatch):
    torch.manual_seed(0)
    wide = gradient.dtype == torch.float64
    counts = torch.randint(0, 9, gradient.shape)
    factor = 8 / (counts.double() if wide else counts.float()).add(0.5)
    factor = factor.clamp(max=limit or torch.inf).masked_fill(counts == 0, 1)
    expected = gradient.clone().mul_(factor)
    scaled = scale_(gradient.clone(), Counts(counts, 8), 8, 0.5, limit)
    assert torch.equal(scaled, expected)
    corrected = mean_effective(gradient, (Counts(counts, 8), 8), 0.5, limit)
    for found in (scaled, corrected):
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    assert torch.equal(corrected, expected)
    monkeypatch.setattr(Pass, "takes", lambda *_: False)
    assert torch.equal(scale_(gradient.clone(), Counts(counts, 8), 8, 0.5, limit), expected)


def test_scale_takes_complex_gradients():
    gradient = torch.tensor([1 + 2j, 3j], dtype=torch.complex64)
    assert scale_(gradient, Counts(torch.tensor([1, 3]), 4), 4).tolist() == [2 + 4j, 3j]


def test_nan_and_inf_stay():
    gradient = torch.tensor([torch.nan, torch.inf])
    scale_(gradient, Counts(torch.tensor([0, 1]), 4), 4)
    assert gradient[0].isnan()
    assert gradient[1].isinf()


def test_booster_on_every_pair_of_signs():
    values = torch.tensor([-2.0, 0.0, 4.0])
    gradient, previous = values.repeat_interleave(3), values.repeat(3)
    # sign(0) == sign(0), and their average is 0
    assert booster(gradient, previous).tolist() == [-2, 0, 0, 0, 0, 0, 0, 0, 4]


def test_booster_equals_numpy():
    rng = np.random.default_rng(0)
    gradient, previous = rng.normal(size=(2, 50))
    expected = np.where(np.sign(gradient) == np.sign(previous), (gradient + previous) / 2, 0.0)
    found = booster(torch.from_numpy(gradient), torch.from_numpy(previous))
    assert found.numpy().tolist() == expected.tolist()


def test_complex_gradients_are_boosted_part_by_part():
    gradient, previous = torch.tensor([1 + 1j]), torch.tensor([3 - 3j])
    assert boosted(gradient, previous).tolist() == [3 + 1j]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64])
def test_zeros_of_either_sign_are_off_and_nan_is_on(dtype):
    zeros = torch.zeros(3, 5, dtype=dtype)
    assert not any_on(zeros)
    assert not any_on(-zeros)
    assert not any_on(zeros[:0])
    assert any_on(zeros.clone().index_fill_(1, torch.tensor([2]), -1))
    if dtype.is_floating_point:
        assert any_on(zeros.clone().index_fill_(1, torch.tensor([2]), torch.nan))
