"""Evaluation on a data set: loss, and accuracy, macro-F1 and a confusion matrix, or perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import nn

from sgm_finetune.config import Task
from sgm_finetune.errors import UserError

Collator = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


@dataclass
class Losses:
    """Sums over part of a data set: loss in nats, what it was counted over, and predicted classes by index."""

    total: float = 0.0
    count: int = 0
    predictions: dict[int, int] = field(default_factory=dict)


def by_length(encoded: Dataset) -> list[int]:
    """The indices of a data set from its longest to its shortest sequence, so that batches hold little padding."""
    lengths = [len(ids) for ids in encoded["input_ids"]]
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def sum_losses(
    model: nn.Module,
    encoded: Dataset,
    indices: Sequence[int],
    collator: Collator,
    task: Task,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Losses:
    """The summed cross-entropy of `model`, in eval mode, on `indices` of `encoded`: over examples (classification) or
    predicted tokens (language modelling). Sums are taken in float64 in the order given, so that the same weights on
    the same machine give the same digits. The model's mode is restored."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses = Losses()
    try:
        with torch.inference_mode():
            for first in range(0, len(indices), batch_size):
                chosen = indices[first : first + batch_size]
                batch = {k: v.to(device) for k, v in collator([encoded[i] for i in chosen]).items()}
                targets = batch.pop("labels")
                logits = model(**batch).logits.float()
                if task == "causal-lm":
                    logits, targets = logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
                else:
                    losses.predictions.update(zip(chosen, logits.argmax(-1).tolist(), strict=True))
                losses.total += float(nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
                losses.count += int((targets != -100).sum())
                progress(min(first + batch_size, len(indices)), len(indices))
    finally:
        model.train(was_training)
    return losses


def evaluate_model(
    model: nn.Module,
    encoded: Dataset,
    collator: Collator,
    task: Task,
    batch_size: int,
    labels: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The model's metrics on `encoded` (input_ids, labels), plain data.

    Classification: loss (mean over examples, nats), accuracy, macro_f1, confusion_matrix (rows: true class, columns:
    predicted), majority_accuracy (of always naming the most frequent class), num_examples.
    Language modelling: loss (mean over predicted tokens, nats), perplexity = exp(loss), num_tokens, num_examples.
    Raises UserError for a loss that is not finite.
    """
    losses = sum_losses(model, encoded, by_length(encoded), collator, task, batch_size, progress)
    mean = losses.total / losses.count
    if not math.isfinite(mean):
        raise UserError(f"The evaluation's loss is {mean}; try model.dtype=float32")
    if task == "causal-lm":
        perplexity = math.exp(min(mean, 700.0))
        return {"loss": mean, "perplexity": perplexity, "num_tokens": losses.count, "num_examples": len(encoded)}
    predicted = [losses.predictions[i] for i in range(len(encoded))]
    return {"loss": mean, **classification_metrics(list(encoded["labels"]), predicted, len(labels))}


def classification_metrics(truth: Sequence[int], predicted: Sequence[int], num_labels: int) -> dict[str, Any]:
    """Accuracy, macro-F1 (a class that never occurs and is never named counts as 0), confusion matrix.

    >>> classification_metrics([0, 1, 1, 1], [0, 1, 1, 0], 2)["accuracy"]
    0.75
    """
    classes = list(range(num_labels))
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, labels=classes, average="macro", zero_division=0.0)),  # type: ignore[arg-type]
        "majority_accuracy": max(list(truth).count(c) for c in classes) / len(truth),
        "confusion_matrix": confusion_matrix(truth, predicted, labels=classes).tolist(),
        "num_examples": len(truth),
    }
