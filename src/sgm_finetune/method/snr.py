"""Signal-to-noise ratio of a weight matrix (docs/method.md section 1).

Letters, as there: W is the matrix (rows x cols), M and N the larger and the smaller of its sides, β = N/M its aspect
ratio; s are its singular values, descending, in the units of the weights; σ is the standard deviation of one *entry*
of the noise; k is the signal rank, the number of singular values that noise does not explain.

Everything after the decomposition is float64 on spectra divided by their largest value, so that W and cW give the
same answer for every c that floating point can represent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from scipy.optimize import brentq
from torch import Tensor

Estimator = Literal["mp", "spectrum"]

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Share of the largest singular value below which nothing is told from the rounding of float32 arithmetic: such
values count as zero, and the noise edge lies here at least."""

NO_SIGNAL_DB = 20 * math.log10(ROUNDING)
"""Decibels of no signal at all (SNR 0), and the least that is reported: −126.4."""

_TRACY_WIDOM = 3.27  # its 99.9 % point (β = 1): a larger top singular value is chance once in a thousand matrices
_MEDIAN_DEVIATIONS = 2.0  # allowed error of σ itself, in standard deviations of the median's estimate


@dataclass(frozen=True)
class SpectrumStatistics:
    """What the singular values of one matrix say about noise and signal."""

    sigma: float
    """Standard deviation of one noise entry, in the units of the weights (spectrum: of the singular values)."""
    edge: float
    """Singular values above are signal, and there are exactly `signal_rank` of them; units of the weights."""
    signal_rank: int
    snr: float
    """Signal energy / noise energy (eq. 6): 0 for pure noise, at most 4/ρ² (ρ: ROUNDING) for no noise. Under
    "spectrum" eq. 7, which has the unit 1/weight and is infinite where nothing lies below the edge."""
    snr_db: float
    """10·log10(snr), at least NO_SIGNAL_DB; infinite with snr."""


def singular_values(weights: Tensor) -> Tensor:
    """All min(rows, cols) singular values of a matrix, descending: square roots of the Gram matrix's eigenvalues.

    In float64, so that the Gram matrix's own error, about 1e-8 of the largest singular value, stays below ROUNDING; in
    float32 even a direct decomposition's error would pass for noise: a constant 1024 x 1024 matrix gets 200·ε·s₁
    where it has zeros. The matrix is first divided by its largest entry (1e30 and subnormal numbers are safe) and
    laid tall (it and its transpose give the same bits).

    >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]])).tolist()
    [4.0, 3.0]
    """
    tall = (weights if weights.shape[0] >= weights.shape[1] else weights.T).double()
    largest = tall.abs().max().item() if tall.numel() else 0.0
    if largest == 0:
        return torch.zeros(tall.shape[1], dtype=torch.float64)
    scaled = tall / largest
    return torch.linalg.eigvalsh(scaled.T @ scaled).flip(0).clamp_min(0).sqrt() * largest


@lru_cache(maxsize=65536)
def bulk_median(aspect: float) -> float:
    """Median of the Marchenko-Pastur law of singular values (eq. 2), in units of σ√M, for β = `aspect` in (0, 1].

    >>> round(bulk_median(1.0) ** 2, 4)  # μ_1 of Gavish & Donoho
    0.6528
    """
    angle: float = brentq(lambda theta: _share_above(theta, aspect) - 0.5, 1e-9, math.pi - 1e-9, xtol=1e-13)  # type: ignore[assignment]
    return math.sqrt(1 + aspect + 2 * math.sqrt(aspect) * math.cos(angle))


def _share_above(theta: float, aspect: float) -> float:
    """Share of the law above y, where y² = 1 + β + 2√β·cos θ: the integral of its density in closed form."""
    a, b = 1 + aspect, 2 * math.sqrt(aspect)
    root = math.sqrt(aspect)
    arc = math.atan((1 - root) / (1 + root) * math.tan(theta / 2))
    return 2 / math.pi * ((a * theta - 2 * (1 - aspect) * arc) / b**2 - math.sin(theta) / b)


def noise_edge(sigma: float, rows: int, cols: int) -> float:
    """Largest singular value that noise alone explains in a large matrix (eq. 1).

    `sigma` is the standard deviation of one *entry*, in the units of the weights; the edge is in the
    units of the singular values.

    >>> noise_edge(sigma=0.5, rows=9, cols=16)
    3.5
    """
    return sigma * (math.sqrt(rows) + math.sqrt(cols))


def noise_margin(sigma: float, rows: int, cols: int) -> float:
    """How far above the edge noise may still reach in a matrix of this size (eq. 4); units as `noise_edge`.

    With u = 1/√rows + 1/√cols: σ·(½·3.27·u^⅓ + 2·u). The first term is the 99.9 % point of the Tracy-Widom law in
    Johnstone's scaling, the second twice the uncertainty of σ, which counts in small matrices.

    >>> round(noise_margin(1.0, 1024, 1024) / noise_edge(1.0, 1024, 1024), 3)
    0.012
    """
    u = 1 / math.sqrt(rows) + 1 / math.sqrt(cols)
    return sigma * (_TRACY_WIDOM / 2 * u ** (1 / 3) + _MEDIAN_DEVIATIONS * u)


def estimate_noise(singular_values: Tensor | Sequence[float], rows: int, cols: int) -> tuple[float, int]:
    """(σ, k): noise per entry, in the units of the weights, and signal rank, by the deflated median (eq. 3 to 5).

    A matrix of zeros gives (0, 0). Where more than one singular value in 256 (at least one) is zero, that is below
    ρ·s₁ (ρ: ROUNDING), there is no independent noise: every other value is signal and σ is the floor ρ·s₁/(√M + √N).
    A vector (1 x n) has no bulk to compare with: k = 0.

    >>> estimate_noise([5.0, 0.0, 0.0], 3, 3)[1]
    1
    """
    s, largest = _normalised(singular_values, rows, cols)
    sigma, rank, _ = _deflate(s, rows, cols)
    return sigma * largest, rank


def signal_to_noise(
    singular_values: Tensor | Sequence[float], rows: int, cols: int, estimator: Estimator = "mp"
) -> SpectrumStatistics:
    """Noise level, signal rank and signal-to-noise ratio of a rows x cols matrix with these singular values (eq. 6).

    "mp" is finite for every finite matrix: zeros and pure noise have SNR 0 (NO_SIGNAL_DB), and a matrix without noise
    the SNR over the floor of float32, at most 4/ρ² (132.5 dB). "spectrum" is the published formula (eq. 7), infinite
    where no singular value lies below its edge, as in the published script.

    >>> signal_to_noise([1.0, 1.0], 2, 2).snr
    0.0
    >>> signal_to_noise([1.0, 1.0], 2, 2, estimator="spectrum").snr
    inf
    """
    s, largest = _normalised(singular_values, rows, cols)
    match estimator:
        case "mp":
            sigma, rank, edge = _deflate(s, rows, cols)
            noise = max(s[rank:].square().sum().item(), _sigma_floor(rows, cols) ** 2 * rows * cols)
            snr = s[:rank].square().sum().item() / noise if rank else 0.0
        case "spectrum":
            sigma, rank, edge, snr = _published(s, rows, cols, largest)
    return SpectrumStatistics(sigma * largest, edge * largest, rank, snr, _decibels(snr))


def _normalised(singular_values: Tensor | Sequence[float], rows: int, cols: int) -> tuple[Tensor, float]:
    """(s/s₁ descending in float64, s₁); s stays zero where all of it is."""
    s = torch.as_tensor(singular_values, dtype=torch.float64).sort(descending=True).values
    assert s.shape == (min(rows, cols),), f"{tuple(s.shape)} singular values of a {rows} x {cols} matrix"
    largest = s[0].item() if len(s) else 0.0
    assert math.isfinite(largest), "non-finite singular values"
    return (s / largest if largest > 0 else s), largest


def _sigma_floor(rows: int, cols: int) -> float:
    """The σ, relative to s₁, whose edge is ROUNDING."""
    return ROUNDING / (math.sqrt(rows) + math.sqrt(cols)) if min(rows, cols) else 0.0


def _deflate(s: Tensor, rows: int, cols: int) -> tuple[float, int, float]:
    """(σ, k, edge) of a normalised spectrum: the smallest k that its own estimate of the noise confirms (eq. 5).

    k only grows, so the iteration ends. An eighth of the values (at least one) always remains as noise: a spectrum
    that falls without ever levelling off would otherwise be counted to its end.
    """
    size = len(s)
    if size == 0 or s[0] == 0:
        return 0.0, 0, 0.0
    floor = _sigma_floor(rows, cols)
    num_zero = int((s <= ROUNDING).sum())
    if num_zero > size // 256:
        return floor, size - num_zero, ROUNDING
    most = size - max(1, size // 8)
    rank, edge = 0, math.inf
    while True:
        m, n = rows - rank, cols - rank
        sigma = max(_median(s[rank:]) / (math.sqrt(max(m, n)) * bulk_median(min(m, n) / max(m, n))), floor)
        edge = min(edge, noise_edge(sigma, m, n) + noise_margin(sigma, m, n))
        count = int((s > edge).sum())
        if count > most:
            edge = s[most].item()
            count = int((s > edge).sum())
        if count <= rank:
            return sigma, rank, edge
        rank = count


def _median(descending: Tensor) -> float:
    """Mean of the two middle values (torch.median takes the lower)."""
    size = len(descending)
    return (descending[(size - 1) // 2].item() + descending[size // 2].item()) / 2


def _published(s: Tensor, rows: int, cols: int, largest: float) -> tuple[float, int, float, float]:
    """(σ, k, edge, SNR) as the published Spectrum script computes them (eq. 7), flaws included.

    σ is the interquartile range of the *singular values* over 1.349 (as if they were a normal sample), the edge
    σ(1 + √β), and the SNR a ratio of sums, not of energies, divided by the largest singular value.
    """
    if len(s) == 0:
        return 0.0, 0, 0.0, math.inf
    low, high = torch.quantile(s, torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    sigma = (high - low) / 1.349
    edge = sigma * (1 + math.sqrt(min(rows, cols) / max(rows, cols)))
    above = s > edge
    signal, noise = s[above].sum().item(), s[~above].sum().item()
    snr = signal / noise / largest if noise > 0 else math.inf
    return sigma, int(above.sum()), edge, snr


def _decibels(snr: float) -> float:
    return max(10 * math.log10(snr), NO_SIGNAL_DB) if snr > 0 else NO_SIGNAL_DB
