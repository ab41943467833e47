"""Judges whether a run ended better than it began, and says what to try where it did not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from sgm_finetune.results.intervals import interval_of
from sgm_finetune.results.metric_names import METRICS, Metric
from sgm_finetune.results.report.formats import finite

_DECIDING = ("preference_accuracy", "reward_accuracy", "entity_f1", "micro_f1", "accuracy", "r2", "perplexity", "loss")
"""The first of these metrics that a run has decides.

Entity F1 and micro-F1 come before the accuracy, which most words without an entity, or all classes at once, decide. A
language model's few generated answers do not decide: its perplexity counts every token.
"""
_TESTED = (("num_words", "words"), ("num_tokens", "tokens"), ("num_examples", "examples"))


class Shortfall(NamedTuple):
    """What is said of a run that ended no better than it began."""

    line: str
    """One sentence with the metric before and after."""
    advice: tuple[str, ...]
    """What to try, one sentence each, with the run's own numbers."""


def shortfall(metrics: Mapping[str, Any]) -> Shortfall | None:
    """Returns what to say of a run that ended no better than it began; None for a run that ended better.

    `metrics` is the content of metrics.json. A run is no better if its deciding metric did not rise (a loss: fall), or
    if the value before training lies within the 95 % interval of the value after. Also returns None if there is no
    finite metric to compare.
    """
    before, after, metric = metrics.get("before") or {}, metrics.get("after") or {}, _deciding_metric(metrics)
    if metric is None:
        return None
    old, new = before[metric.key], after[metric.key]
    interval = interval_of(after, metric.key)
    within = interval is not None and interval[0] <= old <= interval[1]
    gained = new > old if metric.higher_is_better else new < old
    if gained and not within:
        return None
    return Shortfall(_line(metric, old, new, interval, after), _advice(metrics, interval if within else None))


def improved(metrics: Mapping[str, Any]) -> bool | None:
    """Whether a run ended better than it began; None if there is no finite metric to compare.

    >>> improved({"before": {"loss": 2.0}, "after": {"loss": 1.0}}), improved({"before": {}, "after": {"loss": 1.0}})
    (True, None)
    """
    return None if _deciding_metric(metrics) is None else shortfall(metrics) is None


def _deciding_metric(metrics: Mapping[str, Any]) -> Metric | None:
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    return deciding_of([key for key in _DECIDING if finite(before.get(key)) and finite(after.get(key))])


def deciding_of(keys: Collection[str]) -> Metric | None:
    """Returns the metric that decides, of those named; None if none of them does."""
    return next((one for key in _DECIDING for one in METRICS if one.key == key and key in keys), None)


def _line(
    metric: Metric, old: float, new: float, interval: tuple[float, float] | None, after: Mapping[str, Any]
) -> str:
    digits = max(1, metric.digits - 1)
    line = f"This run ended no better than it began: {metric.name} {old:.{digits}f} → {new:.{digits}f}"
    if interval is not None:
        number, what = next((after[key], what) for key, what in _TESTED if key in after)
        line += f" (95 % interval {interval[0]:.{digits}f} to {interval[1]:.{digits}f} on {number:,} test {what})"
    if metric.baseline is not None and metric.baseline in after:
        line += f"; always naming the most frequent class reaches {after[metric.baseline]:.{digits}f}"
    return line + "."


def _advice(metrics: Mapping[str, Any], within: tuple[float, float] | None) -> tuple[str, ...]:
    steps, num_train = metrics.get("steps"), metrics.get("num_train")
    taken = f"{steps:,} step{'' if steps == 1 else 's'}" if steps is not None else "its steps"
    if num_train is not None:
        taken += f" on {num_train:,} training examples"
    advice = [f"Train for longer or on more data: this run took {taken} (training.epochs, data.num_train)."]
    if rate := metrics.get("learning_rate"):
        advice.append(
            f"Try another learning rate: this run's was {rate:.4g}; try training.learning_rate={3 * rate:.2g} "
            f"and {rate / 3:.2g}."
        )
    advice.append("Look at the data: `sgm data` shows examples and labels as the model sees them.")
    if within is not None:
        advice.append(f"Test on more examples (data.num_test): these cannot tell {within[0]:.3f} from {within[1]:.3f}.")
    return tuple(advice)
