"""Formats numbers as text for people."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeGuard

NOTHING = "–"
"""Text for a value that was not measured."""


def layer_ranges(layers: Iterable[int | None]) -> str:
    """Returns layer numbers as ranges.

    >>> layer_ranges([0, 1, 2, 5, 7, 8])
    '0–2, 5, 7–8'
    """
    numbers = sorted({layer for layer in layers if layer is not None})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or NOTHING


def decimal(value: float | None, digits: int = 2) -> str:
    """Returns a number with `digits` decimals, a dash for None, NaN and infinity.

    >>> decimal(-0.25), decimal(1234.5, 1), decimal(-0.0001), decimal(None)
    ('−0.25', '1,234.5', '0.00', '–')
    """
    if not finite(value):
        return NOTHING
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")  # + 0.0: no negative zero


def count(value: float | None) -> str:
    """Returns a whole number with commas.

    >>> count(1234567)
    '1,234,567'
    """
    return f"{round(value):,}".replace("-", "−") if finite(value) else NOTHING


def duration(seconds: float | None) -> str:
    """Returns seconds in the largest fitting units.

    >>> [duration(s) for s in (0.04, 12.34, 75, 7384, None)]
    ['0.04 s', '12.3 s', '1 min 15 s', '2 h 3 min', '–']
    """
    if not finite(seconds):
        return NOTHING
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(size: float | None) -> str:
    """Returns a number of bytes in the largest fitting unit.

    >>> memory(3 * 2**29), memory(5 * 2**20), memory(700)
    ('1.5 GiB', '5.0 MiB', '700 B')
    """
    if not finite(size):
        return NOTHING
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def short(value: float) -> str:
    """Returns the label of an axis tick: three digits, thousands as k.

    >>> [short(v) for v in (0.0125, 950, 1873.4, 25000, 0)]
    ['0.0125', '950', '1.87k', '25k', '0']
    """
    return f"{value / 1000:.3g}k" if abs(value) >= 1000 else f"{value:.3g}"


def finite(value: Any) -> TypeGuard[float]:
    """Returns whether `value` is a number other than NaN and infinity."""
    return isinstance(value, (int, float)) and math.isfinite(value)
