"""Gradient subspaces from sketches (docs/method.md section 2).

Letters as in that section: G is the gradient of a matrix (rows x cols, which is d_out x d_in). x are the layer's inputs
(tokens x d_in) and δ the gradients of the loss with respect to its outputs (tokens x d_out), so G = δᵀx. Ω are Gaussian
test matrices with k columns. S is a sketch (k x d): ΩᵀG for the input side, (GΩ')ᵀ for the output side. Q (d x r) is an
orthonormal basis. Tensors are float32 unless a docstring says otherwise. Small eigenproblems are solved in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sgm_finetune.method.sides import Side


@dataclass(frozen=True)
class Sketch:
    """Both sides of one gradient G (d_out x d_in), seen through k test vectors on each side (eq. 8, 9)."""

    input: Tensor  # k x d_in: ΩᵀG
    output: Tensor  # k x d_out: (GΩ')ᵀ
    seed: int  # of Ω = test_matrix(d_out, k, seed) and Ω' = test_matrix(d_in, k, seed)

    def side(self, name: Side) -> Tensor:
        return self.input if name == "input" else self.output


def test_matrix(dim: int, num_vectors: int, seed: int) -> Tensor:
    """Ω (dim x num_vectors): independent standard normal entries. The same three arguments give the same entries.

    >>> test_matrix(4, 2, seed=0).shape
    torch.Size([4, 2])
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + dim) % 2**63)
    return torch.randn(dim, num_vectors, generator=generator)


test_matrix.__test__ = False  # type: ignore[attr-defined]  # pytest must not collect it: the field calls Ω a test matrix


def sketch_batch(x: Tensor, delta: Tensor, omega_out: Tensor, omega_in: Tensor) -> tuple[Tensor, Tensor]:
    """What one batch adds to a sketch's two sides (eq. 8, 9): (δΩ)ᵀx and (xΩ')ᵀδ, without forming δᵀx.

    `x` is tokens x d_in, `delta` tokens x d_out, `omega_out` d_out x k, `omega_in` d_in x k. It takes
    4·tokens·k·(d_in + d_out) operations; the gradient itself would take 2·tokens·d_in·d_out.
    """
    return (delta @ omega_out).T @ x, (x @ omega_in).T @ delta


def sketch_stack(gradients: Tensor, omega_below: Tensor, omega_beside: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of a sketch (eq. 9b) of the gradients Gₑ of a stack of experts, each side as if they were one matrix.

    The sides are Σ ΩₑᵀGₑ of [G₁; G₂; ...] and Σ (GₑΩ'ₑ)ᵀ of [G₁ G₂ ...]. `gradients` is experts x d_out x d_in,
    `omega_below` experts x d_out x k, `omega_beside` experts x d_in x k. The result is float32.
    """
    gradients = gradients.float()
    return (
        torch.einsum("eok,eoi->ki", omega_below, gradients),
        torch.einsum("eoi,eik->ko", gradients, omega_beside),
    )


def squared_norm(sketch: Sketch) -> float:
    """Unbiased estimate of ‖G‖²_F (eq. 10): the mean of ‖S‖²_F / k over both sides, in float64."""
    parts = [side.double().square().sum() / side.shape[0] for side in (sketch.input, sketch.output)]
    return float(sum(parts) / 2)


def leading_parts(stacked: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(σ, Q) of each of n matrices (n x rows x d): the top `rank` singular values and their right singular vectors.

    σ (n x rank) is descending and Q (n x d x rank) orthonormal, float64; both come from the smaller Gram matrices.
    Directions with a singular value below 1e-6 of the largest are arbitrary and have σ = 0, as have those beyond the
    rank of the matrix. The sign of a column makes its largest entry positive, so that equal input gives equal output.
    """
    wide = stacked.double()
    rows, dim = wide.shape[-2:]
    wanted = min(rank, rows, dim)
    eigenvalues, vectors = torch.linalg.eigh(wide @ wide.mT if rows <= dim else wide.mT @ wide)
    squares = eigenvalues.flip(-1)[:, :wanted].clamp_min(0)
    vectors = vectors.flip(-1)[:, :, :wanted]
    usable = squares > 1e-12 * squares[:, :1].clamp_min(torch.finfo(torch.float64).tiny)
    roots = torch.where(usable, squares, 0.0).sqrt()
    columns = vectors if rows > dim else wide.mT @ (vectors / torch.where(usable, roots, 1.0)[:, None, :])
    if wanted < rank or not bool(usable.all()):
        columns = torch.stack([_completed(q[:, kept], rank) for q, kept in zip(columns, usable, strict=True)])
    values = torch.nn.functional.pad(roots, (0, rank - wanted))
    largest = columns.gather(1, columns.abs().argmax(dim=1, keepdim=True))
    return values, columns * torch.where(largest < 0, -1.0, 1.0)


def _completed(columns: Tensor, rank: int) -> Tensor:
    """Orthonormal `columns` (d x at most `rank`), followed by arbitrary ones up to `rank`."""
    dim, num = columns.shape
    if num == rank:
        return columns
    filler = test_matrix(dim, rank - num, seed=0).double()
    return torch.linalg.qr(torch.cat([columns, filler], dim=1)).Q[:, :rank]


def leading_part(stacked: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(σ (rank), Q (d x rank)) of one matrix `stacked` (rows x d); see `leading_parts`."""
    values, columns = leading_parts(stacked[None], rank)
    return values[0], columns[0]


def leading_basis(stacked: Tensor, rank: int) -> Tensor:
    """Q (d x rank), float32: the orthonormal top right singular vectors of `stacked` (rows x d); see `leading_part`."""
    return leading_part(stacked, rank)[1].float()


def leading_rows(sketch: Tensor, rank: int) -> Tensor:
    """R = ΣVᵀ (rank x d), float64: the leading part of the unit-norm sketch, a layer's part in its group (eq. 12)."""
    values, columns = leading_part(with_unit_norm(sketch), rank)
    return values[:, None] * columns.T


def shared_basis(rows: Sequence[Tensor], rank: int) -> Tensor:
    """Q (d x rank) of a group (eq. 12): the top right singular vectors of its members' stacked `leading_rows`."""
    return leading_basis(torch.cat(list(rows)), rank)


def spectral_basis(sketches: Sequence[Tensor], rank: int) -> Tensor:
    """Q (d x rank) for matrices that share one basis, from their sketches with equal channels (eq. 11b, 12)."""
    return shared_basis([leading_rows(sketch, rank) for sketch in equalise_channels(sketches)], rank)


def with_unit_norm(sketch: Tensor) -> Tensor:
    """The sketch over its Frobenius norm. Zeros stay zeros."""
    norm = torch.linalg.vector_norm(sketch)
    return sketch / norm if norm > 0 else sketch


def equalise_channels(sketches: Sequence[Tensor]) -> list[Tensor]:
    """SC^(-1/2) of each of `sketches` (k x d) that may share a basis (eq. 11b), at unit norm, float64.

    Each channel (column) is divided by its root mean square over all sketches. Channels below a millionth of the mean
    square do not become louder.

    >>> [s.round(decimals=2).tolist() for s in equalise_channels([torch.tensor([[3.0, 0.1], [3.0, -0.1]])])]
    [[[0.5, 0.5], [0.5, -0.5]]]
    """
    wide = [with_unit_norm(sketch.double()) for sketch in sketches]
    squares = torch.stack([sketch.square().mean(0) for sketch in wide]).mean(0)
    floor = (1e-6 * squares.mean()).clamp_min(torch.finfo(torch.float64).tiny)
    return [with_unit_norm(sketch * (squares + floor).rsqrt()) for sketch in wide]


def energy_kept(basis: Tensor, sketch: Tensor) -> float:
    """Share of a gradient's energy inside `basis` (eq. 11): ‖SQ‖² / ‖S‖², in [0, 1]; 0 for a sketch of zeros.

    The sketch must come from other data than the basis. Otherwise the share is too large.
    """
    whole = sketch.double().square().sum()
    return float((sketch.double() @ basis.double()).square().sum() / whole) if whole > 0 else 0.0


def reconstruct(sketch: Sketch) -> tuple[Tensor, Tensor]:
    """(Q (d_out x k/2), X (k/2 x d_in)) of one gradient; see `reconstruct_all`."""
    bases, rests = reconstruct_all([sketch])
    return bases[0], rests[0]


def reconstruct_all(sketches: Sequence[Sketch]) -> tuple[Tensor, Tensor]:
    """(Q, X) of n gradients of one shape, G ≈ QX, of rank k/2 (eq. 13): the single-pass approximation of Tropp et al.
    2017, algorithm 4.

    Q (n x d_out x k/2) are orthonormal bases of the output sketches' leading parts and X (n x k/2 x d_in) solve
    (ΩᵀQ) X = S in the least-squares sense, by the pseudo-inverse: LAPACK's gelsy, which lstsq calls, gives other last
    digits every time. float64.
    """
    outputs, inputs = (torch.stack([sketch.side(side) for sketch in sketches]) for side in ("output", "input"))
    num_vectors, dim = outputs.shape[1:]
    bases = leading_parts(outputs, max(1, min(num_vectors // 2, dim)))[1].float().double()
    seeds = {sketch.seed for sketch in sketches}
    omegas = {seed: test_matrix(dim, num_vectors, seed).double().to(bases.device) for seed in seeds}
    seen = torch.stack([omegas[sketch.seed].T @ basis for sketch, basis in zip(sketches, bases, strict=True)])
    return bases, torch.linalg.pinv(seen) @ inputs.double()


def cosines(sketches: Sequence[Sketch], others: Sequence[Sketch] | None = None) -> Tensor:
    """Cosines of gradients of one shape (eq. 13b): ⟨Q₁X₁, Q₂X₂⟩ / (‖X₁‖ ‖X₂‖), float64, in [-1, 1].

    (n x n) between all of `sketches`, or (n,) between `sketches[i]` and `others[i]` (the same layer on other data).
    They compare the leading k/2 directions of the gradients, from `reconstruct_all`. A gradient of zeros has cosine 0.
    """
    return cosines_of(reconstruct_all(sketches), None if others is None else reconstruct_all(others))


def cosines_of(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The `cosines` of gradients from their (Q, X), as `reconstruct_all` returns them."""
    first_norms = torch.linalg.vector_norm(first[1], dim=(1, 2))
    if second is None:
        inner = (_gram(first[0].mT) * _gram(first[1])).sum((-1, -2))
        scale = first_norms[:, None] * first_norms[None, :]
    else:
        second_norms = torch.linalg.vector_norm(second[1], dim=(1, 2))
        inner = ((first[0].mT @ second[0]) * (first[1] @ second[1].mT)).sum((-1, -2))
        scale = first_norms * second_norms
    result = torch.where(scale > 0, inner / scale.clamp_min(1e-300), 0.0).clamp(-1.0, 1.0)
    return result if second is not None else result.fill_diagonal_(1.0)


def _gram(rows: Tensor) -> Tensor:
    """(n, n, k, k): the products R_i R_jᵀ of n blocks of k rows (n x k x d)."""
    num, size, dim = rows.shape
    flat = rows.reshape(num * size, dim)
    return (flat @ flat.T).reshape(num, size, num, size).permute(0, 2, 1, 3)


def pairwise_retention(fit: Sequence[Tensor], held_out: Sequence[Tensor], rank: int) -> Tensor:
    """R (n x n): how well two layers can share one basis of `rank` directions (eq. 14).

    `fit[i]` and `held_out[i]` (k x d) are the sketches of layer i from the two halves. For the pair (i, j) the shared
    basis is fitted to the first half. R_ij is the smaller of the two layers' (energy that this basis keeps of the
    held-out half) / (energy that the layer's own basis keeps). About 1 means that sharing costs nothing. The diagonal
    is 1.
    """
    values, columns = leading_parts(torch.stack([with_unit_norm(sketch) for sketch in fit]), rank)
    tests = torch.stack([with_unit_norm(sketch).double() for sketch in held_out])
    return retention_of_pairs(values[:, :, None] * columns.mT, (tests @ columns).square().sum((1, 2)), tests)


def retention_of_pairs(rows: Tensor, own: Tensor, tests: Tensor) -> Tensor:
    """R (n x n) of `pairwise_retention`, from what it needs of each layer, float64.

    `rows` (n x rank x d) are the leading rows of the first half, `tests` (n x k x d) the held-out sketches at unit
    norm, and `own` (n) the energy that each layer's own basis keeps of its `tests`.

    The function works on Gram matrices, so that no pair needs a d-dimensional decomposition. For stacked leading parts
    M = [F_i; F_j] with MMᵀ = UΛUᵀ the basis is MᵀUΛ^(-1/2), and H applied to it needs only HMᵀ.
    """
    num_layers, rank, _ = rows.shape
    if num_layers < 2:
        return torch.ones(num_layers, num_layers, dtype=torch.float64)
    gram = _gram(rows)
    cross = torch.einsum("ntd,mrd->nmtr", tests, rows)
    i, j = torch.triu_indices(num_layers, num_layers, 1)
    pair = torch.cat([torch.cat([gram[i, i], gram[i, j]], dim=2), torch.cat([gram[j, i], gram[j, j]], dim=2)], dim=1)
    eigenvalues, vectors = torch.linalg.eigh(pair)
    eigenvalues, vectors = eigenvalues[:, -rank:], vectors[:, :, -rank:]
    usable = eigenvalues > 1e-12 * eigenvalues[:, -1:].clamp_min(1e-300)
    scaled = vectors * torch.where(usable, eigenvalues.clamp_min(1e-300).rsqrt(), 0.0)[:, None, :]
    kept = [
        (torch.cat([cross[m, i], cross[m, j]], dim=2) @ scaled).square().sum((1, 2)) / own[m].clamp_min(1e-12)
        for m in (i, j)
    ]
    retention = torch.ones(num_layers, num_layers, dtype=torch.float64)
    retention[i, j] = retention[j, i] = torch.minimum(*kept)
    return retention
