"""Truths about the step for a factor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgm_finetune.method.descent import (
    channel_profile,
    descent_directions,
    inverse_root,
    inverse_roots,
    partner_floor,
    partner_metric,
    polar_factor,
)

EXACT = 1e-5  # float32 results of float64 arithmetic
SEEDS = st.integers(0, 10**6)


def descent_direction(momentum: torch.Tensor, root: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    return next(descent_directions([(momentum, root, channels)]))


def partner_root(gram: torch.Tensor, floor: float) -> torch.Tensor:
    return inverse_root(partner_metric(gram, floor))


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 12), extra=st.integers(0, 20), seed=SEEDS)
def test_the_polar_factor_is_u_v_of_the_singular_value_decomposition(rank: int, extra: int, seed: int):
    matrix = gaussian(rank, rank + extra, seed=seed)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    if s[-1] > 1e-3 * s[0]:
        assert torch.allclose(polar_factor(matrix), u @ vh, atol=EXACT)


def test_directions_without_momentum_do_not_move():
    matrix = gaussian(5, 2) @ gaussian(2, 30, seed=1)
    found = torch.linalg.svdvals(polar_factor(matrix))
    assert torch.allclose(found, torch.tensor([1.0, 1, 0, 0, 0], dtype=torch.float64), atol=1e-4)
    assert torch.equal(polar_factor(torch.zeros(3, 4)), torch.zeros(3, 4))
    assert torch.equal(descent_direction(torch.zeros(3, 4), torch.eye(3), torch.ones(4)), torch.zeros(3, 4))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_size_of_the_momentum_is_of_no_account(scale: float):
    matrix = gaussian(4, 9).float()
    assert torch.allclose(polar_factor(matrix * scale), polar_factor(matrix), atol=EXACT)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 8), seed=SEEDS)
def test_no_step_of_the_same_length_goes_further_down(rank: int, seed: int):
    """⟨M·C^(-1/2), D⟩ ≥ ⟨M·C^(-1/2), X⟩ for every X with ‖P·X‖₂ ≤ 1."""
    momentum, partner = gaussian(rank, 15, seed=seed), gaussian(20, rank, seed=seed + 1)
    channels = gaussian(15, seed=seed + 9).square() + 0.1
    scaled = momentum / channels.sqrt()
    best = descent_direction(momentum, partner_root(partner.T @ partner, 0.0), channels)
    assert torch.linalg.matrix_norm(partner @ best, 2) <= 1 + 1e-4
    for other in range(5):
        tried = gaussian(rank, 15, seed=seed + 2 + other) + other * scaled
        tried = tried / torch.linalg.matrix_norm(partner @ tried, 2)
        assert (scaled * best).sum() >= (scaled * tried).sum() * (1 - 1e-5) - 1e-5


def test_the_change_of_the_product_does_not_depend_on_how_it_is_split():
    """With A → R·A and B → B·R⁻¹ the gradient of A becomes R⁻ᵀ times it, and B·(change of A) stays."""
    gradient, b, split = gaussian(4, 12), gaussian(10, 4, seed=1), gaussian(4, 4, seed=2)

    def change(gradient: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        root = partner_root(b.T @ b, 0.0)
        return b @ descent_direction(gradient, root, channel_profile(root @ gradient))

    inverse = torch.linalg.inv(split)
    assert torch.allclose(change(inverse.T @ gradient, b @ inverse), change(gradient, b), atol=1e-4)


def test_a_channel_a_thousand_times_as_loud_counts_as_much_as_the_others():
    gradient = gaussian(4, 12)
    loud = gradient.clone()
    loud[:, 5] *= 1000
    plain, found = (descent_direction(g, torch.eye(4).double(), channel_profile(g)) for g in (gradient, loud))
    assert torch.nn.functional.cosine_similarity(plain.flatten(), found.flatten(), dim=0) > 0.99
    deaf = descent_direction(loud, torch.eye(4).double(), torch.ones(12).double())
    assert torch.nn.functional.cosine_similarity(plain.flatten(), deaf.flatten(), dim=0) < 0.9


def test_channels_of_a_zero_gradient_are_alike():
    assert torch.equal(channel_profile(torch.zeros(3, 5)), torch.ones(5))
    assert channel_profile(gaussian(3, 5)).mean() == pytest.approx(1.0)


def test_matrices_of_a_batch_are_what_they_are_alone():
    momentum, grams = gaussian(3, 4, 9), gaussian(3, 4, 4, seed=1)
    grams, channels = grams @ grams.mT, gaussian(3, 9, seed=2).square()
    batch = descent_direction(momentum, partner_root(grams, 0.1), channels)
    for i in range(3):
        assert torch.allclose(batch[i], descent_direction(momentum[i], partner_root(grams[i], 0.1), channels[i]))
    assert torch.allclose(inverse_root(grams)[0] @ inverse_root(grams)[0] @ grams[0], torch.eye(4).double(), atol=1e-6)


def test_a_step_of_length_zero_needs_no_floor():
    assert torch.equal(partner_floor(torch.tensor([0.0, 1.0]), step=0.0, trust=10.0), torch.zeros(2))


def test_roots_of_many_batches_are_those_of_each():
    factors = [gaussian(2, 3, 9), gaussian(5, 6, seed=1), gaussian(4, 1, 3, 8, seed=2)]
    grams = [f @ f.mT for f in factors]
    for found, gram in zip(inverse_roots(grams), grams, strict=True):
        torch.testing.assert_close(found, inverse_root(gram))
    assert inverse_roots([]) == []
