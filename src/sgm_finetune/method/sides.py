"""The two sides of a matrix on which its gradient has a subspace, and their widths (docs/method.md section 2)."""

from __future__ import annotations

from typing import Literal

Side = Literal["input", "output"]
SIDES: tuple[Side, Side] = ("input", "output")


def width(shape: tuple[int, int], side: Side) -> int:
    """Length of the basis vectors on `side` of a matrix of `shape` (d_out, d_in)."""
    return shape[1] if side == "input" else shape[0]
