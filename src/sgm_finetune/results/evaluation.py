"""A model tested on a data set: its loss, its task's metrics, and the answers that it generates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from sgm_finetune.base.config import PreferenceConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.batches import by_length
from sgm_finetune.data.encoding import IGNORED
from sgm_finetune.data.mixture import by_source
from sgm_finetune.data.questions import asked_indices, has_answers, questions
from sgm_finetune.results.bootstrap import Sums, class_sums, number_sums, set_sums, tag_sums
from sgm_finetune.results.generation import answer_metrics, generate_answers
from sgm_finetune.results.metrics import (
    classification_metrics,
    multilabel_metrics,
    regression_metrics,
    tagging_metrics,
)
from sgm_finetune.results.preference_metrics import preference_metrics, reward_metrics, reward_sums
from sgm_finetune.results.stops import model_stops
from sgm_finetune.train.losses import Losses, Progress, TestSet, sum_losses
from sgm_finetune.train.preference import joined, score

_T = TypeVar("_T")
SHOWN_SAMPLES = 8
"""Generated answers that are kept with their prompt and reference."""


@dataclass(frozen=True)
class Evaluation:
    """What a test found."""

    metrics: dict[str, Any]
    """Plain data. `loss` is the mean loss in nats, `num_examples` the number of examples; then the task's metrics."""
    predictions: list[Any]
    """For each example its class, vector of 0 and 1, number, tags of its words, or the scores of its two answers; None
    for language models."""


def evaluate_model(model: nn.Module, test_set: TestSet, progress: Progress = lambda done, total: None) -> Evaluation:
    """Computes the loss of `model` on `test_set`, and the metrics of its task.

    One class: `classification_metrics`. Sets of classes: `multilabel_metrics`. Numbers: `regression_metrics`. Tagged
    words: `tagging_metrics`. Language modelling: perplexity = exp(loss), num_tokens (predicted). All but the last have
    `intervals`: name of a metric -> its 95 % interval. Preferences: `preference_metrics`;
    rewards: `reward_metrics`. Of a mixture, `sources` has the same metrics on the examples of each source, by its name.
    Raises UserError for a loss that is not finite.
    """
    encoded = test_set.encoded
    parts = by_source(encoded, by_length(encoded))
    if test_set.task == "preference":
        settings, is_base = test_set.preference or PreferenceConfig(), test_set.is_base
        scores = dict(_each(parts, lambda here, tell: score(model, test_set, here, tell), progress))
        metrics = preference_metrics(joined(list(scores.values())), settings, is_base)
        _require_finite(metrics["loss"])
        of = _by_name(scores, test_set, lambda found: preference_metrics(found, settings, is_base))
        return Evaluation({**metrics, **of}, [None] * len(encoded))
    losses = dict(_each(parts, lambda here, tell: sum_losses(model, test_set, here, tell), progress))
    total = sum(losses.values(), Losses())
    _require_finite(total.total / total.count)
    metrics = _metrics(test_set, total)
    of = _by_name(losses, test_set, lambda found: _metrics(test_set, found))
    return Evaluation({**metrics, **of}, [total.predictions[i] for i in range(len(encoded))])


def _each(
    parts: Mapping[int, Sequence[int]], measure: Callable[[Sequence[int], Progress], _T], progress: Progress
) -> Iterator[tuple[int, _T]]:
    """What `measure` finds of the examples of each source."""
    done, total = 0, sum(map(len, parts.values()))
    for source, indices in parts.items():
        yield source, measure(indices, lambda here, _, before=done: progress(before + here, total))
        done += len(indices)


def _by_name(found: Mapping[int, _T], test_set: TestSet, metrics: Callable[[_T], dict[str, Any]]) -> dict[str, Any]:
    """The entry `sources` of the metrics; {} without a mixture."""
    names = test_set.sources
    return {"sources": {names[source]: metrics(part) for source, part in found.items()}} if names else {}


def _metrics(test_set: TestSet, losses: Losses) -> dict[str, Any]:
    """The metrics on the examples of `losses`."""
    indices = sorted(losses.predictions)
    predictions = [losses.predictions[i] for i in indices]
    metrics = {"loss": losses.total / losses.count, "num_examples": len(indices)}
    return {**metrics, **_task_metrics(test_set, indices, predictions, losses)}


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
    """Lets `model` answer the first `num_generated` test examples, of each source of a mixture its part; returns the
    metrics of its answers, and a few samples. Of preferences it is the mean length of the answers in tokens. Returns {}
    where none are asked for or the data has no answers; `sources` is as in `evaluate_model`."""
    indices = asked_indices(test_set.encoded, num_generated)
    number = len(indices)
    if not number or not has_answers(test_set.encoded, test_set.task):
        return {}
    asked = questions(test_set.encoded, indices, test_set.task)
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

    def judge(chosen: Sequence[int]) -> dict[str, Any]:
        said = [answers[at] for at in chosen]
        if test_set.task == "preference":  # nearness to one good answer is not what it aims at
            ids = tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"]
            return {"answer_tokens": sum(map(len, ids)) / len(said), "num_generated": len(said)}
        return {**answer_metrics(said, [texts[at][1] for at in chosen]), "num_generated": len(said)}

    places = by_source(test_set.encoded.select(indices), range(number))
    return {**judge(range(number)), **_by_name(places, test_set, judge), "samples": samples}


def _task_metrics(test_set: TestSet, indices: Sequence[int], predictions: list[Any], losses: Losses) -> dict[str, Any]:
    if test_set.task in ("causal-lm", "seq2seq-lm"):
        mean = losses.total / losses.count
        return {"perplexity": math.exp(min(mean, 700.0)), "num_tokens": losses.count}
    if test_set.task == "reward":
        return reward_metrics(predictions)
    truth, num_labels = true_labels(test_set, indices), len(test_set.labels)
    match truth[0]:
        case list() if test_set.task == "token-classification":
            numbers = tagging_metrics(truth, predictions, test_set.labels)
        case int():
            numbers = classification_metrics(truth, predictions, num_labels)
        case float():
            numbers = regression_metrics(truth, predictions)
        case _:
            numbers = multilabel_metrics(truth, predictions)
    return {**numbers, "intervals": prediction_sums(test_set, predictions, indices).intervals()}


def true_labels(test_set: TestSet, indices: Sequence[int] | None = None) -> list[Any]:
    """The true class, vector of 0 and 1, number, or tags of words of each example, or of some."""
    truth = test_set.encoded["labels"][:]
    truth = truth if indices is None else [truth[i] for i in indices]
    if test_set.task == "token-classification":
        return [[tag for tag in row if tag != IGNORED] for row in truth]
    return truth


def prediction_sums(test_set: TestSet, predictions: list[Any], indices: Sequence[int] | None = None) -> Sums:
    """The metrics of predictions, of all examples or of some, as functions of sums over examples."""
    if test_set.task == "reward":
        return reward_sums(predictions)
    truth = true_labels(test_set, indices)
    match truth[0]:
        case list() if test_set.task == "token-classification":
            return tag_sums(truth, predictions, test_set.labels)
        case int():
            return class_sums(truth, predictions, len(test_set.labels))
        case float():
            return number_sums(truth, predictions)
    return set_sums(truth, predictions)
