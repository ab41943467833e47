"""bitsandbytes' 4-bit layers on a CPU: correct gradients after an evaluation."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn


def ready_for_backward(model: nn.Module) -> None:
    """Makes bitsandbytes' 4-bit CPU layers give correct gradients, before and after any evaluation.

    On CPUs with AVX512-BF16 an evaluation repacks a `Linear4bit` for inference. After that every backward pass gives
    wrong gradients (docs/method.md section 5). This function switches packing off and unpacks the layers that are
    packed. It unpacks with `state_dict`, the public way; bitsandbytes 0.50.2 then leaves the scales of the blocks
    transposed, so the function transposes them back.
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
                if state.absmax.dim() == 2:  # packed: (blocks in a row, rows) in bfloat16; unpacked: float32, by row
                    state.absmax = state.absmax.T.reshape(-1).float()
