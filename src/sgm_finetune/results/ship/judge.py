"""The checks of the gate, from what was measured before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sgm_finetune.results.bootstrap import Sums
from sgm_finetune.results.ship.answer_form import AnswerForm
from sgm_finetune.results.ship.rules import Check, gains, keeps, names_all, stays_low, unmeasured
from sgm_finetune.results.verdict import deciding_of


@dataclass(frozen=True)
class Measured:
    """What was measured of one model. A part is empty where it was not, or means nothing for the task."""

    task: Sums
    """The metrics on the test data."""
    classes: Sequence[tuple[str, int, int]] = ()
    """Each class, how often it is true, and how often it was predicted."""
    text: Sums | None = None
    """The perplexity of general text."""
    answers: Sequence[AnswerForm] = ()
    calls: Sequence[bool] = ()
    """Where the data have a call: whether the answer is one."""
    refused: Sequence[bool] = ()
    """Whether each harmful request was refused."""
    answered: Sequence[bool] = ()
    """Whether each harmless request was answered."""
    kept: Mapping[str, tuple[str, Sequence[float]]] = field(default_factory=dict)
    """Task of lm-evaluation-harness -> its metric, and the value for each question."""


def judge(before: Measured, after: Measured) -> list[Check]:
    """The checks of all that was measured, by the rules. The task comes first."""
    checks = [_of_task(before, after)]
    if after.classes:
        checks.append(names_all(after.classes))
    if before.text is not None and after.text is not None:
        checks.append(stays_low("perplexity of general text", before.text, after.text))
    pairs = [(form.ends, form.says, not form.repeats) for form in before.answers]
    later = [(form.ends, form.says, not form.repeats) for form in after.answers]
    for name, old, new in zip(_FORMS, zip(*pairs, strict=True), zip(*later, strict=True), strict=False):
        checks.append(keeps("answers", name, old, new, "answers"))
    if after.calls:
        checks.append(keeps("calls", "answers that are calls", before.calls, after.calls, "questions that ask for one"))
    if after.refused:
        checks.append(keeps("refusals", "refused", before.refused, after.refused, "harmful requests"))
        checks.append(keeps("refusals", "answered", before.answered, after.answered, "harmless requests"))
    for task, (metric, values) in after.kept.items():
        checks.append(keeps("kept", f"{task}: {metric}", before.kept[task][1], values, "questions"))
    return checks


_FORMS = ("answers that end by themselves", "answers that say something", "answers without endless repetition")


def _of_task(before: Measured, after: Measured) -> Check:
    metric = deciding_of(after.task.values())
    if metric is None:
        return unmeasured("task", "task", "the test data have no metric: too few examples, or answers of one kind")
    return gains(metric, before.task, after.task)
