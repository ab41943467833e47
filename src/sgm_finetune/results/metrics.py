"""Computes the metrics of each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, mean_absolute_error, r2_score

MOST_CLASSES = 100
"""Of more classes the metrics hold no confusion matrix, which would be their square, but its worst entries."""
NUM_CONFUSIONS = 100


def classification_metrics(truth: Sequence[int], predicted: Sequence[int], num_labels: int) -> dict[str, Any]:
    """Returns accuracy, macro-F1, confusion matrix, and the accuracy of always naming the most frequent class.

    Macro-F1 counts a class that neither occurs nor is predicted as 0. Of more than MOST_CLASSES classes it returns
    `class_counts` and `confusions` instead of the confusion matrix.

    >>> classification_metrics([0, 1, 1, 1], [0, 1, 1, 0], 2)["accuracy"]
    0.75
    """
    classes = list(range(num_labels))
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, labels=classes, average="macro", zero_division=0.0)),  # type: ignore[arg-type]
        "majority_accuracy": int(np.bincount(truth).max()) / len(truth),
        **_confusions(np.asarray(truth), np.asarray(predicted), num_labels),
    }


def _confusions(truth: np.ndarray, predicted: np.ndarray, num_labels: int) -> dict[str, Any]:
    """The confusion matrix, whose rows are true classes and whose columns are predicted ones. If it is large, how often
    each class was true, predicted and both, and its largest entries as (true class, predicted class, number)."""
    if num_labels <= MOST_CLASSES:
        return {"confusion_matrix": confusion_matrix(truth, predicted, labels=list(range(num_labels))).tolist()}
    is_right = truth == predicted
    counts = {"true": truth, "predicted": predicted, "right": truth[is_right]}
    wrong = np.stack([truth[~is_right], predicted[~is_right]], axis=1)
    pairs, numbers = np.unique(wrong, axis=0, return_counts=True)
    worst = np.argsort(-numbers, kind="stable")[:NUM_CONFUSIONS]  # the pairs are in order
    return {
        "class_counts": {name: np.bincount(found, minlength=num_labels).tolist() for name, found in counts.items()},
        "confusions": np.column_stack([pairs, numbers])[worst].tolist(),
    }


def multilabel_metrics(truth: Sequence[Sequence[float]], predicted: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Returns micro- and macro-F1 over classes, accuracy, and the accuracy of always naming the frequent classes.

    Accuracy is the share of examples whose whole set is right. More than half of the examples have a frequent class.

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
    """Returns R², mean absolute error, and Pearson's and Spearman's correlation.

    R² is 0 for always naming the mean. A correlation is 0 if either side is constant.

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
    """Returns the metrics of `classification_metrics` over words, num_words, and for B-, I- and O tags the entity F1.

    seqeval computes the entity F1: an entity is right if its type and both its ends are.
    """
    flat_truth, flat_predicted = ([tag for row in rows for tag in row] for rows in (truth, predicted))
    found = {**classification_metrics(flat_truth, flat_predicted, len(names)), "num_words": len(flat_truth)}
    if any(name.startswith("B-") for name in names):
        from seqeval.metrics import f1_score as entity_f1

        written = ([[names[tag] for tag in row] for row in rows] for rows in (truth, predicted))
        found["entity_f1"] = float(entity_f1(*written, zero_division=0))  # type: ignore[arg-type]
    return found
