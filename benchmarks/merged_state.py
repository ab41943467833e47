"""One basis for the optimizer states of a group of matrices: an experiment that did not win (docs/LOG.md, 2026-11-28).

Letters: T (d x c) is the gradient of a member of the group, turned so that the shared side has its rows: G for the
output side, Gᵀ for the input side. P (d x r) is the group's orthonormal basis and R = PᵀT (r x c) the projected
gradient. M and V (r x c) are Adam's first and second moments of R: 2rc numbers a member instead of 2dc, as in GaLore
(arXiv 2403.03507), whose layers have bases of their own. e (r) is the evidence behind the rows of V: the sum of the
weights in its running mean, which is 1 − β₂ᵗ before the first change of basis.

Equation 1, the basis: it turns to the r leading left singular vectors of Y = C[P Ω], where C is the sum of TTᵀ / ‖T‖²
over the members and the steps since the last turn, and Ω are 8 random directions: a step of subspace iteration.

Equation 2, the moments in the new basis, with Q = P_newᵀP_old and the mean M̂: M' = QM, e' = Q∘Q e and
V' = |Q∘Q (V − e M̂∘M̂) + e' (QM̂)∘(QM̂)|. The rule for V is that of LDAdam (arXiv 2410.16103).

Equation 3, the step: U ∝ PN + (T − PR) diag(‖N_j‖ / ‖R_j‖) with ‖U‖ = √(d/r) ‖N‖, where N is Adam's direction. The
second part is that of Fira (arXiv 2410.01623) and APOLLO (arXiv 2412.05270); the size makes it AdamW's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sgm_finetune.method.sides import Side
from sgm_finetune.method.subspace import leading_basis, test_matrix

OVERSAMPLING = 8
"""Directions beyond the rank that a refresh looks along."""


def turned(matrix: Tensor, side: Side) -> Tensor:
    """A view of `matrix` (d_out x d_in) whose rows belong to `side`: itself, or its transpose for the input side."""
    return matrix if side == "output" else matrix.mT


# The basis


def probes_beside(dim: int, num: int, seed: int) -> Tensor:
    """Ω (dim x num): random directions of about unit length, in which the gradients may lie beside the basis."""
    return test_matrix(dim, num, seed) / dim**0.5


def covariance_sketch(gradient: Tensor, projected: Tensor, beside: Tensor) -> Tensor:
    """T[R TᵀΩ]ᵀ / ‖T‖² (d x (r + p)): what one member's gradient adds to its group's Y = C[P Ω] (equation 1).

    C is the sum over members and steps of TTᵀ / ‖T‖², so that each counts alike, as under Adam. Neither C nor a
    gradient is kept. `projected` is R = PᵀT (without rows before there is a basis), `beside` is Ω (d x p). A gradient
    of zeros adds zeros.
    """
    scale = torch.linalg.vector_norm(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
    unit = gradient / scale
    return unit @ torch.cat([projected / scale, beside.mT @ unit]).mT


def turned_basis(sketch: Tensor, rank: int) -> Tensor:
    """P (d x rank): the leading left singular vectors of Y, one step of subspace iteration on C (equation 1)."""
    return leading_basis(sketch.mT, rank)


# The moments


class Moments(NamedTuple):
    """Adam's moments of one member's projected gradient, and the evidence behind the second."""

    first: Tensor  # r x c
    second: Tensor  # r x c
    evidence: Tensor  # r


def updated(moments: Moments, projected: Tensor, betas: tuple[float, float]) -> Moments:
    """The moments after the projected gradient R (r x c), changed in place."""
    moments.first.lerp_(projected.to(moments.first.dtype), 1 - betas[0])
    moments.second.lerp_(projected.square(), 1 - betas[1])
    moments.evidence.lerp_(torch.ones_like(moments.evidence), 1 - betas[1])
    return moments


def adam_direction(moments: Moments, step: int, beta: float, eps: float) -> Tensor:
    """N (r x c) = M̂ / (√V̂ + eps), where V̂ = V / e row by row and M̂ = M / (1 − βˢᵗᵉᵖ).

    Before a change of basis it is Adam's. A row whose direction is new has little evidence, not small gradients.
    """
    second = moments.second / moments.evidence.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return moments.first.float() / (1 - beta**step) / second.sqrt_().add_(eps)


def carried(moments: Moments, turn: Tensor, step: int, beta: float) -> Moments:
    """The moments in a new basis (equation 2): `turn` is Q = P_newᵀP_old (r x r).

    M becomes QM. V follows LDAdam (arXiv 2410.16103, algorithm 1): with the mean M̂ and uncorrelated coordinates, the
    second moment of a turned gradient is Q²(V̂ − M̂²) + (QM̂)², where Q² is taken entry by entry. The evidence becomes
    Q²e: the share of a new direction that the old basis saw. With Q = I nothing changes.
    """
    squared = turn.square()
    mean = moments.first.float() / (1 - beta**step)
    evidence = squared @ moments.evidence
    spread = moments.second - moments.evidence[:, None] * mean.square()
    second = (squared @ spread + evidence[:, None] * (turn @ mean).square()).abs_()
    return Moments((turn @ moments.first.float()).to(moments.first.dtype), second, evidence)


# The step


def missed(gradient: Tensor, basis: Tensor, projected: Tensor, direction: Tensor) -> Tensor:
    """What the basis misses, T − PR (d x c), each channel (column) times ‖N‖ / ‖R‖ of that channel (equation 3).

    `direction` is N and `projected` R = PᵀT. It needs no state. The scaling is that of Fira (arXiv 2410.01623) and of
    APOLLO (arXiv 2412.05270). A channel without a projection adds nothing.
    """
    size = torch.linalg.vector_norm(projected, dim=0)
    ratio = torch.linalg.vector_norm(direction, dim=0) / size.clamp_min(torch.finfo(size.dtype).tiny)
    return torch.addmm(gradient, basis, projected, alpha=-1).mul_(torch.where(size > 0, ratio, 0.0))


def whole_step(direction: Tensor, basis: Tensor, rest: Tensor) -> Tensor:
    """U (d x c): PN and the `rest` that the basis misses, at the size of Adam's step in all d directions (equation 3).

    Its mean square is that of N, as AdamW's is for every rank. With r = d it is PN. `rest` is overwritten.
    """
    size = torch.linalg.vector_norm(direction) * (basis.shape[0] / basis.shape[1]) ** 0.5
    step = rest.addmm_(basis, direction)
    norm = torch.linalg.vector_norm(step)
    return step.mul_(size / norm.clamp_min(torch.finfo(norm.dtype).tiny))


# The bytes


class GroupShape(NamedTuple):
    """The widths of one group: d of the shared side, and c of every member's other side."""

    dim: int
    others: tuple[int, ...]


def state_bytes(groups: Iterable[GroupShape], rank: int, refresh: int, first_moment_bytes: int = 4) -> int:
    """Bytes of the states of groups with bases of `rank`, between two steps.

    A group has its basis and, unless `refresh` is 0, the sketch of the next one. A member has two moments and the
    evidence. All but the first moment are float32.

    >>> state_bytes([GroupShape(100, (50, 50))], rank=2, refresh=0)
    2416
    """
    total = 0
    for dim, others in groups:
        r = min(rank, dim)
        total += 4 * r * dim + sum((first_moment_bytes + 4) * r * other + 4 * r for other in others)
        total += 4 * dim * (r + OVERSAMPLING) if refresh else 0
    return total
