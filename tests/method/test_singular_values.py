"""Truths about the singular values of large matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgm_finetune.method.singular_values import (
    FLOAT64_BELOW,
    batched_singular_values,
    exact_bfloat16_products,
    singular_values,
)
from sgm_finetune.method.snr import signal_to_noise

FLOAT64_ERROR = 1e-7  # of the largest value: the Gram matrix squares the condition
SIGMA_ERROR = 1e-6  # relative, whatever the spikes
FLOAT32_BULK_ERROR = 3e-5  # relative, of the values from the median up, at a largest value of 100 medians


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spiked(rows: int, cols: int, times: float) -> torch.Tensor:
    """Noise with three spikes of about `times` its median singular value."""
    left, right = torch.linalg.qr(gaussian(rows, 3, seed=1)).Q, torch.linalg.qr(gaussian(cols, 3, seed=2)).Q
    return gaussian(rows, cols) + times * math.sqrt(rows) * (left * torch.tensor([1.0, 0.9, 0.8])) @ right.T


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_small_matrices_agree_with_a_direct_decomposition(rows: int, cols: int, seed: int):
    weights = gaussian(rows, cols, seed=seed)
    direct = torch.linalg.svdvals(weights)
    assert (singular_values(weights) - direct).abs().max() <= FLOAT64_ERROR * direct[0]


@pytest.mark.parametrize("shape", [(1100, 1024), (1024, 1500)])
@pytest.mark.parametrize("times", [0, 3, 100])
def test_large_matrices_keep_what_decides_about_noise(shape: tuple[int, int], times: float):
    """In float32 the values from the median up stay right. Only the smallest values of square matrices suffer."""
    weights = spiked(*shape, times)
    direct = torch.linalg.svdvals(weights)
    found = singular_values(weights.float())
    upper = len(direct) // 2
    assert ((found - direct) / direct)[:upper].abs().max() < FLOAT32_BULK_ERROR
    expected, got = signal_to_noise(direct, *shape), signal_to_noise(found, *shape)
    assert got.signal_rank == expected.signal_rank
    assert got.sigma == pytest.approx(expected.sigma, rel=FLOAT32_BULK_ERROR)


def test_a_large_matrix_that_float32_cannot_resolve_is_decomposed_in_float64():
    """Rank 700 of 1024: in float32 the other values are 1e-4 of the largest, a noise that does not exist."""
    weights = gaussian(1200, 700) @ gaussian(700, 1024, seed=1)
    found = singular_values(weights)
    assert int((found > 1e-6 * found[0]).sum()) == 700
    assert signal_to_noise(found, 1200, 1024).signal_rank == 700


def test_a_large_matrix_scaled_by_a_power_of_two_or_transposed_has_the_same_bits():
    weights = spiked(1030, 1024, 5).float()
    plain = singular_values(weights)
    assert torch.equal(singular_values(weights.T), plain)
    for power in (-20, 7):
        assert torch.equal(singular_values(weights * 2.0**power), plain * 2.0**power)
    assert torch.allclose(singular_values(weights * 1e25)[:512], plain[:512] * 1e25, rtol=FLOAT32_BULK_ERROR)


@pytest.mark.parametrize("shape", [(1024, 1024), (1024, 3000)])
@pytest.mark.parametrize("times", [50, *(pytest.param(n, marks=pytest.mark.slow) for n in (20, 300))])
def test_noise_beside_large_spikes_is_measured_to_a_millionth_and_scales(shape: tuple[int, int], times: float):
    weights = spiked(*shape, times).float()
    expected = signal_to_noise(torch.linalg.svdvals(weights.double()), *shape)
    for factor in (1.0, 3.7):
        found = signal_to_noise(singular_values(weights * factor), *shape)
        assert found.sigma == pytest.approx(factor * expected.sigma, rel=SIGMA_ERROR)
        assert found.snr == pytest.approx(expected.snr, rel=SIGMA_ERROR)
        assert found.signal_rank == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_decomposed_as_the_numbers_it_holds(dtype: torch.dtype):
    weights = gaussian(48, 30).to(dtype)
    assert torch.equal(singular_values(weights), singular_values(weights.double()))


def test_bfloat16_products_are_exact():
    """The values equal those of float32 up to the order of the sums, on processors with and without bfloat16 units. The
    setting is restored."""
    weights = spiked(1100, FLOAT64_BELOW, 20).bfloat16()
    before = torch.get_float32_matmul_precision()
    with exact_bfloat16_products(True):
        found = singular_values(weights)
    assert torch.get_float32_matmul_precision() == before
    direct = torch.linalg.svdvals(weights.double())
    assert ((found - direct) / direct)[: FLOAT64_BELOW // 2].abs().max() < FLOAT32_BULK_ERROR


def test_matrices_of_a_batch_are_what_they_are_alone():
    matrices = [gaussian(40, 16), gaussian(16, 25, seed=1), gaussian(16, 16, seed=2)]
    for matrix, found in zip(matrices, batched_singular_values(matrices), strict=True):
        assert torch.allclose(found.values, singular_values(matrix), rtol=1e-12)
        assert found.alive == tuple(matrix.shape)


def test_rows_and_columns_of_zeros_are_told():
    weights = gaussian(30, 20)
    weights[[3, 4]], weights[:, 7] = 0, 0
    for matrix, alive in ((weights, (28, 19)), (weights.T, (19, 28))):
        (found,) = batched_singular_values([matrix])
        assert found.alive == alive
        assert int((found.values > 0).sum()) == 19


@pytest.mark.parametrize("value", [1.0, 1e-42, 1e30, -3e-3])
def test_extreme_entries_neither_overflow_nor_vanish(value: float):
    found = singular_values(torch.full((3, 5), value))
    assert found[0].item() == pytest.approx(abs(torch.tensor(value).item()) * math.sqrt(15), rel=1e-6)
    assert found[1:].max() <= 1e-7 * found[0]
    assert singular_values(torch.full((2, 2), 1e300, dtype=torch.float64))[0].item() == pytest.approx(2e300)


def test_a_matrix_of_zeros_and_one_without_entries():
    assert singular_values(torch.zeros(4, 3)).tolist() == [0, 0, 0]
    assert singular_values(torch.zeros(0, 3)).tolist() == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("size", [5, 1030])
def test_entries_that_are_not_finite_are_refused(value: float, size: int):
    weights = torch.ones(size, size)
    weights[2, 3] = value
    with pytest.raises(ValueError, match="infinite or not a number"):
        batched_singular_values([weights])
