"""The section "Right and wrong predictions": the confusion matrix, and each class before and after."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

FOLDED_CLASSES = 12
"""A confusion matrix of more classes is folded."""
MAX_CLASSES = 30
"""Instead of the confusion matrix of more classes, the worst confusions and the worst classes are shown."""
NUM_WORST = 20

Table = Sequence[Sequence[int]]
"""Numbers of examples: rows are true classes, columns predicted ones."""


class Counts(NamedTuple):
    """How often each class was true, predicted, and both."""

    true: Sequence[int]
    predicted: Sequence[int]
    right: Sequence[int]


class Scores(NamedTuple):
    """How well a class is found; None: it is neither true nor predicted."""

    precision: float | None
    recall: float | None
    f1: float | None


class ClassLine(NamedTuple):
    label: str
    number: int
    """Examples whose true class it is."""
    before: Scores | None
    """None: not known."""
    after: Scores


class Confusion(NamedTuple):
    truth: str
    predicted: str
    number: int
    share: float
    """Of the examples of the true class."""


def classes_section(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section's values for the template, all empty where the task has no confusion matrix."""
    after = metrics.get("after") or {}
    table: Table = after.get("confusion_matrix") or []
    counts = _counts(after)
    labels = metrics["labels"] if counts.true else []
    lines = class_lines(labels, _counts(metrics.get("before") or {}), counts)
    is_large = len(labels) > MAX_CLASSES
    if is_large:
        worst = sorted((line for line in lines if line.number), key=lambda line: (line.after.f1 or 0.0, -line.number))
        lines = worst[:NUM_WORST]
    return {
        "confusion": [] if is_large else _rows(labels, table),
        "confusion_folded": len(labels) > FOLDED_CLASSES,
        "confusions": worst_confusions(labels, after.get("confusions") or _wrong(table), counts) if is_large else [],
        "confusion_key": "confusion_matrix" if table else "confusions",
        "class_lines": lines,
        "num_classes": len(labels),
        "counted": "words" if "num_words" in after else "examples",
    }


def _counts(metrics: Mapping[str, Any]) -> Counts:
    """The counts of metrics that hold them or, of few classes and in older results, a confusion matrix."""
    if "class_counts" in metrics:
        return Counts(**metrics["class_counts"])
    return table_counts(metrics.get("confusion_matrix") or [])


def table_counts(table: Table) -> Counts:
    """The counts of a confusion matrix.

    >>> table_counts([[3, 1], [0, 2]])
    Counts(true=[4, 2], predicted=[3, 3], right=[3, 2])
    """
    predicted = [sum(column) for column in zip(*table, strict=True)]
    return Counts([sum(row) for row in table], predicted, [row[at] for at, row in enumerate(table)])


def _rows(labels: Sequence[str], table: Table) -> list[tuple[str, list[tuple[int, float]], int]]:
    """Returns (true class, (number, share of the row) of each predicted class, number in all) of each row."""
    rows = []
    for label, counts in zip(labels, table, strict=True):
        total = sum(counts)
        rows.append((label, [(number, number / total if total else 0.0) for number in counts], total))
    return rows


def _wrong(table: Table) -> list[tuple[int, int, int]]:
    """(true class, predicted class, number) of each confusion in a confusion matrix."""
    return [
        (true, predicted, number)
        for true, row in enumerate(table)
        for predicted, number in enumerate(row)
        if number and true != predicted
    ]


def worst_confusions(labels: Sequence[str], confusions: Sequence[Sequence[int]], counts: Counts) -> list[Confusion]:
    """Returns the most frequent of (true class, predicted class, number).

    >>> worst_confusions(["a", "b"], [(0, 1, 1)], Counts([4, 2], [3, 3], [3, 2]))
    [Confusion(truth='a', predicted='b', number=1, share=0.25)]
    """
    worst = heapq.nlargest(NUM_WORST, ((number, -true, -predicted) for true, predicted, number in confusions))
    return [
        Confusion(labels[-true], labels[-predicted], number, number / counts.true[-true])
        for number, true, predicted in worst
    ]


def class_lines(labels: Sequence[str], before: Counts, after: Counts) -> list[ClassLine]:
    """Returns precision, recall and F1 of each class before, where they are known, and after."""
    later = class_scores(after)
    earlier = class_scores(before) if len(before.true) == len(after.true) else [None] * len(later)
    numbers = after.true
    return [
        ClassLine(label, number, old, new)
        for label, number, old, new in zip(labels, numbers, earlier, later, strict=True)
    ]


def class_scores(counts: Counts) -> list[Scores]:
    """Returns the scores of each class.

    >>> class_scores(Counts([4, 2], [3, 3], [3, 2]))[0]
    Scores(precision=1.0, recall=0.75, f1=0.8571428571428571)
    """

    def ratio(above: float, below: float) -> float | None:
        return above / below if below else None

    return [
        Scores(ratio(right, named), ratio(right, true), ratio(2 * right, true + named))
        for true, named, right in zip(*counts, strict=True)
    ]
