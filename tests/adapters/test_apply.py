"""A plan becomes an ordinary PEFT model; a shared factor is one parameter, and its gradient is its members' sum."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import make_batches, make_model, measured_numbers, shared_factors
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.probe import probe
from sgm_finetune.method.build_plan import build_plan
from sgm_finetune.method.parameter_count import adapter_parameters
from sgm_finetune.method.plan import PlanSettings
from sgm_finetune.train.adapters.apply import (
    apply_plan,
    check_plan,
    check_starts,
    lora_layers,
    tie,
)

SHARES = ["activation", "input", "output"]
"""What shares a factor: the readers of the same activations, or the layers of a kind on one side."""


def make_plan(model, share="activation", rank=4):
    probed = probe(model, make_batches(task=task_of(model)), sketch_size=10)
    scope, side = ("activation", "auto") if share == "activation" else ("layers", share)
    settings = PlanSettings(rank=rank, alpha=8, scope=scope, side=side, threshold=0.0)
    return build_plan("pico", measured_numbers(probed), settings)


def task_of(model):
    return "causal-lm" if "CausalLM" in type(model).__name__ else "sequence-classification"


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def train_steps(model, batches, num_steps=20):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for step in range(num_steps):
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("share", SHARES)
def test_a_merged_model_starts_at_the_base_model(share):
    base, batch = make_model(), make_batches()[0]
    before = logits(base, batch)
    adapted = apply_plan(base, make_plan(base, share))
    assert torch.equal(before, logits(adapted, batch))


def test_the_adapters_own_file_is_the_same_from_every_process(tmp_path):
    adapted = apply_plan(make_model(), make_plan(make_model()))
    adapted.save_pretrained(tmp_path)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names)
    assert len(names) > 1


@pytest.mark.parametrize("share", SHARES)
def test_members_hold_one_parameter_that_starts_in_the_groups_spectrum(share):
    model = make_model()
    plan = make_plan(model, share)
    adapted = apply_plan(model, plan)
    assert plan.groups
    for name, factors in shared_factors(adapted, plan).items():
        assert len({id(factor) for factor in factors}) == 1
        start = factors[0].detach().T if share != "output" else factors[0].detach()
        torch.testing.assert_close(start * 3**0.5, plan.starts[name], atol=1e-6, rtol=0)


def test_a_matrix_of_its_own_starts_in_its_own_spectrum():
    model = make_model()
    plan = make_plan(model)
    alone = [matrix for matrix in plan.matrices if matrix.group is None]
    assert {matrix.name.rpartition(".")[2] for matrix in alone} == {"o_proj", "down_proj"}
    layers = lora_layers(apply_plan(model, plan))
    for matrix in alone:
        assert matrix.start == "spectral"
        a, b = layers[matrix.name].lora_A["default"].weight, layers[matrix.name].lora_B["default"].weight
        torch.testing.assert_close(a.detach().T * 3**0.5, plan.starts[matrix.name], atol=1e-6, rtol=0)
        assert not b.any()


@pytest.mark.parametrize("share", SHARES)
def test_members_are_equal_after_training_and_the_loss_falls(share):
    model, batches = make_model(), make_batches()
    plan = make_plan(model, share)
    adapted = apply_plan(model, plan)
    first = float(adapted(**batches[0]).loss.detach())
    train_steps(adapted, batches, 40)
    for name, factors in shared_factors(adapted, plan).items():
        assert all(torch.equal(factors[0], factor) for factor in factors[1:])
        start = factors[0].T if share != "output" else factors[0]
        assert not torch.allclose(start * 3**0.5, plan.starts[name], atol=1e-4)
    assert float(adapted(**batches[0]).loss.detach()) < 0.1 * first


@pytest.mark.parametrize("share", SHARES)
def test_the_shared_gradient_is_the_sum_of_its_members_gradients(share):
    """∂L/∂A_g = Σ_l ∂L/∂A_l in float64; each member's gradient comes from an untied copy."""
    batch = make_batches()[0]

    def build(tied: bool):
        model = make_model()
        plan = make_plan(model, share)
        adapted = apply_plan(model, plan)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and not float(parameter.detach().abs().sum()):  # a zero factor passes on no gradient
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        if not tied:
            for module in adapted.modules():
                if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
                    for factor in (module.lora_A["default"], module.lora_B["default"]):
                        factor.weight = torch.nn.Parameter(factor.weight.detach().clone())
        adapted = adapted.double()
        if tied:
            tie(adapted, plan)
        adapted(**batch).loss.backward()
        return {name: [f.grad for f in factors] for name, factors in shared_factors(adapted, plan).items()}

    together, apart = build(tied=True), build(tied=False)
    assert together
    for name, gradients in together.items():
        expected = torch.stack(apart[name]).sum(0)
        torch.testing.assert_close(gradients[0], expected, rtol=1e-9, atol=1e-12)


def test_merging_nothing_is_plain_lora_bit_for_bit():
    """The same seed, a plan without groups and a LoraConfig written by hand: equal parameters after 20 steps."""
    batches = make_batches()

    def plain(model):
        names = [m.name for m in make_plan(make_model(), "none").selected]
        return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="SEQ_CLS"))

    results = []
    for build in (plain, lambda model: apply_plan(model, make_plan(make_model(), "none"))):
        model = make_model()
        torch.manual_seed(11)
        results.append(get_peft_model_state_dict(train_steps(build(model), batches)))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_parameters_are_counted_as_the_plan_says():
    model = make_model("causal-lm")
    plan = make_plan(model)
    adapted = apply_plan(model, plan)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == adapter_parameters(plan)[0]
    assert adapter_parameters(plan)[0] < adapter_parameters(plan)[1]


@pytest.mark.parametrize("share", SHARES)
def test_a_saved_adapter_loads_in_an_unmodified_peft_and_merges(share, tmp_path):
    """logits: trained = loaded by PeftModel.from_pretrained (difference 0) = merged into the base (tolerance)."""
    batches = make_batches()
    model = make_model()
    adapted = train_steps(apply_plan(model, make_plan(model, share)), batches)
    expected = logits(adapted, batches[0])
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(expected, logits(loaded, batches[0]))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(expected, logits(merged, batches[0]), atol=1e-4, rtol=1e-4)


def test_loading_a_checkpoint_keeps_members_tied(tmp_path):
    model = make_model()
    plan = make_plan(model, "input")
    adapted = train_steps(apply_plan(model, plan), make_batches())
    adapted.save_pretrained(tmp_path)
    fresh_base = make_model()
    fresh = apply_plan(fresh_base, plan)
    fresh.load_adapter(tmp_path, "default")
    for name, factors in shared_factors(fresh, plan).items():
        assert len({id(f) for f in factors}) == 1
        assert torch.equal(factors[0], shared_factors(adapted, plan)[name][0])


def test_a_group_may_start_at_random():
    model = make_model()
    plan = make_plan(model, "output")
    groups = tuple(replace(group, start="random") for group in plan.groups)
    plan = replace(plan, groups=groups, matrices=tuple(replace(m, start="random") for m in plan.matrices), starts={})
    before = logits(model, make_batches()[0])
    adapted = apply_plan(model, plan)
    assert torch.equal(before, logits(adapted, make_batches()[0]))
    assert all(float(f[0].detach().abs().sum()) > 0 for f in shared_factors(adapted, plan).values())


def broken(plan, what):
    group = plan.groups[0]
    match what:
        case "another model":
            return replace(plan, matrices=(replace(plan.matrices[0], name="h.0.attn"), *plan.matrices[1:]))
        case "another shape":
            return replace(plan, matrices=(replace(plan.matrices[0], shape=(1, 2)), *plan.matrices[1:]))
        case "nothing selected":
            return replace(plan, matrices=tuple(replace(m, selected=False) for m in plan.matrices), groups=())
        case "a member not selected":
            matrices = tuple(replace(m, selected=m.name != group.members[0]) for m in plan.matrices)
            return replace(plan, matrices=matrices)
        case "a layer in two groups":
            return replace(plan, groups=(group, replace(group, name="again")))
        case "no start":
            return replace(plan, starts={})
        case "a start of another rank":
            return replace(plan, starts={name: start[:, :2] for name, start in plan.starts.items()})
        case _:
            other = next(m for m in plan.matrices if m.shape[1] != plan.shape_of(group.members[0])[1])
            return replace(plan, groups=(replace(group, members=(group.members[0], other.name)),))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("another model", "made for another model .* has no `h.0.attn`"),
        ("another shape", "is 1x2 in the plan and 64x64 in this model"),
        ("nothing selected", "selects no matrix"),
        ("a member not selected", "does not select"),
        ("a layer in two groups", "two groups"),
        ("no start", "no spectral start"),
        ("a start of another rank", "64x2, but its factor is 64x4"),
        ("shapes mixed", "mixes input widths"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_one_line(what, message):
    model = make_model()
    plan = broken(make_plan(model), what)

    def check() -> None:
        check_plan(model, plan)
        check_starts(plan)

    with pytest.raises(UserError, match=message) as caught:
        check()
    assert "\n" not in str(caught.value)
