"""What a run gained: its measures before and after, as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from sgm_finetune.results.metrics import MEASURES, Measure
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
    """What a reader wants first: the task's measures, in the order of `MEASURES`."""
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    found = []
    for measure in MEASURES:
        if measure.key in {**before, **after}:
            squared = measure.key == "loss" and "r2" in after
            found.append(_headline(replace(measure, unit="squared error") if squared else measure, before, after))
    for task, numbers in after.get("harness", {}).items():
        earlier = before.get("harness", {}).get(task, {})
        found += [_headline(Measure(key, f"{task}: {key}"), earlier, numbers) for key in numbers]
    return found


def _headline(measure: Measure, before: Mapping[str, Any], after: Mapping[str, Any]) -> Headline:
    old, new, digits = before.get(measure.key), after.get(measure.key), max(1, measure.digits - 1)
    change, better = "", None
    if finite(old) and finite(new):
        difference = round(new, digits) - round(old, digits)
        change = ("+" if difference > 0 else "") + decimal(difference, digits)
        better = None if round(difference, digits) == 0 else (difference > 0) == measure.higher_is_better
    notes = [measure.unit] if measure.unit else []
    if measure.baseline is not None:
        notes.append(f"always naming the most frequent class: {decimal(after.get(measure.baseline), digits)}")
    if not measure.higher_is_better:
        notes.append("lower is better")
    name = measure.name[0].upper() + measure.name[1:]
    return Headline(name, decimal(old, digits), decimal(new, digits), change, better, "; ".join(notes))
