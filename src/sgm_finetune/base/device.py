"""The device that this process computes on, and what it is good at."""

from __future__ import annotations

import torch


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device_for(local_rank: int = 0) -> torch.device:
    """The GPU of this process where there is one, else the CPU."""
    return torch.device("cuda", local_rank) if has_gpu() else torch.device("cpu")


def multiplies_bfloat16() -> bool:
    """Whether the GPU is one, or the processor has instructions for products of bfloat16 matrices (AVX-512 BF16, AMX,
    Arm's BF16). Without them they take several times as long as those of float32 (docs/LOG.md)."""
    return has_gpu() or any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
