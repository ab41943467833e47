"""The loss of each task, summed over part of a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from sgm_finetune.base.config import Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import first_line
from sgm_finetune.data.batches import num_predictions
from sgm_finetune.data.encoding import IGNORED
from sgm_finetune.train.fast.head_loss import HeadLoss

Collator = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


Progress = Callable[[int, int], None]


@dataclass
class Losses:
    """Sums over part of a data set: loss in nats (a number's: squared error), what it was counted over, and what was
    predicted, by index: a class, a vector of 0 and 1, a number, or the tags of the words."""

    total: float = 0.0
    count: int = 0
    predictions: dict[int, Any] = field(default_factory=dict)


def summed_loss(logits: Tensor, labels: Tensor, task: Task) -> tuple[Tensor, int]:
    """(sum, count): cross-entropy in nats over examples (one class), predicted tokens or tagged words; over examples
    the binary cross-entropy averaged over classes (labels: vectors), or the squared error (labels: numbers). float32.

    >>> summed_loss(torch.tensor([[2.0]]), torch.tensor([5.0]), "sequence-classification")
    (tensor(9.), 1)
    """
    logits, count = logits.float(), num_predictions(labels, task)
    if task == "sequence-classification":
        if labels.is_floating_point():
            if labels.dim() == 1:
                return (logits.squeeze(-1) - labels).square().sum(), count
            losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
            return losses.mean(-1).sum(), count
        return nn.functional.cross_entropy(logits, labels, reduction="sum"), count
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, count


def _predicted(logits: Tensor, labels: Tensor, task: Task) -> list[Any]:
    """What the logits say about each example."""
    match task:
        case "sequence-classification" if labels.is_floating_point():
            return logits.squeeze(-1).tolist() if labels.dim() == 1 else (logits > 0).long().tolist()
        case "sequence-classification":
            return logits.argmax(-1).tolist()
        case "token-classification":
            rows = zip(logits.argmax(-1), labels != IGNORED, strict=True)
            return [row[tagged].tolist() for row, tagged in rows]
        case _:
            return [None] * len(labels)


def sum_losses(
    model: nn.Module,
    encoded: Dataset,
    indices: Sequence[int],
    collator: Collator,
    task: Task,
    batch_size: int,
    progress: Progress = lambda done, total: None,
    num_batches: int = 0,
    head_loss: HeadLoss | None = None,
) -> Losses:
    """The summed loss of `model`, in eval mode, on `indices` of `encoded`. Sums are taken in float64 in the order
    given, so that the same weights on the same machine give the same digits. The model's mode is restored.

    At least `num_batches` are computed, the first one again where there are fewer: the processes that share a model
    compute together.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses = Losses()
    try:
        with torch.no_grad():  # not inference_mode, whose tensors a sharded model would keep for training
            for first in range(0, len(indices), batch_size):
                chosen = indices[first : first + batch_size]
                batch = {k: v.to(device) for k, v in collator([encoded[i] for i in chosen]).items()}
                labels = batch["labels"] if task == "seq2seq-lm" else batch.pop("labels")  # which its decoder reads
                if head_loss is not None:
                    total, count = head_loss(model, batch, labels)
                    losses.predictions.update(dict.fromkeys(chosen))
                else:
                    logits = _forward(model, batch)
                    total, count = summed_loss(logits, labels, task)
                    losses.predictions.update(zip(chosen, _predicted(logits, labels, task), strict=True))
                losses.total += float(total)
                losses.count += count
                progress(min(first + batch_size, len(indices)), len(indices))
            for _ in range(num_batches - -(-len(indices) // batch_size)):
                batch = {k: v.to(device) for k, v in collator([encoded[indices[0] if indices else 0]]).items()}
                _forward(model, batch if task == "seq2seq-lm" else {k: v for k, v in batch.items() if k != "labels"})
    finally:
        model.train(was_training)
    return losses


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    try:
        return model(**batch).logits
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        what = f"A {type(model).__name__} cannot compute in its type ({first_line(error)})"
        raise UserError(f"{what}; try model.dtype=float32") from None


@torch.no_grad()
def check_packing(model: nn.Module, encoded: Dataset) -> None:
    """Raises UserError where packed examples see each other: the second one's logits are others than alone."""
    if "position_ids" not in encoded.column_names:
        return
    row = next((row for row in encoded if row["position_ids"].count(0) > 1), None)  # type: ignore[index, call-overload]
    if row is None:
        return
    positions = row["position_ids"]  # type: ignore[index, call-overload]
    begin = positions.index(0, 1)
    end = positions.index(0, begin + 1) if 0 in positions[begin + 1 :] else len(positions)
    device = next(model.parameters()).device
    ids, places = (torch.tensor([row[name][:end]], device=device) for name in ("input_ids", "position_ids"))  # type: ignore
    together = model(input_ids=ids, position_ids=places).logits[:, begin:].float()
    alone = model(input_ids=ids[:, begin:]).logits.float()
    if float((together - alone).norm()) > 0.05 * float(alone.norm()):
        raise UserError(
            f"data.packing=true: packed examples see each other in a {type(model).__name__}; take data.packing=false"
        )
