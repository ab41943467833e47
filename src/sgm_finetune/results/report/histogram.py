"""Histogram of the singular values of a matrix, with the fitted law of noise: the numbers behind a figure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sgm_finetune.method.noise_density import bulk_density


@dataclass(frozen=True)
class Histogram:
    """Numbers of singular values of one matrix in bins, as plain data."""

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    sigma: float
    """Standard deviation of the noise of one entry."""
    edge: float
    """Largest singular value that noise alone explains."""
    signal_rank: int
    snr_db: float | None
    """None: no signal, or infinite."""
    bin_width: float
    """The first bin begins at 0, and the noise edge is the border of two bins."""
    noise: tuple[int, ...]
    """Number of noise values in each bin."""
    signal: tuple[int, ...]
    """Number of signal values in each bin."""
    num_beyond: int
    """Number of values beyond the last bin, which ends at three noise edges at most. All of them are signal."""
    largest: float
    bulk_sigma: float
    """Noise level of the law (eq. 2, 3), fitted to the values below the edge only. 0: there was nothing to fit."""
    sides: tuple[int, int]
    """Larger and smaller side of the noise matrix: rows and columns that are not all zeros, minus the signal rank."""

    @property
    def end(self) -> float:
        """Right end of the last bin."""
        return self.bin_width * len(self.noise)


def law_of_noise(histogram: Histogram, num_points: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Returns singular values and the number that the Marchenko-Pastur law expects in a bin there, float64.

    Leaves out points where the law is 0. Returns empty arrays if there was nothing to fit.
    """
    larger, smaller = histogram.sides
    if histogram.bulk_sigma <= 0 or smaller < 1:
        return np.empty(0), np.empty(0)
    end, unit = histogram.end, histogram.bulk_sigma * math.sqrt(larger)
    points = np.linspace(end / num_points, end, num_points)
    number = bulk_density(points / unit, smaller / larger) / unit * smaller * histogram.bin_width
    inside = number > 0
    return points[inside], number[inside]
