"""What `accelerate launch` was told besides how many processes to start: FSDP2 or DeepSpeed (docs/scale.md)."""

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
from sgm_finetune.data.batches import divide_batch


def follow_launcher(config: Config) -> Config:
    """`config` as the launcher wants it: its FSDP is `training.shard`, which is done here and not by the trainer, since
    factors stay whole. Raises UserError for what cannot be done as asked. (DeepSpeed: `check_launch`.)"""
    if os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        return config
    _check_fsdp()
    del os.environ["ACCELERATE_USE_FSDP"]
    training = config.training.model_copy(update={"shard": True})
    return config.model_copy(update={"training": training})


def check_launch(config: Config, num_processes: int, checkpoint: Path | None = None) -> None:
    """Raises UserError where `config` cannot be trained by as many processes, or as a DeepSpeed configuration says, or
    go on from `checkpoint` so."""
    divide_batch(config, num_processes)
    if config.training.shard and num_processes == 1:
        raise UserError("training.shard=true needs several processes; start it with torchrun --nproc_per_node N")
    if launched := os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        _check_deepspeed(config, num_processes)
    if checkpoint is not None:
        _check_checkpoint(checkpoint, launched, num_processes)


def _check_fsdp() -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("The launcher asks for FSDP's version 1; write fsdp_version: 2 into its fsdp_config")
    for key in ("OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING"):
        if os.environ.get(f"FSDP_{key}", "false") == "true":
            raise UserError(f"The launcher's fsdp_{key.lower()} cannot be followed; write false into its fsdp_config")


def _check_deepspeed(config: Config, num_processes: int) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "The launcher asks for DeepSpeed, which is not installed; pip install 'sgm-finetune[deepspeed]'"
        )
    plugin = DeepSpeedPlugin()
    stage = int(plugin.zero_stage)
    if config.training.shard:
        raise UserError("training.shard=true is FSDP2, and the launcher asks for DeepSpeed; take one of them")
    if config.training.optimizer != "adamw":
        raise UserError(
            f"training.optimizer={config.training.optimizer} needs whole matrices, and DeepSpeed's ZeRO cuts them into "
            "flat pieces; take training.optimizer=adamw, or FSDP2 (configs/accelerate/fsdp2.yaml)"
        )
    if stage == 3 and config.model.quantization != "none":
        raise UserError(
            f"model.quantization={config.model.quantization} is not possible with DeepSpeed's ZeRO-3; take ZeRO-2, or "
            "FSDP2 (configs/accelerate/fsdp2.yaml)"
        )
    micro, num_micro = divide_batch(config, num_processes)
    wanted = {
        "train_micro_batch_size_per_gpu": ("training.micro_batch_size", micro),
        "gradient_accumulation_steps": ("training.batch_size", num_micro),
        "train_batch_size": ("training.batch_size", config.training.batch_size),
        "gradient_clipping": ("training.max_grad_norm", config.training.max_grad_norm),
    }
    for key, (ours, value) in wanted.items():
        theirs = plugin.deepspeed_config.get(key, "auto")
        if theirs != "auto" and float(theirs) != float(value):
            raise UserError(
                f"The DeepSpeed configuration says {key}: {theirs}, and the run's {ours} makes it {value}; write auto"
            )
    for key in ("fp16", "bf16"):
        if plugin.deepspeed_config.get(key, {}).get("enabled") is True:
            raise UserError(f"The DeepSpeed configuration enables {key}; leave it out, model.dtype says the types")


def _check_checkpoint(checkpoint: Path, deepspeed: bool, num_processes: int) -> None:
    """DeepSpeed's hold the optimizer in one piece a process, and no other reads them."""
    written = (checkpoint / "latest").is_file()
    if written != deepspeed:
        began, now = (("with" if there else "without") for there in (written, deepspeed))
        raise UserError(f"training.resume=true: {checkpoint} was begun {began} DeepSpeed; go on so, not {now} it")
    number = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    if written and number != num_processes:
        raise UserError(
            f"training.resume=true: {checkpoint} was written by {number} processes with DeepSpeed; go on with as many, "
            f"not {num_processes}"
        )


def zero_stage() -> int:
    """Of DeepSpeed's ZeRO, as launched; 0 without it."""
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    return int(DeepSpeedPlugin().zero_stage) if launched else 0


def in_pieces(config: Config) -> bool:
    """Whether no process holds the whole model now, so that all of them have to compute together. (ZeRO-3 cuts it when
    the training begins.)"""
    return config.training.shard or is_deepspeed_zero3_enabled()


@contextmanager
def whole_factors(model: nn.Module) -> Iterator[None]:
    """What is trained, whole on every process: ZeRO-3 has it in pieces. To be entered by all of them."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad]):
        yield
