"""Singular values of large matrices in the precision that the noise estimate needs (docs/method.md section 1.9).

Letters as in method/snr.py: W is the matrix, M and N are the larger and the smaller of its sides. The singular values
are the square roots of the eigenvalues λ of the N x N Gram matrix, which is summed over slices of W. W itself is never
copied whole, and the work is one product and one reduction of an N x N matrix, however large M is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT64_BELOW = 1024
"""Matrices with a smaller side below this are decomposed in float64, which takes little time there."""

_SINGULAR = 2.0**-5 * torch.finfo(torch.float32).eps
"""In float32, eigenvalues below this fraction of the largest are zeros with a rounding error of either sign."""

_BLURRED = 2.0**-10
"""In float32, noise below this fraction of the largest eigenvalue has an error of more than a millionth."""

_SLICE = 2**24  # entries of W that are converted at a time
_PANELS = 8  # the Gram matrix is symmetric: of 8 x 8 panels only 36 are multiplied


@dataclass(frozen=True)
class SingularValues:
    """The singular values of one matrix."""

    values: Tensor
    """Descending, float64, min(rows, cols) of them, in the units of the weights."""
    alive: tuple[int, int]
    """Numbers of rows and columns that are not all zeros: pruned units are neither noise nor signal."""


def singular_values(weights: Tensor) -> Tensor:
    """All min(rows, cols) singular values of a matrix, descending, float64 on the CPU.

    >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]])).tolist()
    [4.0, 3.0]
    """
    return batched_singular_values([weights])[0].values


def batched_singular_values(matrices: Sequence[Tensor]) -> list[SingularValues]:
    """Singular values of matrices with equal smaller sides, decomposed together on their device.

    The matrices may have any floating dtype. W, Wᵀ and 2ⁿW give the same bits, scaled. Below FLOAT64_BELOW the
    arithmetic is float64. From there on it is float32, where an eigenvalue has an error of a small multiple of ε·λ₁
    (docs/evidence/singular-values.md). Unless λ₁ is large, only the smallest values suffer. A matrix is decomposed
    again in float64 if float32 cannot distinguish more than N/512 of its eigenvalues from zero, or if the third quarter
    of its eigenvalues has a mean below λ₁/2¹⁰. Raises ValueError for entries that are not finite.
    """
    talls = [w if w.shape[0] >= w.shape[1] else w.T for w in matrices]
    size = talls[0].shape[1]
    assert all(tall.shape[1] == size for tall in talls), "the matrices of a batch have different smaller sides"
    if size == 0:
        return [SingularValues(torch.zeros(0, dtype=torch.float64), (0, 0)) for _ in matrices]
    if size < FLOAT64_BELOW:
        found = _decompose(talls, torch.float64)
    else:
        found = _decompose(talls, torch.float32)
        for i, values in enumerate(found):
            if values is None:
                (found[i],) = _decompose([talls[i]], torch.float64)
    return [
        _with_sides_of(matrix, values) for matrix, values in zip(matrices, found, strict=True) if values is not None
    ]


@contextmanager
def exact_bfloat16_products(enabled: bool) -> Iterator[None]:
    """Lets the CPU multiply float32 matrices as bfloat16 with float32 sums, if `enabled`.

    This is exact if every entry *is* a bfloat16 number, and several times as fast on processors with such units. The
    setting holds for the whole process, so it is for bfloat16 files only.
    """
    before = torch.get_float32_matmul_precision()
    if enabled:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _decompose(talls: Sequence[Tensor], dtype: torch.dtype) -> list[SingularValues | None]:
    """Singular values of matrices with rows >= columns, in `dtype`; None for one that float32 cannot resolve."""
    grams = [_gram(tall, dtype) for tall in talls]
    stacked = grams[0][0][None] if len(grams) == 1 else torch.stack([gram for gram, *_ in grams])
    eigenvalues = torch.linalg.eigvalsh(stacked).double().flip(-1).cpu()
    found: list[SingularValues | None] = []
    for values, (gram, scale, rows) in zip(eigenvalues, grams, strict=True):
        if dtype == torch.float32 and not _is_resolved(values):
            found.append(None)
        else:
            alive = int((gram.diagonal() > 0).sum())
            values[alive:] = 0
            found.append(SingularValues(values.clamp_min(0).sqrt() / scale, (rows, alive)))
    return found


def _is_resolved(eigenvalues: Tensor) -> bool:
    """Whether float32 resolves these descending eigenvalues: few are zero, and noise is not small beside the first."""
    size, largest = len(eigenvalues), eigenvalues[0]
    num_tiny = int((eigenvalues <= _SINGULAR * largest).sum())
    return num_tiny <= size // 512 and bool(eigenvalues[size // 2 : size * 3 // 4].mean() >= _BLURRED * largest)


def _with_sides_of(matrix: Tensor, found: SingularValues) -> SingularValues:
    """`found` with its rows and columns as in `matrix`, of which the transpose was decomposed if it is wide."""
    if matrix.shape[0] >= matrix.shape[1]:
        return found
    rows, cols = found.alive
    return SingularValues(found.values, (cols, rows))


def _gram(tall: Tensor, dtype: torch.dtype) -> tuple[Tensor, float, int]:
    """(WᵀW of the scaled matrix, scale, number of rows that are not all zeros).

    The scale is a power of two, which changes no digit. It puts the largest entry of the Gram matrix into [¼, 1), so
    that solvers with absolute tolerances always see the same size. Raises ValueError for entries that are not finite.
    """
    gram, alive = _gram_sum(tall, dtype, 1.0)
    largest = gram.diagonal().max().item()
    scale = 1.0
    if not 1e-20 < largest < 1e30:  # the squares of the entries may leave the range of float32
        peak = tall.abs().max().item()
        if not math.isfinite(peak):
            raise ValueError("entries are infinite or not a number")
        if peak == 0:
            return gram, 1.0, alive
        scale = 2.0 ** max(min(-math.frexp(peak)[1], 1000), -1000)
        gram, alive = _gram_sum(tall.double(), dtype, scale)
        largest = gram.diagonal().max().item()
    half = -((math.frexp(largest)[1] + 1) // 2)
    return gram.mul_(4.0**half), scale * 2.0**half, alive


def _gram_sum(tall: Tensor, dtype: torch.dtype, scale: float) -> tuple[Tensor, int]:
    """(scale²·WᵀW, number of rows that are not all zeros), summed over slices of rows.

    Only panels on and above the diagonal are multiplied. A row is all zeros if its product with a random vector is 0.
    """
    size = tall.shape[1]
    num_panels = _PANELS if size >= FLOAT64_BELOW else 1
    bounds = [(i * size // num_panels, (i + 1) * size // num_panels) for i in range(num_panels)]
    panels = [torch.zeros(high - low, size - low, dtype=dtype, device=tall.device) for low, high in bounds]
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(tall.device, dtype)
    alive = 0
    for part in tall.split(max(1, _SLICE // size)):
        part = part.to(dtype) if scale == 1 else (part * scale).to(dtype)
        alive += int((part @ vector).count_nonzero())
        for (low, high), panel in zip(bounds, panels, strict=True):
            panel.addmm_(part[:, low:high].T, part[:, low:])
    gram = torch.empty(size, size, dtype=dtype, device=tall.device)
    for (low, high), panel in zip(bounds, panels, strict=True):
        gram[low:high, low:] = panel
        gram[low:, low:high] = panel.T
    return gram, alive
