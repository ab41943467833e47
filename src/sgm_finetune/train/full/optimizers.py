"""The optimizers of whole matrices: ordinary ones, one for each parameter, so that each can step alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from sgm_finetune.base.config import Optimizer

_SMALLEST_8_BIT = 4096
"""Entries from which on bitsandbytes keeps the state in 8 bits."""
_WORKSPACE: dict[Optimizer, int] = {"adafactor": 8, "muon": 12}
"""Bytes that a step needs for each entry of its matrix, beside state, weight and gradient; others need none."""


def make_optimizers(
    optimizer: Optimizer, shadows: Mapping[str, nn.Parameter], matrices: Collection[str], rate: float, decay: float
) -> list[torch.optim.Optimizer]:
    """The optimizers whose step changes the `shadows` (name -> float32 parameter) that have a gradient.

    `matrices` names those that are selected matrices. Weight decay applies to parameters with two dimensions or more,
    as in Transformers. AdamW and bitsandbytes' are as in Transformers' Trainer; Adafactor takes the learning rate as it
    is; Muon is torch's, scaled so that AdamW's rates fit it, and AdamW trains what is no selected matrix.
    """
    return [
        _make(optimizer, shadow, name in matrices and shadow.dim() == 2, rate, decay if shadow.dim() > 1 else 0.0)
        for name, shadow in shadows.items()
    ]


def _make(
    optimizer: Optimizer, shadow: nn.Parameter, is_matrix: bool, rate: float, decay: float
) -> torch.optim.Optimizer:
    match optimizer:
        case "adafactor":
            from transformers.optimization import Adafactor

            fixed = {"scale_parameter": False, "relative_step": False}
            return Adafactor([shadow], lr=rate, weight_decay=decay, **fixed)
        case "adamw_8bit":
            from bitsandbytes.optim.adamw import AdamW8bit

            return AdamW8bit([shadow], lr=rate, weight_decay=decay)
        case "paged_adamw_8bit":
            from bitsandbytes.optim.adamw import PagedAdamW8bit

            return PagedAdamW8bit([shadow], lr=rate, weight_decay=decay)
        case "muon" if is_matrix:
            return torch.optim.Muon([shadow], lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        case "adamw" | "muon":
            return torch.optim.AdamW([shadow], lr=rate, weight_decay=decay, fused=True)
        case _:
            raise AssertionError(f"{optimizer} does not train whole matrices")


def whole_state_bytes(optimizer: Optimizer, trained: Mapping[str, nn.Parameter], matrices: Collection[str]) -> int:
    """Bytes of the state that `make_optimizers` holds after the first step, for parameters as large as `trained`. The
    scales of 8-bit states are counted: 8 bytes for each 256 entries."""
    return sum(_state_bytes(optimizer, p, name in matrices and p.dim() == 2) for name, p in trained.items())


def _state_bytes(optimizer: Optimizer, parameter: nn.Parameter, is_matrix: bool) -> int:
    size = parameter.numel()
    match optimizer:
        case "adafactor" if parameter.dim() > 1:
            return 4 * (size // parameter.shape[-1] + size // parameter.shape[-2])
        case "adafactor":
            return 4 * size
        case "adamw_8bit" | "paged_adamw_8bit" if size >= _SMALLEST_8_BIT:
            return 2 * size + 8 * (size // 256 + 1)
        case "muon" if is_matrix:
            return 4 * size
    return 8 * size


def update_bytes(optimizer: Optimizer, parameter: Tensor) -> int:
    """Bytes that the update of one parameter needs at its peak beside its weight, its gradient and its state.

    A float32 parameter steps in place. For a bfloat16 one there are a float32 copy of it and one of its gradient, whose
    first form is freed then; later the copy, random bits as large, and the rounded result.
    """
    workspace = _WORKSPACE.get(optimizer, 0)
    if parameter.dtype == torch.float32:
        return workspace * parameter.numel()
    return max(8, 6 + workspace) * parameter.numel()
