"""Signal-to-noise ratio of a weight matrix (docs/method.md section 1).

Letters as in that section: W is the matrix (rows x cols). M and N are the larger and the smaller of its sides, and
β = N/M is its aspect ratio. s are its singular values, descending, in the units of the weights. σ is the standard
deviation of one *entry* of the noise. k is the signal rank, the number of singular values that noise does not explain.

The functions compute in float64 on singular values divided by the largest one, so that W and cW give the same answer
for every c that floating point can represent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor

from sgm_finetune.method.decibels import ROUNDING, Estimator, ratio_decibels

_TRACY_WIDOM = 3.27  # the law's 99.9 % point (β = 1): chance exceeds it in one of a thousand matrices of noise
_SIGMA_DEVIATIONS = 1.0  # standard errors of σ that the margin allows for
_FIT_FRACTION, _FIT_NUM_VALUES = 0.075, 2.0  # a noise bulk is within this fraction, or number, of its values of the law
_NEAREST = 1.5  # a bulk below fewer spikes may be this many times as far from the law as the nearest bulk


@dataclass(frozen=True)
class SnrStatistics:
    """Noise level, signal rank and signal-to-noise ratio of one matrix."""

    sigma: float
    """Standard deviation of one noise entry, in the units of the weights ("spectrum": of the singular values)."""
    edge: float
    """Exactly `signal_rank` singular values lie above it; units of the weights."""
    signal_rank: int
    snr: float
    """Signal energy / noise energy (eq. 6): 0 for pure noise, at most 4/ρ² (ρ: ROUNDING) for no noise. With the
    estimator "spectrum" it is eq. 7: in the unit 1/weight, and infinite where nothing lies below the edge."""
    snr_db: float
    """10·log10(snr), at least NO_SIGNAL_DB; infinite if snr is."""


@lru_cache(maxsize=65536)
def bulk_median(aspect: float) -> float:
    """Median of the Marchenko-Pastur law of singular values (eq. 2), in units of σ√M, for β = `aspect` in (0, 1].

    >>> round(bulk_median(1.0) ** 2, 4)  # μ_1 of Gavish & Donoho
    0.6528
    """
    return math.sqrt(1 + aspect + 2 * math.sqrt(aspect) * math.cos(_angle_of_share(0.5, aspect)))


def bulk_share_above(values: Tensor, aspect: float) -> Tensor:
    """Share of the Marchenko-Pastur law above each of `values` (any shape, units of σ√M), for β = `aspect` (eq. 2).

    >>> bulk_share_above(torch.tensor([0.0, 1.0, 2.0]), 1.0).mul(1000).round().tolist()
    [1000.0, 391.0, 0.0]
    """
    cosine = (values.double().square() - 1 - aspect) / (2 * math.sqrt(aspect))
    theta = cosine.clamp(-1, 1).acos()
    return _share(theta, (_arc_factor(aspect) * (theta / 2).tan()).atan(), theta.sin(), aspect)


@lru_cache(maxsize=65536)
def bulk_energy(first: float, last: float, aspect: float) -> float:
    """Mean of y² over the law from its share `first` to its share `last`, counted from the top (eq. 3)."""
    low, high = (_angle_of_share(share, aspect) for share in (first, last))
    energy = (high - math.sin(high) * math.cos(high)) - (low - math.sin(low) * math.cos(low))
    return energy / math.pi / (last - first)


@lru_cache(maxsize=65536)
def _angle_of_share(share: float, aspect: float) -> float:
    """The angle θ above which the given share of the law lies, with y² = 1 + β + 2√β·cos θ (eq. 2)."""
    if share <= 0 or share >= 1:
        return 0.0 if share <= 0 else math.pi
    return brentq(lambda theta: _share_above(theta, aspect) - share, 0.0, math.pi - 1e-9, xtol=1e-13)  # type: ignore[return-value]


def _share_above(theta: float, aspect: float) -> float:
    return _share(theta, math.atan(_arc_factor(aspect) * math.tan(theta / 2)), math.sin(theta), aspect)


def _arc_factor(aspect: float) -> float:
    return (1 - math.sqrt(aspect)) / (1 + math.sqrt(aspect))


def _share(theta: Any, arc: Any, sine: Any, aspect: float) -> Any:
    """Share of the law above θ (eq. 2): the integral of its density in closed form, for numbers or tensors."""
    bulk = ((1 + aspect) * theta - 2 * (1 - aspect) * arc) / (4 * aspect)
    return 2 / math.pi * (bulk - sine / (2 * math.sqrt(aspect)))


def noise_edge(sigma: float, rows: int, cols: int) -> float:
    """Largest singular value that noise alone explains in a large matrix (eq. 1).

    `sigma` is the standard deviation of one *entry*, in the units of the weights; the edge is in the
    units of the singular values.

    >>> noise_edge(sigma=0.5, rows=9, cols=16)
    3.5
    """
    return sigma * (math.sqrt(rows) + math.sqrt(cols))


def noise_margin(sigma: float, rows: int, cols: int) -> float:
    """How far above the edge noise may still reach in a rows x cols matrix (eq. 4), in the units of `noise_edge`.

    With u = 1/√rows + 1/√cols: σ·(½·3.27·u^⅓ + u). The first term is the 99.9 % point of the Tracy-Widom law in
    Johnstone's scaling. The second is the uncertainty of σ, which matters in small matrices.

    >>> round(noise_margin(1.0, 1024, 1024) / noise_edge(1.0, 1024, 1024), 3)
    0.011
    """
    u = 1 / math.sqrt(rows) + 1 / math.sqrt(cols)
    return sigma * (_TRACY_WIDOM / 2 * u ** (1 / 3) + _SIGMA_DEVIATIONS * u)


def estimate_noise(singular_values: Tensor | Sequence[float], rows: int, cols: int) -> tuple[float, int]:
    """(σ, k): noise per entry, in the units of the weights, and signal rank, by deflation (eq. 3 to 5).

    A matrix of zeros gives (0, 0). A value counts as zero below ρ·s₁ (ρ: ROUNDING). If more than N // 256 values are
    zero, there is no independent noise: every other value is signal, and σ is the floor ρ·s₁/(√M + √N).
    A vector (1 x n) has no bulk to compare with: k = 0.

    >>> estimate_noise([5.0, 0.0, 0.0], 3, 3)[1]
    1
    """
    s, largest = _scale_to_one(singular_values, rows, cols)
    sigma, rank, _ = deflate(s, rows, cols)
    return sigma * largest, rank


def signal_to_noise(
    singular_values: Tensor | Sequence[float], rows: int, cols: int, estimator: Estimator = "mp"
) -> SnrStatistics:
    """Noise level, signal rank and signal-to-noise ratio of a rows x cols matrix with these singular values (eq. 6).

    "mp" is finite for every finite matrix. Zeros and pure noise have SNR 0 (NO_SIGNAL_DB). A matrix without noise has
    its SNR over the floor of float32, at most 4/ρ² (132.5 dB). "spectrum" is the published formula (eq. 7). It is
    infinite where no singular value lies below its edge, as in the published script.

    >>> signal_to_noise([1.0, 1.0], 2, 2).snr
    0.0
    >>> signal_to_noise([1.0, 1.0], 2, 2, estimator="spectrum").snr
    inf
    """
    s, largest = _scale_to_one(singular_values, rows, cols)
    match estimator:
        case "mp":
            sigma, rank, edge = deflate(s, rows, cols)
            noise = max(s[rank:].square().sum().item(), _sigma_floor(rows, cols) ** 2 * rows * cols)
            snr = s[:rank].square().sum().item() / noise if rank else 0.0
        case "spectrum":
            sigma, rank, edge, snr = published_formula(s, rows, cols, largest)
    return SnrStatistics(sigma * largest, edge * largest, rank, snr, ratio_decibels(snr))


def _scale_to_one(singular_values: Tensor | Sequence[float], rows: int, cols: int) -> tuple[Tensor, float]:
    """(s/s₁ descending in float64, s₁). All zeros stay zeros."""
    s = torch.as_tensor(singular_values, dtype=torch.float64).sort(descending=True).values
    assert s.shape == (min(rows, cols),), f"{tuple(s.shape)} singular values of a {rows} x {cols} matrix"
    largest = s[0].item() if len(s) else 0.0
    assert math.isfinite(largest), "non-finite singular values"
    return (s / largest if largest > 0 else s), largest


def _sigma_floor(rows: int, cols: int) -> float:
    """The σ, relative to s₁, whose noise edge is ROUNDING."""
    return ROUNDING / (math.sqrt(rows) + math.sqrt(cols)) if min(rows, cols) else 0.0


def deflate(s: Tensor, rows: int, cols: int) -> tuple[float, int, float]:
    """(σ, k, edge) of singular values divided by the largest (eq. 5).

    k is the smallest confirmed signal rank whose noise follows the Marchenko-Pastur law. If no noise does, it is the
    smallest one that comes nearly as close to the law as the closest.
    """
    size = len(s)
    if size == 0 or s[0] == 0:
        return 0.0, 0, 0.0
    num_zero = int((s <= ROUNDING).sum())
    if num_zero > size // 256:
        return _sigma_floor(rows, cols), size - num_zero, ROUNDING
    edges: dict[int, float] = {}
    distances: dict[int, float] = {}
    for quarter in range(4):
        rank, edge = confirm_rank(s, rows, cols, quarter * size // 4)
        if rank in edges:
            continue
        edges[rank], distances[rank] = edge, distance_from_noise(s, rows, cols, rank)
        if distances[rank] <= _fit_tolerance(size - rank):
            break
    nearest = min(distances.values())
    rank = min(k for k, distance in distances.items() if distance <= max(_fit_tolerance(size - k), _NEAREST * nearest))
    sigma = bulk_sigma(s, rows, cols, rank)
    corrected = sigma * absorption_factor(s[:rank], sigma, rows, cols)
    return max(corrected, _sigma_floor(rows, cols)), rank, edges[rank]


def _fit_tolerance(num_values: int) -> float:
    """Distance from the law that `num_values` singular values of noise stay below."""
    return max(_FIT_FRACTION, _FIT_NUM_VALUES / num_values)


def confirm_rank(s: Tensor, rows: int, cols: int, rank: int) -> tuple[int, float]:
    """(k, edge) with exactly k values above the edge that the other values give (eq. 5), iterated from k = `rank`.

    The edge falls as k grows, so k moves in one direction. If rounding turns it once, the larger k is kept, with the
    edge that gave it. An eighth of the values (at least one) always remains as noise: a spectrum that falls without
    levelling off would otherwise be counted to its end.
    """
    most = len(s) - max(1, len(s) // 8)
    rising, edge = False, math.inf
    while True:
        sigma = max(bulk_sigma(s, rows, cols, rank), _sigma_floor(rows, cols))
        next_edge = noise_edge(sigma, rows - rank, cols - rank) + noise_margin(sigma, rows - rank, cols - rank)
        count = int((s > next_edge).sum())
        if count > most:
            next_edge = s[most].item()
            count = int((s > next_edge).sum())
        if count == rank:
            return rank, next_edge
        if rising and count < rank:
            return rank, edge
        rising, rank, edge = count > rank, count, next_edge


def bulk_sigma(singular_values: Tensor, rows: int, cols: int, rank: int) -> float:
    """σ from the energy of the middle half of the descending values below the `rank` largest (eq. 3).

    `rank` is less than the number of values.
    """
    larger, smaller = max(rows, cols) - rank, min(rows, cols) - rank
    first, last = smaller // 4, math.ceil(smaller * 3 / 4)
    middle = singular_values[rank + first : rank + last].square().mean().item()
    return math.sqrt(middle / (larger * bulk_energy(first / smaller, last / smaller, smaller / larger)))


def absorption_factor(signal: Tensor, sigma: float, rows: int, cols: int) -> float:
    """σ/σ_k: how many times the noise around the spikes `signal` is as strong as the noise below them (eq. 5b)."""
    m, n = rows - len(signal), cols - len(signal)
    shifted = signal.square() / sigma**2 - (rows + cols - len(signal)) if sigma > 0 else signal
    strength = (shifted + (shifted.square() - 4 * m * n).clamp_min(0).sqrt()) / 2
    return math.sqrt(1 + (1 / strength.clamp_min(math.sqrt(m * n))).sum().item())


def distance_from_noise(singular_values: Tensor, rows: int, cols: int, rank: int) -> float:
    """How far the values below the `rank` largest are from noise with their own σ (eq. 5), in [0, 1].

    It is the largest difference of the two distributions (Kolmogorov's): about 1/values for noise, and 0.1 and more
    without a noise bulk.
    """
    larger, smaller = max(rows, cols) - rank, min(rows, cols) - rank
    sigma = bulk_sigma(singular_values, rows, cols, rank)
    if sigma == 0:
        return 1.0
    above = bulk_share_above(singular_values[rank:] / (sigma * math.sqrt(larger)), smaller / larger)
    shares = (torch.arange(smaller, dtype=torch.float64) + 0.5) / smaller
    return (above - shares).abs().max().item()


def published_formula(s: Tensor, rows: int, cols: int, largest: float) -> tuple[float, int, float, float]:
    """(σ, k, edge, SNR) as the published Spectrum script computes them (eq. 7), flaws included.

    σ is the interquartile range of the *singular values* over 1.349, as if they were a normal sample. The edge is
    σ(1 + √β). The SNR is a ratio of sums, not of energies, divided by the largest singular value.
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
