"""The task of a run: what a model makes of each test example, as sums that can be compared before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from sgm_finetune.data.batches import by_length
from sgm_finetune.results.bootstrap import Sums
from sgm_finetune.results.evaluation import prediction_sums, true_labels
from sgm_finetune.results.preference_metrics import preference_sums
from sgm_finetune.train.losses import Progress, TestSet, example_losses, sum_losses
from sgm_finetune.train.preference import score

LARGEST_LOSS = 700.0
"""Nats beyond which exp overflows."""


def task_sums(model: nn.Module, test_set: TestSet, progress: Progress) -> tuple[Sums, list[Any]]:
    """The metrics of the task, and the predictions of a classifier, tagger or reward model ([] for others)."""
    match test_set.task:
        case "preference":
            return preference_sums(score(model, test_set, by_length(test_set.encoded), progress)), []
        case "causal-lm" | "seq2seq-lm":
            return perplexity_sums(example_losses(model, test_set, progress)), []
    losses = sum_losses(model, test_set, by_length(test_set.encoded), progress)
    predictions = [losses.predictions[i] for i in range(len(test_set.encoded))]
    return prediction_sums(test_set, predictions), predictions


def perplexity_sums(losses: Sequence[tuple[float, int]]) -> Sums:
    """The perplexity of examples, from the summed loss in nats and the number of tokens of each."""

    def statistics(sums: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"perplexity": np.exp(np.minimum(sums[:, 0] / sums[:, 1], LARGEST_LOSS))}

    return Sums(np.array(losses, dtype=float), statistics)


def class_counts(test_set: TestSet, predictions: Sequence[Any]) -> list[tuple[str, int, int]]:
    """Each class or tag, how often it is true, and how often it was predicted. [] where a label is a number."""
    if not test_set.labels or test_set.task == "reward":
        return []
    truth = true_labels(test_set)
    if isinstance(truth[0], float):
        return []
    is_tagged = test_set.task == "token-classification"
    true, predicted = (Counter(_classes(labels, is_tagged)) for labels in (truth, predictions))
    return [(name, true[number], predicted[number]) for number, name in enumerate(test_set.labels)]


def _classes(labels: Sequence[Any], is_tagged: bool) -> list[int]:
    """The classes of all examples; those of a vector are where it is not 0."""
    if isinstance(labels[0], int):
        return list(labels)
    if is_tagged:
        return [tag for row in labels for tag in row]
    return [number for row in labels for number, has in enumerate(row) if has]
