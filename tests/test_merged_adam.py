"""Truths about the optimizer whose moments live in shared bases."""

from __future__ import annotations

import copy

import pytest
import torch
from merged_adam import BasisGroup, MergedAdam
from merged_state import GroupShape, state_bytes
from torch import Tensor, nn

DIM, OTHER, RANK = 16, 24, 4
CLOSE = 2e-5  # float32, a few steps


def orthonormal(dim: int, rank: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(dim, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.float()


def some_weights(count: int = 3, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(OTHER, DIM, generator=generator).to(dtype)) for _ in range(count)]


def some_gradients(steps: int, count: int = 3) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(OTHER, DIM, generator=generator) for _ in range(count)] for _ in range(steps)]


def optimizer_of(weights: list[nn.Parameter], start: Tensor | None = None, rank: int = RANK, **more) -> MergedAdam:
    return MergedAdam([BasisGroup(weights, "input", start)], lr=0.01, rank=rank, **more)


def train(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], gradients: list[list[Tensor]]) -> None:
    for of_step in gradients:
        for weight, gradient in zip(weights, of_step, strict=True):
            weight.grad = gradient.to(weight.dtype)
        optimizer.step()
        optimizer.zero_grad()


def test_the_whole_space_is_adamw():
    """P = I: the steps are AdamW's, with its weight decay."""
    ours, theirs, gradients = some_weights(), some_weights(), some_gradients(6)
    train(optimizer_of(ours, torch.eye(DIM), DIM, refresh=0, weight_decay=0.1), ours, gradients)
    train(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1), theirs, gradients)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=CLOSE, rtol=CLOSE)


def test_a_turned_basis_of_the_whole_space_is_adamw_in_turned_coordinates():
    ours, basis, gradients = some_weights(), orthonormal(DIM, DIM), some_gradients(6)
    theirs = [nn.Parameter(weight.detach() @ basis) for weight in ours]
    train(optimizer_of(ours, basis, DIM, refresh=0), ours, gradients)
    train(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.0), theirs, [[g @ basis for g in s] for s in gradients])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one @ basis, other, atol=CLOSE, rtol=CLOSE)


def test_sides_are_transposes_of_each_other():
    ours, gradients = some_weights(), some_gradients(6)
    theirs = [nn.Parameter(weight.detach().mT.contiguous()) for weight in ours]
    train(optimizer_of(ours, refresh=2), ours, gradients)
    other = MergedAdam([BasisGroup(theirs, "output")], lr=0.01, rank=RANK, refresh=2)
    train(other, theirs, [[g.mT.contiguous() for g in of_step] for of_step in gradients])
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two.mT, atol=CLOSE, rtol=CLOSE)


def test_the_size_of_the_gradients_does_not_matter():
    ours, theirs, gradients = some_weights(), some_weights(), some_gradients(6)
    train(optimizer_of(ours, refresh=2, eps=0.0), ours, gradients)
    train(optimizer_of(theirs, refresh=2, eps=0.0), theirs, [[1024 * g for g in of_step] for of_step in gradients])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=CLOSE, rtol=CLOSE)


def test_a_hook_that_updates_each_weight_gives_the_bits_of_one_step():
    ours, theirs, gradients = some_weights(), some_weights(), some_gradients(5)
    train(optimizer_of(ours, refresh=2), ours, gradients)
    other = optimizer_of(theirs, refresh=2)
    for of_step in gradients:
        for weight, gradient in zip(theirs, of_step, strict=True):
            weight.grad = gradient
            other.update(weight)
            weight.grad = None
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def test_accumulated_projections_are_the_projection_of_the_sum():
    """The moments and the direction in the basis are; outside of it, the last part alone is seen."""
    ours, theirs, start, before = some_weights(1), some_weights(1), orthonormal(DIM, RANK), some_weights(1)[0]
    parts = [part for (part,) in some_gradients(3, 1)]
    one, two = optimizer_of(ours, start, refresh=0), optimizer_of(theirs, start, refresh=0)
    for part in parts:
        ours[0].grad = part
        one.update(ours[0]) if part is parts[-1] else one.accumulate(ours[0])
    train(two, theirs, [[torch.stack(parts).sum(0)]])
    for name in ("first", "second", "evidence"):
        torch.testing.assert_close(one.state[ours[0]][name], two.state[theirs[0]][name], atol=CLOSE, rtol=CLOSE)
    assert "waiting" not in one.state[ours[0]]
    moved = [nn.functional.normalize(((w - before) @ start).detach().flatten(), dim=0) for w in (ours[0], theirs[0])]
    torch.testing.assert_close(*moved, atol=1e-4, rtol=0)


def test_accumulating_before_there_is_a_basis_gives_one():
    weights = some_weights(1)
    optimizer, before = optimizer_of(weights), weights[0].detach().clone()
    for (part,) in some_gradients(3, 1):
        weights[0].grad = part
        optimizer.accumulate(weights[0])
    optimizer.update(weights[0])
    assert optimizer.param_groups[0]["basis"] is not None
    assert torch.equal(weights[0], before)


def test_a_weight_without_a_gradient_rests_and_the_group_goes_on():
    """The basis turns although one member never comes."""
    weights, gradients = some_weights(), some_gradients(5)
    before = weights[1].detach().clone()
    optimizer = optimizer_of(weights, orthonormal(DIM, RANK), refresh=2)
    start = optimizer.param_groups[0]["basis"].clone()
    for of_step in gradients:
        weights[0].grad, weights[2].grad = of_step[0], of_step[2]
        optimizer.step()
    assert torch.equal(weights[1], before)
    assert weights[1] not in optimizer.state
    assert optimizer.state[weights[0]]["step"] == 5
    assert not torch.equal(optimizer.param_groups[0]["basis"], start)


def test_the_first_gradients_give_a_basis_and_move_nothing():
    weights, gradients = some_weights(), some_gradients(2)
    before = [weight.detach().clone() for weight in weights]
    optimizer = optimizer_of(weights)
    train(optimizer, weights, gradients[:1])
    assert all(torch.equal(one, two) for one, two in zip(weights, before, strict=True))
    basis = optimizer.param_groups[0]["basis"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(RANK), atol=CLOSE, rtol=0)
    train(optimizer, weights, gradients[1:])
    assert not any(torch.equal(one, two) for one, two in zip(weights, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first_moment", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_is_uninterrupted(dtype: torch.dtype, first_moment: torch.dtype):
    """Bit for bit: bases, counts and moments, at every step, also between two members of one step."""
    gradients = some_gradients(7)
    whole = some_weights(dtype=dtype)
    optimizer = optimizer_of(whole, refresh=3, first_moment=first_moment)
    for at, of_step in enumerate(gradients):
        if at == 5:  # the step that refreshes
            whole[0].grad = of_step[0].to(dtype)
            optimizer.update(whole[0])
            resumed = copy.deepcopy(whole)
            saved = copy.deepcopy(optimizer.state_dict())
            other = optimizer_of(resumed, refresh=3, first_moment=first_moment)
            other.load_state_dict(saved)
            of_step = of_step[1:]
            train_rest(optimizer, whole[1:], of_step)
            train_rest(other, resumed[1:], of_step)
            continue
        train(optimizer, whole, [of_step])
        if at > 5:
            train(other, resumed, [of_step])  # pyright: ignore[reportPossiblyUnboundVariable]
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed, strict=True))
    for one, two in zip(whole, resumed, strict=True):
        for name, value in optimizer.state[one].items():
            found = other.state[two][name]
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value
            if name == "second":
                assert found.dtype == torch.float32
            if name == "first":
                assert found.dtype == first_moment


def train_rest(optimizer: MergedAdam, weights: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.to(weight.dtype)
        optimizer.update(weight)


def test_a_float32_copy_of_a_bfloat16_weight_takes_the_step():
    """The caller's copy moves as a float32 weight would; the weight itself waits for the caller."""
    (weight,), ((gradient,),) = some_weights(1, torch.bfloat16), some_gradients(1, 1)
    start = orthonormal(DIM, RANK)
    copy_of_it, before = weight.detach().float(), weight.detach().clone()
    weight.grad = gradient.bfloat16()
    optimizer_of([weight], start).update(weight, copy_of_it)
    assert torch.equal(weight, before)
    plain = [nn.Parameter(before.float())]
    train(optimizer_of(plain, start), plain, [[gradient.bfloat16().float()]])
    assert torch.equal(copy_of_it, plain[0])


def test_autocast_does_not_reach_the_states():
    ours, theirs, gradients = some_weights(), some_weights(), some_gradients(4)
    train(optimizer_of(ours, refresh=2), ours, gradients)
    with torch.autocast("cpu", torch.bfloat16):
        train(optimizer_of(theirs, refresh=2), theirs, gradients)
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def test_the_bytes_are_those_that_are_held():
    weights = some_weights()
    for refresh in (0, 5):
        optimizer = optimizer_of(weights, orthonormal(DIM, RANK), refresh=refresh)
        train(optimizer, weights, some_gradients(3))  # between two turns of the basis
        assert held_bytes(optimizer) == state_bytes([GroupShape(DIM, (OTHER,) * 3)], RANK, refresh)


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    in_states = [value for state in optimizer.state.values() for value in state.values()]
    in_groups = [value for group in optimizer.param_groups for value in group.values()]
    return sum(t.numel() * t.element_size() for t in [*in_states, *in_groups] if isinstance(t, Tensor))


def test_it_learns_what_lies_outside_its_first_basis():
    """Least squares: rank 2 of 16 directions, and the loss falls to a twentieth."""
    weights = some_weights(2)
    targets = [torch.randn(OTHER, DIM) for _ in weights]
    optimizer = MergedAdam([BasisGroup(weights, "input")], lr=0.05, rank=2, refresh=10)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 150)
    losses = []
    for _ in range(150):
        errors = [weight - target for weight, target in zip(weights, targets, strict=True)]
        loss = torch.stack(errors).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20
