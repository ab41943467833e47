"""bitsandbytes' 4-bit layers, kept right for training on a CPU."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn


def ready_for_backward(model: nn.Module) -> None:
    """Keeps bitsandbytes' 4-bit CPU layers right for training, whatever was evaluated before or will be.

    On CPUs with AVX512-BF16 an evaluation repacks a `Linear4bit` for inference, after which every backward pass gives
    wrong gradients (docs/method.md section 5). Packing is switched off, and what was packed is unpacked (by
    `state_dict`, the public way; bitsandbytes 0.50.2 leaves the blocks' scales transposed then, which is put right).
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()
                state: Any = module.weight.quant_state  # type: ignore[union-attr]
                if state.absmax.dim() == 2:  # (blocks of a row x rows) in bfloat16; one row after another in float32
                    state.absmax = state.absmax.T.reshape(-1).float()
