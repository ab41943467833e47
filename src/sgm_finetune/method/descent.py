"""The step for a factor of a low-rank update: spectral descent in its partners' metric (docs/method.md section 6).

Letters as in that section: ΔW = s·B·A with A (r x d_in), B (d_out x r) and the scaling s. M is the momentum of a
factor's gradient with its r rows first (A: r x d_in; B transposed: r x d_out). All tensors may have leading batch
dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

_CHANNEL_FLOOR = 1e-6
"""Channels below this fraction of the mean square do not become louder."""


def inverse_root(gram: Tensor) -> Tensor:
    """gram^(-1/2) of a symmetric positive semidefinite `gram` (..., r, r), in its dtype.

    It is 0 in the directions where `gram` is 0 up to rounding. Computes in float64.

    >>> inverse_root(torch.diag(torch.tensor([4.0, 0.0]))).tolist()
    [[0.5, 0.0], [0.0, 0.0]]
    """
    values, vectors = torch.linalg.eigh(gram.double())
    smallest = 8 * torch.finfo(gram.dtype).eps * values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    roots = torch.where(values > smallest, values.clamp_min(smallest).rsqrt(), 0.0)
    return ((vectors * roots.unsqueeze(-2)) @ vectors.mT).to(gram.dtype)


def inverse_roots(grams: Sequence[Tensor]) -> list[Tensor]:
    """`inverse_root` of each of `grams`. Equal r share one decomposition, because each one makes a GPU wait."""
    found: list[Tensor] = [torch.empty(0)] * len(grams)
    for rank in {gram.shape[-1] for gram in grams}:
        places = [i for i, gram in enumerate(grams) if gram.shape[-1] == rank]
        roots = inverse_root(torch.cat([grams[i].reshape(-1, rank, rank) for i in places]))
        for i, root in zip(places, roots.split([grams[i].numel() // rank**2 for i in places]), strict=True):
            found[i] = root.view(grams[i].shape)
    return found


def polar_factor(momentum: Tensor) -> Tensor:
    """(M·Mᵀ)^(-1/2)·M (..., r, d): M with every singular value replaced by 1 (eq. 16).

    It comes from the r x r Gram matrix in M's own precision. In float32, singular values below a thousandth of the
    largest become 0.

    >>> polar_factor(torch.tensor([[0.0, 3.0], [-0.5, 0.0]])).tolist()
    [[0.0, 1.0], [-1.0, 0.0]]
    """
    scaled = _with_unit_norm(momentum)
    return inverse_root(scaled @ scaled.mT) @ scaled


def _with_unit_norm(momentum: Tensor) -> Tensor:
    """M over its Frobenius norm, so that no square overflows or vanishes."""
    size = torch.linalg.matrix_norm(momentum, keepdim=True).clamp_min(torch.finfo(momentum.dtype).tiny)
    return momentum / size


def channel_profile(gradient: Tensor) -> Tensor:
    """C (..., d) of eq. 17: mean square of each channel (column) of `gradient` (..., r, d) over that of all channels.

    The mean of C is 1. A gradient of zeros gives ones.

    >>> channel_profile(torch.tensor([[3.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])).tolist()
    [1.5, 0.5]
    """
    squares = gradient.square().mean(-2)
    mean = squares.mean(-1, keepdim=True)
    return torch.where(mean > 0, squares / mean.clamp_min(torch.finfo(mean.dtype).tiny), 1.0)


def partner_metric(partner_gram: Tensor, floor: Tensor | float) -> Tensor:
    """S² = partner_gram + floor·I (..., r, r) of eq. 18; its `inverse_root` is S⁻¹."""
    eye = torch.eye(partner_gram.shape[-1], dtype=partner_gram.dtype, device=partner_gram.device)
    return partner_gram + floor * eye


def pool_metric(gram: Tensor, codes: Tensor) -> Tensor:
    """The mean over the members of a pool of diag(c)·BᵀB·diag(c) (eq. 17c), or of the same of A·Aᵀ.

    `gram` (..., r, r) is BᵀB and `codes` (..., members, r) are the members' c.

    >>> pool_metric(torch.ones(2, 2), torch.tensor([[1.0, -3.0]])).tolist()
    [[1.0, -3.0], [-3.0, 9.0]]
    """
    return gram * (codes.mT @ codes) / codes.shape[-2]


def largest_change(root: Tensor, gram: Tensor, codes: Tensor, iterations: int = 12) -> Tensor:
    """The largest ‖B·diag(c)·S⁻¹‖₂ of the members of a pool (..., 1, 1), and at least 1.

    `root` is S⁻¹ (..., r, r) of the `pool_metric` of `gram` and `codes`. Members with few directions in common have a
    mean metric in which a unit step changes each of them by more than one unit; a step over this number changes none of
    them by more. Power iteration on all members at once.
    """
    vectors = torch.ones_like(codes)
    sizes = torch.ones_like(codes[..., :1])
    for _ in range(iterations):
        vectors = (codes * ((codes * (vectors @ root)) @ gram)) @ root
        sizes = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        vectors = vectors / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
    return sizes.sqrt().amax(dim=-2, keepdim=True).clamp_min(1.0)


def code_steps(momentum: Tensor, loudness: Tensor, floor: Tensor, step: float) -> Tensor:
    """The step of a pool member's codes (eq. 17d): sign descent, each code in the units of its own direction.

    `loudness` (r) is |a_j|²·|b_j|² of the directions. With orthogonal directions the change of ΔW has the spectral norm
    `step`, however a direction's size is divided between a_j, b_j and c_j. `floor` is that of `partner_floor`.

    >>> code_steps(torch.tensor([0.2, -5.0]), torch.tensor([4.0, 1.0]), torch.tensor(0.0), step=0.1).tolist()
    [0.05000000074505806, -0.10000000149011612]
    """
    tiny = torch.finfo(loudness.dtype).tiny  # before the first step both may be 0
    return step * momentum.sign() * (loudness + floor).clamp_min(tiny).rsqrt()


def descent_directions(parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Iterator[Tensor]:
    """Yields D = S⁻¹·polar(S⁻¹·M·C^(-1/2)) (..., r, d) (eq. 17) for each of `parts` = (M, S⁻¹, diagonal of C (..., d)).

    With PᵀP = S², D has the largest inner product with M·C^(-1/2) of all matrices with ‖P·D‖₂ ≤ 1. A step along −D
    changes ΔW by at most the step in spectral norm, and by the same matrix however the product B·A is split into its
    factors.
    """
    roots, scaled = [], []
    for momentum, root, channels in parts:
        roots.append(root)
        scaled.append(_with_unit_norm(root @ momentum * (channels + _CHANNEL_FLOOR).rsqrt().unsqueeze(-2)))
    polar_roots = inverse_roots([rows @ rows.mT for rows in scaled])
    for root, polar_root, rows in zip(roots, polar_roots, scaled, strict=True):
        yield root @ polar_root @ rows  # the r x r product comes first because it is cheap


def partner_floor(own: Tensor, step: float, trust: float) -> Tensor:
    """f (eq. 18): the floor of S² with which a factor changes by at most about 1/trust of itself in a step.

    `own` is the mean squared singular value of the factor, `step` is η' in the units of B·D. f is 0 for a factor of
    zeros, which has to begin, and for a step of 0.

    >>> partner_floor(torch.tensor([0.0, 1.0]), step=0.01, trust=10.0).mul(1e4).round().tolist()
    [0.0, 99.0]
    """
    least = trust * step
    return least**2 * own / (own.square() + least**2).clamp_min(torch.finfo(own.dtype).tiny)
