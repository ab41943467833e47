"""Signal-to-noise ratios in decibels (docs/method.md section 1.5), without torch: a report shows them."""

from __future__ import annotations

import math
from typing import Literal

Estimator = Literal["mp", "spectrum"]

ROUNDING = 4 * 2.0**-23
"""ρ, a fraction of the largest singular value: four times the rounding of float32. Values below it cannot be
distinguished from the rounding of float32 arithmetic: they count as zero, and the noise edge is never lower."""

NO_SIGNAL_DB = 20 * math.log10(ROUNDING)
"""Decibels that are reported for no signal at all (SNR 0), and the least that is ever reported: −126.4."""


def ratio_decibels(snr: float) -> float:
    """10·log10(snr), at least NO_SIGNAL_DB; infinite if `snr` is.

    >>> ratio_decibels(100.0)
    20.0
    """
    return max(10 * math.log10(snr), NO_SIGNAL_DB) if snr > 0 else NO_SIGNAL_DB
