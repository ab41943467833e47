"""Liger's kernels for norms, rotary embeddings and gated MLPs, on GPUs (docs/method.md section 8).

Each kernel passes over its tensors once, where Transformers' code does so several times, and keeps less for the
backward pass. The loss is ours (`head_loss.py`).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

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
    change = output_change(model, batch, lambda: _apply(model))
    if not change <= _MAX_CHANGE:
        raise UserError(
            f"liger-kernel's kernels change the output of this {type(model).__name__} by {change:.1%}; set "
            "training.step=peft, or pip uninstall liger-kernel"
        )
    return None


def _apply(model: PreTrainedModel) -> None:
    """Makes this model, and no other, use the kernels.

    Liger changes the model's parts, and the classes and functions of its module in Transformers. A model that is made
    later from these may be on a CPU or on device "meta", where a kernel reads from address 0 and ends every later call
    of the GPU with an illegal memory access. So the classes are restored, and the functions look at their tensors.
    """
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    only_on_gpu(module, before)


def only_on_gpu(module: ModuleType, before: Mapping[str, Any]) -> None:
    """Restores the classes that `module` had `before`, and makes a function that has replaced another compute only for
    tensors on a GPU."""
    for name, now in list(vars(module).items()):
        original = before.get(name)
        if now is original or original is None:
            continue
        changes = isinstance(now, type) or isinstance(original, _OnGpu)
        setattr(module, name, original if changes else _OnGpu(now, original))


class _OnGpu:
    """A function of a GPU's tensors that has taken the place of another one."""

    def __init__(self, kernel: Callable[..., Any], original: Callable[..., Any]):
        self.kernel, self.original = kernel, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        on_gpu = bool(tensors) and tensors[0].is_cuda
        return (self.kernel if on_gpu else self.original)(*args, **kwargs)
