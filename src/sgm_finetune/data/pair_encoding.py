"""Encodes preferences: two token sequences an example, which begin with the same prompt.

The sequence with the chosen answer is in the columns of a language model's example, so that whatever reads those reads
it. The rejected answer is in `other_ids` and `other_labels`. A single answer with a label has `desirable` beside it,
and as its other sequence its prompt with the answer to another one: KTO estimates from it how far the model has moved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import datasets

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import num_common
from sgm_finetune.data.chat import written_answers
from sgm_finetune.data.conversations import Message, answers, is_learnt
from sgm_finetune.data.encoding import (
    IGNORED,
    TOKEN_FEATURES,
    Encoded,
    all_lost,
    check_lengths,
    completed_prompts,
    in_row,
    plain_question,
    plain_questions,
    token_dataset,
)
from sgm_finetune.data.rows import Origin
from sgm_finetune.data.token_lists import TokenLists
from sgm_finetune.data.tokens import learnt_tokens

_FEATURES = datasets.Features(
    {**TOKEN_FEATURES, "other_ids": TOKEN_FEATURES["labels"], "other_labels": TOKEN_FEATURES["labels"]}
)
_MOST_SHARED = 8
"""Tokens before an answer that may differ between the two sequences: a token can reach over the prompt's end."""


class Answer(NamedTuple):
    """The tokens of a prompt and its answer, and the labels: a token itself where it is learnt, else IGNORED."""

    ids: list[int]
    labels: list[int]

    @property
    def begin(self) -> int:
        """The number of tokens before the first learnt one."""
        return next((at for at, label in enumerate(self.labels) if label != IGNORED), len(self.labels))

    def learnt_from(self, begin: int) -> Answer:
        """The same with the tokens from `begin` on learnt, up to the first learnt one."""
        return Answer(self.ids, [*self.labels[:begin], *self.ids[begin : self.begin], *self.labels[self.begin :]])

    def cut(self, length: int, keeps_end: bool = False) -> Answer:
        """The first `length` tokens; with `keeps_end`, the last token in the place of the last of these."""
        if len(self.ids) <= length:
            return self
        if keeps_end:
            return Answer([*self.ids[: length - 1], self.ids[-1]], [*self.labels[: length - 1], self.labels[-1]])
        return Answer(self.ids[:length], self.labels[:length])


def encode_preferences(
    split: datasets.Dataset,
    tokenizer: Any,
    max_length: int,
    origins: Sequence[Origin] | None,
    is_scored: bool = False,
) -> Encoded:
    """`split` as pairs of token sequences of at most `max_length` tokens; longer ones are cut at the end.

    With `is_scored`, for a model that reads whole answers and generates none, a cut sequence keeps its last token, at
    which a decoder is asked for the score. An example is dropped if its prompt fills `max_length`, or if its two
    answers are equal up to there. Raises UserError when none is left, and for a conversation that the chat template
    refuses.
    """
    has_pairs = "rejected" in split.column_names
    first = list(_answers(split, "messages", "completion", tokenizer, max_length, origins, is_scored))
    if has_pairs:
        second = list(_answers(split, "rejected", "rejected", tokenizer, max_length, origins, is_scored))
        pairs = [_with_one_prompt(*pair, origins, at) for at, pair in enumerate(zip(first, second, strict=True))]
    else:
        pairs = _with_other_answers(first)
    columns = {name: TokenLists() for name in ("input_ids", "other_ids", "other_labels")}
    labels, kept, num_truncated, longest = TokenLists(), [], 0, 0
    for at, (answer, other) in enumerate(pairs):
        longest = max(longest, answer.begin)
        is_long = max(len(answer.ids), len(other.ids)) > max_length
        if max(answer.begin, 1) >= max_length:  # the first token of a sequence is never predicted
            continue
        answer, other = answer.cut(max_length, is_scored), other.cut(max_length, is_scored)
        if has_pairs and answer.ids == other.ids:
            continue
        num_truncated += is_long
        kept.append(at)
        for name, values in zip(columns, (answer.ids, other.ids, other.labels), strict=True):
            columns[name].append(values)
        labels.append(answer.labels)
    if not kept:
        raise all_lost(len(pairs), max_length, longest)
    dataset = token_dataset(columns, labels, _FEATURES)
    if not has_pairs:
        verdicts = split["label"][:]
        dataset = dataset.add_column(
            "desirable",
            [verdicts[at] for at in kept],
            feature=datasets.Value("int8"),  # type: ignore[call-arg]
        )
    return Encoded(dataset, num_truncated, len(pairs) - len(kept))


def _answers(
    split: datasets.Dataset,
    messages: str,
    text: str,
    tokenizer: Any,
    max_length: int,
    origins: Sequence[Origin] | None,
    is_scored: bool,
) -> Iterator[Answer]:
    """The answer in each row: at the end of the conversation in the column `messages`, or in the column `text`."""
    if "messages" not in split.column_names:
        yield from _answer_texts(split["prompt"][:], split[text][:], tokenizer, max_length, is_scored)
        return
    conversations = split[messages][:]
    tools = split["tools"][:] if "tools" in split.column_names else [None] * len(conversations)
    if tokenizer.chat_template is None:
        questions = plain_questions(conversations, tools, tokenizer, origins)
        yield from _answer_texts(*questions, tokenizer, max_length, is_scored)
        return
    for at, (turns, offered) in enumerate(zip(conversations, tools, strict=True)):
        try:
            yield _answer_in(turns, offered, tokenizer, max_length)
        except UserError as error:
            raise in_row(error, origins, at) from None


def _answer_in(turns: list[Message], tools: list[dict] | None, tokenizer: Any, max_length: int) -> Answer:
    """The answer at the end of a conversation, which the chat template writes."""
    written = written_answers(turns, tokenizer, tools)
    if len(written) > 1:
        raise UserError(
            "This model's chat template changes earlier answers when later ones follow; let the two conversations "
            "differ in their last answer only"
        )
    ((whole, spans),) = written
    check_lengths([whole], max_length)
    ids, learnt = learnt_tokens(whole, spans, tokenizer)
    return Answer(ids, [token if counts else IGNORED for token, counts in zip(ids, learnt, strict=True)])


def _answer_texts(
    prompts: Sequence[str], answers: Sequence[str], tokenizer: Any, max_length: int, is_scored: bool
) -> Iterator[Answer]:
    for ids, begin in completed_prompts(prompts, answers, tokenizer, max_length, is_generated=not is_scored):
        yield Answer(ids, [IGNORED] * begin + ids[begin:])


def scored_text(text: str, tokenizer: Any, max_length: int) -> list[int]:
    """The tokens of a prompt with its answer, as a reward model reads them (`encode_preferences`)."""
    (answer,) = _answer_texts([""], [text], tokenizer, max_length, is_scored=True)
    return answer.cut(max_length, keeps_end=True).ids


def scored_conversation(turns: list[Message], tools: list[dict] | None, tokenizer: Any, max_length: int) -> list[int]:
    """The tokens of a conversation that ends with an answer, as a reward model reads them. Raises UserError for a
    conversation that ends otherwise, or that the chat template refuses."""
    if not answers(turns[-1]):
        raise UserError(
            f"The conversation ends with a message by the {turns[-1]['role']}; end it with the assistant's answer, "
            "which is scored"
        )
    if tokenizer.chat_template is None:
        return scored_text("".join(plain_question(turns, tools, tokenizer)), tokenizer, max_length)
    asked = [{**said, "weight": 0} if is_learnt(said) else said for said in turns[:-1]]
    return _answer_in([*asked, turns[-1]], tools, tokenizer, max_length).cut(max_length, keeps_end=True).ids


def _with_one_prompt(
    chosen: Answer, rejected: Answer, origins: Sequence[Origin] | None, at: int
) -> tuple[Answer, Answer]:
    """The two answers with the same tokens before them; what differs is learnt."""
    nearest = min(chosen.begin, rejected.begin)
    begin = min(nearest, num_common(chosen.ids, rejected.ids))
    if nearest - begin > _MOST_SHARED:
        problem = "This model's chat template writes the prompt differently before the two answers; remove the row"
        raise in_row(UserError(problem), origins, at)
    return chosen.learnt_from(begin), rejected.learnt_from(begin)


def _with_other_answers(found: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    """Each answer, and its prompt with the answer to another prompt, wherever there is one."""
    others = _elsewhere([tuple(one.ids[: one.begin]) for one in found])
    return [
        (one, Answer([*prompt, *other.ids[other.begin :]], [IGNORED] * len(prompt) + other.labels[other.begin :]))
        for one, index in zip(found, others, strict=True)
        for prompt, other in [(one.ids[: one.begin], found[index])]
    ]


def _elsewhere(prompts: Sequence[tuple[int, ...]]) -> list[int]:
    """For each row the index of a row with another prompt, each index once. Of a prompt that more than half of the rows
    have, some rows get one of their own.

    >>> _elsewhere([(1,), (1,), (2,), (3,)])
    [2, 3, 0, 1]
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    counts = Counter(prompts)
    most = max(counts.values()) if len(counts) > 1 else 1
    found = [0] * len(prompts)
    for place, row in enumerate(order):
        found[row] = order[(place + most) % len(prompts)]
    return found
