"""Counts the singular values of a model's matrices into histograms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from sgm_finetune.measure.scan import measured_singular_values
from sgm_finetune.measure.scan_result import MatrixScan, Scan
from sgm_finetune.method.singular_values import SingularValues
from sgm_finetune.method.snr import bulk_sigma
from sgm_finetune.results.report.histogram import Histogram
from sgm_finetune.results.report.pictures import MAX_KINDS
from sgm_finetune.results.report.scan_table import kinds_in_order, lowest_median_highest

_MAX_BINS = 120
_MAX_EDGES = 3
"""The last bin ends at this many noise edges at most."""


def histograms_of(scanned: Scan, folder: Path) -> tuple[Histogram, ...]:
    """Returns the histograms of the model in `folder` from the scan's cache. Holds two matrices in memory at a time."""
    layered = [matrix for matrix in scanned.matrices if matrix.layer is not None]
    kinds = kinds_in_order(layered)[:MAX_KINDS]
    chosen = [lowest_median_highest(m for m in layered if m.kind == kind)[1].name for kind in kinds]
    found = {m.name: histogram_of(s, m) for s, m in measured_singular_values(folder, chosen, scanned.estimator)}
    return tuple(found[name] for name in chosen if name in found)


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
