"""Histogram of the singular values of a matrix, with the fitted law of noise: the numbers behind a figure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from sgm_finetune.measure.scan_result import MatrixScan
from sgm_finetune.method.singular_values import SingularValues
from sgm_finetune.method.snr import bulk_density, bulk_sigma

_MAX_BINS = 120
_MAX_EDGES = 3
"""The last bin ends at this many noise edges at most."""


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


def histogram_of(spectrum: SingularValues, matrix: MatrixScan) -> Histogram:
    """Returns the histogram of a matrix with the noise level, edge and rank that the scan found."""
    rows, cols = spectrum.alive
    values = spectrum.values[: min(rows, cols)]
    largest = values[0].item() if len(values) else 0.0
    end = min(max(largest, 1.05 * matrix.edge), _MAX_EDGES * matrix.edge) if matrix.edge > 0 else largest
    width = (end or 1.0) / min(_MAX_BINS, max(24, len(values) // 6))
    if matrix.edge > width:
        width = matrix.edge / round(matrix.edge / width)
    bins = width * np.arange(math.ceil((end or 1.0) / width + 1e-9) + 1)
    rank = matrix.signal_rank
    noise, signal = (np.histogram(part.numpy(), bins)[0].tolist() for part in (values[rank:], values[:rank]))
    fitted = bulk_sigma(values, rows, cols, rank) if len(values) > rank else 0.0
    return Histogram(
        name=matrix.name,
        kind=matrix.kind,
        layer=matrix.layer,
        shape=matrix.shape,
        sigma=matrix.sigma,
        edge=matrix.edge,
        signal_rank=rank,
        snr_db=matrix.snr_db if 0 < matrix.snr < math.inf else None,
        bin_width=width,
        noise=tuple(noise),
        signal=tuple(signal),
        num_beyond=int((values > bins[-1]).sum()),
        largest=largest,
        bulk_sigma=max(fitted, 0.0),
        sides=(max(rows, cols) - rank, min(rows, cols) - rank),
    )


def law_of_noise(histogram: Histogram, num_points: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Returns singular values and the number that the Marchenko-Pastur law expects in a bin there, float64.

    Leaves out points where the law is 0. Returns empty arrays if there was nothing to fit.
    """
    larger, smaller = histogram.sides
    if histogram.bulk_sigma <= 0 or smaller < 1:
        return np.empty(0), np.empty(0)
    end, unit = histogram.end, histogram.bulk_sigma * math.sqrt(larger)
    points = torch.linspace(end / num_points, end, num_points, dtype=torch.float64)
    number = bulk_density(points / unit, smaller / larger) / unit * smaller * histogram.bin_width
    inside = number > 0
    return points[inside].numpy(), number[inside].numpy()
