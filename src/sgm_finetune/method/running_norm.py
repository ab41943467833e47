"""Clipping by a running norm, for gradients that exist one after another (docs/method.md section 9.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping


def running_norm(last: Mapping[str, float], now: Mapping[str, float], num_tensors: int) -> float:
    """Returns an estimate of the norm of the whole gradient while only a part of it has been computed (eq. 21).

    `now` holds the squared norms of this step's gradients so far, `last` those of the step before. Each tensor counts
    with its newest norm. In the first step, where there is no step before, the tensors to come count as much as those
    so far do on average. `num_tensors` is the number of all tensors.

    >>> running_norm({"a": 9.0, "b": 7.0}, {"b": 16.0}, 2), running_norm({}, {"b": 16.0}, 4)
    (5.0, 8.0)
    """
    if not last:
        return math.sqrt(sum(now.values()) * num_tensors / len(now))
    return math.sqrt(sum(now.get(name, square) for name, square in last.items()))


def clip_factor(norm: float, limit: float) -> float:
    """Returns the factor by which a gradient of `norm` is multiplied so that its norm is at most `limit`.

    >>> clip_factor(4.0, limit=1.0), clip_factor(0.5, limit=1.0)
    (0.25, 1.0)
    """
    return min(1.0, limit / norm) if norm > 0 else 1.0
