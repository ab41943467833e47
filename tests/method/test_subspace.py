"""Sketches agree with the gradients that they stand for, in float64."""

from __future__ import annotations

import pytest
import torch

from sgm_finetune.method.subspace import (
    Sketch,
    cosines,
    energy_kept,
    equalise_channels,
    leading_basis,
    leading_rows,
    pairwise_retention,
    reconstruct,
    shared_basis,
    sketch_batch,
    squared_norm,
    test_matrix,
)


def sketch_of(gradient: torch.Tensor, num_vectors: int, seed: int) -> Sketch:
    rows, cols = gradient.shape
    omega_out, omega_in = test_matrix(rows, num_vectors, seed), test_matrix(cols, num_vectors, seed)
    return Sketch(omega_out.T @ gradient, (gradient @ omega_in).T, seed)


def low_rank(rows: int, cols: int, rank: int, seed: int, decay: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(cols, rank, generator=generator)).Q
    return (left * decay ** torch.arange(rank)) @ right.T


def test_a_batch_adds_the_sketch_of_its_gradient():
    """sketch_batch(x, δ) = sketch of δᵀx."""
    x, delta = torch.randn(30, 20), torch.randn(30, 12)
    omega_out, omega_in = test_matrix(12, 8, 3), test_matrix(20, 8, 3)
    parts = sketch_batch(x, delta, omega_out, omega_in)
    whole = sketch_of(delta.T @ x, 8, 3)
    torch.testing.assert_close(parts[0], whole.input, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts[1], whole.output, rtol=1e-4, atol=1e-4)


def test_squared_norm_is_unbiased():
    """The mean over test matrices is ‖G‖²_F."""
    gradient = low_rank(20, 30, 6, 0)
    estimates = [squared_norm(sketch_of(gradient, 16, seed)) for seed in range(200)]
    assert sum(estimates) / len(estimates) == pytest.approx(float(gradient.square().sum()), rel=0.05)


def test_the_basis_of_a_low_rank_gradient_keeps_all_its_energy():
    gradient = low_rank(40, 50, 4, 0)
    basis = leading_basis(sketch_of(gradient, 12, 0).input, 4)
    assert energy_kept(basis, gradient) == pytest.approx(1.0, abs=1e-5)


def test_energy_kept_agrees_with_the_gradient_itself():
    """The share from a sketch equals ‖GQ‖²/‖G‖² for a basis that does not come from that sketch."""
    gradient = low_rank(64, 80, 30, 1, decay=0.9)
    basis = leading_basis(sketch_of(low_rank(64, 80, 30, 1, decay=0.8), 24, 0).input, 6)
    truth = float((gradient.double() @ basis.double()).square().sum() / gradient.double().square().sum())
    estimates = [energy_kept(basis, sketch_of(gradient, 48, seed).input) for seed in range(1, 41)]
    assert sum(estimates) / len(estimates) == pytest.approx(truth, abs=0.02)


@pytest.mark.parametrize("rows", [3, 12, 40])
def test_a_basis_is_orthonormal_also_where_directions_are_missing(rows):
    basis = leading_basis(torch.randn(rows, 20) @ torch.randn(20, 2) @ torch.randn(2, 20), 6)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6), atol=1e-5, rtol=0)
    zero = leading_basis(torch.zeros(rows, 20), 6)
    torch.testing.assert_close(zero.T @ zero, torch.eye(6), atol=1e-5, rtol=0)


def test_leading_basis_is_that_of_the_svd():
    matrix = torch.randn(12, 30, dtype=torch.float64)
    right = torch.linalg.svd(matrix, full_matrices=False).Vh[:5].T
    basis = leading_basis(matrix, 5).double()
    torch.testing.assert_close(basis @ basis.T, right @ right.T, atol=1e-5, rtol=0)


def test_a_reconstruction_of_a_low_rank_gradient_is_exact():
    gradient = low_rank(30, 40, 4, 2)
    left, right = reconstruct(sketch_of(gradient, 16, 0))
    torch.testing.assert_close((left @ right).float(), gradient, atol=1e-5, rtol=1e-4)


def test_cosines_agree_with_whole_gradients():
    """The oracle is the cosine of the flattened matrices. The gradients share a part."""
    common = low_rank(40, 50, 3, 9)
    gradients = [common + 0.7 * low_rank(40, 50, 3, seed) for seed in range(3)] + [low_rank(40, 50, 3, 20)]
    flat = torch.stack([g.double().flatten() / g.double().norm() for g in gradients])
    found = cosines([sketch_of(g, 32, 0) for g in gradients])
    torch.testing.assert_close(found, flat @ flat.T, atol=0.05, rtol=0)


def test_cosine_of_a_gradient_with_itself_through_other_test_vectors_is_one():
    gradients = [low_rank(40, 50, 5, seed) for seed in range(3)]
    found = cosines([sketch_of(g, 32, 0) for g in gradients], [sketch_of(g, 32, 1) for g in gradients])
    assert float(found.min()) > 0.9


def test_a_zero_gradient_has_cosine_zero_and_keeps_nothing():
    zero, other = sketch_of(torch.zeros(10, 12), 8, 0), sketch_of(low_rank(10, 12, 2, 0), 8, 0)
    assert float(cosines([zero, other])[0, 1]) == 0.0
    assert energy_kept(leading_basis(other.input, 2), zero.input) == 0.0


def test_pairwise_retention_agrees_with_bases_formed_one_by_one():
    """The Gram form equals the definition: fit a basis to the pair, evaluate both layers, divide by their own."""
    common = low_rank(30, 40, 3, 9)
    gradients = [common + 0.5 * low_rank(30, 40, 4, seed) for seed in range(4)]
    fit = [sketch_of(g, 12, 0).input for g in gradients]
    held_out = [sketch_of(g, 12, 1).input for g in gradients]
    found = pairwise_retention(fit, held_out, 4)
    for i in range(4):
        for j in range(i + 1, 4):
            shared = shared_basis([leading_rows(fit[i], 4), leading_rows(fit[j], 4)], 4)
            ratios = [
                energy_kept(shared, held_out[m]) / energy_kept(leading_basis(fit[m], 4), held_out[m]) for m in (i, j)
            ]
            assert float(found[i, j]) == pytest.approx(min(ratios), abs=1e-4)
    torch.testing.assert_close(found, found.T)
    assert torch.equal(found.diagonal(), torch.ones(4, dtype=torch.float64))


def test_layers_with_one_row_space_can_share_and_orthogonal_ones_cannot():
    right = torch.linalg.qr(torch.randn(40, 8)).Q
    same = [torch.randn(30, 4) @ right[:, :4].T for _ in range(2)]
    other = torch.randn(30, 4) @ right[:, 4:].T
    sketches = [[sketch_of(g, 12, seed).input for g in (*same, other)] for seed in (0, 1)]
    found = pairwise_retention(*sketches, 4)
    assert float(found[0, 1]) == pytest.approx(1.0, abs=1e-3)
    assert float(found[0, 2]) < 0.85


def test_test_matrices_are_reproducible_and_differ_by_seed_and_size():
    assert torch.equal(test_matrix(6, 4, 1), test_matrix(6, 4, 1))
    assert not torch.equal(test_matrix(6, 4, 1), test_matrix(6, 4, 2))


def test_loud_channels_do_not_decide_a_basis():
    """Gradients with different directions and one loud channel in common agree, until channels are equally loud."""
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(20, 3, generator=generator) @ torch.randn(3, 40, generator=generator) for _ in range(2))
    loud = torch.ones(40)
    loud[7] = 1000.0
    raw, equal = [one * loud, two * loud], equalise_channels([one * loud, two * loud])
    assert energy_kept(leading_basis(raw[0], 3), raw[1]) > 0.99
    assert energy_kept(leading_basis(equal[0], 3), equal[1]) < 0.4
    for sketch in equal:
        assert torch.linalg.vector_norm(sketch).item() == pytest.approx(1.0)


def test_sketches_with_equal_channels_do_not_depend_on_the_scale_of_a_channel_or_of_a_sketch():
    generator = torch.Generator().manual_seed(0)
    sketches = [torch.randn(20, 12, generator=generator, dtype=torch.float64) for _ in range(3)]
    sketches = [sketch / torch.linalg.vector_norm(sketch) for sketch in sketches]
    channels = torch.logspace(-1, 1, 12, dtype=torch.float64)
    for left, right in zip(
        equalise_channels(sketches), equalise_channels([5 * sketch for sketch in sketches]), strict=True
    ):
        torch.testing.assert_close(left, right)
    (alone,), (scaled,) = equalise_channels(sketches[:1]), equalise_channels([sketches[0] * channels])
    torch.testing.assert_close(alone, scaled, rtol=1e-3, atol=1e-5)


def test_silent_channels_stay_silent():
    sketch = torch.zeros(4, 6)
    sketch[:, 0] = 1.0
    (found,) = equalise_channels([sketch])
    assert (found[:, 1:] == 0).all()
    assert equalise_channels([torch.zeros(4, 6)])[0].eq(0).all()
