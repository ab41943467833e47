"""A model tested on a data set: its loss, its task's metrics, and the answers that it generates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from sgm_finetune.base.config import PreferenceConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.batches import by_length
from sgm_finetune.data.encoding import IGNORED
from sgm_finetune.data.questions import has_answers, questions
from sgm_finetune.results.bootstrap import Sums, class_sums, number_sums, set_sums, tag_sums
from sgm_finetune.results.generation import answer_metrics, generate_answers
from sgm_finetune.results.metrics import (
    classification_metrics,
    multilabel_metrics,
    regression_metrics,
    tagging_metrics,
)
from sgm_finetune.results.preference_metrics import preference_metrics
from sgm_finetune.results.stops import model_stops
from sgm_finetune.train.losses import Losses, Progress, TestSet, sum_losses
from sgm_finetune.train.preference import score

SHOWN_SAMPLES = 8
"""Generated answers that are kept with their prompt and reference."""


@dataclass(frozen=True)
class Evaluation:
    """What a test found."""

    metrics: dict[str, Any]
    """Plain data. `loss` is the mean loss in nats, `num_examples` the number of examples; then the task's metrics."""
    predictions: list[Any]
    """For each example its class, vector of 0 and 1, number, or tags of its words; None for language models."""


def evaluate_model(model: nn.Module, test_set: TestSet, progress: Progress = lambda done, total: None) -> Evaluation:
    """Computes the loss of `model` on `test_set`, and the metrics of its task.

    One class: `classification_metrics`. Sets of classes: `multilabel_metrics`. Numbers: `regression_metrics`. Tagged
    words: `tagging_metrics`. Language modelling: perplexity = exp(loss), num_tokens (predicted). All but the last have
    `intervals`: name of a metric -> its 95 % interval. Preferences: `preference_metrics`.
    Raises UserError for a loss that is not finite.
    """
    encoded = test_set.encoded
    if test_set.task == "preference":
        scores = score(model, test_set, by_length(encoded), progress)
        metrics = preference_metrics(scores, test_set.preference or PreferenceConfig(), test_set.is_base)
        _require_finite(metrics["loss"])
        return Evaluation(metrics, [None] * len(encoded))
    losses = sum_losses(model, test_set, by_length(encoded), progress)
    mean = losses.total / losses.count
    _require_finite(mean)
    predictions = [losses.predictions[i] for i in range(len(encoded))]
    metrics = {"loss": mean, "num_examples": len(encoded)}
    return Evaluation({**metrics, **_task_metrics(test_set, predictions, losses)}, predictions)


def _require_finite(mean: float) -> None:
    if not math.isfinite(mean):
        raise UserError(f"The evaluation's loss is {mean}; try model.dtype=float32")


def evaluate_answers(
    model: nn.Module,
    test_set: TestSet,
    tokenizer: PreTrainedTokenizerBase,
    num_generated: int,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Lets `model` answer the first `num_generated` test examples; returns the metrics of its answers, and a few
    samples. Of preferences it is the mean length of the answers in tokens. Returns {} where none are asked for or the
    data has no answers."""
    number = min(num_generated, len(test_set.encoded))
    if not number or not has_answers(test_set.encoded, test_set.task):
        return {}
    asked = questions(test_set.encoded, range(number), test_set.task)
    answers = generate_answers(model, asked, tokenizer, test_set.task, test_set.batch_size, progress)
    stops = model_stops(model, tokenizer)
    texts = [
        [str(tokenizer.decode(q.prompt, skip_special_tokens=True)).strip(), stops.text(q.answer, tokenizer)]
        for q in asked
    ]
    samples = [
        {"prompt": prompt, "reference": reference, "answer": answer}
        for (prompt, reference), answer in zip(texts[:SHOWN_SAMPLES], answers, strict=False)
    ]
    if test_set.task == "preference":  # nearness to one good answer is not what it aims at
        ids = tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
        metrics = {"answer_tokens": sum(map(len, ids)) / number}
    else:
        metrics = answer_metrics(answers, [reference for _, reference in texts])
    return {**metrics, "num_generated": number, "samples": samples}


def _task_metrics(test_set: TestSet, predictions: list[Any], losses: Losses) -> dict[str, Any]:
    if test_set.task in ("causal-lm", "seq2seq-lm"):
        mean = losses.total / losses.count
        return {"perplexity": math.exp(min(mean, 700.0)), "num_tokens": losses.count}
    truth, num_labels = true_labels(test_set), len(test_set.labels)
    match truth[0]:
        case list() if test_set.task == "token-classification":
            numbers = tagging_metrics(truth, predictions, test_set.labels)
        case int():
            numbers = classification_metrics(truth, predictions, num_labels)
        case float():
            numbers = regression_metrics(truth, predictions)
        case _:
            numbers = multilabel_metrics(truth, predictions)
    return {**numbers, "intervals": prediction_sums(test_set, predictions).intervals()}


def true_labels(test_set: TestSet) -> list[Any]:
    """The true class, vector of 0 and 1, number, or tags of words of each example."""
    truth = list(test_set.encoded["labels"])
    if test_set.task == "token-classification":
        return [[tag for tag in row if tag != IGNORED] for row in truth]
    return truth


def prediction_sums(test_set: TestSet, predictions: list[Any]) -> Sums:
    """The metrics of predictions as functions of sums over examples."""
    truth = true_labels(test_set)
    match truth[0]:
        case list() if test_set.task == "token-classification":
            return tag_sums(truth, predictions, test_set.labels)
        case int():
            return class_sums(truth, predictions, len(test_set.labels))
        case float():
            return number_sums(truth, predictions)
    return set_sums(truth, predictions)
