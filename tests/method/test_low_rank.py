"""A cut update is the truncated singular value decomposition of the product that is never formed."""

from __future__ import annotations

import pytest
import torch

from sgm_finetune.method.low_rank import cut_update

EXACT = {"rtol": 1e-10, "atol": 1e-10}
"""Between two float64 decompositions of small matrices."""


def factors(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, rows, rank, cols = shape
    A = torch.randn(*batch, rank, cols, dtype=torch.float64)
    return A, torch.randn(*batch, rows, rank, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(9, 5, 12), (12, 5, 9), (4, 6, 12), (12, 6, 4), (5, 5, 5), (3, 9, 5, 12)])
def test_it_is_the_truncated_decomposition_of_the_product(shape):
    """For every rank up to r, also where a side of the matrix is shorter than r, and for several at once."""
    A, B = factors(*shape)
    U, values, Vt = torch.linalg.svd(1.5 * B @ A, full_matrices=False)
    for rank in range(1, A.shape[-2] + 1):
        A_cut, B_cut, found = cut_update(A, B, 1.5, rank)
        assert A_cut.shape == (*A.shape[:-2], rank, A.shape[-1])
        assert B_cut.shape == (*B.shape[:-1], rank)
        expected = (U[..., :rank] * values[..., None, :rank]) @ Vt[..., :rank, :]
        torch.testing.assert_close(B_cut @ A_cut, expected, **EXACT)
        torch.testing.assert_close(found, values[..., : found.shape[-1]], **EXACT)
    torch.testing.assert_close(B_cut @ A_cut, 1.5 * B @ A, **EXACT)


def test_both_factors_carry_the_square_root_of_each_singular_value():
    A_cut, B_cut, values = cut_update(*factors(9, 5, 12), 0.5, 3)
    torch.testing.assert_close(A_cut @ A_cut.mT, torch.diag(values[:3]), **EXACT)
    torch.testing.assert_close(B_cut.mT @ B_cut, torch.diag(values[:3]), **EXACT)


def test_an_update_of_zeros_stays_one():
    A, B = factors(9, 5, 12)
    A_cut, B_cut, values = cut_update(A, 0 * B, 2.0, 3)
    assert not B_cut.any()
    assert not A_cut.any()
    assert not values.any()


def test_float32_factors_are_cut_in_float64():
    A, B = factors(40, 8, 50)
    found = cut_update(A.float(), B.float(), 1.0, 4)
    expected = cut_update(A.float().double(), B.float().double(), 1.0, 4)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
