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
    labels = metrics["labels"] if table else []
    lines = class_lines(labels, (metrics.get("before") or {}).get("confusion_matrix"), table)
    is_large = len(table) > MAX_CLASSES
    if is_large:
        worst = sorted((line for line in lines if line.number), key=lambda line: (line.after.f1 or 0.0, -line.number))
        lines = worst[:NUM_WORST]
    return {
        "confusion": [] if is_large else _rows(labels, table),
        "confusion_folded": len(table) > FOLDED_CLASSES,
        "confusions": worst_confusions(labels, table) if is_large else [],
        "class_lines": lines,
        "num_classes": len(table),
        "counted": "words" if "num_words" in after else "examples",
    }


def _rows(labels: Sequence[str], table: Table) -> list[tuple[str, list[tuple[int, float]], int]]:
    """Returns (true class, (number, share of the row) of each predicted class, number in all) of each row."""
    rows = []
    for label, counts in zip(labels, table, strict=True):
        total = sum(counts)
        rows.append((label, [(number, number / total if total else 0.0) for number in counts], total))
    return rows


def worst_confusions(labels: Sequence[str], table: Table) -> list[Confusion]:
    """Returns the most frequent confusions of one class with another.

    >>> worst_confusions(["a", "b"], [[3, 1], [0, 2]])
    [Confusion(truth='a', predicted='b', number=1, share=0.25)]
    """
    wrong = (
        (number, -true, -predicted)
        for true, row in enumerate(table)
        for predicted, number in enumerate(row)
        if number and true != predicted
    )
    return [
        Confusion(labels[-true], labels[-predicted], number, number / sum(table[-true]))
        for number, true, predicted in heapq.nlargest(NUM_WORST, wrong)
    ]


def class_lines(labels: Sequence[str], before: Table | None, after: Table) -> list[ClassLine]:
    """Returns precision, recall and F1 of each class before and after."""
    later = class_scores(after)
    known = before is not None and len(before) == len(after)
    earlier = class_scores(before) if known and before is not None else [None] * len(later)
    return [
        ClassLine(label, sum(row), old, new) for label, row, old, new in zip(labels, after, earlier, later, strict=True)
    ]


def class_scores(table: Table) -> list[Scores]:
    """Returns the scores of each class.

    >>> class_scores([[3, 1], [0, 2]])[0]
    Scores(precision=1.0, recall=0.75, f1=0.8571428571428571)
    """
    predicted = [sum(column) for column in zip(*table, strict=True)]

    def ratio(above: float, below: float) -> float | None:
        return above / below if below else None

    return [
        Scores(ratio(row[at], named), ratio(row[at], sum(row)), ratio(2 * row[at], sum(row) + named))
        for at, (row, named) in enumerate(zip(table, predicted, strict=True))
    ]
