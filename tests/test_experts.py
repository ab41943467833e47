"""Mixtures of experts: a stack is measured, planned and trained with one matrix per expert."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import save_pico
from conftest import make_batches, measured_numbers

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.make_plan import make_plan
from sgm_finetune.measure.probe import probe
from sgm_finetune.measure.scan import scan
from sgm_finetune.method.build_plan import build_plan
from sgm_finetune.method.plan import Group, PlanSettings
from sgm_finetune.method.subspace import spectral_basis, test_matrix
from sgm_finetune.model.load import load_model
from sgm_finetune.model.matrices import adaptable, out_of_reach
from sgm_finetune.train.adapters.apply import apply_plan, lora_layers
from sgm_finetune.train.adapters.optimizer import FactorDescent, Pair, factor_pairs, pack_factor, unpack_factor
from sgm_finetune.train.adapters.shard import shard_base

STACK = "model.layers.1.mlp.experts.gate_up_proj"
NAMES = ["mixtral", "qwen2_moe", "gpt_oss"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_pico(name, tmp_path_factory.mktemp("experts") / name) for name in NAMES}


def loaded(folder):
    return load_model(ModelConfig(task="causal-lm", dtype="float32"), folder)[0]


def batches():
    return make_batches(task="causal-lm")


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_is_sketched_as_one_matrix_of_all_its_experts(folders, name):
    probed = probe(loaded(folders[name]), batches(), sketch_size=6)
    model = loaded(folders[name])  # float32, since grouped products do not support float64
    for batch in batches()[::2]:
        model(**batch).loss.backward()
    gradient = model.get_parameter(STACK).grad.double()
    if name == "gpt_oss":  # stored as d_in x d_out
        gradient = gradient.mT
    assert gradient.shape == (4, *probed.shapes[STACK])
    assert probed.num_experts[STACK] == 4
    sketch = probed.halves[STACK][0]
    below, beside = torch.cat([*gradient], dim=0), torch.cat([*gradient], dim=1)
    expected = test_matrix(below.shape[0], 6, sketch.seed).double().T @ below
    torch.testing.assert_close(sketch.input.double(), expected, rtol=1e-3, atol=1e-5)
    expected = (beside @ test_matrix(beside.shape[1], 6, sketch.seed).double()).T
    torch.testing.assert_close(sketch.output.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_probe_leaves_a_model_with_experts_unchanged(folders, name):
    model = loaded(folders[name])
    model.get_parameter(STACK).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    probe(model, batches())
    assert not model.get_parameter(STACK).requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())  # type: ignore[attr-defined]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_every_expert_has_its_snr_from_the_files_and_the_start_of_its_stack(folders, name):
    scanned, probed = scan(folders[name]), probe(loaded(folders[name]), batches(), sketch_size=12)
    plan = make_plan(scanned, probed, load_config(None, ["adapter.rank=4", "probe.sketch_size=12"]))
    matrix = next(matrix for matrix in plan.matrices if matrix.name == STACK)
    assert [m.name for m in plan.matrices] == list(adaptable(loaded(folders[name])))
    ours = [m for m in scanned.matrices if "layers.1." in m.name and ".experts" in m.name and m.shape[0] != 32]
    assert matrix.signal_rank is not None
    assert matrix.signal_rank <= sum(m.signal_rank for m in ours)
    assert (matrix.num_experts, matrix.group, matrix.start) == (4, None, "spectral")

    model = loaded(folders[name])
    batch = batches()[0]
    before = model(**batch).logits
    layer = lora_layers(adapted := apply_plan(model, plan))[STACK]
    starts = layer.lora_A["default"].weight.reshape(4, 4, 32)
    basis = spectral_basis([half.input for half in probed.halves[STACK]], 4)
    for start in starts:
        torch.testing.assert_close(start, basis.T / 3**0.5)
    torch.testing.assert_close(adapted(**batch).logits, before, rtol=0, atol=1e-6)


def test_linear_layers_that_peft_takes_for_experts_are_left_out(folders):
    model = loaded(folders["qwen2_moe"])
    there = adaptable(model)
    assert len(out_of_reach(model)) == 2 * 3
    assert all("shared_expert" in name for name in out_of_reach(model))
    assert out_of_reach(loaded(folders["gpt_oss"])) == []
    assert not any("shared_expert" in name for name in there)
    assert "model.layers.0.mlp.experts.down_proj" in there


def test_settings_that_experts_do_not_support_are_refused(folders):
    model = loaded(folders["mixtral"])
    with pytest.raises(UserError, match=r"shard=true is not possible with a model of experts; set training.shard=fal"):
        shard_base(model, torch.device("cpu"))
    numbers = [
        replace(one, num_experts=4 if "experts" in one.name else None)
        for one in measured_numbers(probe(model, batches()))
    ]
    plan = build_plan("pico", numbers, PlanSettings(rank=4, alpha=8.0, dropout=0.1))
    with pytest.raises(
        UserError, match=r"adapter\.dropout=0\.1 is not possible with experts .* set adapter\.dropout=0"
    ):
        apply_plan(model, plan)
    plan = build_plan("pico", numbers, PlanSettings(rank=4, alpha=8.0))
    group = Group("x", "x", "input", (STACK, STACK.replace("1", "0")), start="random")
    with pytest.raises(UserError, match="experts share nothing"):
        apply_plan(model, replace(plan, groups=(group,)))


def test_groups_leave_experts_out(folders):
    probed = probe(loaded(folders["mixtral"]), batches(), sketch_size=12)
    for criterion in ("subspace", "cosine"):
        chosen = ["adapter.rank=4", "probe.sketch_size=12", "merge.scope=layers", "merge.threshold=-1"]
        plan = make_plan(scan(folders["mixtral"]), probed, load_config(None, [*chosen, f"merge.criterion={criterion}"]))
        assert plan.groups
        assert not any("experts" in name for group in plan.groups for name in group.members)


def test_laying_factors_out_and_storing_them_are_inverse():
    factor = torch.arange(24.0).reshape(12, 2)
    assert torch.equal(pack_factor("a", unpack_factor("a", factor, 3)), factor)
    assert torch.equal(pack_factor("b", unpack_factor("b", factor.T, 3)), factor.T)


def test_an_experts_step_is_that_of_a_separate_layer():
    """The factors that PEFT uses for each expert move as if each expert were a LoRA layer."""
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator)) for _ in range(3)]
    ups = [(torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator)) for _ in range(3)]

    def parameter(value, gradient):
        made = torch.nn.Parameter(value.clone())
        made.grad = gradient.clone()
        return made

    alone = []
    for (a, b), (da, db) in zip(factors, ups, strict=True):
        pair = Pair(parameter(a, da), parameter(b, db), 2.0)
        FactorDescent([pair], lr=0.1).step()
        alone.append(pair)
    stack = Pair(
        parameter(torch.cat([a for a, _ in factors]), torch.cat([da for da, _ in ups])),
        parameter(
            pack_factor("b", torch.stack([b.T for _, b in factors])),
            pack_factor("b", torch.stack([d.T for _, d in ups])),
        ),
        2.0,
        num_experts=3,
    )
    FactorDescent([stack], lr=0.1).step()
    torch.testing.assert_close(stack.a.detach(), torch.cat([pair.a.detach() for pair in alone]))
    expected = torch.stack([pair.b.detach().T for pair in alone])
    torch.testing.assert_close(unpack_factor("b", stack.b.detach(), 3), expected)


def test_the_layout_of_a_stack_is_pefts_own(folders):
    """PEFT's update of expert e is the product of the factors that `laid` returns for it."""
    model = loaded(folders["mixtral"])
    plan = make_plan(
        scan(folders["mixtral"]),
        probe(model, batches(), sketch_size=12),
        load_config(None, ["adapter.rank=4", "probe.sketch_size=12"]),
    )
    adapted = apply_plan(model, plan)
    layer = lora_layers(adapted)[STACK]
    pair = next(p for p in factor_pairs(adapted) if p.a is layer.lora_A["default"].weight)
    with torch.no_grad():
        pair.b.normal_()
        a, b = unpack_factor("a", pair.a, 4), unpack_factor("b", pair.b, 4)
        torch.testing.assert_close(layer.get_delta_weight("default"), pair.scaling * b.mT @ a, rtol=1e-4, atol=1e-5)
