"""Which matrices are trained, by their signal-to-noise ratio (docs/method.md section 1.6)."""

from __future__ import annotations

import math
from collections.abc import Mapping


def top_fraction_per_kind(snrs: Mapping[str, float], kinds: Mapping[str, str], fraction: float) -> list[str]:
    """Names of the `fraction` of each kind with the highest SNR, in input order.

    Counts are rounded up, so every kind keeps at least one; of equal SNRs the earlier name wins. `fraction` is in
    (0, 1]; an SNR may be infinite (published formula) but not NaN. ValueError otherwise.

    >>> top_fraction_per_kind({"q0": 3.0, "q1": 9.0, "q2": 5.0, "v0": 1.0}, dict(q0="q", q1="q", q2="q", v0="v"), 0.5)
    ['q1', 'q2', 'v0']
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction to select is {fraction}; it lies above 0 and is at most 1")
    _refuse_nan(snrs)
    members: dict[str, list[str]] = {}
    for name in snrs:
        members.setdefault(kinds[name], []).append(name)
    chosen: set[str] = set()
    for names in members.values():
        count = math.ceil(fraction * len(names) - 1e-9)  # 0.07 · 100 is 7.000000000000001 and means 7
        chosen.update(sorted(names, key=lambda name: -snrs[name])[: max(count, 1)])
    return [name for name in snrs if name in chosen]


def above_threshold(snrs: Mapping[str, float], threshold: float) -> list[str]:
    """Names whose SNR (a ratio of energies, not decibels) is at least `threshold`, in input order.

    >>> above_threshold({"a": 0.5, "b": 2.0, "c": 1.0}, 1.0)
    ['b', 'c']
    """
    _refuse_nan(snrs)
    return [name for name, snr in snrs.items() if snr >= threshold]


def _refuse_nan(snrs: Mapping[str, float]) -> None:
    for name, snr in snrs.items():
        if math.isnan(snr):
            raise ValueError(f"the SNR of {name} is not a number")
