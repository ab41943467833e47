"""Density of the law of noise (docs/method.md section 1.2), in NumPy: a report draws it without torch."""

from __future__ import annotations

import math

import numpy as np


def bulk_density(values: np.ndarray, aspect: float) -> np.ndarray:
    """Density of the Marchenko-Pastur law of singular values at each of `values` (units of σ√M), for β = `aspect`.

    >>> np.square(math.pi * bulk_density(np.array([1.0, 3.0]), 1.0)).round().tolist()  # √(4 - y²)/π
    [3.0, 0.0]
    """
    y = np.asarray(values, dtype=np.float64)
    low, high = (1 - math.sqrt(aspect)) ** 2, (1 + math.sqrt(aspect)) ** 2
    root = np.sqrt(np.maximum((high - np.square(y)) * (np.square(y) - low), 0))
    return root / (math.pi * aspect * np.maximum(y, 1e-12))
