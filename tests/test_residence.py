"""Whole runs on a base that stays on disk: what they leave is what the resident base leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import save_pico
from conftest import WORDS
from safetensors.torch import load_file

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.train.arguments import check_machine


def results(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    expected, found = results(one), results(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


ON_DISK = ("model.residence=disk", "model.dtype=bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("training.checkpointing=true",), ("model.quantization=nf4",)], ids=str)
def test_a_run_leaves_the_adapter_and_metrics_of_the_resident_base(more, settings, command, tmp_path):
    """With the scan, both tests, the probe, validations, and a resumed second half."""
    short = [*settings, "training.max_steps=6", *more]
    resident = command("finetune", [*short, ON_DISK[1], f"output.dir={tmp_path / 'resident'}"])
    disk = command("finetune", [*short, *ON_DISK, f"output.dir={tmp_path / 'disk'}"])
    assert_same(tmp_path / "resident", tmp_path / "disk")
    for when in ("before", "after"):
        assert resident[when] == disk[when]
    assert disk["predicted"]["mapped_bytes"] > 0
    again = command("evaluate", [f"output.dir={tmp_path / 'disk'}"])
    assert again["loss"] == disk["after"]["loss"]


@pytest.mark.slow
def test_a_run_resumes_on_disk_as_it_began(settings, command, tmp_path):
    short = [*settings, "training.max_steps=6", "training.eval_steps=3", *ON_DISK]
    command("finetune", [*short, f"output.dir={tmp_path / 'whole'}"])
    command("finetune", [*short, f"output.dir={tmp_path / 'cut'}"])
    checkpoints = sorted((tmp_path / "cut" / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    (tmp_path / "cut" / "sgm_finetuned.pth").unlink()
    (tmp_path / "cut" / "metrics.json").unlink()
    shutil.rmtree(checkpoints[-1])
    command("finetune", [*short, f"output.dir={tmp_path / 'cut'}", "training.resume=true"])
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_answers_chat_and_exports_come_from_a_base_on_disk(reviews, command, tmp_path):
    folder = save_pico("llama", tmp_path / "llama")
    rows = tmp_path / "rows.jsonl"
    pairs = [(f"{one} {two} film", "was good") for one in WORDS for two in WORDS[:4]]
    rows.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    short = [
        f"model.name={folder}", "model.task=causal-lm", *ON_DISK, f"data.train={rows}", "data.max_length=32",
        "training.max_steps=2", "training.batch_size=4", "probe.num_batches=2", "probe.batch_size=4",
        "probe.sketch_size=12", "adapter.rank=4", f"output.dir={tmp_path / 'out'}",
    ]  # fmt: skip
    command("finetune", short)
    asked = ("--prompt", "the film", "--compare")
    on_disk = command("generate", [f"output.dir={tmp_path / 'out'}"], *asked)
    resident = command("generate", [f"output.dir={tmp_path / 'out'}", "model.residence=device"], *asked)
    assert on_disk["rows"] == resident["rows"]
    exported = command(
        "export", [f"output.dir={tmp_path / 'out'}"], "--to", "merged", "--output", str(tmp_path / "whole")
    )
    assert exported
    assert (tmp_path / "whole" / "config.json").is_file()


def test_disk_and_shards_exclude_each_other(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    config = load_config(tmp_path / "config.yaml", ["model.residence=disk", "training.shard=true"])
    with pytest.raises(UserError, match=r"^training.shard=true cuts a base.*or model.residence=device$"):
        check_machine(config)
