"""Cross-entropy of a causal language model without the logits of a whole batch (docs/method.md section 8).

The logits are the largest tensor of a batch: tokens x vocabulary, in float32, and their gradient is as large again.
Here they exist for a few rows at a time, of predicted tokens only, and the hidden states' gradient is computed from
them at once. They exist for a slice of the vocabulary at a time too, so that an output layer may be elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sgm_finetune.base.device import has_gpu
from sgm_finetune.data.encoding import IGNORED
from sgm_finetune.model.residence.window import slices

NUM_LOGITS = {"cpu": 2**21, "cuda": 2**25}
"""Number of logits that exist at one time. On a CPU more of them take more memory and no less time (docs/LOG.md)."""
SLICE = {"cpu": 2**12, "cuda": 2**13}
"""Rows of the output layer that are read at one time, wherever they are, so that all sums are the same."""


def slice_sizes(device: torch.device, vocabulary: int) -> tuple[int, int]:
    """Words of a vocabulary, and tokens, whose logits exist at one time on `device`; for "meta" on this machine."""
    kind = device.type if device.type in SLICE else "cuda" if device.type == "meta" and has_gpu() else "cpu"
    width = min(vocabulary, SLICE[kind])
    return width, max(1, NUM_LOGITS[kind] // width)


class _LinearCrossEntropy(torch.autograd.Function):
    """log Σ exp z − z[y] with z = W h, in float32: (n,). h: (n, d). W: (vocabulary, d), frozen. y: (n,).

    With q = softmax(z) over all words but y and p = softmax(z)[y], the gradient is (1 − p)(Σ q W − W[y]). The sums are
    over slices of the vocabulary, in float32: what an earlier slice added is scaled when a larger z is found.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        width, size = slice_sizes(hidden.device, len(weight))
        for first in range(0, len(hidden), size):
            rows = slice(first, first + size)
            losses[rows], found = _loss_and_gradient(hidden[rows], weight, labels[rows], width, gradient is not None)
            if gradient is not None and found is not None:
                gradient[rows] = found
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype)[:, None], None, None


def _loss_and_gradient(
    hidden: Tensor, weight: Tensor, labels: Tensor, width: int, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of each of a few rows, and its gradient in float32; `width` rows of `weight` are read at a time."""
    targets = labels[:, None]
    column = torch.zeros(len(hidden), 1, dtype=torch.float32, device=hidden.device)
    own, most, total = column, torch.full_like(column, torch.finfo(torch.float32).min), column
    mean = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if wants_gradient else None
    right = torch.zeros_like(hidden)
    for first, part in slices(weight, width):
        logits = nn.functional.linear(hidden, part).float()
        place = targets - first
        inside = (place >= 0) & (place < len(part))
        place = place.clamp(0, len(part) - 1)
        found = logits.gather(-1, place)
        own = torch.where(inside, found, own)
        logits.scatter_(-1, place, found.masked_fill(inside, -torch.inf))
        larger = torch.maximum(most, logits.amax(-1, keepdim=True))
        scale, most = (most - larger).exp(), larger
        others = logits.sub_(larger).exp_()
        total = total * scale + others.sum(-1, keepdim=True)
        if mean is not None:
            right = torch.where(inside, part[place[:, 0]], right)
            mean.mul_(scale).add_(others.to(weight.dtype) @ part)
    rest = most + total.log()
    normaliser = torch.logaddexp(rest, own)
    if mean is not None:
        mean.div_(total).sub_(right).mul_((rest - normaliser).exp())
    return (normaliser - own).squeeze(-1), mean


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
        for no position, so that its output layer is not read."""
        return linear_cross_entropy(self._hidden(model, batch), self.head.weight, labels)

    def by_row(self, model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        """The log-probability in nats of the labels of each sequence: (batch,)."""
        return row_log_probabilities(self._hidden(model, batch), self.head.weight, labels)

    def _hidden(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nowhere = torch.zeros(0, dtype=torch.long, device=next(iter(batch.values())).device)
        return _run_decoder(model, self.decoder, {**batch, "logits_to_keep": nowhere})[0]

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
