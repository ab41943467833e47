"""A matrix's singular values in bins, with the law that noise of the fitted level follows: what a picture needs."""

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


@dataclass(frozen=True)
class Histogram:
    """Singular values of one matrix, counted; plain data."""

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    sigma: float
    """Noise per entry."""
    edge: float
    """Largest singular value that noise alone explains."""
    signal_rank: int
    snr_db: float | None
    """None: no signal, or infinite."""
    bin_width: float
    """The first bin begins at 0; none lies on both sides of the edge."""
    noise: tuple[int, ...]
    """Number of values in each bin that count as noise."""
    signal: tuple[int, ...]
    num_beyond: int
    """Values right of the last bin, which ends at three edges at most; all of them signal."""
    largest: float
    bulk_sigma: float
    """Of the fitted law (eq. 2, 3), from the values below the edge alone; 0: nothing to fit."""
    sides: tuple[int, int]
    """Larger and smaller side of the noise matrix: of the rows and columns that are not all zeros, less the signal."""

    @property
    def end(self) -> float:
        return self.bin_width * len(self.noise)


def histogram_of(spectrum: SingularValues, matrix: MatrixScan) -> Histogram:
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
    """(singular value, expected number in a bin there) of the Marchenko-Pastur law, where it is not 0; empty where
    there is nothing to fit."""
    larger, smaller = histogram.sides
    if histogram.bulk_sigma <= 0 or smaller < 1:
        return np.empty(0), np.empty(0)
    end, unit = histogram.end, histogram.bulk_sigma * math.sqrt(larger)
    points = torch.linspace(end / num_points, end, num_points, dtype=torch.float64)
    number = bulk_density(points / unit, smaller / larger) / unit * smaller * histogram.bin_width
    inside = number > 0
    return points[inside].numpy(), number[inside].numpy()
