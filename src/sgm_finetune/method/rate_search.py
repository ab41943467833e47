"""The search for a learning rate by trials (docs/method.md section 6.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping

_EXPONENT = 0.75
"""Of the number of steps, by whose power the best learning rate falls."""


def best_rate(losses: Mapping[float, float]) -> float:
    """The learning rate with the lowest loss; a loss that is not finite counts as infinite.

    >>> best_rate({1.0: 0.5, 2.0: 0.4, 4.0: float("nan")})
    2.0
    """
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def next_rate(losses: Mapping[float, float], most: int) -> float | None:
    """The learning rate to try after those of `losses`: the next one on the side where the best lies at the edge.

    It is as far from the best as the best is from its neighbour, with two digits. None if the best lies inside, and
    after `most` tries.

    >>> next_rate({1.0: 0.5, 2.0: 0.4, 4.0: 0.3}, most=9), next_rate({1.0: 0.5, 2.0: 0.3, 4.0: 0.4}, most=9)
    (8.0, None)
    """
    rates, best = sorted(losses), best_rate(losses)
    if not 1 < len(rates) < most or best not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / neighbour:.2g}")


def rate_for(rate: float, steps: int, more: int) -> float:
    """The learning rate for `more` steps that corresponds to `rate` for `steps`: η·(steps/more)^¾ (eq. 18b).

    >>> round(rate_for(0.08, 30, 120), 4)
    0.0283
    """
    return rate * (steps / more) ** _EXPONENT


def lowest_point(losses: Mapping[float, float]) -> float:
    """The learning rate at which the parabola through the best trial and its neighbours is lowest, over log(rate).

    It is the best rate itself where a neighbour is missing or its loss is not finite.

    >>> round(lowest_point({1.0: 0.5, 2.0: 0.3, 4.0: 0.5}), 6), round(lowest_point({1.0: 0.5, 2.0: 0.3, 4.0: 0.3}), 6)
    (2.0, 2.828427)
    """
    rates, best = sorted(losses), best_rate(losses)
    at = rates.index(best)
    if at in (0, len(rates) - 1):
        return best
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(rate), losses[rate]) for rate in rates[at - 1 : at + 2])
    if not (math.isfinite(y0) and math.isfinite(y2)):
        return best
    left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    if left == right:
        return best
    return math.exp(x1 - ((x1 - x0) * left - (x1 - x2) * right) / (2 * (left - right)))
