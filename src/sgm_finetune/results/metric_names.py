"""The metrics: their names, their order, and how they are shown. results/metrics.py computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """Name of a metric, and how it is shown."""

    key: str
    """Key in metrics.json."""
    name: str
    higher_is_better: bool | None = True
    """None: neither end is better."""
    baseline: str | None = None
    """Key of the value that always naming the most frequent class reaches."""
    digits: int = 4
    unit: str = ""


METRICS = (
    Metric("accuracy", "accuracy", baseline="majority_accuracy"),
    Metric("entity_f1", "entity F1"),
    Metric("micro_f1", "micro-F1"),
    Metric("macro_f1", "macro-F1"),
    Metric("r2", "R²"),
    Metric("pearson", "Pearson's r"),
    Metric("mae", "mean absolute error", higher_is_better=False, digits=3),
    Metric("exact_match", "exact match", digits=3),
    Metric("rouge_l", "ROUGE-L", digits=3),
    Metric("bleu", "BLEU", digits=1),
    Metric("preference_accuracy", "preference accuracy"),
    Metric("preference_margin", "preference margin", digits=3, unit="nats a token"),
    Metric("reward_accuracy", "reward accuracy"),
    Metric("reward_margin", "reward margin", digits=3),
    Metric("answer_tokens", "length of answers", higher_is_better=None, digits=1, unit="tokens"),
    Metric("perplexity", "perplexity", higher_is_better=False, digits=3),
    Metric("loss", "loss", higher_is_better=False, unit="nats"),
)
"""Metrics in the order in which they matter. Each task has some of them."""


def describe_metrics(metrics: dict[str, Any]) -> str:
    """Returns one line: every metric in the order of METRICS, and the number of test examples or tokens."""
    parts = []
    for metric in METRICS:
        if metric.key in metrics:
            text = f"{metric.name} {metrics[metric.key]:.{metric.digits}f}"
            if metric.baseline in metrics:
                text += f" (majority class {metrics[metric.baseline]:.{metric.digits}f})"
            parts.append(text)
    number, what = next(
        (metrics[key], what) for key, what in (("num_tokens", "tokens"), ("num_examples", "examples")) if key in metrics
    )
    answers = [f"{metrics['num_generated']:,} generated answers"] if "num_generated" in metrics else []
    return " · ".join([*parts, f"{number:,} test {what}", *answers])
