"""Attention for CPUs that keeps no probabilities for the backward pass (docs/method.md section 8).

Transformers' eager attention keeps heads x length x length numbers a layer, twice. Torch's fused attention keeps none,
but is slower in bfloat16 on a CPU (docs/LOG.md). Here the backward pass computes the probabilities again, one sequence
at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from sgm_finetune.train.fast.same_output import ROUNDING, output_change

NAME = "sgm_recomputed"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")
"""Arguments beside a mask that some models pass to attention and that this one does not support."""


class RecomputedAttention(torch.autograd.Function):
    """softmax(s·q kᵀ + mask) v, sequence by sequence.

    q: (batch, heads, length, d). k, v: (batch, key heads, keys, d); each key head serves heads / key heads consecutive
    heads. mask: (batch or 1, 1, length, keys), added to the scores, or None.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        output = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        for i in range(len(q)):
            grouped = q[i].reshape(k.shape[1], -1, q.shape[-1])
            probabilities = _probabilities(grouped, k[i], _sequence_mask(mask, i), scaling, q.shape[-2])
            torch.bmm(probabilities, v[i], out=output[i].view(k.shape[1], -1, v.shape[-1]))
        ctx.scaling = scaling
        ctx.save_for_backward(q, k, v, mask)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, mask = ctx.saved_tensors
        for_q, for_k, for_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for i in range(len(q)):
            grouped, delta = (x[i].reshape(k.shape[1], -1, x.shape[-1]) for x in (q, gradients[0]))
            probabilities = _probabilities(grouped, k[i], _sequence_mask(mask, i), ctx.scaling, q.shape[-2])
            torch.bmm(probabilities.mT, delta, out=for_v[i])
            p, for_p = probabilities.float(), torch.bmm(delta, v[i].mT).float()
            # softmax's derivative: p (for_p - Σ p for_p)
            for_scores = for_p.sub_((p * for_p).sum(-1, keepdim=True)).mul_(p).mul_(ctx.scaling).to(q.dtype)
            torch.bmm(for_scores, k[i], out=for_q[i].view(grouped.shape))
            torch.bmm(for_scores.mT, grouped, out=for_k[i])
        return for_q, for_k, for_v, None, None


def _sequence_mask(mask: Tensor | None, i: int) -> Tensor | None:
    """The mask of sequence `i`; a mask of batch size 1 serves all sequences."""
    return None if mask is None else mask[min(i, len(mask) - 1)]


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, length: int) -> Tensor:
    """Attention probabilities, (key heads, heads / key heads · length, keys), in q's type; the softmax is float32."""
    scores = torch.bmm(q, k.mT).mul_(scaling)
    if mask is not None:
        scores.view(len(k), -1, length, k.shape[-2]).add_(mask)
    return nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if dropout or any(kwargs.get(name) is not None for name in _UNSUPPORTED):
        raise NotImplementedError("attention with dropout, softcapping, sinks or position biases")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = attention_mask[..., : key.shape[-2]] if attention_mask is not None else None
    output = RecomputedAttention.apply(query, key, value, mask, scaling)
    return output.transpose(1, 2).contiguous(), None  # type: ignore[union-attr]


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, eager_mask)


def recompute_attention(model: PreTrainedModel, batch: dict[str, Tensor]) -> bool:
    """Makes `model` recompute attention probabilities instead of keeping them, if its output for `batch` stays the
    same.

    Returns whether it did. Attention with dropout, softcapping, sinks or position biases stays as it is.
    """
    config: Any = model.config.get_text_config()
    before = config._attn_implementation
    if any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")):
        return False
    refusals = (ValueError, TypeError, RuntimeError)  # NotImplementedError is a RuntimeError
    change = output_change(model, batch, lambda: model.set_attn_implementation(NAME), refusals)
    same = config._attn_implementation == NAME and change <= ROUNDING
    if not same:
        model.set_attn_implementation(before)
    return same
