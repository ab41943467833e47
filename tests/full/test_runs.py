"""Whole runs that train whole matrices: what they leave, that they resume, and what reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import losses, remove
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from sgm_finetune.base.config import Config
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.plan_file import load_plan
from sgm_finetune.method.plan import PlanSettings
from sgm_finetune.train.launch import check_launch


def overrides(model: Path, reviews: Path, output: Path, *more: str) -> list[str]:
    return [
        f"model.name={model}", f"data.train={reviews}", "data.max_length=32", "adapter.kind=full",
        "training.max_steps=8", "training.eval_steps=4", "training.batch_size=16", "training.learning_rate=1e-3",
        *more, f"output.dir={output}",
    ]  # fmt: skip


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "sgm_finetuned.pth", weights_only=True)["tensors"]


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
    for name in ("sgm_finetuned.pth", "metrics.json", "report.html", "history.json", "examples.json"):
        remove(tmp_path / "out" / name)
    remove(tmp_path / "out" / "checkpoints" / "checkpoint-8" / "trainer_state.json")
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


def test_whole_matrices_have_defaults_of_their_own_and_one_process():
    config = load_config(None, ["adapter.kind=full"])
    assert (config.optimizer, config.peak_learning_rate(100)) == ("adamw", 2e-5)
    assert (Config().optimizer, Config().peak_learning_rate(100)) == ("spectral", 0.0125)
    with pytest.raises(UserError, match=r"adapter.kind=full trains in one process"):
        check_launch(config, 2)


def test_a_configuration_and_a_plan_of_an_earlier_version_are_read(tmp_path):
    (tmp_path / "old.yaml").write_text("selection: {top_fraction: 0.5, prefer_depth: true}\n")
    assert load_config(tmp_path / "old.yaml").selection.by == "depth"
    settings = {"rank": 4, "alpha": 8.0, "prefer_depth": True}
    plan = {"model": "m", "settings": settings, "matrices": [], "format": "sgm-plan/1"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert load_plan(tmp_path / "plan.json").settings.rank == 4
