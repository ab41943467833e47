"""What a run gained: its metrics before and after, as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from sgm_finetune.results.intervals import interval_of
from sgm_finetune.results.metric_names import METRICS, Metric
from sgm_finetune.results.report.formats import decimal, finite


class Headline(NamedTuple):
    """One metric before and after, as text."""

    name: str
    before: str
    after: str
    change: str
    better: bool | None
    """None: equal, or not measured."""
    note: str


def headlines(metrics: Mapping[str, Any]) -> list[Headline]:
    """Returns the metrics of the task in the order of `METRICS`, then those of lm-evaluation-harness."""
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    found = []
    for metric in METRICS:
        if metric.key == "loss" and "r2" in after:
            metric = replace(metric, unit="squared error")
        if metric.key in before or metric.key in after:
            found.append(_headline(metric, before, after))
    for task, numbers in after.get("harness", {}).items():
        earlier = before.get("harness", {}).get(task, {})
        found += [_headline(Metric(key, f"{task}: {key}"), earlier, numbers) for key in numbers]
    return found


def _headline(metric: Metric, before: Mapping[str, Any], after: Mapping[str, Any]) -> Headline:
    old, new, digits = before.get(metric.key), after.get(metric.key), max(1, metric.digits - 1)
    change, better = "", None
    if finite(old) and finite(new):
        difference = round(new, digits) - round(old, digits)
        change = ("+" if difference > 0 else "") + decimal(difference, digits)
        if metric.higher_is_better is not None and round(difference, digits) != 0:
            better = (difference > 0) == metric.higher_is_better
    notes = [metric.unit] if metric.unit else []
    if metric.baseline is not None:
        notes.append(f"always naming the most frequent class: {decimal(after.get(metric.baseline), digits)}")
    if metric.higher_is_better is False:
        notes.append("lower is better")
    if finite(new) and (interval := interval_of(after, metric.key)) is not None:
        notes.insert(0, f"95 % interval {decimal(interval[0], digits)} to {decimal(interval[1], digits)}")
    name = metric.name[0].upper() + metric.name[1:]
    return Headline(name, decimal(old, digits), decimal(new, digits), change, better, "; ".join(notes))
