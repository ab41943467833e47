"""The fast adapter step: computes a LoRA layer as one function, without copies (docs/method.md section 8).

PEFT's own forward casts a layer's input to float32, keeps that copy for the backward pass, and adds three more tensors
as large as the output. Here u = x Aᵀ is computed in the base's type, once for all layers that read x and share A, and
s·u Bᵀ is added to the base's output in place. The backward pass keeps x, which its readers share, and u; it dequantises
4-bit weights again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sgm_finetune.model.names import block_of
from sgm_finetune.train.adapters.apply import ADAPTER, lora_layers


class _AdaptedLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s·u Bᵀ, with W and bias from `base`, frozen.

    x: (..., d_in). B: (d_out, r). `left` is A (r, d_in), from which u = x Aᵀ is computed, or u itself (..., r) if
    `shared`. A and B may have any type.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, b: Tensor, base: nn.Module, scaling: float, shared: bool) -> Tensor:
        rows, weight = x.reshape(-1, x.shape[-1]), _base_weight(base, x.dtype)
        bias: Any = base.bias.to(x.dtype) if base.bias is not None else None  # type: ignore[union-attr, operator]
        y = x.new_empty(*x.shape[:-1], weight.shape[0])  # not a view of a product: some models change y in place
        flat = y.view(-1, y.shape[-1])
        if bias is None:
            torch.mm(rows, weight.T, out=flat)
        else:
            torch.addmm(bias, rows, weight.T, out=flat)
        kept = weight if isinstance(base, Conv1D) or type(base) is nn.Linear else None
        del weight
        a = None if shared else left.to(x.dtype)
        u = left.reshape(-1, b.shape[1]) if a is None else nn.functional.linear(rows, a)
        b_rounded = b.to(x.dtype)
        flat.addmm_(u, b_rounded.T, alpha=scaling)
        ctx.base, ctx.scaling, ctx.shapes = base, scaling, (x.shape, left.shape)
        ctx.types = left.dtype, b.dtype
        ctx.save_for_backward(None if shared else rows, a, u, b_rounded, kept)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, u, b, weight = ctx.saved_tensors
        x_shape, left_shape = ctx.shapes
        delta = gradients[0].reshape(-1, gradients[0].shape[-1])
        for_u = _scaled_product(delta, b, ctx.scaling)
        # uᵀ δ rather than δᵀ u, which takes twice as long in float32 on a CPU
        for_b = torch.empty(b.shape, dtype=ctx.types[1], device=b.device)
        for_b.copy_(_scaled_product(u.T, delta, ctx.scaling).T)
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = delta @ (_base_weight(ctx.base, delta.dtype) if weight is None else weight)
            if a is not None:
                for_x.addmm_(for_u, a)
            for_x = for_x.view(x_shape)
        left = for_u.view(left_shape) if a is None else (for_u.T @ rows).to(ctx.types[0])
        return for_x, left, for_b, None, None, None


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """s·a b, computed in one kernel."""
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scaling)


def _base_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a base layer, (d_out, d_in): a plain one as stored, a 4-bit one dequantised to `dtype`."""
    weight: Any = base.weight
    if isinstance(base, Conv1D):
        return weight.T
    if type(base) is nn.Linear:
        return weight
    if weight.is_meta:  # a stand-in for a 4-bit weight (model/stand_ins.py)
        return weight.new_empty((base.out_features, base.in_features), dtype=dtype)  # type: ignore[arg-type]
    return _dequantize_function(weight.is_cuda)(weight, weight.quant_state, dtype)


@cache
def _dequantize_function(on_gpu: bool) -> Callable[[Tensor, Any, torch.dtype], Tensor]:
    """The function that dequantises 4-bit weights: one kernel on a GPU with Triton, otherwise bitsandbytes' three."""
    if on_gpu and importlib.util.find_spec("triton") is not None:
        from sgm_finetune.train.fast.nf4_kernel import dequantize

        return dequantize
    from bitsandbytes.functional import dequantize_4bit

    return lambda weight, state, dtype: dequantize_4bit(weight, state).to(dtype)


class _Projection:
    """u = x Aᵀ of the layers that share one A: computed when the first of them reads x, and reused by the others."""

    def __init__(self, num_readers: int) -> None:
        self.num_readers, self.left = num_readers, 0
        self.read: Tensor | None = None
        self.version = -1
        self.u: Tensor | None = None

    def __call__(self, x: Tensor, a: Tensor) -> Tensor:
        if self.u is None or self.read is not x or self.version != x._version:
            u = nn.functional.linear(x, a.to(x.dtype))
            if self.num_readers == 1 or x.is_inference():  # an inference tensor does not count its changes
                return u
            self.read, self.version, self.u, self.left = x, x._version, u, self.num_readers
        u = self.u
        self.left -= 1
        if self.left == 0:  # hold no memory beyond what the backward pass holds
            self.read = self.u = None
        assert u is not None
        return u


class FastForward:
    """Mixed into PEFT's layers: a forward for plain LoRA on a base whose weights have the input's type."""

    projection: _Projection

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        inputs = x if x.is_meta or not torch.is_autocast_enabled(x.device.type) else _cast_as_autocast(x)
        plain = not (args or kwargs or self.merged or self.disable_adapters)
        if not plain or not _can_compute(base, inputs, self.active_adapters):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        x = inputs
        a, b, scaling = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight, self.scaling[ADAPTER]
        shared = self.projection.num_readers > 1
        if not torch.is_grad_enabled():  # the base's own forward has kernels for single tokens
            y = base(x).contiguous()
            y.view(-1, y.shape[-1]).addmm_(self.projection(x, a).reshape(-1, len(a)), b.to(y.dtype).T, alpha=scaling)
            return y
        return _AdaptedLinear.apply(x, self.projection(x, a) if shared else a, b, base, scaling, shared)


class FastLinear(FastForward, Linear):
    """PEFT's layer with the forward of `FastForward`."""


def _cast_as_autocast(x: Tensor) -> Tensor:
    return x.to(torch.get_autocast_dtype(x.device.type))


def _can_compute(base: nn.Module, x: Tensor, active: list[str]) -> bool:
    """Whether `base` computes no more than x Wᵀ + bias and only our adapter is active: `base` has no hooks (which fetch
    weights from elsewhere), none of its parameters is trained, and x has its type."""
    weight: Any = base.weight
    if active != [ADAPTER] or base._forward_hooks or base._forward_pre_hooks or hasattr(base, "_hf_hook"):
        return False
    if weight.requires_grad or (base.bias is not None and base.bias.requires_grad):  # type: ignore[union-attr]
        return False
    if isinstance(base, nn.Linear) and type(base) is not nn.Linear:  # bitsandbytes' layers
        state = getattr(weight, "quant_state", None)
        packed = getattr(state, "packing_format_for_cpu", False)
        return base.compute_dtype == x.dtype and not packed and (state is not None or weight.is_meta)
    return weight.dtype == x.dtype


def _fast_classes() -> dict[type, type]:
    """PEFT's class of a layer -> our subclass of it."""
    import peft.tuners.lora as lora

    found: dict[type, type] = {Linear: FastLinear}
    if (four_bits := getattr(lora, "Linear4bit", None)) is not None:
        found[four_bits] = _fast_four_bit_class(four_bits)
    return found


@cache
def _fast_four_bit_class(four_bits: type) -> type:
    return type("FastLinear4bit", (FastForward, four_bits), {"__doc__": FastLinear.__doc__, "__module__": __name__})


def use_fast_step(model: PeftModel) -> list[str]:
    """Makes the LoRA layers of `model` use the fast forward where they can. Returns the names of the others.

    A layer keeps PEFT's forward if it has dropout, a bias of its own or another variant (DoRA), if it holds experts, or
    if it is neither plain nor 4-bit. A fast layer gets a subclass of its class, which calls PEFT's forward where the
    fast one does not apply.
    """
    layers = lora_layers(model)
    types = _fast_classes()
    fast = {name: layer for name, layer in layers.items() if _is_plain(layer, types)}
    readers: dict[tuple[nn.Parameter, str | None], list[LoraLayer]] = {}
    for name, layer in fast.items():  # within a block, since checkpointing recomputes each block by itself
        readers.setdefault((layer.lora_A[ADAPTER].weight, block_of(name)), []).append(layer)  # type: ignore
    for members in readers.values():
        projection = _Projection(len(members))
        for layer in members:
            layer.__class__ = types.get(type(layer), type(layer))
            layer.projection = projection  # type: ignore[assignment]
    return [name for name in layers if name not in fast]


def _is_plain(layer: nn.Module, types: dict[type, type]) -> bool:
    """Whether a layer is plain LoRA without dropout on a plain or 4-bit base."""
    if type(layer) not in (*types, *types.values()) or layer.lora_variant or layer.lora_bias[ADAPTER]:  # type: ignore
        return False
    base = layer.base_layer
    known = type(base) in (nn.Linear, Conv1D) or type(layer) not in (Linear, FastLinear)
    return known and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)  # type: ignore[index]
