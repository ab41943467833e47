"""The fast adapter step: what a LoRA layer adds to its base layer's output, without copies (docs/method.md section 8).

PEFT's own forward casts what a layer reads to float32, keeps that copy for the backward pass, and adds three more
tensors of the output's size. Here u = x Aᵀ is computed in the base's type, once for all readers of x that share A, and
s·u Bᵀ is added into the base's output where it lies. Kept for the backward pass: x, which its readers share, and u.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from torch import Tensor, nn

from sgm_finetune.adapters.apply import ADAPTER, lora_layers
from sgm_finetune.models import block_of


class _AddUpdate(torch.autograd.Function):
    """y + s·u Bᵀ, in place of y. y: (..., d_out); u: (..., r), of y's type; B: (d_out, r), of any type."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, u: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.scaling = scaling
        ctx.save_for_backward(u, b)
        y.view(-1, y.shape[-1]).addmm_(u.reshape(-1, u.shape[-1]), b.to(y.dtype).T, alpha=scaling)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        u, b = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_u = for_b = None
        if ctx.needs_input_grad[1]:
            for_u = (rows @ (b * ctx.scaling).to(rows.dtype)).view(u.shape)
        if ctx.needs_input_grad[2]:
            # the few rows first: the other way round takes twice as long in float32 on a CPU
            for_b = (u.reshape(-1, u.shape[-1]).T @ rows).T.to(b.dtype).contiguous().mul_(ctx.scaling)
        return gradient, for_u, for_b, None


class _Projection:
    """u = x Aᵀ of the layers that hold one A: computed when the first of them reads x, and given to the others."""

    def __init__(self, num_readers: int) -> None:
        self.num_readers, self.left = num_readers, 0
        self.read: Tensor | None = None
        self.version = -1
        self.u: Tensor | None = None

    def __call__(self, x: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
        if self.u is None or self.read is not x or self.version != x._version or self.u.dtype != dtype:
            u = nn.functional.linear(x.to(dtype), a.to(dtype))
            if self.num_readers == 1 or x.is_inference():  # such a tensor does not tell that it was changed
                return u
            self.read, self.version, self.u, self.left = x, x._version, u, self.num_readers
        u = self.u
        self.left -= 1
        if self.left == 0:  # nothing is held that the backward pass does not hold
            self.read = self.u = None
        assert u is not None
        return u


class FastUpdate(LoraVariant):
    """PEFT's hook for other forms of LoRA: the same update, computed as above. Merging is plain LoRA's."""

    def __init__(self, projection: _Projection) -> None:
        self.projection = projection

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Nothing to prepare: it is set on layers that are there."""

    def forward(self, module: Linear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        a: Any = module.lora_A[active_adapter].weight
        b = module.lora_B[active_adapter].weight
        u = self.projection(x, a, result.dtype)
        return _AddUpdate.apply(result.contiguous(), u, b, module.scaling[active_adapter])  # type: ignore[return-value]

    @staticmethod
    def merge_safe(module: Linear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Linear, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Linear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def use_fast_step(model: PeftModel) -> list[str]:
    """Has every LoRA layer that can add its update the fast way; returns the names of those that keep PEFT's forward:
    those with dropout, a bias of their own or another variant (DoRA), experts, and layers that are neither plain nor
    4-bit ones.
    """
    layers = lora_layers(model)
    fast = {name: layer for name, layer in layers.items() if _is_plain(layer)}
    readers: dict[tuple[nn.Parameter, str | None], list[LoraLayer]] = {}
    for name, layer in fast.items():  # of one block, since blocks may be computed again, each by itself (checkpointing)
        readers.setdefault((layer.lora_A[ADAPTER].weight, block_of(name)), []).append(layer)  # type: ignore
    for members in readers.values():
        projection = _Projection(len(members))
        for layer in members:
            layer.lora_variant[ADAPTER] = FastUpdate(projection)
            layer.cast_input_dtype_enabled = False  # what `peft.helpers.disable_input_dtype_casting` sets
    return [name for name in layers if name not in fast]


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) not in _plain_types() or layer.lora_variant or layer.lora_bias[ADAPTER]:  # type: ignore[index, union-attr]
        return False
    return isinstance(layer.lora_dropout[ADAPTER], nn.Identity)  # type: ignore[index]


def _plain_types() -> Iterable[type]:
    import peft.tuners.lora as lora

    return tuple(found for name in ("Linear", "Linear4bit") if (found := getattr(lora, name, None)) is not None)
