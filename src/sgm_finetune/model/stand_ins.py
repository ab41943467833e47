"""Quantised layers, attention and kernels on device "meta" that make and keep the tensors of the real ones.

`model/load.py:skeleton` uses them. The quantised layers are subclasses of bitsandbytes' layers, so that PEFT puts the
same adapter on them as on the real model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

FUSED_ATTENTION = "sgm_fused_stand_in"
"""The name under which Transformers finds `_fused_attention`."""
NF4_BLOCK = 64
"""Number of weights that share one float32 scale."""


class _Dequantised(torch.autograd.Function):
    """x Wᵀ, with W dequantised in the forward and again in the backward pass.

    A 4-bit layer does not keep x, an 8-bit layer on a CPU does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear, keeps_input: bool) -> Tensor:
        ctx.layer, ctx.shape, ctx.kept = layer, x.shape, x if keeps_input else None
        return nn.functional.linear(x, _weight(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return (gradient @ _weight(ctx.layer, gradient.dtype)).view(ctx.shape), None, None


def _weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    return torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="meta")


class _Nf4(Linear4bit):
    def forward(self, x: Tensor) -> Tensor:
        y = _Dequantised.apply(x, self, False)
        return y if self.bias is None else y + self.bias  # type: ignore[operator, return-value]


class _Int8(Linear8bitLt):
    def forward(self, x: Tensor) -> Tensor:
        y = _Dequantised.apply(x, self, torch.is_grad_enabled() and self.training)
        return y if self.bias is None else y + self.bias  # type: ignore[operator, return-value]


def stand_in(layer: nn.Linear, quantization: str) -> nn.Linear:
    """A quantised stand-in for `layer`, on device "meta", in the dtype of `layer`; `quantization` is nf4 or int8."""
    rows, cols, bias = layer.out_features, layer.in_features, layer.bias is not None
    dtype = layer.weight.dtype
    if quantization == "nf4":
        made: nn.Linear = _Nf4(cols, rows, bias, compute_dtype=dtype, quant_type="nf4", device="meta")
    else:
        made = _Int8(cols, rows, bias, has_fp16_weights=False, device="meta")
    if made.bias is not None:
        made.bias.data = made.bias.data.to(dtype)
    return made


class _Fused(torch.autograd.Function):
    """Attention that keeps q, k, v, its output, and one float32 per query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device="meta")
        ctx.save_for_backward(q, k, v, output, torch.empty(q.shape[:-1], device="meta"))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return _Fused.apply(query, key, value).transpose(1, 2).contiguous(), None  # type: ignore[union-attr]


AttentionInterface.register(FUSED_ATTENTION, _fused_attention)
AttentionMaskInterface.register(FUSED_ATTENTION, sdpa_mask)


class _Norm(torch.autograd.Function):
    """Liger's RMSNorm: it keeps x and one float32 per row; the gradient of x overwrites that of y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, torch.empty(x.shape[:-1], device="meta"))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Gated(torch.autograd.Function):
    """Liger's SwiGLU or GeGLU: it keeps both factors, and their gradients overwrite them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return ctx.saved_tensors


def stand_in_kernels(model: nn.Module) -> None:
    """Makes the norms and gated MLPs of a skeleton keep what Liger's kernels keep."""

    def gated(module: Any, x: Tensor) -> Tensor:
        return module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _Norm.apply  # type: ignore[method-assign, assignment]
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            module.forward = partial(gated, module)  # type: ignore[method-assign]


def stored_bytes(model: nn.Module) -> int:
    """Bytes that the parameters and buffers of a skeleton will need.

    4-bit weights take half a byte each and a float32 scale for every 64, 8-bit weights one byte each and a float32
    scale per row. Tied weights count once.
    """
    quantised: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, _Nf4):
            quantised[id(module.weight)] = module.weight.numel() * (0.5 + 4 / NF4_BLOCK)
        elif isinstance(module, _Int8):
            quantised[id(module.weight)] = module.weight.numel() + 4 * module.out_features
    plain = (t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if id(t) not in quantised)
    return int(sum(plain) + sum(quantised.values()))
