"""The two sides of a matrix on which its gradient has a subspace, and their widths (docs/method.md section 2)."""

from __future__ import annotations

from typing import Literal

Side = Literal["input", "output"]
Sharing = Literal["input", "output", "both"]
"""What the matrices of a group share: the factor of one side, or both factors (a pool)."""
SIDES: tuple[Side, Side] = ("input", "output")


def width(shape: tuple[int, int], side: Side) -> int:
    """Length of the basis vectors on `side` of a matrix of `shape` (d_out, d_in)."""
    return shape[1] if side == "input" else shape[0]


def sides_of(sharing: Sharing) -> tuple[Side, ...]:
    """The sides on which a group shares.

    >>> sides_of("both"), sides_of("input")
    (('input', 'output'), ('input',))
    """
    return SIDES if sharing == "both" else (sharing,)
