"""Answers in OpenAI's form: of a chat or a completion, whole or in chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgm_finetune.commands.openai.asked import MODELS, Asked, read_chat, read_completion
from sgm_finetune.results.answer_stream import ChosenToken, Piece
from sgm_finetune.results.answers import Streamed

UNLIKELY = -9999.0
"""OpenAI's log-probability of what is impossible: JSON has no infinity."""
DONE = "data: [DONE]\n\n"
"""The end of a stream."""
_STARTED = int(time.time())


@dataclass(frozen=True)
class Form:
    """One of the two endpoints."""

    read: Callable[[Any], Asked]
    prefix: str
    """Beginning of the id of an answer."""
    whole: str
    """`object` of a whole answer."""
    chunk: str
    """`object` of one event of a stream."""
    choice: Callable[[str, Any, str], dict[str, Any]]
    """The text, log-probabilities and reason of the end of a whole answer, as its one choice."""
    delta: Callable[[str, Any, str | None], dict[str, Any]]
    """The same of a chunk."""
    logprobs: Callable[[Sequence[ChosenToken]], dict[str, Any]]
    first: dict[str, Any] | None = None
    """What the first chunk of a stream holds."""


@dataclass(frozen=True)
class Envelope:
    """What stands around every part of one answer."""

    form: Form
    asked: Asked
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Sequence[Piece], end: Streamed) -> dict[str, Any]:
        """The whole answer."""
        text = "".join(piece.text for piece in pieces)
        logprobs = self._logprobs([token for piece in pieces for token in piece.tokens])
        choice = self.form.choice(text, logprobs, _reason(end))
        return self._around(self.form.whole, [choice]) | {"usage": _usage(end)}

    def begin(self) -> str:
        """The first event of a stream; "" where there is none."""
        return "" if self.form.first is None else self._event([self.form.first])

    def next(self, item: Piece | Streamed) -> str:
        """The event of the next piece, or the last one and what follows it."""
        if isinstance(item, Piece):
            return self._event([self.form.delta(item.text, self._logprobs(item.tokens), None)])
        last = self._event([self.form.delta("", None, _reason(item))])
        return last + (self._event([], _usage(item)) if self.asked.with_usage else "") + DONE

    def _logprobs(self, tokens: Sequence[ChosenToken]) -> dict[str, Any] | None:
        return None if self.asked.num_likeliest is None else self.form.logprobs(tokens)

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        content = self._around(self.form.chunk, choices)
        return event(content | {"usage": usage} if self.asked.with_usage else content)

    def _around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = f"{self.form.prefix}-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.asked.when, "choices": choices}


def event(content: dict[str, Any]) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


def models() -> dict[str, Any]:
    """The list of models."""
    return {"object": "list", "data": [model(name) for name in MODELS]}


def model(name: str) -> dict[str, Any]:
    """One model."""
    return {"id": name, "object": "model", "created": _STARTED, "owned_by": "sgm"}


def _reason(end: Streamed) -> str:
    return "stop" if end.has_ended else "length"


def _usage(end: Streamed) -> dict[str, int]:
    asked, answered = end.num_prompt_tokens, end.num_tokens
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def _chat_choice(text: str, logprobs: Any, reason: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}


def _chat_delta(text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
    delta = {"content": text} if reason is None else {}
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _text_choice(text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _chat_logprobs(tokens: Sequence[ChosenToken]) -> dict[str, Any]:
    content = [
        _entry(token.text, token.logprob) | {"top_logprobs": [_entry(*pair) for pair in token.likeliest]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, UNLIKELY), "bytes": list(text.encode(errors="replace"))}


def _text_logprobs(tokens: Sequence[ChosenToken]) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [max(token.logprob, UNLIKELY) for token in tokens],
        "top_logprobs": [{text: max(value, UNLIKELY) for text, value in token.likeliest} for token in tokens],
        "text_offset": [token.begin for token in tokens],
    }


CHAT = Form(
    read_chat, "chatcmpl", "chat.completion", "chat.completion.chunk", _chat_choice, _chat_delta, _chat_logprobs,
    {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None},
)  # fmt: skip
COMPLETION = Form(
    read_completion, "cmpl", "text_completion", "text_completion", _text_choice, _text_choice, _text_logprobs
)
