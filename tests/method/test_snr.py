"""Truths about signal and noise in singular values (docs/method.md section 1)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.linalg import eigvalsh_tridiagonal

from sgm_finetune.method.decibels import NO_SIGNAL_DB
from sgm_finetune.method.noise_density import bulk_density
from sgm_finetune.method.singular_values import singular_values
from sgm_finetune.method.snr import (
    ROUNDING,
    SnrStatistics,
    bulk_median,
    bulk_share_above,
    distance_from_noise,
    estimate_noise,
    noise_edge,
    noise_margin,
    signal_to_noise,
)

SIGMA_ERROR_QUARTER = 0.01  # relative, at 25 % signal rank
SIGMA_ERROR_HALF = 0.03  # relative, at 50 % signal rank
INVARIANCE = 1e-6  # relative
FALSE_SHARE = 1e-3  # of the singular values of pure noise

SHAPES = [(64, 1280), (192, 576), (576, 576), (1024, 256)]


def gaussian(rows: int, cols: int, seed: int, sigma: float = 1.0) -> torch.Tensor:
    return sigma * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(rows: int, cols: int, rank: int, seed: int, sigma: float = 1.0, least: float = 1.5) -> torch.Tensor:
    """Noise plus `rank` orthogonal spikes of `least` to ten times the noise edge."""
    left = torch.linalg.qr(gaussian(rows, rank, seed + 1)).Q
    right = torch.linalg.qr(gaussian(cols, rank, seed + 2)).Q
    strength = noise_edge(sigma, rows, cols) * torch.linspace(least, 10, rank, dtype=torch.float64)
    return gaussian(rows, cols, seed, sigma) + (left * strength) @ right.T


def statistics(weights: torch.Tensor, estimator="mp") -> SnrStatistics:
    return signal_to_noise(singular_values(weights), *weights.shape, estimator)


@pytest.mark.parametrize("aspect", [1.0, 0.9, 0.5, 0.25, 1 / 20, 1 / 1024, 1e-4])
def test_half_of_the_law_lies_below_its_median(aspect: float):
    """The density of Marchenko and Pastur integrates to ½ from (1 − √β)² to the squared median."""
    low, high = (1 - math.sqrt(aspect)) ** 2, (1 + math.sqrt(aspect)) ** 2

    def density(y: float) -> float:  # of the singular value y; its square has the law
        t = y * y
        return 2 * y * math.sqrt(max((high - t) * (t - low), 0)) / (2 * math.pi * aspect * t) if t else 0.0

    below, _ = quad(density, math.sqrt(low), bulk_median(aspect), limit=400)
    assert below == pytest.approx(0.5, abs=1e-7)


@pytest.mark.parametrize("aspect", [1.0, 0.9, 0.5, 0.25, 1 / 20])
def test_the_density_of_the_law_is_the_derivative_of_its_share(aspect: float):
    points = torch.linspace(1 - math.sqrt(aspect), 1 + math.sqrt(aspect), 20001, dtype=torch.float64)
    inside = slice(100, -100)  # at the ends the density has no derivative
    slope = -torch.gradient(bulk_share_above(points, aspect), spacing=(points,))[0]
    assert np.allclose(bulk_density(points.numpy(), aspect)[inside], slope.numpy()[inside], rtol=1e-3, atol=1e-5)
    outside = np.array([max(0.0, 0.999 - math.sqrt(aspect)), 1.001 + math.sqrt(aspect)])
    assert bulk_density(outside, aspect).sum() == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_pure_noise_has_no_signal(shape: tuple[int, int], seed: int):
    found = statistics(gaussian(*shape, seed, sigma=0.02))
    assert found.signal_rank == 0
    assert found.snr == 0
    assert found.snr_db == NO_SIGNAL_DB
    assert found.sigma == pytest.approx(0.02, rel=SIGMA_ERROR_HALF)


def test_pure_noise_of_a_thousand_by_a_thousand_has_no_signal():
    assert statistics(gaussian(1024, 1024, seed=0)).signal_rank == 0


@pytest.mark.parametrize(
    ("rows", "cols", "num_seeds"), [(8, 8, 4000), (8, 64, 2000), (16, 16, 2000), (32, 64, 500), (64, 64, 100)]
)
def test_small_noise_counts_at_most_one_value_in_a_thousand(rows: int, cols: int, num_seeds: int):
    noise = torch.randn(num_seeds, rows, cols, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    counts = [estimate_noise(s, rows, cols)[1] for s in torch.linalg.svdvals(noise)]
    assert sum(counts) <= FALSE_SHARE * num_seeds * min(rows, cols)


def noise_spectrum(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Singular values with exactly the law of a Gaussian matrix's, from a bidiagonal of χ variables (Dumitriu & Edelman
    2002). 8192 x 8192 takes seconds."""
    draw = np.random.default_rng(seed)
    larger, smaller = max(rows, cols), min(rows, cols)
    diagonal = draw.chisquare(larger - np.arange(smaller))
    lower = draw.chisquare(smaller - 1 - np.arange(smaller - 1))
    squares = eigvalsh_tridiagonal(diagonal + np.r_[0, lower], np.sqrt(diagonal[:-1] * lower))
    return torch.from_numpy(np.sqrt(np.maximum(squares, 0))[::-1].copy())


@pytest.mark.parametrize("aspect", [0.05, 0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("size", "num_seeds"), [(64, 60), (256, 30), (1024, 4)])
def test_noise_of_every_shape_counts_at_most_one_value_in_a_thousand(size: int, num_seeds: int, aspect: float):
    rows = round(size / aspect)
    found = [signal_to_noise(noise_spectrum(rows, size, seed), rows, size) for seed in range(num_seeds)]
    assert sum(f.signal_rank for f in found) <= FALSE_SHARE * num_seeds * size
    assert np.mean([f.sigma for f in found]) == pytest.approx(1, rel=SIGMA_ERROR_QUARTER)


@pytest.mark.slow
@pytest.mark.parametrize("aspect", [0.05, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("size", [2048, 4096, 8192])
def test_large_noise_has_no_signal(size: int, aspect: float):
    found = signal_to_noise(noise_spectrum(round(size / aspect), size, 1), round(size / aspect), size)
    assert found.signal_rank == 0
    assert found.sigma == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("aspect", [1.0, 0.5, 0.05])
def test_the_share_of_the_law_above_a_value_is_the_integral_of_its_density(aspect: float):
    ends = torch.tensor([1 - math.sqrt(aspect), 1 + math.sqrt(aspect)])
    assert bulk_share_above(ends, aspect).tolist() == pytest.approx([1, 0], abs=1e-6)
    assert bulk_share_above(torch.tensor([bulk_median(aspect)]), aspect).item() == pytest.approx(0.5, abs=1e-6)
    assert bulk_share_above(torch.tensor([9.0, 0.0]), aspect).tolist() == pytest.approx([0, 1], abs=1e-12)


def test_noise_is_near_to_the_law_and_a_steep_spectrum_is_not():
    assert distance_from_noise(noise_spectrum(1024, 512, 0), 1024, 512, 0) < 0.01
    assert distance_from_noise(torch.tensor([0.98**i for i in range(512)]), 1024, 512, 0) > 0.2


@pytest.mark.parametrize(("fraction", "error"), [(0.25, SIGMA_ERROR_QUARTER), (0.5, SIGMA_ERROR_HALF)])
@pytest.mark.parametrize("shape", [(512, 512), (1024, 320), (320, 1024)])
def test_planted_spikes_are_counted_and_do_not_move_sigma(shape: tuple[int, int], fraction: float, error: float):
    rank = int(fraction * min(shape))
    found = statistics(planted(*shape, rank, seed=11, sigma=0.05))
    assert abs(found.signal_rank - rank) <= 1
    assert found.sigma == pytest.approx(0.05, rel=error)


@pytest.mark.parametrize("shape", [(384, 384), (768, 256)])
def test_three_quarters_of_signal_are_counted(shape: tuple[int, int]):
    """The first estimate of the noise lies among the spikes. The bulk that fits the law is found nevertheless."""
    rank = 3 * min(shape) // 4
    found = statistics(planted(*shape, rank, seed=4))
    assert abs(found.signal_rank - rank) <= 1
    assert found.sigma == pytest.approx(1, rel=SIGMA_ERROR_HALF)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(64, 200),
    cols=st.integers(64, 200),
    share=st.floats(0, 0.5),
    least=st.floats(2.3, 4),
    seed=st.integers(0, 10**6),
)
def test_spikes_above_the_detectable_limit_are_counted_at_any_shape(rows, cols, share, least, seed):
    """All spikes are at least `least` times the detectable limit (MN)^¼·σ."""
    rank = int(share * min(rows, cols))
    limit = (rows * cols) ** 0.25 / (rows**0.5 + cols**0.5)
    found = statistics(planted(rows, cols, rank, seed, least=least * limit))
    assert abs(found.signal_rank - rank) <= 1
    assert found.sigma == pytest.approx(1, rel=0.1)  # 64 - 32 values determine σ to some percent


@pytest.mark.parametrize(("share", "error"), [(0.05, SIGMA_ERROR_QUARTER), (0.25, SIGMA_ERROR_QUARTER), (0.5, 0.03)])
@pytest.mark.parametrize("shape", [(512, 512), (1024, 320)])
def test_weak_spikes_do_not_move_sigma_either(shape: tuple[int, int], share: float, error: float):
    """Spikes from twice the detectable limit on weaken the noise below them, and eq. 5b corrects σ for that."""
    rows, cols = shape
    limit = (rows * cols) ** 0.25 / (rows**0.5 + cols**0.5)
    rank = int(share * min(shape))
    found = [statistics(planted(*shape, rank, seed, sigma=3.0, least=2 * limit)) for seed in (1, 2)]
    assert all(abs(f.signal_rank - rank) <= 1 for f in found)
    assert [f.sigma for f in found] == pytest.approx([3.0, 3.0], rel=error)


def test_spikes_below_the_detectable_limit_are_noise():
    """A spike of strength below (MN)^¼·σ leaves no trace in the spectrum (Benaych-Georges & Nadakuditi)."""
    rows, cols = 400, 300
    u, v = torch.linalg.qr(gaussian(rows, 1, 1)).Q, torch.linalg.qr(gaussian(cols, 1, 2)).Q
    assert statistics(gaussian(rows, cols, 0) + 0.5 * (rows * cols) ** 0.25 * u @ v.T).signal_rank == 0


def test_shuffling_the_entries_leaves_no_signal():
    weights = planted(256, 192, 40, seed=5)
    order = torch.randperm(weights.numel(), generator=torch.Generator().manual_seed(0))
    assert statistics(weights).signal_rank == 40
    assert statistics(weights.flatten()[order].view_as(weights)).signal_rank == 0


@pytest.mark.parametrize(("rank", "least"), [(12, 1.5), (0, 1.5), (25, 0.9)])
def test_statistics_agree_with_a_naive_oracle(rank: int, least: float):
    """The oracle writes the definitions out: plain loops over a float64 decomposition, and the law as a table."""
    rows, cols = 90, 60
    weights = planted(rows, cols, rank, seed=21, sigma=0.3, least=least) if rank else gaussian(rows, cols, 21, 0.3)
    s = sorted(map(float, torch.linalg.svdvals(weights)), reverse=True)

    def middle_energy(beta: float, top: float, bottom: float) -> float:
        """Mean of the law's t = y² between two shares, counted from the top."""
        low, high = (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2
        t = np.linspace(high, low, 400_001)[1:-1]
        mass = np.sqrt((high - t) * (t - low)) / (2 * math.pi * beta * t) * (t[0] - t[1])
        inside = (mass.cumsum() > top) & (mass.cumsum() <= bottom)
        return float((t * mass)[inside].sum() / (bottom - top))

    k = 0
    while True:
        m, n = rows - k, cols - k
        first, last = n // 4, math.ceil(n * 3 / 4)
        middle = sum(value**2 for value in s[k + first : k + last]) / (last - first)
        sigma = math.sqrt(middle / (m * middle_energy(n / m, first / n, last / n)))
        u = m**-0.5 + n**-0.5
        edge = sigma * (m**0.5 + n**0.5 + 0.5 * 3.27 * u ** (1 / 3) + u)
        count = sum(value > edge for value in s)
        if count <= k:
            break
        k = count
    absorbed = 0.0
    for value in s[:k]:
        b = value**2 / sigma**2 - (rows + cols - k)
        strength = (b + math.sqrt(max(b * b - 4 * m * n, 0))) / 2
        absorbed += 1 / max(strength, math.sqrt(m * n))
    found = statistics(weights)
    assert found.signal_rank == k
    assert found.edge == pytest.approx(edge, rel=1e-4)
    assert found.sigma == pytest.approx(sigma * math.sqrt(1 + absorbed), rel=1e-4)
    assert found.snr == pytest.approx(sum(v * v for v in s[:k]) / sum(v * v for v in s[k:]), rel=1e-9)
    assert found.snr_db == (pytest.approx(10 * math.log10(found.snr)) if k else NO_SIGNAL_DB)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    cols=st.integers(1, 60),
    rank=st.integers(0, 60),
    exponent=st.floats(-300, 150),
    negative=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_scale_and_transpose_change_nothing(rows, cols, rank, exponent, negative, seed):
    """snr(cW) = snr(W) = snr(Wᵀ), and σ and the edge scale with |c|."""
    rank = min(rank, rows, cols)
    weights = planted(rows, cols, rank, seed) if rank else gaussian(rows, cols, seed)
    c = 10.0**exponent
    plain, other = statistics(weights), statistics((-c if negative else c) * weights.T)
    assert other.signal_rank == plain.signal_rank
    assert other.snr == pytest.approx(plain.snr, rel=INVARIANCE)
    assert other.sigma == pytest.approx(c * plain.sigma, rel=INVARIANCE)
    assert other.edge == pytest.approx(c * plain.edge, rel=INVARIANCE)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=40), st.integers(0, 60))
def test_every_spectrum_has_a_finite_answer_that_its_edge_explains(values: list[float], extra: int):
    rows, cols = len(values) + extra, len(values)
    found = signal_to_noise(values, rows, cols)
    assert all(map(math.isfinite, (found.sigma, found.edge, found.snr, found.snr_db)))
    assert 0 <= found.snr <= 4 / ROUNDING**2
    assert found.snr_db >= NO_SIGNAL_DB
    assert found.signal_rank == sum(value > found.edge for value in values) or found.edge < 1e-300
    assert estimate_noise(values, rows, cols) == (found.sigma, found.signal_rank)


@pytest.mark.parametrize("shape", [(5, 5), (1, 7), (300, 20)])
def test_a_matrix_of_zeros_has_neither_noise_nor_signal(shape: tuple[int, int]):
    assert statistics(torch.zeros(shape)) == SnrStatistics(0.0, 0.0, 0, 0.0, NO_SIGNAL_DB)


@pytest.mark.parametrize("value", [1.0, -3e-3, 1e30, 1e-42])
@pytest.mark.parametrize("shape", [(2, 2), (16, 16), (400, 150)])
def test_a_constant_matrix_is_one_signal_without_noise(shape: tuple[int, int], value: float):
    found = statistics(torch.full(shape, value))
    assert found.signal_rank == 1
    assert 100 < found.snr_db <= 10 * math.log10(4 / ROUNDING**2)


@pytest.mark.parametrize("rank", [1, 5, 40, 90, 119])
def test_a_float32_product_of_low_rank_is_all_signal(rank: int):
    weights = gaussian(150, rank, 1).float() @ gaussian(rank, 120, 2).float()
    found = statistics(weights)
    assert found.signal_rank == rank
    assert 100 < found.snr_db < 150
    assert found.sigma > 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1)])
def test_a_vector_has_no_signal_to_tell(shape: tuple[int, int]):
    found = statistics(gaussian(*shape, 0))
    assert (found.signal_rank, found.snr) == (0, 0.0)
    assert math.isfinite(found.sigma)


def test_equal_singular_values_are_no_signal():
    assert statistics(torch.eye(64)).signal_rank == 0


def test_a_spectrum_that_never_levels_off_keeps_an_eighth_as_noise():
    found = signal_to_noise([0.8**i for i in range(64)], 256, 64)
    assert found.signal_rank == 56


def test_the_margin_shrinks_against_the_edge_as_matrices_grow():
    shares = [noise_margin(1.0, size, 2 * size) / noise_edge(1.0, size, 2 * size) for size in (8, 64, 512, 8192)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.003


def test_the_published_formula_is_reproduced():
    """σ = IQR/1.349, edge σ(1 + √β), Σ above / Σ below / s₁, as in the published script, term by term."""
    weights = planted(96, 48, 6, seed=2).float()
    s = torch.linalg.svdvals(weights)
    sigma = (torch.quantile(s, 0.75) - torch.quantile(s, 0.25)) / 1.349
    edge = sigma * math.sqrt((1 + math.sqrt(48 / 96)) ** 2)
    snr = s[s > edge].sum() / s[s <= edge].sum() / s[0]
    found = statistics(weights, "spectrum")
    assert found.signal_rank == int((s > edge).sum())
    assert (found.sigma, found.edge, found.snr) == pytest.approx((sigma.item(), edge.item(), snr.item()), rel=1e-5)


def test_the_published_formula_takes_most_noise_for_signal():
    assert statistics(gaussian(256, 1024, 0), "spectrum").signal_rank == 256
    assert math.isinf(statistics(gaussian(256, 1024, 0), "spectrum").snr)
    assert statistics(gaussian(256, 256, 0), "spectrum").signal_rank > 50


def test_the_published_formula_depends_on_the_unit_of_the_weights():
    weights = planted(64, 64, 4, seed=0)
    assert statistics(10 * weights, "spectrum").snr == pytest.approx(statistics(weights, "spectrum").snr / 10)
