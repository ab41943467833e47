"""Liger's kernels for norms, rotary embeddings and gated MLPs, on GPUs (docs/method.md section 8).

Each is one pass over its tensors where Transformers' code takes several, and keeps less for the backward pass. The loss
is ours (`head_loss.py`).
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
"""Relative difference of logits beyond which another model is computed; bfloat16's rounding makes less."""


def use_liger(model: PreTrainedModel, batch: dict[str, Tensor]) -> str | None:
    """Has `model` compute by Liger's kernels, where liger-kernel is installed and knows its architecture; else returns
    why not. Raises UserError where its output for `batch` does not stay what it is."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # type: ignore[import-not-found]

    if (kind := model.config.model_type) not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"liger-kernel has none for {kind}"
    if model.device.type == "meta":
        stand_in_kernels(model)
        return None
    settings = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    off = output_change(model, batch, lambda: apply_liger_kernel(model, settings))
    if not off <= _MAX_CHANGE:
        raise UserError(
            f"With liger-kernel's kernels this {type(model).__name__} computes another output ({off:.1%} off); take "
            "training.step=peft, or pip uninstall liger-kernel"
        )
    return None
