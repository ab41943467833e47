"""Liger's kernels for norms, rotary embeddings and gated MLPs, on GPUs (docs/method.md section 8).

Each kernel passes over its tensors once, where Transformers' code does so several times, and keeps less for the
backward pass. The loss is ours (`head_loss.py`).
"""

from __future__ import annotations

import importlib.util

from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from sgm_finetune.base.errors import UserError
from sgm_finetune.model.stand_ins import stand_in_kernels
from sgm_finetune.train.fast.same_output import output_change

_MAX_CHANGE = 0.05
"""Relative change of the logits beyond which the kernels compute another model; bfloat16's rounding changes less."""


def use_liger(model: PreTrainedModel, batch: dict[str, Tensor]) -> str | None:
    """Makes `model` use Liger's kernels. Returns None, or the reason why it cannot: liger-kernel is not installed or
    does not know the architecture. Raises UserError when the model's output for `batch` changes."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # type: ignore[import-not-found]

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"liger-kernel has no kernels for {kind}"
    if model.device.type == "meta":
        stand_in_kernels(model)
        return None
    settings = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    change = output_change(model, batch, lambda: apply_liger_kernel(model, settings))
    if not change <= _MAX_CHANGE:
        raise UserError(
            f"liger-kernel's kernels change the output of this {type(model).__name__} by {change:.1%}; set "
            "training.step=peft, or pip uninstall liger-kernel"
        )
    return None
