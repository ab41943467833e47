"""An answer while it is generated: its text in pieces, and the tokens behind it with their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from sgm_finetune.results.stops import Stops

_INCOMPLETE = "\ufffd"
"""What a tokenizer writes for the first bytes of a character whose other bytes are in the next tokens."""


@dataclass(frozen=True)
class ChosenToken:
    """A token of an answer, and what the model gave it and the likeliest ones."""

    text: str
    logprob: float
    """Natural logarithm of its probability, before temperature and top_p."""
    begin: int
    """Where it begins in the answer, in characters."""
    likeliest: tuple[tuple[str, float], ...] = ()
    """Texts and log-probabilities of the likeliest tokens in its place, the likeliest first."""


@dataclass(frozen=True)
class Piece:
    """The next characters of an answer, and the tokens that begin in them."""

    text: str
    tokens: tuple[ChosenToken, ...] = ()
    """() unless log-probabilities were asked for."""


class AnswerStream(StoppingCriteria):
    """Passes each piece of an answer to `show` as it is generated, without what ends the answer.

    The pieces together are the answer, white space around it included. Transformers' `generate` asks after each token
    whether to stop, which a streamer could not answer; so this is a stopping criterion. It is for one prompt. The
    caller calls `end` when nothing more is generated.
    """

    def __init__(self, tokenizer: Any, stops: Stops, show: Callable[[Piece], object], num_likeliest: int | None = None):
        """With `num_likeliest`, pieces have their tokens, and each token that many likeliest ones."""
        self.num_tokens = 0
        """Tokens so far, with the one that ends the answer."""
        self.has_ended = False
        """Whether a token or a text that ends answers was generated."""
        self._tokenizer, self._stops, self._show = tokenizer, stops, show
        self._record = None if num_likeliest is None else _LastScores()
        self._num_likeliest = num_likeliest or 0
        self._ids: list[int] = []
        self._known = (0, 0)  # the text is that of ids[:known[1]]; decoding from known[0] gives its end right
        self._text, self._num_shown = "", 0
        self._tokens: list[ChosenToken] = []  # not shown yet

    def options(self) -> dict[str, Any]:
        """The arguments of Transformers' `generate`."""
        options: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([self])}
        return options if self._record is None else options | {"logits_processor": LogitsProcessorList([self._record])}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.num_tokens += 1
        token = int(input_ids[0, -1])
        if token in self._stops.tokens:
            self.has_ended = True
        else:
            self._append(token)
            self._show_piece(is_last=False)
        return torch.full((len(input_ids),), self.has_ended, device=input_ids.device)

    def end(self) -> None:
        """Shows what was held back."""
        self._text += self._behind()
        self._show_piece(is_last=True)

    def _append(self, token: int) -> None:
        if self._record is not None:
            self._tokens.append(self._chosen(token, self._record.logprobs()))
        self._ids.append(token)
        new = self._behind()
        if not new.endswith(_INCOMPLETE):
            self._text += new
            self._known = (self._known[1 if new else 0], len(self._ids))  # a special token has no text to begin with

    def _behind(self, *more: int, skip_special: bool = True) -> str:
        """The text behind the known one: of the ids that are not decoded yet, and of `more` behind them."""
        begin, end = self._known
        known, whole = (
            str(self._tokenizer.decode(ids, skip_special_tokens=skip_special))
            for ids in (self._ids[begin:end], [*self._ids[begin:], *more])
        )
        return whole[len(known) :]

    def _show_piece(self, is_last: bool) -> None:
        """Shows the new text, but not as many characters at its end as may begin a text that ends the answer."""
        cut = self._stops.cut(self._text)
        self.has_ended = self.has_ended or cut != self._text
        end = len(cut) if is_last or self.has_ended else len(cut) - self._num_held()
        end = max(end, self._num_shown)
        whole = is_last and cut == self._text
        num_tokens = sum(token.begin < end or whole for token in self._tokens)
        if end > self._num_shown or num_tokens:
            self._show(Piece(cut[self._num_shown : end], tuple(self._tokens[:num_tokens])))
        self._num_shown = end
        del self._tokens[:num_tokens]

    def _num_held(self) -> int:
        sizes = ((stop, size) for stop in self._stops.texts for size in range(min(len(stop), len(self._text) + 1)))
        return max((size for stop, size in sizes if self._text.endswith(stop[:size])), default=0)

    def _chosen(self, token: int, logprobs: Tensor) -> ChosenToken:
        largest = logprobs.topk(min(self._num_likeliest, len(logprobs)))
        pairs = zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
        likeliest = tuple((self._token_text(other), value) for other, value in pairs)
        return ChosenToken(self._token_text(token), float(logprobs[token]), len(self._text), likeliest)

    def _token_text(self, token: int) -> str:
        before = self._behind(skip_special=False)
        return self._behind(token, skip_special=False)[len(before) :]


class _LastScores(LogitsProcessor):
    """Keeps the scores of the next token, of which `generate` draws after it has applied temperature and top_p."""

    def __init__(self) -> None:
        self._scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self._scores = scores
        return scores

    def logprobs(self) -> Tensor:
        """(vocabulary,) log-probabilities."""
        assert self._scores is not None
        return self._scores[0].float().log_softmax(-1)
