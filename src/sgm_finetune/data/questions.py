"""What a model is asked in a test, and the answers in the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from sgm_finetune.base.config import Task
from sgm_finetune.data.encoding import IGNORED


@dataclass(frozen=True)
class Question:
    """What the model is asked, and the answer in the data: token ids."""

    prompt: list[int]
    answer: list[int]


def questions(encoded: Dataset, indices: Sequence[int], task: Task) -> list[Question]:
    """Of each example: the source and its target, or all before the last answer and that answer."""
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


def has_answers(encoded: Dataset, task: Task) -> bool:
    """Whether there is something to ask: running text has no questions."""
    return task == "seq2seq-lm" or (task == "causal-lm" and IGNORED in encoded[0]["labels"])


def answer_limit(asked: Sequence[Question]) -> int:
    """Tokens that an answer may have: as many as the longest one in the data, and half as many again."""
    return int(1.5 * max(len(question.answer) for question in asked)) + 1
