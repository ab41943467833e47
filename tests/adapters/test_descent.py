"""What holds for every step of the optimizer for factors."""

from __future__ import annotations

import pytest
import torch
from conftest import make_batches, make_model

from sgm_finetune.base.errors import UserError
from sgm_finetune.method.plan import Group, Plan, PlannedMatrix, PlanSettings
from sgm_finetune.train.adapters.apply import apply_plan
from sgm_finetune.train.adapters.optimizer import FactorDescent, Pair, create_optimizer, factor_pairs, state_bytes

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
    """Layer -> the change of its update s·B·A in one step."""

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
    trained = [p for p in model.parameters() if p.requires_grad and any(p is f for f in optimizer.members)]
    assert sum(state["momentum"].numel() for state in optimizer.state.values()) == sum(p.numel() for p in trained)
    assert sum(state["channels"].numel() for state in optimizer.state.values()) == sum(max(p.shape) for p in trained)


@pytest.mark.parametrize("sides", [("none", "none"), ("input", "output")])
def test_the_first_step_changes_every_update_by_the_step_in_spectral_norm(sides):
    model = adapted(*sides)
    optimizer = FactorDescent(factor_pairs(model), lr=0.01, momentum=0.0)
    for name, change in one_step(model, optimizer).items():
        if sides[int(name) // 2] != "output":  # there B is shared, random, and A starts at zero
            assert torch.linalg.matrix_norm(change, 2) == pytest.approx(0.01, rel=1e-3)


def test_a_factor_shared_by_layers_of_different_outputs_steps_by_the_mean_in_their_own_units():
    """The mean over q (64 outputs) and k (32) of the squared change from RMS to RMS, in its largest direction, is the
    step."""
    draw = torch.Generator().manual_seed(0)
    a = torch.nn.Parameter(torch.randn(RANK, 64, generator=draw))
    members = [torch.nn.Parameter(torch.randn(rows, RANK, generator=draw)) for rows in (64, 32)]
    pairs = [Pair(a, b, 2.0) for b in members]
    optimizer = FactorDescent(pairs, lr=0.01, momentum=0.0, trust=1e-3)
    before = a.detach().clone()
    a.grad = torch.randn(a.shape, generator=draw)
    optimizer.step()
    change = a.detach() - before
    parts = [2.0 * (64 / len(b)) ** 0.5 * b.detach() @ change for b in members]
    assert torch.linalg.matrix_norm(torch.cat(parts), 2) == pytest.approx(0.01 * 2**0.5, rel=1e-3)


@pytest.mark.parametrize("sides", [("none", "none"), ("input", "output")])
def test_the_loss_falls(sides):
    model = adapted(*sides)
    optimizer = FactorDescent(factor_pairs(model), lr=0.05)
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
        assert state.keys() == {"momentum", "channels"}
        assert all(torch.equal(other.state[factor][name], state[name]) for name in state)


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


def classifier():
    """A classifier with a new head, one layer adapted."""
    torch.manual_seed(3)
    plan = Plan(
        "pico",
        PlanSettings(RANK, 2.0 * RANK),
        (PlannedMatrix("model.layers.0.self_attn.q_proj", "q", 0, (64, 64), True),),
    )
    return apply_plan(make_model("sequence-classification"), plan)


def test_every_trained_parameter_has_its_rule_and_is_in_it_once():
    model = classifier()
    optimizer = create_optimizer(model, lr=0.01)
    groups = [group["params"] for group in optimizer.param_groups]
    assert [len(group) for group in groups] == [2, 1]
    assert {id(p) for group in groups for p in group} == {id(p) for p in model.parameters() if p.requires_grad}


def test_what_is_no_factor_steps_as_under_adamw():
    """Four steps of the head, bit for bit; through a saved and loaded state after the second."""
    ours, theirs = torch.nn.Parameter(torch.ones(3, 5)), torch.nn.Parameter(torch.ones(3, 5))
    pairs = factor_pairs(adapted("none", "none"))

    def build() -> FactorDescent:
        return FactorDescent(pairs, lr=0.01, others=[ours], others_lr=2e-3, weight_decay=0.1)

    optimizer, reference = build(), torch.optim.AdamW([theirs], lr=2e-3, weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    for step in range(4):
        if step == 2:
            stored, optimizer = optimizer.state_dict(), build()
            optimizer.load_state_dict(stored)
        ours.grad = torch.randn(3, 5, generator=draw)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
        assert torch.equal(ours, theirs)


def test_weight_decay_shrinks_factors_by_its_share_of_the_step():
    def stepped(weight_decay: float) -> Pair:
        draw = torch.Generator().manual_seed(0)
        a, b = (torch.nn.Parameter(torch.randn(*shape, generator=draw)) for shape in ((RANK, 10), (12, RANK)))
        a.grad, b.grad = torch.randn(RANK, 10, generator=draw), torch.randn(12, RANK, generator=draw)
        before = a.detach().clone(), b.detach().clone()
        FactorDescent([Pair(a, b, 2.0)], lr=0.5, weight_decay=weight_decay).step()
        return Pair(a.detach() - before[0], b.detach() - before[1], 2.0)  # type: ignore[arg-type]

    draw = torch.Generator().manual_seed(0)
    a = torch.randn(RANK, 10, generator=draw)
    assert torch.allclose(stepped(0.1).a, stepped(0.0).a - 0.05 * a, atol=1e-6)


def test_a_step_of_length_zero_changes_nothing_and_remembers_the_gradient():
    """A schedule's warm-up begins with such a step."""
    model = adapted("input", "output")
    optimizer = FactorDescent(factor_pairs(model), lr=0.0)
    assert all(not change.any() for change in one_step(model, optimizer).values())
    assert any(state["momentum"].any() for state in optimizer.state.values())


def test_a_gradient_that_is_not_finite_stops_before_any_factor_has_moved():
    model = adapted("input", "output")
    pairs = factor_pairs(model)
    optimizer = FactorDescent(pairs, lr=0.01)
    model(**make_batches(1)[0]).loss.backward()
    before = [factor.detach().clone() for factor in optimizer.members]
    assert pairs[-1].b.grad is not None
    pairs[-1].b.grad[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"not finite; try a smaller training\.learning_rate"):
        optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, optimizer.members, strict=True))


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state, without step counters and without the code tables that 8-bit tensors share."""
    tensors = [
        tensor
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and name != "step" and not name.startswith("qmap")
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", ["spectral", "adamw", "adamw_8bit"])
def test_an_optimizer_holds_as_many_bytes_as_it_says(name):
    """After one step; the scales of 8-bit tensors, a sixty-fourth of them, are not in the formula."""
    torch.manual_seed(3)
    model = apply_plan(make_model("causal-lm"), plan_with_groups("input", "output"))  # trains factors alone
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        trained = [torch.nn.Parameter(torch.ones(shape)) for shape in ((64, 256), (10, 10))]
        optimizer: torch.optim.Optimizer = AdamW8bit(trained, lr=0.01)
    else:
        optimizer = create_optimizer(model, lr=0.01) if name == "spectral" else torch.optim.AdamW(trained, lr=0.01)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert state_bytes(trained, name) == pytest.approx(held_bytes(optimizer), rel=0.02 if "8bit" in name else 0)
