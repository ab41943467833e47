"""The device that this process computes on, and what it supports."""

from __future__ import annotations

import torch

from sgm_finetune.base.errors import UserError


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device_for(local_rank: int = 0) -> torch.device:
    """The GPU of this process, or the CPU when there is no GPU.

    The GPU of a Mac (MPS) does not count: it has no float64, in which eigenproblems and sums are computed.
    """
    return torch.device("cuda", local_rank) if has_gpu() else torch.device("cpu")


def check_has_float64(device: torch.device) -> None:
    """Raises UserError for the GPU of a Mac, to which Transformers' own Trainer moves a model."""
    if device.type == "mps":
        raise UserError(
            "The model is on the GPU of a Mac (mps), which lacks float64, and SGM needs that; leave it on the CPU: "
            "TrainingArguments(use_cpu=True)"
        )


def multiplies_bfloat16() -> bool:
    """Whether the device multiplies bfloat16 matrices with its own instructions: a GPU, AVX-512 BF16, AMX or Arm BF16.

    Without them, bfloat16 products take several times as long as float32 products (docs/LOG.md).
    """
    return has_gpu() or any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
