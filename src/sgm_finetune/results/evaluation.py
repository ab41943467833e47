"""Evaluation on a data set: the loss of each task, its metrics, and answers that the model generates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from torch import nn

from sgm_finetune.base.config import Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.batches import by_length
from sgm_finetune.results.metrics import task_metrics
from sgm_finetune.train.fast.head_loss import HeadLoss
from sgm_finetune.train.losses import Collator, Progress, sum_losses


def evaluate_model(
    model: nn.Module,
    encoded: Dataset,
    collator: Collator,
    task: Task,
    batch_size: int,
    labels: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
    head_loss: HeadLoss | None = None,
) -> dict[str, Any]:
    """`evaluate_with_predictions` without the predictions."""
    return evaluate_with_predictions(model, encoded, collator, task, batch_size, labels, progress, head_loss)[0]


def evaluate_with_predictions(
    model: nn.Module,
    encoded: Dataset,
    collator: Collator,
    task: Task,
    batch_size: int,
    labels: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
    head_loss: HeadLoss | None = None,
) -> tuple[dict[str, Any], list[Any]]:
    """The model's metrics on `encoded` (input_ids, labels), plain data; `loss` is the mean, num_examples their number.
    And what it predicts of each example: a class, a vector of 0 and 1, a number, the tags of its words, or None.

    One class: `classification_metrics`. Sets of classes: `multilabel_metrics`. Numbers: `regression_metrics`. Tagged
    words: `tagging_metrics`. Language modelling: perplexity = exp(loss), num_tokens (predicted).
    Raises UserError for a loss that is not finite.
    """
    losses = sum_losses(model, encoded, by_length(encoded), collator, task, batch_size, progress, head_loss=head_loss)
    mean = losses.total / losses.count
    if not math.isfinite(mean):
        raise UserError(f"The evaluation's loss is {mean}; try model.dtype=float32")
    found = {"loss": mean, "num_examples": len(encoded)}
    predicted = [losses.predictions[i] for i in range(len(encoded))]
    return {**found, **task_metrics(task, encoded, predicted, losses, labels)}, predicted
