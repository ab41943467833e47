"""A budget of parameters instead of a rank: the largest rank that stays within it, whatever the probe decides."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from architectures import save_pico
from conftest import make_batches, make_model

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.config_file import load_config, parse_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.cli import run
from sgm_finetune.measure.make_plan import make_plan, makes_whole_pools
from sgm_finetune.measure.plan_file import load_plan
from sgm_finetune.measure.probe import Probe, probe
from sgm_finetune.measure.scan import scan
from sgm_finetune.measure.scan_result import Scan
from sgm_finetune.method.parameter_count import adapter_parameters
from sgm_finetune.model.load import skeleton
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.results.claim import as_it_began
from sgm_finetune.train.adapters.apply import apply_plan
from sgm_finetune.train.budget.parameters import fit_parameters

PER_RANK = 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
"""Parameters of plain LoRA of rank 1 on the pico LLaMA of 4 layers: q, o; k, v; gate, up, down."""
IN_POOLS = PER_RANK // 4 + 7 * 4
"""The same in seven pools, with a code for each layer."""
LIMIT = 32
"""Directions of its smallest matrices, k and v."""


def configured(*overrides: str):
    return load_config(None, ["probe.sketch_size=64", *overrides])


@pytest.fixture(scope="module")
def measured(llama_folder) -> tuple[Scan, Probe]:
    return scan(llama_folder), probe(make_model(), make_batches(), sketch_size=8)


def trained_by(config, measured: tuple[Scan, Probe]) -> int:
    """The adapter parameters that a run with this configuration trains."""
    model = make_model()
    plan = make_plan(*measured, config, model)
    assert plan.settings.rank == config.adapter.rank
    adapted = apply_plan(model, plan)
    return sum(p.numel() for name, p in adapted.named_parameters() if p.requires_grad and "lora_" in name)


@pytest.mark.parametrize(
    ("overrides", "each"),
    [
        (("merge.scope=activation",), PER_RANK),
        (("merge.scope=layers", "merge.threshold=0"), PER_RANK),
        (("merge.scope=pool",), IN_POOLS),
        (("merge.scope=pool", "selection.top_fraction=0.5"), IN_POOLS - 7 * 2),
        (("merge.scope=pool", "merge.max_group_size=2"), PER_RANK),
        (("selection.top_fraction=0.5",), PER_RANK // 2),
        (("selection.snr_threshold=0",), PER_RANK),
    ],
)
def test_the_rank_is_the_largest_that_stays_within_whatever_is_shared(overrides, each, measured):
    budget = 5 * each + each // 2
    config, line = fit_parameters(configured(f"adapter.parameters={budget}", *overrides), adaptable(make_model()))
    assert (config.adapter.rank, config.adapter.alpha) == (5, 10.0)
    assert line == f"rank 5 (alpha 10) takes at most {5 * each:,} of {budget:,} parameters"
    trained = trained_by(config, measured)
    assert trained <= 5 * each
    assert trained == 5 * each or not makes_whole_pools(config.merge)


def test_without_a_probe_the_rank_is_plain_loras():
    config = configured(f"adapter.parameters={70 * PER_RANK}", "merge.side=none")
    assert fit_parameters(config, adaptable(make_model()))[0].adapter.rank == 70


def test_alpha_keeps_its_ratio_and_a_chosen_rank_is_chosen_again():
    config = configured(f"adapter.parameters={7 * PER_RANK}", "adapter.rank=3", "adapter.alpha=32")
    chosen, _ = fit_parameters(config, adaptable(make_model()))
    assert (chosen.adapter.rank, chosen.adapter.alpha) == (7, pytest.approx(32 / 3 * 7, rel=1e-15))
    written = parse_config(chosen.model_dump(mode="json"))
    assert fit_parameters(written, adaptable(make_model()))[0] == chosen


def test_the_smallest_number_that_works_is_named():
    matrices = adaptable(make_model())
    with pytest.raises(UserError, match=rf"is too small: rank 1 takes up to {PER_RANK}; give .*={PER_RANK} or more"):
        fit_parameters(configured(f"adapter.parameters={PER_RANK - 1}"), matrices)
    assert fit_parameters(configured(f"adapter.parameters={PER_RANK}"), matrices)[0].adapter.rank == 1


def test_a_rank_is_no_larger_than_the_smallest_matrix_and_the_sketches_hold_it():
    matrices = adaptable(make_model())
    chosen, line = fit_parameters(configured("adapter.parameters=1M"), matrices)
    assert chosen.adapter.rank == LIMIT
    assert line.endswith("and no larger rank is possible")
    small = load_config(None, ["probe.sketch_size=12", f"adapter.parameters={14 * PER_RANK}"])
    with pytest.raises(UserError, match=r"allows rank 14, and probe.sketch_size=12 is smaller; give .*=14 or more"):
        fit_parameters(small, matrices)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_each_expert_counts(name, tmp_path):
    """A skeleton of the folder has the matrices of the model: rank 2 is exactly what the adapter takes."""
    folder = save_pico(name, tmp_path / name)
    model = skeleton(ModelConfig(task="causal-lm"), folder)
    config = configured("adapter.rank=2", "adapter.alpha=4", "merge.side=none", "model.task=causal-lm")
    plain, _ = adapter_parameters(make_plan(scan(folder), None, config, model))
    for budget, rank in ((plain, 2), (plain - 1, 1)):
        asked = configured("merge.side=none", f"adapter.parameters={budget}")
        assert fit_parameters(asked, adaptable(model))[0].adapter.rank == rank


def test_a_plan_never_trains_more_than_its_budget(measured):
    config = configured("merge.side=none", f"adapter.parameters={PER_RANK}", "adapter.rank=2")
    with pytest.raises(UserError, match=rf"adapter.rank=2 trains {2 * PER_RANK} parameters, more than .*={PER_RANK};"):
        trained_by(config, measured)


# whole runs


def test_a_run_keeps_its_rank_and_is_resumed_with_it(settings, tmp_path, command):
    """Printed once, trained exactly, written into config.yaml, and kept when the run goes on."""
    asked = [*settings, "merge.scope=pool", f"adapter.parameters={6 * IN_POOLS + 100}", "training.max_steps=4"]
    metrics = command("finetune", asked)
    said = f"rank 6 (alpha 48) takes at most {6 * IN_POOLS:,} of {6 * IN_POOLS + 100:,} parameters"
    assert command.said.count(said) == 1
    assert f"PEFT LoRA: {6 * IN_POOLS:,} trainable adapter parameters" in command.said
    assert metrics["trainable_parameters"] == metrics["predicted"]["trainable_parameters"] == 6 * IN_POOLS + 2 * 64
    out = tmp_path / "out"
    begun = load_config(out / "config.yaml").adapter
    assert (begun.rank, begun.alpha, begun.parameters) == (6, 48.0, 6 * IN_POOLS + 100)

    for other, named in (("adapter.parameters=1M", "parameters"), ("adapter.rank=5", "rank")):
        line = refused(["finetune", *asked, other, "training.resume=true"], tmp_path)
        assert f"`adapter.{named}` is " in line
    assert as_it_began(load_config(None, asked), out).adapter == begun
    assert as_it_began(load_config(out / "config.yaml"), out).adapter == begun


@pytest.mark.slow
def test_a_run_goes_on_with_the_rank_that_it_began_with(settings, tmp_path, command):
    asked = [*settings, "merge.scope=pool", f"adapter.parameters={6 * IN_POOLS}", "training.max_steps=8"]
    whole = command("finetune", asked)
    (tmp_path / "out" / "sgm_finetuned.pth").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-8")
    assert command("finetune", [*asked, "training.resume=true"])["after"] == whole["after"]
    assert "takes at most" not in command.said
    assert load_config(tmp_path / "out" / "config.yaml").adapter.rank == 6


def refused(arguments: list[str], tmp_path: Path) -> str:
    """The one line of a command that ends with status 2."""
    with pytest.raises(UserError) as caught:
        run([*arguments, "--config", str(tmp_path / "empty.yaml")])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_estimate_and_plan_know_it(settings, tmp_path, command):
    asked = [*settings, f"adapter.parameters={3 * PER_RANK}"]
    needed = command("estimate", [*asked, "merge.side=none"])
    assert f"rank 3 (alpha 24) takes at most {3 * PER_RANK:,}" in command.said
    assert needed["trainable_parameters"] == 3 * PER_RANK + 2 * 64
    command("plan", asked, "--output", str(tmp_path / "plan.json"))
    assert f"rank 3 (alpha 24) takes at most {3 * PER_RANK:,}" in command.said
    plan = load_plan(tmp_path / "plan.json")
    assert (plan.settings.rank, plan.settings.alpha) == (3, 24)
    assert plan.groups
    small = f"adapter.parameters={PER_RANK - 1}"
    for name in ("estimate", "plan", "finetune"):
        assert f"give adapter.parameters={PER_RANK} or more" in refused([name, *settings, small], tmp_path)
    given = [f"plan={tmp_path / 'plan.json'}", small]
    assert "not both: the plan has its rank" in refused(["finetune", *settings, *given], tmp_path)
