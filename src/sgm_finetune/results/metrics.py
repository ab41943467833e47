"""The metrics of each task, and how they are named and shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, mean_absolute_error, r2_score


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
