"""Whole runs that train whole matrices: what they leave, that they resume, and what reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ANOTHER_ORDER, losses, remove, torchrun
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from sgm_finetune.base.config import Config
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.plan_file import load_plan
from sgm_finetune.method.plan import Plan, PlannedMatrix, PlanSettings
from sgm_finetune.model.names import kind_of
from sgm_finetune.train.full import apply
from sgm_finetune.train.full.apply import train_whole
from sgm_finetune.train.launch import apply_launcher, check_launch


def overrides(model: Path, reviews: Path, output: Path, *more: str) -> list[str]:
    return [
        f"model.name={model}", f"data.train={reviews}", "data.max_length=32", "adapter.kind=full",
        "training.max_steps=8", "training.eval_steps=4", "training.batch_size=16", "training.learning_rate=1e-3",
        *more, f"output.dir={output}",
    ]  # fmt: skip


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "sgm_finetuned.pth", weights_only=True)["tensors"]


def forget_the_end(output: Path) -> None:
    """Leaves of a run of 8 steps what was there before its last checkpoint was whole."""
    for name in ("sgm_finetuned.pth", "metrics.json", "report.html", "history.json", "examples.json"):
        remove(output / name)
    remove(output / "checkpoints" / "checkpoint-8" / "trainer_state.json")


def test_a_resumed_run_is_the_uninterrupted_one(llama_folder, reviews, tmp_path, command):
    """bfloat16 with stochastic rounding, gradients of two micro-batches, the upper half of the matrices."""
    half = ("selection.top_fraction=0.5", "selection.by=depth", "training.micro_batch_size=8", "model.dtype=bfloat16")
    settings = overrides(llama_folder, reviews, tmp_path / "whole", *half)
    whole = command("finetune", settings)
    plan = load_plan(tmp_path / "whole" / "plan.json")
    assert plan.settings == PlanSettings(kind="full", top_fraction=0.5, by="depth", threshold=0.85)
    assert "14 of 28 matrices, trained whole · the top 50 % of each kind by depth" in command.said
    found = tensors(tmp_path / "whole")
    assert set(found) == {f"{matrix.name}.weight" for matrix in plan.selected} | {"score.weight"}
    assert {matrix.layer for matrix in plan.selected} == {2, 3}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert whole["trainable_parameters"] == sum(tensor.numel() for tensor in found.values())
    assert (tmp_path / "whole" / "sgm_finetuned.pth").stat().st_size < 2 * whole["trainable_parameters"] + 60_000
    assert not (tmp_path / "whole" / "adapter").exists()
    best = load_file(tmp_path / "whole" / "checkpoints" / f"checkpoint-{whole['best_step']}" / "trained.safetensors")
    assert all(torch.equal(found[name], best[name]) for name in found)

    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    forget_the_end(tmp_path / "out")
    resumed = command("finetune", [*settings[:-1], f"output.dir={tmp_path / 'out'}", "training.resume=true"])
    assert resumed["after"] == whole["after"]
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    again = tensors(tmp_path / "out")
    assert [name for name in found if not torch.equal(found[name], again[name])] == []


@pytest.mark.slow
def test_an_encoder_learns_and_all_commands_read_the_result(bert_folder, reviews, tmp_path, command):
    out = [f"output.dir={tmp_path / 'out'}"]
    more = ("training.max_steps=40", "adapter.also=norms", "training.optimizer=adafactor")
    more += ("training.learning_rate=1e-2",)
    metrics = command("finetune", overrides(bert_folder, reviews, tmp_path / "out", *more))
    assert metrics["after"]["loss"] < 0.8 * metrics["before"]["loss"]
    assert metrics["optimizer"] == "adafactor"
    kept = tensors(tmp_path / "out")
    assert {"classifier.weight", "bert.encoder.layer.0.attention.self.query.bias"} <= set(kept)
    assert "bert.encoder.layer.0.output.LayerNorm.weight" in kept
    assert not [name for name in kept if "embeddings" in name]
    again = command("evaluate", out)
    assert {key: again[key] for key in metrics["after"]} == metrics["after"]
    (row,) = command("generate", out, "--prompt", "good great film", "--compare")["rows"]
    assert row["answer"] == "good"
    assert row["before"]["scores"] != row["scores"]

    merged = tmp_path / "merged"
    found = command("export", out, "--to", "merged", "--output", str(merged))
    assert found["difference"] < 1e-6
    plain = dict(AutoModelForSequenceClassification.from_pretrained(merged).named_parameters())
    assert [name for name in kept if not torch.equal(kept[name], plain[name])] == []
    found = command("export", out, "--to", "adapter", "--rank", "32", "--output", str(tmp_path / "adapter"))
    assert found["cut"]["kept"] == pytest.approx(1.0)
    assert "left out, since no low-rank update holds them" in command.said
    before = found["cut"]["validation_loss_before"]
    assert found["cut"]["validation_loss"] == pytest.approx(before, rel=0.2)  # biases and norms are left out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Trained matrices" in page
    assert "lora_A" not in page
    assert "whole matrices, and norms" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["adapter.rank=8"], "adapter.rank means nothing with adapter.kind=full; leave it out"),
        (["merge.side=none"], "merge.side means nothing with adapter.kind=full"),
        (["adapter.parameters=300k"], "adapter.parameters means nothing"),
        (["training.optimizer=spectral"], "spectral is not possible with adapter.kind=full; .*optimizer=adamw"),
        (["model.quantization=nf4"], "nf4 is not possible with adapter.kind=full; .*quantization=none"),
        (["model.residence=disk"], "disk is not possible .*; give model.residence=device"),
        (["model.dtype=float16"], "float16 is not possible .*; give model.dtype=bfloat16"),
        (["training.shard=true"], "shard=true is not possible .*; give training.shard=false"),
        (["adapter.kind=lora", "adapter.also=norms"], "adapter.also is for adapter.kind=full"),
        (["adapter.kind=lora", "training.optimizer=muon"], "muon is for adapter.kind=full"),
    ],
)
def test_what_means_nothing_for_whole_matrices_is_refused_in_one_line(given, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(None, ["adapter.kind=full", *given])
    assert "\n" not in str(caught.value)


def test_whole_matrices_have_defaults_of_their_own():
    config = load_config(None, ["adapter.kind=full"])
    assert (config.optimizer, config.peak_learning_rate(100)) == ("adamw", 2e-5)
    assert (Config().optimizer, Config().peak_learning_rate(100)) == ("spectral", 0.0125)
    check_launch(config, 2)


def test_launchers_that_cut_matrices_are_refused(monkeypatch):
    config = load_config(None, ["adapter.kind=full"])
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(UserError, match=r"adapter.kind=full trains without DeepSpeed"):
            check_launch(config, 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match=r"the launcher asks for FSDP; start sgm finetune with torchrun"):
        check_launch(apply_launcher(config), 2)


def test_several_processes_do_not_train_experts_that_are_layers(monkeypatch):
    """A step may reach an expert in one process and not in another, which would wait for it forever."""
    block = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8)])})
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    name = "layers.0.experts.0"
    plan = Plan("m", PlanSettings(kind="full", side="none"), (PlannedMatrix(name, kind_of(name), 0, (8, 8), True),))
    train_whole(model, plan)
    monkeypatch.setattr(apply, "processes", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(UserError, match=r"`layers.0.experts.0.weight` belongs to one expert"):
        train_whole(model, plan)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_processes_are_one(dtype, llama_folder, reviews, tmp_path, command):
    """Gradients are averaged in the backward pass; a run of two processes resumes as well."""
    settings = overrides(llama_folder, reviews, tmp_path / "one", "training.micro_batch_size=4", f"model.dtype={dtype}")
    (tmp_path / "empty.yaml").write_text("")
    two = ("--config", str(tmp_path / "empty.yaml"), *settings[:-1], f"output.dir={tmp_path / 'two'}")
    said = torchrun("src/finetune.py", *two)
    assert "MiB reduced a step" in said
    command("finetune", settings)
    bound = ANOTHER_ORDER if dtype == "float32" else 2e-2  # sums in bfloat16
    for name in ("loss", "eval_loss", "grad_norm"):
        left, right = (torch.tensor(losses(tmp_path / run, name)) for run in ("one", "two"))
        torch.testing.assert_close(left, right, atol=bound, rtol=bound)
    left, right = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert left.keys() == right.keys()
    for name, value in left.items():
        moved = (value.float() - right[name].float()).abs()
        assert (moved > 1e-3).float().mean() < 0.01, name  # AdamW's steps of gradients near 0 have either sign

    forget_the_end(tmp_path / "two")
    torchrun("src/finetune.py", *two, "training.resume=true")
    again = tensors(tmp_path / "two")
    assert [name for name in right if not torch.equal(right[name], again[name])] == []


def test_a_configuration_and_a_plan_of_an_earlier_version_are_read(tmp_path):
    (tmp_path / "old.yaml").write_text("selection: {top_fraction: 0.5, prefer_depth: true}\n")
    assert load_config(tmp_path / "old.yaml").selection.by == "depth"
    settings = {"rank": 4, "alpha": 8.0, "prefer_depth": True}
    plan = {"model": "m", "settings": settings, "matrices": [], "format": "sgm-plan/1"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert load_plan(tmp_path / "plan.json").settings.rank == 4
