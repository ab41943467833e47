"""The best approximation of a low-rank update by one of smaller rank (docs/method.md section 4)."""

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
    roots = values[..., :rank].sqrt()
    A_cut = roots[..., :, None] * (Vt[..., :rank, :] @ Q_A.mT)
    B_cut = (Q_B @ U[..., :, :rank]) * roots[..., None, :]
    lacking = rank - roots.shape[-1]
    return (
        torch.nn.functional.pad(A_cut, (0, 0, 0, lacking)),
        torch.nn.functional.pad(B_cut, (0, lacking)),
        values,
    )
