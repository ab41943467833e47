"""The best approximation of an update by one of smaller rank (docs/method.md section 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def cut_update(A: Tensor, B: Tensor, scale: float, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A', B', Σ): factors of the best approximation of s·B·A of at most `rank`, and the singular values of s·B·A.

    A is (..., r, d_in), B (..., d_out, r), and s is `scale`. B'·A' holds the `rank` largest singular values; A' (...,
    rank, d_in) and B' (..., d_out, rank) have the square root of each, and zeros where s·B·A has fewer. Σ is in falling
    order. All are float64. No d_out x d_in matrix is formed: with Aᵀ = Q_A·R_A and B = Q_B·R_B the singular values are
    those of s·R_B·R_Aᵀ, which is at most r x r.

    >>> A, B = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.eye(2)
    >>> A_cut, B_cut, values = cut_update(A, B, scale=2.0, rank=1)
    >>> (B_cut @ A_cut).round(decimals=9).tolist(), values.round(decimals=9).tolist()
    ([[6.0, 0.0], [0.0, 0.0]], [6.0, 2.0])
    """
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    Q_B, R_B = torch.linalg.qr(B.double())
    U, values, Vt = torch.linalg.svd(scale * R_B @ R_A.mT, full_matrices=False)
    return *_factors(Q_B @ U, values, Vt @ Q_A.mT, rank), values


def extract_update(change: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B, Σ) as `cut_update` returns them, of the best approximation of a whole `change` (d_out x d_in) of at most
    `rank`. In float64, from the eigenvectors of the smaller of its two Gram matrices.

    >>> A, B, values = extract_update(torch.tensor([[6.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), rank=1)
    >>> (B @ A).round(decimals=9).abs().tolist(), values.round(decimals=9).tolist()
    ([[6.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [6.0, 2.0])
    """
    if change.shape[0] > change.shape[1]:
        B, A, values = extract_update(change.mT, rank)
        return A.mT, B.mT, values
    change = change.double()
    squares, U = torch.linalg.eigh(change @ change.mT)
    values, U = squares.clamp_min(0).flip(-1).sqrt(), U.flip(-1)
    Vt = torch.where(values > 0, 1 / values, 0.0)[:, None] * (U.mT @ change)
    return *_factors(U, values, Vt, rank), values


def _factors(U: Tensor, values: Tensor, Vt: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (..., rank, d_in) and B (..., d_out, rank) of the `rank` largest singular values, with the square root of each;
    zeros where there are fewer."""
    roots = values[..., :rank].sqrt()
    lacking = rank - roots.shape[-1]
    A = roots[..., :, None] * Vt[..., :rank, :]
    B = U[..., :, :rank] * roots[..., None, :]
    return torch.nn.functional.pad(A, (0, 0, 0, lacking)), torch.nn.functional.pad(B, (0, lacking))
