"""Questions for a model in a test, and the answers to them in the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from sgm_finetune.base.config import Task
from sgm_finetune.data.encoding import IGNORED
from sgm_finetune.data.mixture import by_source, divide


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt and of its answer in the data."""

    prompt: list[int]
    answer: list[int]


def questions(encoded: Dataset, indices: Sequence[int], task: Task) -> list[Question]:
    """The question of each example: source and target, or the last answer and everything before it. The answer of a
    preference is the chosen one."""
    found = []
    for index in indices:
        ids, labels = encoded[index]["input_ids"], encoded[index]["labels"]
        if task == "seq2seq-lm":
            found.append(Question(ids, labels))
            continue
        end = max(at for at, label in enumerate(labels) if label != IGNORED) + 1
        begin = next((at + 1 for at in range(end - 1, -1, -1) if labels[at] == IGNORED), 0)
        found.append(Question(ids[:begin], ids[begin:end]))
    return found


def asked_indices(encoded: Dataset, number: int) -> list[int]:
    """The examples that a test asks: the first `number`, or of a mixture the first ones of each source, in proportion
    to their examples."""
    parts = by_source(encoded, range(len(encoded)))
    numbers = divide([len(here) for here in parts.values()], min(number, len(encoded)))
    return [index for here, count in zip(parts.values(), numbers, strict=True) for index in here[:count]]


def spread(items: Sequence[int], number: int) -> list[int]:
    """At most `number` of the items, which lie evenly among them.

    >>> spread(range(10), 4), spread([7, 8], 4)
    ([0, 2, 5, 7], [7, 8])
    """
    number = min(number, len(items))
    return [items[at * len(items) // number] for at in range(number)]


def has_answers(encoded: Dataset, task: Task) -> bool:
    """Whether the examples have prompts and answers; running text has none."""
    return task in ("seq2seq-lm", "preference") or (task == "causal-lm" and IGNORED in encoded[0]["labels"])


def answer_limit(asked: Sequence[Question]) -> int:
    """The maximum number of tokens of a generated answer: 1.5 times the longest answer in the data, plus one."""
    return int(1.5 * max(len(question.answer) for question in asked)) + 1
