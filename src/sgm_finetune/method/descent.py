"""The step for a factor of a low-rank update: spectral descent in its partners' metric (docs/method.md section 6).

Letters, as there: ΔW = s·B·A with A (r x d_in), B (d_out x r) and scaling s; M is the momentum of a factor's gradient,
laid with its r rows first (A: r x d_in; B transposed: r x d_out). All tensors may have leading batch dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

_CHANNEL_FLOOR = 1e-6
"""Channels below this share of the mean are not made louder."""


def inverse_root(gram: Tensor) -> Tensor:
    """gram^(-1/2) of symmetric positive semidefinite (..., r, r), 0 in the directions where gram is 0 up to rounding;
    float64 within.

    >>> inverse_root(torch.diag(torch.tensor([4.0, 0.0]))).tolist()
    [[0.5, 0.0], [0.0, 0.0]]
    """
    values, vectors = torch.linalg.eigh(gram.double())
    smallest = 8 * torch.finfo(gram.dtype).eps * values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    roots = torch.where(values > smallest, values.clamp_min(smallest).rsqrt(), 0.0)
    return ((vectors * roots.unsqueeze(-2)) @ vectors.mT).to(gram.dtype)


def inverse_roots(grams: Sequence[Tensor]) -> list[Tensor]:
    """`inverse_root` of batches of any number, those of equal r in one decomposition: each makes a GPU wait."""
    found: list[Tensor] = [torch.empty(0)] * len(grams)
    for rank in {gram.shape[-1] for gram in grams}:
        places = [i for i, gram in enumerate(grams) if gram.shape[-1] == rank]
        roots = inverse_root(torch.cat([grams[i].reshape(-1, rank, rank) for i in places]))
        for i, root in zip(places, roots.split([grams[i].numel() // rank**2 for i in places]), strict=True):
            found[i] = root.view(grams[i].shape)
    return found


def polar_factor(momentum: Tensor) -> Tensor:
    """(M·Mᵀ)^(-1/2)·M of (..., r, d): M with every singular value replaced by 1 (eq. 16), from the r x r Gram matrix in
    M's own precision. In float32 singular values below a thousandth of the largest stay 0.

    >>> polar_factor(torch.tensor([[0.0, 3.0], [-0.5, 0.0]])).tolist()
    [[0.0, 1.0], [-1.0, 0.0]]
    """
    scaled = _with_unit_norm(momentum)
    return inverse_root(scaled @ scaled.mT) @ scaled


def _with_unit_norm(momentum: Tensor) -> Tensor:
    """M over its norm, so that no square overflows or vanishes."""
    size = torch.linalg.matrix_norm(momentum, keepdim=True).clamp_min(torch.finfo(momentum.dtype).tiny)
    return momentum / size


def channel_profile(gradient: Tensor) -> Tensor:
    """Mean square of every channel (column) of (..., r, d) over the mean of all: (..., d) of mean 1; of zeros, ones.

    >>> channel_profile(torch.tensor([[3.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])).tolist()
    [1.5, 0.5]
    """
    squares = gradient.square().mean(-2)
    mean = squares.mean(-1, keepdim=True)
    return torch.where(mean > 0, squares / mean.clamp_min(torch.finfo(mean.dtype).tiny), 1.0)


def partner_metric(partner_gram: Tensor, floor: Tensor | float) -> Tensor:
    """S² = partner_gram + floor·I, (..., r, r), whose `inverse_root` is S⁻¹."""
    eye = torch.eye(partner_gram.shape[-1], dtype=partner_gram.dtype, device=partner_gram.device)
    return partner_gram + floor * eye


def descent_directions(parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Iterator[Tensor]:
    """S⁻¹·polar(S⁻¹·M·C^(-1/2)) (eq. 17), (..., r, d), of each of `parts` = (M, S⁻¹, C): C the diagonal, (..., d).

    With PᵀP = S² it is the D with ‖P·D‖₂ ≤ 1 that has the largest inner product with M·C^(-1/2): stepping along −D
    changes ΔW by at most the step in spectral norm, and by the same matrix however the product B·A is split into its
    factors.
    """
    roots, scaled = [], []
    for momentum, root, channels in parts:
        roots.append(root)
        scaled.append(_with_unit_norm(root @ momentum * (channels + _CHANNEL_FLOOR).rsqrt().unsqueeze(-2)))
    polar_roots = inverse_roots([rows @ rows.mT for rows in scaled])
    for root, polar_root, rows in zip(roots, polar_roots, scaled, strict=True):
        yield root @ polar_root @ rows  # r x r first


def partner_floor(own: Tensor, step: float, trust: float) -> Tensor:
    """The floor with which a factor of mean squared singular value `own` changes by at most about 1/trust of itself in
    a step, and which vanishes where it is zero itself and has to begin (eq. 18), or where the step is zero.

    >>> partner_floor(torch.tensor([0.0, 1.0]), step=0.01, trust=10.0).mul(1e4).round().tolist()
    [0.0, 99.0]
    """
    least = trust * step
    return least**2 * own / (own.square() + least**2).clamp_min(torch.finfo(own.dtype).tiny)
