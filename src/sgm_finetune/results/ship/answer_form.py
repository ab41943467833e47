"""The form of generated answers: whether they end by themselves, say something and do not repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sgm_finetune.base.config import Task
from sgm_finetune.data.questions import Question, answer_limit
from sgm_finetune.results.generation import continue_ids
from sgm_finetune.results.stops import Stops, model_stops
from sgm_finetune.train.losses import Progress

NUM_REPEATS = 4
"""Equal runs of tokens at the end of an answer that count as a repetition, if they are half of the answer."""


@dataclass(frozen=True)
class AnswerForm:
    ends: bool
    """Whether the model ended the answer; else it was cut."""
    says: bool
    """Whether there is more than white space in it."""
    repeats: bool
    """Whether it was cut while it repeated itself."""
    ids: Sequence[int]
    """Its token ids."""


def answer_forms(
    model: Any, asked: Sequence[Question], tokenizer: Any, task: Task, batch_size: int, progress: Progress
) -> list[AnswerForm]:
    """The form of the model's greedy answer to each question; its limit is that of the test (`generate_answers`)."""
    stops, prompts = model_stops(model, tokenizer), [question.prompt for question in asked]
    found = continue_ids(model, prompts, tokenizer, task, stops, answer_limit(asked), batch_size, progress)
    return [form_of(ids, stops, tokenizer) for ids in found]


def form_of(ids: Sequence[int], stops: Stops, tokenizer: Any) -> AnswerForm:
    """The form of the answer in `ids`, as `continue_ids` returns it."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    ends = bool(ids and ids[-1] in stops.tokens) or stops.cut(text) != text
    return AnswerForm(ends, bool(stops.text(ids, tokenizer)), not ends and repeats_itself(ids), ids)


def repeats_itself(ids: Sequence[int]) -> bool:
    """Whether the last half of `ids`, or more, is one run of tokens again and again.

    >>> repeats_itself([1, 2, 3, 3, 3, 3]), repeats_itself([7, 8] * 4), repeats_itself([1, 2, 3, 4, 5, 5, 5])
    (True, True, False)
    """
    for length in range(1, len(ids) // NUM_REPEATS + 1):
        same = next((at for at in range(len(ids) - length) if ids[-1 - at] != ids[-1 - at - length]), len(ids) - length)
        span = same + length
        if span >= NUM_REPEATS * length and 2 * span >= len(ids):
            return True
    return False
