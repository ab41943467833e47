"""Truths about the optimizer for factors."""

from __future__ import annotations

import pytest
import torch
from conftest import make_batches, make_model

from sgm_finetune.adapters.apply import apply_plan
from sgm_finetune.adapters.descent import FactorDescent, Pair, factor_pairs
from sgm_finetune.method.plan import Group, Plan, PlannedMatrix, PlanSettings

RANK = 4


def plan_with_groups(*sides: str) -> Plan:
    """q_proj of a pico LLaMA: layers 0 and 1 share the first side, 2 and 3 the second; "none" shares nothing."""
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    groups = tuple(
        Group(f"g{i}", "q", side, (names[2 * i], names[2 * i + 1]), start="random")  # type: ignore[arg-type]
        for i, side in enumerate(sides)
        if side != "none"
    )
    owner = {name: group.name for group in groups for name in group.members}
    matrices = tuple(PlannedMatrix(n, "q", i, (64, 64), True, owner.get(n)) for i, n in enumerate(names))
    return Plan("pico", PlanSettings(RANK, 2.0 * RANK), matrices, groups)


def adapted(*sides: str):
    torch.manual_seed(3)
    return apply_plan(make_model(), plan_with_groups(*sides))


def one_step(model, optimizer) -> dict[str, torch.Tensor]:
    """Change of every layer's update s·B·A by one step."""

    def updates() -> list[torch.Tensor]:
        return [(p.scaling * p.b @ p.a).detach().clone() for p in factor_pairs(model)]

    before = updates()
    model(**make_batches(1)[0]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return {str(i): new - old for i, (new, old) in enumerate(zip(updates(), before, strict=True))}


def test_factors_that_a_group_shares_are_one_parameter_with_one_state():
    model = adapted("input", "output")
    optimizer = FactorDescent(factor_pairs(model), lr=0.01)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2 * 4 - 2
    one_step(model, optimizer)
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    trained = [p for p in model.parameters() if p.requires_grad and any(p is f for f in optimizer.members)]
    assert sum(t.numel() for t in states) == sum(p.numel() for p in trained)


@pytest.mark.parametrize("sides", [("none", "none"), ("input", "output")])
def test_the_first_step_changes_every_update_by_the_step_in_spectral_norm(sides):
    model = adapted(*sides)
    optimizer = FactorDescent(factor_pairs(model), lr=0.01, momentum=0.0)
    for name, change in one_step(model, optimizer).items():
        if sides[int(name) // 2] != "output":  # there B is shared, random, and A starts at zero
            assert torch.linalg.matrix_norm(change, 2) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("metric", ["partners", "none"])
@pytest.mark.parametrize("sides", [("none", "none"), ("input", "output")])
def test_the_loss_falls(metric, sides):
    model = adapted(*sides)
    optimizer = FactorDescent(factor_pairs(model), lr=0.05, metric=metric)
    batch, losses = make_batches(1)[0], []
    for _ in range(15):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_equal_shapes_step_together_as_they_step_alone():
    draw = torch.Generator().manual_seed(0)

    def pairs() -> list[Pair]:
        draw.manual_seed(0)
        made = []
        for _ in range(3):
            a, b = (torch.nn.Parameter(torch.randn(*shape, generator=draw)) for shape in ((RANK, 10), (12, RANK)))
            a.grad, b.grad = torch.randn(RANK, 10, generator=draw), torch.randn(12, RANK, generator=draw)
            made.append(Pair(a, b, 2.0))
        return made

    together, alone = pairs(), pairs()
    FactorDescent(together, lr=0.1).step()
    for pair in alone:
        FactorDescent([pair], lr=0.1).step()
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one.a, other.a, atol=1e-6)
        assert torch.allclose(one.b, other.b, atol=1e-6)


def test_its_state_can_be_saved_and_loaded():
    model = adapted("input", "output")
    optimizer = FactorDescent(factor_pairs(model), lr=0.01)
    one_step(model, optimizer)
    stored = optimizer.state_dict()
    other = FactorDescent(factor_pairs(model), lr=0.5)
    other.load_state_dict(stored)
    assert other.param_groups[0]["lr"] == 0.01
    for factor, state in optimizer.state.items():
        assert torch.equal(other.state[factor]["momentum"], state["momentum"])


def test_a_metric_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="'partner'; it is one of partners, none"):
        FactorDescent(factor_pairs(adapted("none", "none")), lr=0.01, metric="partner")  # type: ignore[arg-type]


def test_a_closure_is_called_once_and_its_loss_returned():
    model = adapted("input", "output")
    optimizer, calls = FactorDescent(factor_pairs(model), lr=0.01), []

    def closure() -> float:
        loss = model(**make_batches(1)[0]).loss
        loss.backward()
        calls.append(loss.item())
        return loss.item()

    before = factor_pairs(model)[0].b.detach().clone()
    assert optimizer.step(closure) == calls[0]
    assert len(calls) == 1
    assert not torch.equal(factor_pairs(model)[0].b, before)
