"""The answers of a trained model: texts, classes with their probabilities, tags; before and after its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import set_seed

from sgm_finetune.base.config import DECODER_TASKS, Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.chat import asked_text
from sgm_finetune.data.conversations import Message
from sgm_finetune.data.tokens import single_ends
from sgm_finetune.model.architecture import num_positions
from sgm_finetune.results.answer_stream import AnswerStream, Piece
from sgm_finetune.results.generation import continue_ids, continue_prompts
from sgm_finetune.results.load import LoadedResult, Result
from sgm_finetune.results.sampling import Sampling
from sgm_finetune.results.stops import Stops, model_stops

When = Literal["before", "after"]
"""Before: the base model. After: the trained model."""
Prompt = str | tuple[str, str] | list[Message] | list[str] | dict[str, Any]
"""A text; two texts; a conversation; the words of a sentence; or a conversation with tools: {"messages", "tools"}."""


@dataclass(frozen=True)
class Streamed:
    """How long an answer became, and why it ended."""

    num_prompt_tokens: int
    num_tokens: int
    """Tokens of the answer, with the one that ends it."""
    has_ended: bool
    """Whether a token or a text ended it; else it has as many tokens as it may."""


class PromptTooLongError(UserError):
    """A prompt leaves no room for an answer."""


def answer(
    result: LoadedResult,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    when: When = "after",
    raw: bool = False,
    progress: Callable[..., None] = lambda done, total: None,
    show: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Answers each prompt; returns {"answer": ...}, with {"scores": class -> probability} for classes.

    An answer is a text, a class, a list of classes, a number, or [[word, tag], ...]. `when="before"` asks the base
    model, whose new head is untrained. `raw` leaves the chat template out. `show` is called with each piece of a text
    as it is generated; prompts are then answered one at a time.
    """
    config, model, tokenizer = result.config, result.model, result.tokenizer
    task = config.model.task
    model.eval()
    with torch.no_grad(), nullcontext() if when == "after" else result.as_base():
        if task == "sequence-classification":
            return [_classify(result, prompt) for prompt in _with_progress(prompts, progress)]
        if task == "token-classification":
            return [_tag(result, prompt) for prompt in _with_progress(prompts, progress)]
        encoded = encode_prompts(result, prompts, raw)
        result.base.check_ids(max(map(max, filter(None, encoded)), default=-1), "The prompt")
        limit = _token_limit(result, encoded, sampling.max_new_tokens)
        options, stops = sampling.options(), model_stops(model, tokenizer)
        set_seed(sampling.seed)
        if show is not None:
            one_by_one = _with_progress(encoded, progress)
            return [{"answer": _stream(result, ids, stops, limit, options, show)} for ids in one_by_one]
        size = config.training.eval_batch_size
        texts = continue_prompts(model, encoded, tokenizer, task, stops, limit, size, progress, **options)
        return [{"answer": text} for text in texts]


def stream_answer(
    result: LoadedResult,
    prompt: Prompt,
    sampling: Sampling,
    when: When,
    raw: bool,
    texts: Sequence[str],
    num_likeliest: int | None,
    show: Callable[[Piece], object],
) -> Streamed:
    """Answers one prompt, as `answer` does, and passes each piece to `show`. `texts` end the answer too.

    `num_likeliest` is that of `AnswerStream`. Raises PromptTooLongError for a prompt that leaves no room for an answer.
    """
    result.model.eval()
    with torch.no_grad(), nullcontext() if when == "after" else result.as_base():
        ids = prompt_ids(result, prompt, raw)
        result.base.check_ids(max(ids, default=-1), "The prompt")
        limit = _token_limit(result, [ids], sampling.max_new_tokens)
        stops = model_stops(result.model, result.tokenizer)
        stream = AnswerStream(result.tokenizer, replace(stops, texts=(*stops.texts, *texts)), show, num_likeliest)
        set_seed(sampling.seed)
        _generate(result, ids, stops, limit, sampling.options(), stream)
    return Streamed(len(ids), stream.num_tokens, stream.has_ended)


def _stream(
    result: LoadedResult, ids: list[int], stops: Stops, limit: int, options: dict[str, Any], show: Callable[[str], None]
) -> str:
    """The answer to one prompt, without white space around it; each piece goes to `show`."""
    pieces: list[str] = []

    def take(piece: Piece) -> None:
        pieces.append(piece.text)
        show(piece.text)

    _generate(result, ids, stops, limit, options, AnswerStream(result.tokenizer, stops, take))
    return "".join(pieces).strip()


def _generate(
    result: LoadedResult, ids: list[int], stops: Stops, limit: int, options: dict[str, Any], stream: AnswerStream
) -> None:
    """Generates an answer for `stream`, which knows the texts that end it."""
    task, tokens = result.config.model.task, Stops(stops.tokens)
    continue_ids(result.model, [ids], result.tokenizer, task, tokens, limit, **options, **stream.options())
    stream.end()


def generates_text(task: Task) -> bool:
    """Whether a model of this task answers with a text."""
    return task in (*DECODER_TASKS, "seq2seq-lm")


def encode_prompts(result: Result, prompts: Sequence[Prompt], raw: bool = False) -> list[list[int]]:
    """`prompt_ids` of each prompt. Raises UserError with the number of a prompt that the chat template refuses."""
    found = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            found.append(prompt_ids(result, prompt, raw))
        except UserError as error:
            if len(prompts) == 1:
                raise
            raise UserError(f"Prompt {number}: {str(error)[:1].lower()}{str(error)[1:]}") from None
    return found


def prompt_ids(result: Result, prompt: Prompt, raw: bool = False) -> list[int]:
    """Token ids of the prompt as the model was trained to read it.

    A conversation is written by the chat template, and so is a text if the model was trained on conversations: it
    becomes one question. The empty reasoning that a template writes belongs to it if those conversations had none.
    `raw` tokenizes the text as it is.
    """
    tokenizer: Any = result.tokenizer
    given: Any = prompt if isinstance(prompt, dict) else {"messages": prompt}
    if isinstance(prompt, str):
        given = {"messages": [{"role": "user", "content": prompt}]}
    if not raw and (not isinstance(prompt, str) or is_chat_model(result)):
        reasons = not is_chat_model(result) or "reasoning" in result.roles
        text = asked_text(given["messages"], tokenizer, given.get("tools"), reasons)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return single_ends(tokenizer(prompt, verbose=False)["input_ids"], tokenizer)


def is_chat_model(result: Result) -> bool:
    """Whether the model was trained on conversations. An older file does not say; then: whether it has a template."""
    if result.config.model.task not in DECODER_TASKS:
        return False
    return "messages" in result.roles if result.roles else result.tokenizer.chat_template is not None


def _token_limit(result: LoadedResult, encoded: Sequence[Sequence[int]], wanted: int) -> int:
    """The most new tokens: `wanted`, or as many as the model's positions allow behind the longest prompt."""
    positions = num_positions(result.model.config)
    if positions is None or result.config.model.task == "seq2seq-lm":
        return wanted
    longest = max(map(len, encoded))
    if longest >= positions:
        raise PromptTooLongError(
            f"The longest prompt has {longest:,} tokens, and the model has {positions:,} positions; shorten it, or "
            "begin a new conversation"
        )
    return min(wanted, positions - longest)


def _classify(result: LoadedResult, prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, list | dict):
        raise UserError("model.task=sequence-classification takes texts, not conversations")
    pair = prompt if isinstance(prompt, tuple) else (prompt,)
    tokenizer: Any = result.tokenizer
    logits = _logits(result, tokenizer(*pair, **_truncation(result)))[0]
    if result.label_kind == "number":
        return {"answer": float(logits[0])}
    several = result.label_kind == "classes"
    scores = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
    by_class = dict(zip(result.labels, scores, strict=True))
    if several:
        return {"answer": [name for name, score in by_class.items() if score > 0.5], "scores": by_class}
    return {"answer": max(by_class, key=by_class.__getitem__), "scores": by_class}


def _tag(result: LoadedResult, prompt: Prompt) -> dict[str, Any]:
    """The tag of each word is that of its first token; "?" for a word that was truncated."""
    words = prompt.split() if isinstance(prompt, str) else [str(word) for word in prompt]
    tokenizer: Any = result.tokenizer
    encoded = tokenizer(words, is_split_into_words=True, **_truncation(result))
    tags = _logits(result, encoded)[0].argmax(-1).tolist()
    first: dict[int, str] = {}
    for at, word in enumerate(encoded.word_ids()):
        if word is not None:
            first.setdefault(word, result.labels[tags[at]])
    return {"answer": [[word, first.get(at, "?")] for at, word in enumerate(words)]}


def _truncation(result: Result) -> dict[str, Any]:
    return {"truncation": True, "max_length": result.config.data.max_length, "return_tensors": "pt"}


def _logits(result: LoadedResult, encoded: Any) -> torch.Tensor:
    result.base.check_ids(int(encoded["input_ids"].max()), "The text")
    return result.model(**{name: x.to(result.model.device) for name, x in encoded.items()}).logits.float()


def _with_progress(items: Sequence[Any], progress: Callable[..., None]) -> Iterator[Any]:
    for done, item in enumerate(items, start=1):
        yield item
        progress(done, len(items))
