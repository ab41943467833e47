"""The 95 % interval of a metric: how far chance alone can move it on so many test examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NORMAL_QUANTILE = 1.959963984540054
"""The standard normal distribution exceeds this value with probability 0.025."""
_SHARES = {"accuracy": ("num_words", "num_examples"), "exact_match": ("num_generated",)}
"""Metrics that are a share, and the keys of what they are a share of; the first key that is there counts."""


def wilson(share: float, number: int) -> tuple[float, float]:
    """Returns Wilson's score interval of `share`, the share of right ones among `number` (E. B. Wilson, 1927).

    Unlike share ± 2 standard errors, it stays within 0 and 1, and it has a length where the share is 0 or 1.

    >>> [round(end, 3) for end in wilson(0.5, 100)]
    [0.404, 0.596]
    """
    square = NORMAL_QUANTILE**2 / number
    middle = (share + square / 2) / (1 + square)
    reach = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))


def interval_of(metrics: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """Returns the interval of the metric `key` in a test's `metrics`, or None if it is unknown.

    A run stores its intervals under "intervals". For an older run it is computed where the metric is a share.

    >>> interval_of({"loss": 0.3, "num_examples": 100}, "loss")
    """
    stored = (metrics.get("intervals") or {}).get(key)
    if stored is not None:
        return float(stored[0]), float(stored[1])
    number = next((metrics[name] for name in _SHARES.get(key, ()) if metrics.get(name)), 0)
    value = metrics.get(key)
    return wilson(value, number) if number and value is not None and 0 <= value <= 1 else None
