"""Quantised linear layers without numbers: the tensors that bitsandbytes makes and keeps, for `models.skeleton`.

They are bitsandbytes' own classes to PEFT, so that an adapter on them is the one that will train.
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
"""Transformers' name for `_fused_attention`."""
NF4_BLOCK = 64
"""Weights that share a scale, a float32."""


class _Dequantised(torch.autograd.Function):
    """x Wᵀ, W made anew in the forward and in the backward pass. 4 bits keep nothing of x, 8 bits on a CPU keep it."""

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
    """Of a linear layer on device "meta", in its type."""
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
    """Attention that keeps what it reads, what it gives, and a float32 for every query and head."""

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
    """Liger's RMSNorm: keeps what it reads and a float32 a row; x's gradient takes the place of y's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, torch.empty(x.shape[:-1], device="meta"))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Gated(torch.autograd.Function):
    """Liger's SwiGLU or GeGLU: keeps both factors, whose gradients take their places."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return ctx.saved_tensors


def stand_in_kernels(model: nn.Module) -> None:
    """Has the norms and gated MLPs of a skeleton keep what Liger's kernels do."""

    def gated(module: Any, x: Tensor) -> Tensor:
        return module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _Norm.apply  # type: ignore[method-assign, assignment]
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            module.forward = partial(gated, module)  # type: ignore[method-assign]


def stored_bytes(model: nn.Module) -> int:
    """Of the parameters and buffers of a skeleton as they will be held: 4-bit weights two in a byte and a scale for
    every 64 of them, 8-bit ones a byte and a scale a row, tied ones once."""
    quantised: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, _Nf4):
            quantised[id(module.weight)] = module.weight.numel() * (0.5 + 4 / NF4_BLOCK)
        elif isinstance(module, _Int8):
            quantised[id(module.weight)] = module.weight.numel() + 4 * module.out_features
    plain = (t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if id(t) not in quantised)
    return int(sum(plain) + sum(quantised.values()))
