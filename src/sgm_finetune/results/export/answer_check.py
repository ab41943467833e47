"""Compares the answers that an export gives to the run's test prompts with the run's own, their ends included.

The export's answers come from a plain program for its format, which knows only what the export's files say.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sgm_finetune.results.answers import is_chat_model
from sgm_finetune.results.generation import continue_ids
from sgm_finetune.results.kept_prompts import load_prompts
from sgm_finetune.results.load import Result
from sgm_finetune.results.sampling import GREEDY
from sgm_finetune.results.stops import Stops, find_stops, stored_generation

LONGEST = 64
"""The most tokens of an answer that are compared: after these an end is no longer waited for."""


@dataclass(frozen=True)
class OwnAnswers:
    """What an export's answers are compared with."""

    prompts: list[list[int]]
    """Token ids."""
    answers: list[list[int]]
    """Token ids, each up to and with the token that ends the answer."""
    stops: Stops
    limit: int
    """The most tokens of an answer."""


@dataclass(frozen=True)
class AnswerCheck:
    """How many of an export's answers are the run's own, token by token."""

    num_equal: int
    num_compared: int
    first_different: dict[str, Any] | None
    """The number of the prompt from 1, and both answers as text; None where all are equal."""
    runs_on: str | None
    """A token that ends an answer, and that the export does not stop at."""

    def describe(self) -> str:
        line = f"answers equal {self.num_equal} of {self.num_compared}"
        if self.first_different is not None:
            number, own, found = (self.first_different[key] for key in ("number", "own", "found"))
            line += f"; the first that differs, to test prompt {number}: {_short(found)} instead of {_short(own)}"
        return line


def result_stops(result: Result, config: Any) -> Stops:
    """What ends an answer of the result, whose base model has the configuration `config`."""
    return find_stops(result.tokenizer, stored_generation(result.folder, config), is_chat_model(result))


def own_answers(result: Result, model: Any) -> OwnAnswers | None:
    """The answers of the unquantised base with the adapter; None for a result without test prompts."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    kept = load_prompts(result.path.parent, vocabulary, result.config.data.max_length)
    if kept is None:
        return None
    stops, limit = result_stops(result, model.config), min(kept.limit, LONGEST)
    answers = continue_ids(model, kept.prompts, result.tokenizer, result.config.model.task, stops, limit)
    return OwnAnswers(kept.prompts, answers, stops, limit)


@torch.no_grad()
def plain_answers(model: Any, own: OwnAnswers, generation_config: Any = None) -> list[list[int]]:
    """What Transformers' `generate()` answers by itself, greedily: where it stops, only its configuration says."""
    settings = copy.deepcopy(generation_config or model.generation_config)
    settings.update(**GREEDY, max_new_tokens=own.limit, stop_strings=None)  # these need a tokenizer
    found = []
    for prompt in own.prompts:
        ids = torch.tensor([prompt], device=model.device)
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        start = 1 if model.config.is_encoder_decoder else len(prompt)
        found.append(written[0, start:].tolist())
    return found


def compare_answers(found: Sequence[Sequence[int]], own: OwnAnswers, tokenizer: Any) -> AnswerCheck:
    """Compares token by token. An answer of the run that a text ends may go on: no file tells a program to stop
    there."""
    pairs = []
    for theirs, ours in zip(found, own.answers, strict=True):
        ended_by_text = bool(own.stops.texts) and len(ours) < own.limit and ours[-1] not in own.stops.tokens
        pairs.append((list(theirs[: len(ours)] if ended_by_text else theirs), ours))
    different = next((at for at, (theirs, ours) in enumerate(pairs) if theirs != ours), None)
    passed = next((id for theirs, _ in pairs for id in theirs[:-1] if id in own.stops.tokens), None)
    return AnswerCheck(
        num_equal=sum(theirs == ours for theirs, ours in pairs),
        num_compared=len(pairs),
        first_different=None if different is None else {
            "number": different + 1, "own": tokenizer.decode(pairs[different][1]),
            "found": tokenizer.decode(pairs[different][0]),
        },
        runs_on=None if passed is None else str(tokenizer.convert_ids_to_tokens(passed)),
    )  # fmt: skip


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
