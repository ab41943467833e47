"""The settings of `accelerate launch`: FSDP2 and DeepSpeed, and the files in configs/accelerate/."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from processes import ROOT, assert_one_run, remove, run_processes

from sgm_finetune.base.config import Config
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line
from sgm_finetune.train import launch
from sgm_finetune.train.launch import apply_launcher, check_launch

FILES = ROOT / "configs" / "accelerate"
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed")


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Sets the environment of a process that was started with a DeepSpeed configuration."""

    def begin(**configuration: object) -> None:
        monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        zero = {"stage": configuration.pop("stage", 2)}
        file = tmp_path / "deepspeed.json"
        file.write_text(json.dumps({"zero_optimization": zero, **configuration}))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))

    return begin


def test_the_launchers_fsdp_is_our_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    config = apply_launcher(Config())
    assert config.training.shard
    assert "ACCELERATE_USE_FSDP" not in os.environ  # with it, the trainer would shard the factors too
    check_launch(config, 2)
    assert apply_launcher(Config()) == Config()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_VERSION": "1"}, "version 1; set fsdp_version: 2 in"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true is not supported; set it to false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing: true is not supported"),
    ],
)
def test_fsdp_settings_that_are_not_supported_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        apply_launcher(Config())


@pytest.mark.parametrize(
    ("overrides", "configuration", "message"),
    [
        ([], {}, "training.optimizer=spectral needs whole matrices, .*; set training.optimizer=adamw, or use FSDP2"),
        (["training.optimizer=adamw", "training.shard=true"], {}, "training.shard=true is FSDP2, but the launcher"),
        (["training.optimizer=adamw", "model.quantization=nf4"], {"stage": 3}, "nf4 is not possible with .* ZeRO-3"),
        (
            ["training.optimizer=adamw"],
            {"gradient_clipping": 0.5},
            "has gradient_clipping: 0.5, .*max_grad_norm makes it 1.0; set it to auto",
        ),
        (
            ["training.optimizer=adamw"],
            {"train_batch_size": 7},
            "has train_batch_size: 7, .* makes it 32; set it to auto",
        ),
        (["training.optimizer=adamw"], {"bf16": {"enabled": True}}, "enables bf16; remove it, since model.dtype sets"),
        (["training.optimizer=adamw", "training.batch_size=5"], {}, "batch_size=5 cannot be divided"),
    ],
)
def test_a_deepspeed_configuration_is_validated(deepspeed, overrides: list[str], configuration: dict, message: str):
    deepspeed(**configuration)
    with pytest.raises(UserError, match=message):
        check_launch(load_config(None, overrides), 2)


def test_a_deepspeed_configuration_that_agrees_is_taken(deepspeed) -> None:
    config = load_config(None, ["training.optimizer=adamw", "training.batch_size=32"])
    deepspeed(stage=3, gradient_clipping=1.0, train_batch_size=32, train_micro_batch_size_per_gpu="auto")
    check_launch(config, 2)
    deepspeed(train_micro_batch_size_per_gpu=16, gradient_accumulation_steps=1)
    check_launch(config, 2)


def test_a_checkpoint_resumes_only_the_way_it_was_written(deepspeed, tmp_path: Path) -> None:
    config, written = load_config(None, ["training.optimizer=adamw"]), tmp_path / "checkpoint-5"
    written.mkdir()
    check_launch(config, 4, written)
    for name in ("latest", "rng_state_0.pth", "rng_state_1.pth"):
        (written / name).touch()
    with pytest.raises(UserError, match="checkpoint-5 was written with DeepSpeed; resume with it, not without it"):
        check_launch(config, 2, written)
    deepspeed()
    check_launch(config, 2, written)
    with pytest.raises(UserError, match="written by 2 processes with DeepSpeed; resume with as many, not 4"):
        check_launch(config, 4, written)
    (written / "latest").unlink()
    with pytest.raises(UserError, match="was written without DeepSpeed; resume without it, not with it"):
        check_launch(config, 2, written)


def test_deepspeed_that_is_not_installed_is_named(deepspeed, monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed()
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(f"not installed; {install_line('deepspeed')}")):
        check_launch(Config(), 2)


def test_every_file_for_the_launcher_is_one_it_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for file in FILES.glob("*.yaml"):
        assert load_config_from_file(str(file)).num_processes == yaml.safe_load(file.read_text())["num_processes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["ddp", "fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)],
)
def test_what_the_launcher_starts_is_one_run(name: str, settings, tmp_path: Path, command) -> None:
    """Two processes end as one does, also when they are resumed. ZeRO-3 cuts every parameter into pieces."""
    settings = [*settings, "training.learning_rate=1e-3", "training.optimizer=adamw"]
    launcher = yaml.safe_load((FILES / f"{name}.yaml").read_text())
    if name == "zero3":  # by default it leaves matrices as small as these whole
        stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
        (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": stage, "gradient_clipping": "auto",
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}))  # fmt: skip
        launcher["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "zero3.json"), "zero3_init_flag": False}
        del launcher["mixed_precision"]
    (tmp_path / "launcher.yaml").write_text(yaml.safe_dump({**launcher, "num_processes": 2}))
    (tmp_path / "empty.yaml").write_text("")
    launched = tmp_path / "launched"
    arguments = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "launcher.yaml")]
    arguments += ["src/finetune.py", "--config", str(tmp_path / "empty.yaml"), *settings, f"output.dir={launched}"]
    assert ("shard " in run_processes(arguments)) == (name == "fsdp2")
    one = command("finetune", settings)
    assert_one_run(tmp_path / "out", launched)
    assert json.loads((launched / "metrics.json").read_text())["after"]["loss"] == pytest.approx(
        one["after"]["loss"], rel=1e-4
    )
    for left in (
        "sgm_finetuned.pth",
        "adapter",
        "metrics.json",
        "report.html",
        "checkpoints/checkpoint-20/trainer_state.json",
    ):
        remove(launched / left)
    run_processes([*arguments, "training.resume=true"])
    assert_one_run(tmp_path / "out", launched)
