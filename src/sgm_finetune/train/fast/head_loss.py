"""Cross-entropy of a causal language model without the logits of a whole batch (docs/method.md section 8).

The logits are the largest tensor of a batch: tokens x vocabulary, in float32, and their gradient is as large again.
Here they exist for a few rows at a time, of predicted tokens only, and the hidden states' gradient is computed from
them at once.
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
"""Number of logits that exist at one time. On a CPU more of them take more memory and no less time (docs/LOG.md)."""


class _LinearCrossEntropy(torch.autograd.Function):
    """log Σ exp z − z[y] with z = W h, in float32: (n,). h: (n, d). W: (vocabulary, d), frozen. y: (n,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(1, NUM_LOGITS.get(hidden.device.type, NUM_LOGITS["cpu"]) // weight.shape[0])
        for first in range(0, len(hidden), size):
            rows = slice(first, first + size)
            targets = labels[rows, None]
            logits = nn.functional.linear(hidden[rows], weight).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            losses[rows] = (normaliser - logits.gather(-1, targets)).squeeze(-1)
            if gradient is not None:
                probabilities = logits.sub_(normaliser).exp_()
                probabilities.scatter_add_(-1, targets, torch.full_like(targets, -1, dtype=torch.float32))
                torch.mm(probabilities.to(weight.dtype), weight, out=gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype)[:, None], None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The loss in nats, summed over all positions whose next label is not IGNORED, and the number of these positions.

    hidden: (batch, length, d). weight: (vocabulary, d). labels: (batch, length). Raises NotImplementedError when
    `weight` is trained.
    """
    _require_frozen(weight)
    targets = labels[:, 1:]
    counted = targets != IGNORED
    rows = hidden[:, :-1][counted]
    return cross_entropy_in_parts(rows, weight, targets[counted]), len(rows)


def row_log_probabilities(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The log-probability in nats of the labels of each sequence, as `linear_cross_entropy` computes it: (batch,)."""
    _require_frozen(weight)
    targets = labels[:, 1:]
    counted = targets != IGNORED
    losses: Any = _LinearCrossEntropy.apply(hidden[:, :-1][counted], weight, targets[counted])
    return -losses.new_zeros(targets.shape).masked_scatter(counted, losses).sum(-1)


def cross_entropy_in_parts(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed loss in nats of hidden states (n, d) and their next labels (n,), none of them ignored."""
    losses: Any = _LinearCrossEntropy.apply(rows, weight, targets)
    return losses.sum()


def _require_frozen(weight: Tensor) -> None:
    if weight.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("a trained output layer gets no gradient from a loss computed in parts")


class HeadLoss:
    """Computes the summed loss of a causal language model in parts, from its decoder's hidden states."""

    def __init__(self, decoder: nn.Module, head: nn.Linear) -> None:
        self.decoder, self.head = decoder, head

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, int]:
        """The summed loss in nats, and the number of predictions. `model` may be wrapped; its own logits are computed
        for one position only."""
        return linear_cross_entropy(self._hidden(model, batch), self.head.weight, labels)

    def by_row(self, model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        """The log-probability in nats of the labels of each sequence: (batch,)."""
        return row_log_probabilities(self._hidden(model, batch), self.head.weight, labels)

    def _hidden(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        # an index, not a slice: a slice is not contiguous, for which the output layer copies its weights
        first = torch.zeros(1, dtype=torch.long, device=batch["input_ids"].device)
        return _run_decoder(model, self.decoder, {**batch, "logits_to_keep": first})[0]

    def mean(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of a batch, which holds its labels, in nats."""
        total, count = self(model, {name: x for name, x in batch.items() if name != "labels"}, batch["labels"])
        return total / count


@torch.no_grad()
def find_head_loss(model: nn.Module, batch: dict[str, Tensor]) -> HeadLoss | None:
    """Returns the `HeadLoss` of a causal language model, or None if its loss cannot be computed in parts.

    It can if the logits for the beginning of `batch` are the output layer applied to the decoder's output, neither
    scaled nor capped, and the layer is not sharded. Do not use it for a model that trains its output layer.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head, decoder = base.get_output_embeddings(), base.base_model
    if type(head) is not nn.Linear or head.bias is not None or decoder is base:
        return None
    if isinstance(head.weight, DTensor) or "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return None
    calls: list[Any] = []
    with head.register_forward_hook(lambda module, args, output: calls.append((args[0], output))):
        hidden, logits = _run_decoder(model, decoder, {"input_ids": batch["input_ids"][:1, :32]})
    if logits.is_meta:  # no numbers to compare: check that the same tensors went through the layer
        given, made = calls[-1]
        return HeadLoss(decoder, head) if made is logits and given._base is hidden else None
    return HeadLoss(decoder, head) if torch.equal(logits, head(hidden)) else None


def _run_decoder(model: nn.Module, decoder: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The decoder's output, which the output layer reads, and the logits."""
    seen: list[Tensor] = []
    with decoder.register_forward_hook(lambda module, args, output: seen.append(output[0])):
        logits = model(**inputs).logits
    return seen[0], logits
