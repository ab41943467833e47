"""Evaluation on a data set: the loss of each task, its metrics, and answers that the model generates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, mean_absolute_error, r2_score
from torch import Tensor, nn

from sgm_finetune.config import Task
from sgm_finetune.data.encoding import IGNORED
from sgm_finetune.errors import UserError
from sgm_finetune.head_loss import HeadLoss

Collator = Callable[[list[dict[str, Any]]], dict[str, Tensor]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Measure:
    """How a metric is called and shown."""

    key: str
    name: str
    higher_is_better: bool = True
    baseline: str | None = None
    """Key of what a model that has learnt nothing reaches."""
    digits: int = 4
    unit: str = ""


MEASURES = (
    Measure("accuracy", "accuracy", baseline="majority_accuracy"),
    Measure("entity_f1", "entity F1"),
    Measure("micro_f1", "micro-F1"),
    Measure("macro_f1", "macro-F1"),
    Measure("r2", "R²"),
    Measure("pearson", "Pearson's r"),
    Measure("mae", "mean absolute error", higher_is_better=False, digits=3),
    Measure("exact_match", "exact match", digits=3),
    Measure("rouge_l", "ROUGE-L", digits=3),
    Measure("bleu", "BLEU", digits=1),
    Measure("perplexity", "perplexity", higher_is_better=False, digits=3),
    Measure("loss", "loss", higher_is_better=False, unit="nats"),
)
"""In the order of interest; a task has some of them."""


@dataclass
class Losses:
    """Sums over part of a data set: loss in nats (a number's: squared error), what it was counted over, and what was
    predicted, by index: a class, a vector of 0 and 1, a number, or the tags of the words."""

    total: float = 0.0
    count: int = 0
    predictions: dict[int, Any] = field(default_factory=dict)


def by_length(encoded: Dataset) -> list[int]:
    """The indices of a data set from its longest to its shortest sequence, so that batches hold little padding."""
    return longest_first([len(ids) for ids in encoded["input_ids"]])


def longest_first(lengths: Sequence[int]) -> list[int]:
    """
    >>> longest_first([3, 9, 5])
    [1, 2, 0]
    """
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def num_predictions(labels: Tensor, task: Task) -> int:
    """What a batch's mean loss is a mean over: examples, predicted tokens or tagged words."""
    if task == "sequence-classification":
        return len(labels)
    return int(((labels[:, 1:] if task == "causal-lm" else labels) != IGNORED).sum())


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
        what = f"A {type(model).__name__} cannot compute in its type ({str(error).splitlines()[0]})"
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
    return {**found, **_task_metrics(task, encoded, predicted, losses, labels)}, predicted


def _task_metrics(
    task: Task, encoded: Dataset, predicted: Sequence[Any], losses: Losses, labels: Sequence[str]
) -> dict[str, Any]:
    truth = list(encoded["labels"])
    match task:
        case "causal-lm" | "seq2seq-lm":
            mean = losses.total / losses.count
            return {"perplexity": math.exp(min(mean, 700.0)), "num_tokens": losses.count}
        case "token-classification":
            return tagging_metrics([[tag for tag in row if tag != IGNORED] for row in truth], predicted, labels)
    match truth[0]:
        case int():
            return classification_metrics(truth, predicted, len(labels))
        case float():
            return regression_metrics(truth, predicted)
    return multilabel_metrics(truth, predicted)


def classification_metrics(truth: Sequence[int], predicted: Sequence[int], num_labels: int) -> dict[str, Any]:
    """Accuracy, macro-F1 (a class that never occurs and is never named counts as 0), confusion matrix (rows: true
    class, columns: predicted), and the accuracy of always naming the most frequent class.

    >>> classification_metrics([0, 1, 1, 1], [0, 1, 1, 0], 2)["accuracy"]
    0.75
    """
    classes = list(range(num_labels))
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, labels=classes, average="macro", zero_division=0.0)),  # type: ignore[arg-type]
        "majority_accuracy": max(list(truth).count(c) for c in classes) / len(truth),
        "confusion_matrix": confusion_matrix(truth, predicted, labels=classes).tolist(),
    }


def multilabel_metrics(truth: Sequence[Sequence[float]], predicted: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Micro- and macro-F1 over classes, the share of examples whose whole set is right (accuracy), and that of always
    naming the classes that more than half of the examples have.

    >>> multilabel_metrics([[1, 0], [1, 1]], [[1, 0], [1, 0]])["accuracy"]
    0.5
    """
    right, named = np.asarray(truth, dtype=int), np.asarray(predicted, dtype=int)
    frequent = (right.mean(0) > 0.5).astype(int)
    return {
        "accuracy": float((right == named).all(1).mean()),
        "micro_f1": float(f1_score(right, named, average="micro", zero_division=0.0)),  # type: ignore[arg-type]
        "macro_f1": float(f1_score(right, named, average="macro", zero_division=0.0)),  # type: ignore[arg-type]
        "majority_accuracy": float((right == frequent).all(1).mean()),
    }


def regression_metrics(truth: Sequence[float], predicted: Sequence[float]) -> dict[str, Any]:
    """R² (0: no better than always naming the mean), mean absolute error, Pearson's and Spearman's correlation (0 where
    either side is constant).

    >>> regression_metrics([0.0, 1.0, 2.0], [0.0, 1.0, 2.0])["r2"]
    1.0
    """
    varied = len(set(truth)) > 1 and len(set(predicted)) > 1
    return {
        "r2": float(r2_score(truth, predicted)) if len(truth) > 1 else 0.0,
        "mae": float(mean_absolute_error(truth, predicted)),
        "pearson": float(pearsonr(truth, predicted).statistic) if varied else 0.0,  # type: ignore[union-attr]
        "spearman": float(spearmanr(truth, predicted).statistic) if varied else 0.0,  # type: ignore[union-attr]
    }


def tagging_metrics(
    truth: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]], names: Sequence[str]
) -> dict[str, Any]:
    """Over words: accuracy, macro-F1 and confusion matrix of the tags, num_words; over entities, where tags are
    written B-..., I-..., O: their F1 by seqeval (an entity is right when its type and both its ends are)."""
    flat_truth, flat_predicted = ([tag for row in rows for tag in row] for rows in (truth, predicted))
    found = {**classification_metrics(flat_truth, flat_predicted, len(names)), "num_words": len(flat_truth)}
    if any(name.startswith("B-") for name in names):
        from seqeval.metrics import f1_score as entity_f1

        written = ([[names[tag] for tag in row] for row in rows] for rows in (truth, predicted))
        found["entity_f1"] = float(entity_f1(*written, zero_division=0))  # type: ignore[arg-type]
    return found


def describe_metrics(metrics: dict[str, Any]) -> str:
    """One line: every measure, in the order of interest, and what it was measured on."""
    parts = []
    for measure in MEASURES:
        if measure.key in metrics:
            text = f"{measure.name} {metrics[measure.key]:.{measure.digits}f}"
            if measure.baseline in metrics:
                text += f" (majority class {metrics[measure.baseline]:.{measure.digits}f})"
            parts.append(text)
    number, what = next(
        (metrics[key], what) for key, what in (("num_tokens", "tokens"), ("num_examples", "examples")) if key in metrics
    )
    answers = [f"{metrics['num_generated']:,} generated answers"] if "num_generated" in metrics else []
    return " · ".join([*parts, f"{number:,} test {what}", *answers])
