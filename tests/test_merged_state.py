"""Truths about moments that live in a shared basis."""

from __future__ import annotations

import torch
from merged_state import (
    Moments,
    adam_direction,
    carried,
    covariance_sketch,
    missed,
    probes_beside,
    turned,
    turned_basis,
    updated,
    whole_step,
)
from torch import Tensor

EXACT = 1e-5  # float32 results of a few products


def orthonormal(dim: int, rank: int, seed: int) -> Tensor:
    drawn = torch.randn(dim, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.float()


def some_moments(rank: int = 5, other: int = 7, step: int = 20) -> Moments:
    moments = Moments(torch.zeros(rank, other), torch.zeros(rank, other), torch.zeros(rank))
    for _ in range(step):
        moments = updated(moments, torch.randn(rank, other) + 0.5, (0.9, 0.99))
    return moments


def gradients_in(basis: Tensor, members: int) -> list[Tensor]:
    return [basis @ torch.randn(basis.shape[1], 11) for _ in range(members)]


def test_the_sides_of_a_matrix_are_views():
    matrix = torch.randn(3, 4)
    for side, shape in (("output", (3, 4)), ("input", (4, 3))):
        view = turned(matrix, side)
        assert view.shape == shape
        assert view.data_ptr() == matrix.data_ptr()


def test_a_sketch_finds_the_directions_that_all_members_share():
    """C of rank r: the basis keeps all of every member, from probes that know nothing."""
    truth, beside = orthonormal(30, 4, 0), probes_beside(30, 12, seed=1)
    parts = [covariance_sketch(gradient, gradient[:0], beside) for gradient in gradients_in(truth, 3)]
    found = turned_basis(torch.stack(parts).sum(0), 4)
    torch.testing.assert_close(found @ found.mT, truth @ truth.mT, atol=EXACT, rtol=0)


def test_turning_again_and_again_leads_to_the_leading_directions():
    """Subspace iteration: the basis comes near that of the leading eigenvectors of C."""
    loud = torch.tensor([3.0] * 4 + [0.3] * 16)[:, None]
    gradients = [loud * torch.randn(20, 30) for _ in range(3)]
    basis = orthonormal(20, 4, 0)
    for seed in range(8):
        beside = probes_beside(20, 8, seed)
        basis = turned_basis(sum(covariance_sketch(g, basis.mT @ g, beside) for g in gradients), 4)
    covariance = sum((g @ g.mT / g.square().sum()).double() for g in gradients)
    wanted = torch.linalg.eigh(covariance).eigenvectors[:, -4:].float()
    torch.testing.assert_close(basis @ basis.mT, wanted @ wanted.mT, atol=0.01, rtol=0)


def test_a_sketch_is_the_covariance_times_what_it_looks_along():
    gradient, basis, beside = torch.randn(20, 6), orthonormal(20, 3, 0), torch.randn(20, 5)
    wanted = gradient @ gradient.mT @ torch.cat([basis, beside], dim=1) / gradient.square().sum()
    torch.testing.assert_close(covariance_sketch(gradient, basis.mT @ gradient, beside), wanted, atol=EXACT, rtol=1e-4)


def test_every_member_counts_alike():
    """The sketch of cT is that of T; zeros add zeros."""
    gradient, basis, beside = torch.randn(20, 6), orthonormal(20, 3, 0), torch.randn(20, 5)
    small, large = (covariance_sketch(c * gradient, c * (basis.mT @ gradient), beside) for c in (1e-12, 1e6))
    torch.testing.assert_close(small, large, atol=EXACT, rtol=EXACT)
    assert not covariance_sketch(torch.zeros(20, 6), torch.zeros(3, 6), beside).any()


def test_adam_in_a_basis_is_adam_on_the_projection():
    projected = [torch.randn(5, 7) for _ in range(6)]
    moments = Moments(torch.zeros(5, 7), torch.zeros(5, 7), torch.zeros(5))
    weight = torch.nn.Parameter(torch.zeros(5, 7))
    reference = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    ours = torch.zeros(5, 7)
    for step, gradient in enumerate(projected, start=1):
        moments = updated(moments, gradient, (0.9, 0.999))
        ours -= adam_direction(moments, step, 0.9, 1e-8)
        weight.grad = gradient
        reference.step()
    torch.testing.assert_close(ours, weight.detach(), atol=EXACT, rtol=1e-4)


def test_a_basis_that_does_not_turn_changes_no_moment():
    moments = some_moments()
    for before, after in zip(moments, carried(moments, torch.eye(5), 20, 0.9), strict=True):
        torch.testing.assert_close(after, before, atol=EXACT, rtol=EXACT)


def test_a_basis_whose_vectors_change_sign_and_place_takes_its_moments_along():
    """Q a signed permutation: M gets the signs, V and e are permuted."""
    moments, order = some_moments(), [3, 0, 4, 1, 2]
    turn = torch.eye(5)[order] * torch.tensor([1.0, -1, -1, 1, -1])[:, None]
    after = carried(moments, turn, 20, 0.9)
    torch.testing.assert_close(after.first, turn @ moments.first)
    torch.testing.assert_close(after.second, moments.second[order], atol=EXACT, rtol=EXACT)
    torch.testing.assert_close(after.evidence, moments.evidence[order])


def test_the_momentum_survives_a_turn_within_its_space():
    """P'M' = PM if both bases span the same space."""
    basis, moments = orthonormal(20, 5, 0), some_moments()
    other = basis @ orthonormal(5, 5, 1)
    after = carried(moments, other.mT @ basis, 20, 0.9)
    torch.testing.assert_close(other @ after.first, basis @ moments.first, atol=EXACT, rtol=EXACT)


def test_the_second_moment_of_a_turned_gradient_is_that_of_its_mean_and_its_spread():
    """E (QR)² = (Q·mean)² + Q²·variance for uncorrelated coordinates (LDAdam)."""
    turn, step, beta = orthonormal(5, 5, 0), 10**6, 0.9
    mean, variance = torch.randn(5, 7), torch.rand(5, 7)
    after = carried(Moments(mean, mean.square() + variance, torch.ones(5)), turn, step, beta)
    wanted = (turn @ mean).square() + turn.square() @ variance
    torch.testing.assert_close(after.second, wanted, atol=EXACT, rtol=1e-4)
    torch.testing.assert_close(after.evidence, torch.ones(5), atol=EXACT, rtol=EXACT)


def test_a_new_direction_begins_as_adam_begins():
    """Without evidence the first step has the size of one step, not of √(1/(1 − β₂))."""
    turn = torch.diag(torch.tensor([1.0, 1, 1, 1, 0]))
    after = carried(some_moments(), turn, 20, 0.9)
    assert not after.first[4].any()
    assert not after.second[4].any()
    assert after.evidence[4] == 0
    stepped = adam_direction(updated(after, torch.full((5, 7), 3.0), (0.9, 0.999)), 10**6, 0.9, 1e-8)
    torch.testing.assert_close(stepped[4], torch.full((7,), 0.1), atol=EXACT, rtol=1e-4)


def test_what_is_missed_is_outside_the_basis_and_as_large_as_adam_makes_the_rest():
    gradient, basis = torch.randn(20, 7), orthonormal(20, 5, 0)
    projected, direction = basis.mT @ gradient, torch.randn(5, 7)
    rest = missed(gradient, basis, projected, direction)
    torch.testing.assert_close(basis.mT @ rest, torch.zeros(5, 7), atol=EXACT, rtol=0)
    outside = torch.linalg.vector_norm(gradient - basis @ projected, dim=0)
    ratio = torch.linalg.vector_norm(rest, dim=0) / outside
    torch.testing.assert_close(ratio, direction.norm(dim=0) / projected.norm(dim=0), atol=EXACT, rtol=1e-4)
    assert not missed(torch.zeros(20, 7), basis, torch.zeros(5, 7), direction).any()


def test_a_step_is_as_large_as_adams_in_all_directions():
    """Its mean square is that of N for every rank; without a rest it is PN if P is the whole space."""
    direction, basis = torch.randn(5, 7), orthonormal(20, 5, 0)
    for rest in (torch.zeros(20, 7), torch.randn(20, 7)):
        step = whole_step(direction, basis, rest.clone())
        torch.testing.assert_close(step.square().mean(), direction.square().mean(), atol=EXACT, rtol=EXACT)
    whole, direction = orthonormal(20, 20, 0), torch.randn(20, 7)
    step = whole_step(direction, whole, torch.zeros(20, 7))
    torch.testing.assert_close(step, whole @ direction, atol=EXACT, rtol=EXACT)
    assert not whole_step(torch.zeros(5, 7), basis, torch.zeros(20, 7)).any()
