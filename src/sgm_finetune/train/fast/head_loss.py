"""Cross-entropy of a causal language model without all of its logits (docs/method.md section 8).

The logits of a batch are its largest tensor: tokens x vocabulary, in float32, and as large again for their gradient.
Here they exist for a few rows at a time, of predicted tokens only, and become the hidden states' gradient at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sgm_finetune.data.encoding import IGNORED

NUM_LOGITS = {"cpu": 2**21, "cuda": 2**25}
"""Logits that exist at a time. On a CPU larger ones take more memory and no less time (docs/LOG.md)."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ (log Σ exp z − z[y]), z = W h. h: (n, d); W: (vocabulary, d), frozen; y: (n,). The sum is float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(1, NUM_LOGITS.get(hidden.device.type, NUM_LOGITS["cpu"]) // weight.shape[0])
        for first in range(0, len(hidden), size):
            rows = slice(first, first + size)
            targets = labels[rows, None]
            logits = nn.functional.linear(hidden[rows], weight).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            total += (normaliser - logits.gather(-1, targets)).sum()
            if gradient is not None:
                probabilities = logits.sub_(normaliser).exp_()
                probabilities.scatter_add_(-1, targets, torch.full_like(targets, -1, dtype=torch.float32))
                torch.mm(probabilities.to(weight.dtype), weight, out=gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """(sum in nats, count) over the positions whose next label counts. hidden: (batch, length, d); weight: (vocabulary,
    d), not trained; labels: (batch, length), IGNORED where none counts."""
    if weight.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("the output layer is trained, and gets no gradient from a loss in parts")
    targets = labels[:, 1:]
    counted = targets != IGNORED
    rows = hidden[:, :-1][counted]
    return _LinearCrossEntropy.apply(rows, weight, targets[counted]), len(rows)  # type: ignore[return-value]


class HeadLoss:
    """The summed loss of a causal language model, from what its decoder gives its output layer."""

    def __init__(self, decoder: nn.Module, head: nn.Linear) -> None:
        self.decoder, self.head = decoder, head

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, int]:
        """(sum in nats, count). `model` may be wrapped; its own logits are computed for one position."""
        # by index: a slice is not contiguous, for which the output layer's weights are copied for every example
        first = torch.zeros(1, dtype=torch.long, device=labels.device)
        hidden, _ = _run_decoder(model, self.decoder, {**batch, "logits_to_keep": first})
        return linear_cross_entropy(hidden, self.head.weight, labels)

    def mean(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of a batch with its labels, in nats."""
        total, count = self(model, {name: x for name, x in batch.items() if name != "labels"}, batch["labels"])
        return total / count


@torch.no_grad()
def find_head_loss(model: nn.Module, batch: dict[str, Tensor]) -> HeadLoss | None:
    """`HeadLoss` of a causal language model, where its logits for the beginning of `batch` are what its output layer
    makes of its decoder's output; None where they are scaled or capped, or the layer is in pieces. A model that
    trains its output layer must not use it."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head, decoder = base.get_output_embeddings(), base.base_model
    if type(head) is not nn.Linear or head.bias is not None or decoder is base:
        return None
    if isinstance(head.weight, DTensor) or "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return None
    passed: list[Any] = []
    with head.register_forward_hook(lambda module, args, output: passed.append((args[0], output))):
        hidden, logits = _run_decoder(model, decoder, {"input_ids": batch["input_ids"][:1, :32]})
    if logits.is_meta:  # nothing can be computed: whether the same tensors went through
        given, made = passed[-1]
        return HeadLoss(decoder, head) if made is logits and given._base is hidden else None
    return HeadLoss(decoder, head) if torch.equal(logits, head(hidden)) else None


def _run_decoder(model: nn.Module, decoder: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the decoder gives the output layer, and the logits."""
    seen: list[Tensor] = []
    with decoder.register_forward_hook(lambda module, args, output: seen.append(output[0])):
        logits = model(**inputs).logits
    return seen[0], logits
