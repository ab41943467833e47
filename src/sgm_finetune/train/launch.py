"""Follows the settings of `accelerate launch`: FSDP2 or DeepSpeed (docs/scale.md)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import DeepSpeedPlugin
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from sgm_finetune.base.config import Config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line
from sgm_finetune.data.batches import divide_batch


def apply_launcher(config: Config) -> Config:
    """Returns `config` with the launcher's settings: its FSDP becomes `training.shard`.

    SGM shards the base itself, since the trainer would shard the factors too; so this removes the launcher's FSDP
    variable from the environment. Raises UserError for FSDP settings that SGM does not support. `check_launch` checks
    those of DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        return config
    _check_fsdp()
    del os.environ["ACCELERATE_USE_FSDP"]
    training = config.training.model_copy(update={"shard": True})
    return config.model_copy(update={"training": training})


def check_launch(config: Config, num_processes: int, checkpoint: Path | None = None) -> None:
    """Raises UserError when `config` cannot train with `num_processes` processes, with the launcher's DeepSpeed
    configuration, or from `checkpoint`."""
    divide_batch(config, num_processes)
    if config.is_full and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        raise UserError(
            "adapter.kind=full trains without DeepSpeed, whose ZeRO cuts matrices into flat pieces; start sgm finetune "
            "with torchrun, or take adapter.kind=lora"
        )
    if config.is_full and config.training.shard:  # by the launcher; the configuration's own is refused when it is read
        raise UserError(
            "adapter.kind=full trains matrices that each process holds whole, but the launcher asks for FSDP; start "
            "sgm finetune with torchrun, or take adapter.kind=lora"
        )
    if config.training.shard and num_processes == 1:
        raise UserError("training.shard=true needs several processes; start it with torchrun --nproc_per_node N")
    if launched := os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        _check_deepspeed(config, num_processes)
    if checkpoint is not None:
        _check_checkpoint(checkpoint, launched, num_processes)


def _check_fsdp() -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("The launcher asks for FSDP version 1; set fsdp_version: 2 in its fsdp_config")
    for key in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"):
        if os.environ.get(key, "false") == "true":
            raise UserError(f"The launcher's {key.lower()}: true is not supported; set it to false in its fsdp_config")


def _check_deepspeed(config: Config, num_processes: int) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"The launcher asks for DeepSpeed, which is not installed; {install_line('deepspeed')}")
    if config.training.learning_rate == "auto":
        raise UserError(
            "training.learning_rate=auto restores whole factors after each trial, but DeepSpeed's ZeRO cuts them; "
            "give a number, or use FSDP2 (configs/accelerate/fsdp2.yaml)"
        )
    plugin = DeepSpeedPlugin()
    stage = int(plugin.zero_stage)
    if config.training.shard:
        raise UserError("training.shard=true is FSDP2, but the launcher asks for DeepSpeed; choose one of them")
    if config.optimizer != "adamw":
        raise UserError(
            f"training.optimizer={config.optimizer} needs whole matrices, but DeepSpeed's ZeRO cuts them into "
            "flat pieces; set training.optimizer=adamw, or use FSDP2 (configs/accelerate/fsdp2.yaml)"
        )
    if stage == 3 and config.model.quantization != "none":
        raise UserError(
            f"model.quantization={config.model.quantization} is not possible with DeepSpeed's ZeRO-3; use ZeRO-2, or "
            "FSDP2 (configs/accelerate/fsdp2.yaml)"
        )
    micro, num_micro = divide_batch(config, num_processes)
    wanted = {
        "train_micro_batch_size_per_gpu": ("training.micro_batch_size", micro),
        "gradient_accumulation_steps": ("training.batch_size", num_micro),
        "train_batch_size": ("training.batch_size", config.training.batch_size),
        "gradient_clipping": ("training.max_grad_norm", config.training.max_grad_norm),
    }
    for key, (setting, value) in wanted.items():
        launched = plugin.deepspeed_config.get(key, "auto")
        if launched != "auto" and float(launched) != float(value):
            raise UserError(
                f"The DeepSpeed configuration has {key}: {launched}, but the run's {setting} makes it {value}; set it "
                "to auto"
            )
    for key in ("fp16", "bf16"):
        if plugin.deepspeed_config.get(key, {}).get("enabled") is True:
            raise UserError(f"The DeepSpeed configuration enables {key}; remove it, since model.dtype sets the types")


def _check_checkpoint(checkpoint: Path, deepspeed: bool, num_processes: int) -> None:
    """Raises UserError unless `checkpoint` was written the way in which the run continues: DeepSpeed's checkpoints hold
    the optimizer in one piece a process, and only as many processes with DeepSpeed can read them."""
    written = (checkpoint / "latest").is_file()
    if written != deepspeed:
        began, now = (("with" if used else "without") for used in (written, deepspeed))
        raise UserError(
            f"training.resume=true: {checkpoint} was written {began} DeepSpeed; resume {began} it, not {now} it"
        )
    num_written = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    if written and num_written != num_processes:
        raise UserError(
            f"training.resume=true: {checkpoint} was written by {num_written} processes with DeepSpeed; resume with "
            f"as many, not {num_processes}"
        )


def zero_stage() -> int:
    """The stage of DeepSpeed's ZeRO that the launcher asks for; 0 without DeepSpeed."""
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    return int(DeepSpeedPlugin().zero_stage) if launched else 0


def model_is_sharded(config: Config) -> bool:
    """Whether no process holds the whole model now, so that all processes must compute together. ZeRO-3 cuts the model
    only when training begins."""
    return config.training.shard or is_deepspeed_zero3_enabled()


@contextmanager
def gather_factors(model: nn.Module) -> Iterator[None]:
    """A context in which every process holds the trained parameters whole, which ZeRO-3 holds in pieces. Every process
    must enter it."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad]):
        yield
