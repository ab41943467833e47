"""Writes conversations as text: with the chat template, or a single question in the format of Alpaca."""

from __future__ import annotations

from typing import Any

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import one_line
from sgm_finetune.data.columns import Message

ALPACA = "Below is an instruction that describes a task. Write a response that completes it.\n\n### Instruction:\n"
"""Start of an instruction for a model without a chat template."""

Written = tuple[str, list[tuple[int, int]]]
"""A text and the [begin, end) characters of the answers in it."""


def written_answers(conversation: list[Message], tokenizer: Any) -> list[Written]:
    """The conversation as the chat template writes it, with the [begin, end) characters of each answer in it.

    An answer ends with the token that ends its turn. There is one text when the template writes every beginning of the
    conversation as a beginning of the whole. Otherwise there is one text for each answer, as the model sees it when it
    gives that answer: a template may drop the reasoning of earlier turns.

    Raises UserError when the template refuses the conversation or writes a question differently before its answer.
    """
    turns = [n for n, message in enumerate(conversation) if message["role"] == "assistant"]
    whole = _render(conversation[: turns[-1] + 1], tokenizer)
    parts = [(_render(conversation[:n], tokenizer, ask=True), _render(conversation[: n + 1], tokenizer)) for n in turns]
    if all(text.startswith(asked) and whole.startswith(text) for asked, text in parts):
        return [(whole, [_answer_span(asked, text) for asked, text in parts])]
    for asked, text in parts:
        if not text.startswith(asked):
            raise UserError(
                "This model's chat template does not write a question the same way with and without its answer, so "
                "the answer cannot be found; give prompt and completion instead (data.format=completion)"
            )
    return [(text, [_answer_span(asked, text)]) for asked, text in parts]


def _answer_span(asked: str, answered: str) -> tuple[int, int]:
    """The [begin, end) of an answer, without the white space behind the end of its turn."""
    return len(asked), max(len(asked) + 1, len(answered.rstrip()))


def _render(conversation: list[Message], tokenizer: Any, ask: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template raises any type
        raise UserError(f"The model's chat template refuses a conversation: {one_line(error)}") from None


def asked_text(conversation: list[Message], tokenizer: Any) -> str:
    """The text that the model reads before it answers.

    The chat template writes the conversation. Without a template, a single question becomes an Alpaca instruction.
    Raises UserError for a longer conversation without a template, and when the template refuses it.
    """
    if tokenizer.chat_template is not None:
        return _render(conversation, tokenizer, ask=True)
    if [message["role"] for message in conversation] != ["user"]:
        raise UserError(needs_template(len(conversation)))
    return f"{ALPACA}{conversation[0]['content']}\n\n### Response:\n"


def needs_template(num_messages: int) -> str:
    """The message for a conversation that a tokenizer without a chat template cannot write."""
    return (
        f"this model's tokenizer has no chat template, which a conversation of {num_messages} messages needs; use an "
        "instruction-tuned model, or give prompt and completion (data.format=completion)"
    )
