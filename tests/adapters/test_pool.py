"""A rank pool: layers that share both factors and weight their directions by codes of their own."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_batches, make_model, measured_numbers
from peft import PeftModel, get_peft_model_state_dict

from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.plan_summary import describe_plan, plan_remarks
from sgm_finetune.measure.probe import probe
from sgm_finetune.method.build_plan import build_plan
from sgm_finetune.method.descent import inverse_root, largest_change, pool_metric
from sgm_finetune.method.parameter_count import adapter_parameters
from sgm_finetune.method.plan import PlanSettings
from sgm_finetune.method.pools import first_codes, owners
from sgm_finetune.method.subspace import equalise_channels, leading_rows, shared_basis
from sgm_finetune.results.files import save_adapter
from sgm_finetune.train.adapters.apply import apply_plan, lora_layers
from sgm_finetune.train.adapters.optimizer import create_optimizer
from sgm_finetune.train.adapters.pool import (
    codes_of,
    direction_strengths,
    layers_per_direction,
    plain_factors,
    shared_b,
)
from sgm_finetune.train.fast.adapter_forward import use_fast_step


def make_plan(model, rank=6, threshold=-1.0, **changes):
    probed = probe(model, make_batches(), sketch_size=10)
    settings = PlanSettings(rank=rank, alpha=12, scope="pool", threshold=threshold, **changes)
    return build_plan("pico", measured_numbers(probed), settings)


def pooled(rank=6, away=False):
    model = make_model()
    plan = make_plan(model, rank)
    adapted = apply_plan(model, plan)
    if away:
        generator = torch.Generator().manual_seed(0)
        for layer in lora_layers(adapted).values():
            b, codes = shared_b(layer.lora_B["default"]), codes_of(layer.lora_B["default"])
            codes.data = torch.randn(codes.shape, generator=generator)
            if not b.detach().any():
                b.data = 0.1 * torch.randn(b.shape, generator=generator)
    return adapted, plan


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def updates(model):
    """Name -> ΔW, in float64."""
    found = {}
    for name, layer in lora_layers(model).items():
        a, b = (layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double())
        found[name] = (layer.scaling["default"] * b @ a).detach()
    return found


def test_the_layers_of_a_kind_make_one_pool_each_and_start_at_the_base_model():
    base, batch = make_model(), make_batches()[0]
    before = logits(base, batch)
    plan = make_plan(base)
    assert [group.side for group in plan.groups] == ["both"] * 7
    assert all(len(group.members) == 4 for group in plan.groups)
    adapted = apply_plan(base, plan)
    assert torch.equal(before, logits(adapted, batch))
    layers = lora_layers(adapted)
    for group in plan.groups:
        members = [layers[name] for name in group.members]
        assert len({id(layer.lora_A["default"].weight) for layer in members}) == 1
        assert len({id(shared_b(layer.lora_B["default"])) for layer in members}) == 1
        assert len({id(codes_of(layer.lora_B["default"])) for layer in members}) == 4
        start = members[0].lora_A["default"].weight.detach().T * 3**0.5
        torch.testing.assert_close(start, plan.starts[group.name], atol=1e-6, rtol=0)
        codes = torch.cat([codes_of(layer.lora_B["default"]).detach() for layer in members])
        assert codes.sum(0).tolist() == [1.0] * 6  # a direction has one owner
        assert sorted(codes.sum(1).tolist()) == [1.0, 1.0, 2.0, 2.0]


def test_a_pool_trains_as_many_numbers_as_the_plan_says():
    adapted, plan = pooled()
    trained = sum(p.numel() for name, p in adapted.named_parameters() if p.requires_grad and "lora_" in name)
    assert adapter_parameters(plan)[0] == trained
    one_of_each = sum(6 * sum(plan.shape_of(group.members[0])) for group in plan.groups)
    assert trained == one_of_each + 6 * 4 * 7


def test_a_higher_threshold_makes_smaller_pools():
    model = make_model()
    assert len(make_plan(model, threshold=1.0).groups) < len(make_plan(model).groups)


def test_gradients_of_a_pool_are_those_of_its_members():
    """∂L/∂B = Σ_l ∂L/∂B_l·diag(c_l) and ∂L/∂c_l = diag(Bᵀ ∂L/∂B_l), where B_l = B·diag(c_l) is a factor of its own."""
    batch = make_batches()[0]
    adapted, plan = pooled(away=True)
    adapted = adapted.double()
    for group in plan.groups:  # .double() makes every member's copy its own
        first = lora_layers(adapted)[group.members[0]]
        for name in group.members[1:]:
            layer = lora_layers(adapted)[name]
            layer.lora_A["default"].weight = first.lora_A["default"].weight
            layer.lora_B["default"].parametrizations.weight.original = shared_b(first.lora_B["default"])
    apart = copy.deepcopy(adapted)
    for layer in lora_layers(apart).values():
        layer.lora_A["default"].weight = torch.nn.Parameter(layer.lora_A["default"].weight.detach().clone())
        own = layer.lora_B["default"].weight.detach().clone()
        layer.lora_B["default"] = torch.nn.Linear(own.shape[1], own.shape[0], bias=False)
        layer.lora_B["default"].weight = torch.nn.Parameter(own)
    adapted(**batch).loss.backward()
    apart(**batch).loss.backward()
    own = lora_layers(apart)
    for group in plan.groups:
        members = [lora_layers(adapted)[name] for name in group.members]
        codes = [codes_of(layer.lora_B["default"]) for layer in members]
        b = shared_b(members[0].lora_B["default"])
        gradients = [own[name].lora_B["default"].weight.grad for name in group.members]
        torch.testing.assert_close(b.grad, sum(g * c.detach() for g, c in zip(gradients, codes, strict=True)))
        for c, gradient in zip(codes, gradients, strict=True):
            torch.testing.assert_close(c.grad, (b.detach() * gradient).sum(0, keepdim=True))
        a = members[0].lora_A["default"].weight
        torch.testing.assert_close(a.grad, sum(own[name].lora_A["default"].weight.grad for name in group.members))


@pytest.mark.parametrize("scales", [(4.0, 1.0, 0.25), (0.5, -8.0, -0.25), (1.0, -1.0, 1.0)])
def test_the_use_of_a_direction_does_not_depend_on_how_it_is_split_into_its_three_parts(scales):
    a, b, codes = torch.randn(3, 5), torch.randn(4, 3), torch.randn(2, 3)
    for_a, for_b, for_codes = scales
    torch.testing.assert_close(
        direction_strengths(a, b, codes), direction_strengths(for_a * a, for_b * b, for_codes * codes)
    )


def test_the_number_of_layers_that_use_a_direction_is_between_one_and_all():
    assert layers_per_direction(torch.eye(5)) == 1
    assert layers_per_direction(torch.rand(1, 4).expand(5, 4)) == pytest.approx(5)
    assert layers_per_direction(torch.zeros(5, 4)) == 0
    assert layers_per_direction(first_codes(30, 64)) == 1
    assert layers_per_direction(first_codes(30, 10)) == pytest.approx(3)


def test_a_plan_of_pools_is_described_in_its_words():
    model = make_model()
    plan = make_plan(model)
    assert describe_plan(plan).startswith("28 of 28 matrices · 28 of them in 7 pools of 6 directions · ")
    one = replace(plan, groups=plan.groups[:1])
    assert "4 of them in 1 pool of 6 directions" in describe_plan(one)
    mixed = replace(plan, groups=(replace(plan.groups[0], side="input"), *plan.groups[1:]))
    assert "28 of them in 7 groups (1 share their input side, 6 pools of 6 directions)" in describe_plan(mixed)


def test_a_plan_without_pools_says_how_near_its_kinds_came_on_their_worse_side():
    model = make_model()
    plan = make_plan(model, threshold=1.2)
    nearest = max(plan.kinds, key=lambda kind: min(kind.retention_input, kind.retention_output))
    kept = min(nearest.retention_input, nearest.retention_output)
    assert plan_remarks(plan) == [
        f"merge.criterion=subspace found nothing at merge.threshold=1.2; {nearest.kind} keeps {kept:.2f} on average "
        "over all pairs, on its worse side"
    ]
    by_snr = replace(plan, settings=replace(plan.settings, criterion="snr"))
    assert plan_remarks(by_snr) == [
        "merge.criterion=snr found nothing: no two layers of a kind are within the tolerance"
    ]


def test_a_saved_pool_is_plain_lora_for_peft(tmp_path):
    adapted, _ = pooled(away=True)
    batch = make_batches()[0]
    expected = logits(adapted, batch)
    save_adapter(adapted, tmp_path / "adapter", "", lambda folder: None)
    base = make_model()
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), batch), expected, rtol=1e-4, atol=1e-5)


def test_the_state_of_a_pool_holds_it_once():
    adapted, plan = pooled(away=True)
    state = get_peft_model_state_dict(adapted)
    held = {tensor.data_ptr(): tensor.numel() for tensor in state.values()}
    head = sum(t.numel() for name, t in state.items() if "lora_" not in name)
    assert sum(held.values()) - head == adapter_parameters(plan)[0]
    plain = plain_factors({name.replace(".default.", "."): tensor for name, tensor in state.items()})
    assert not [name for name in plain if "parametrizations" in name]
    of_layer = next(name for name in plain if name.endswith("lora_B.weight"))
    layer = lora_layers(adapted)[of_layer.removeprefix("base_model.model.").removesuffix(".lora_B.weight")]
    assert torch.equal(plain[of_layer], layer.lora_B["default"].weight)


def test_the_fast_step_computes_a_pool():
    batch = make_batches()[0]
    adapted, _ = pooled(away=True)
    plain = copy.deepcopy(adapted)
    assert use_fast_step(adapted) == []
    losses = []
    for model in (adapted, plain):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    gradients = dict(plain.named_parameters())
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-6)


def steps(model, lr=0.02, num=1):
    optimizer, batches = create_optimizer(model, lr), make_batches()
    for at in range(num):
        model(**batches[at % 4]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_spectral_descent_learns_a_pool():
    adapted, _ = pooled()
    before = float(adapted(**make_batches()[0]).loss.detach())
    steps(adapted, num=30)
    assert float(adapted(**make_batches()[0]).loss.detach()) < 0.7 * before


def test_a_step_changes_no_layer_by_more_than_its_rate():
    adapted, _ = pooled(away=True)
    before = updates(adapted)
    steps(adapted, lr=1e-3)
    for name, after in updates(adapted).items():
        rows, cols = after.shape
        change = torch.linalg.matrix_norm(after - before[name], 2) * (cols / rows) ** 0.5
        assert 1e-5 < change < 3.1e-3  # A, B and the codes step at once


@pytest.mark.parametrize("scales", [(4.0, 1.0), (1.0, 0.25), (0.5, 8.0)])
def test_a_step_does_not_depend_on_how_a_direction_is_split_into_its_three_parts(scales):
    adapted, plan = pooled(away=True)
    other = copy.deepcopy(adapted)
    for_a, for_b = scales
    with torch.no_grad():
        layers = lora_layers(other)
        for group in plan.groups:
            members = [layers[name] for name in group.members]
            members[0].lora_A["default"].weight[::2] *= for_a
            shared_b(members[0].lora_B["default"])[:, ::2] *= for_b
            for layer in members:
                codes_of(layer.lora_B["default"])[:, ::2] /= for_a * for_b
    for model in (adapted, other):
        steps(model, lr=1e-5)  # so small that no factor is held back
    before = updates(pooled(away=True)[0])
    for name, one in updates(adapted).items():
        change, same = one - before[name], updates(other)[name] - before[name]
        assert torch.linalg.matrix_norm(change - same) < 0.05 * torch.linalg.matrix_norm(change)


def test_the_directions_of_an_owner_are_those_of_its_own_gradient():
    model = make_model()
    plan = make_plan(model)
    probed = probe(model, make_batches(), sketch_size=10)
    group = plan.groups[0]
    loud = equalise_channels([half.input for name in group.members for half in probed.halves[name]])
    for at, name in enumerate(group.members):
        mine = [direction for direction, layers in enumerate(owners(4, 6)) if layers == [at]]
        rows = [leading_rows(half, 6) for half in loud[2 * at : 2 * at + 2]]
        expected = shared_basis(rows, len(mine))
        torch.testing.assert_close(plan.starts[group.name][:, mine], expected, msg=name)


def test_codes_whose_gradient_is_not_finite_stop_the_step_before_anything_changes():
    adapted, _ = pooled(away=True)
    optimizer, before = create_optimizer(adapted, 0.02), updates(adapted)
    adapted(**make_batches()[0]).loss.backward()
    next(codes_of(layer.lora_B["default"]) for layer in lora_layers(adapted).values()).grad[0, 0] = float("nan")
    with pytest.raises(UserError, match="A gradient is not finite"):
        optimizer.step()
    assert all(torch.equal(before[name], after) for name, after in updates(adapted).items())


def test_the_metric_of_a_pool_is_the_mean_over_its_members():
    gram, codes = torch.randn(4, 4), torch.randn(3, 4)
    gram = gram @ gram.T
    parts = torch.stack([torch.diag(c) @ gram @ torch.diag(c) for c in codes])
    torch.testing.assert_close(pool_metric(gram, codes), parts.mean(0))
    root = inverse_root(parts.mean(0))
    expected = torch.linalg.matrix_norm(root @ parts @ root, 2).max().sqrt()
    torch.testing.assert_close(largest_change(root, gram, codes, iterations=100).squeeze(), expected, rtol=1e-3, atol=0)
