"""Where an answer ends: the tokens and texts at which generation stops, and the files that tell other programs so."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import write_json
from sgm_finetune.base.untrusted import require_json_object
from sgm_finetune.data.chat import asked_text
from sgm_finetune.data.template_trial import try_template

GENERATION_CONFIG = "generation_config.json"
_QUESTION, _ANSWER = "QUESTION¶", "ANSWER¶"
"""The contents of a conversation in which the end of the assistant's turn is looked for."""


@dataclass(frozen=True)
class Stops:
    """What ends an answer."""

    tokens: tuple[int, ...] = ()
    """Ids of the tokens, the one that ends the answers in the training data first."""
    texts: tuple[str, ...] = ()
    """Texts that end an answer where a chat template ends the assistant's turn without a token of its own."""

    def kept(self, ids: Sequence[int]) -> list[int]:
        """`ids` up to the first token that ends an answer, with that token.

        >>> Stops((2,)).kept([5, 6, 2, 7])
        [5, 6, 2]
        """
        end = next((at for at, token in enumerate(ids, start=1) if token in self.tokens), len(ids))
        return list(ids[:end])

    def text(self, ids: Sequence[int], tokenizer: Any) -> str:
        """The answer in `ids`, without what ends it, special tokens and white space around it."""
        answer = [token for token in self.kept(ids) if token not in self.tokens]
        return self.cut(str(tokenizer.decode(answer, skip_special_tokens=True))).strip()

    def cut(self, text: str) -> str:
        """`text` up to the first of the texts that end an answer."""
        return text[: min([at for stop in self.texts if (at := text.find(stop)) >= 0], default=len(text))]


def find_stops(tokenizer: Any, generation: Mapping[str, Any], is_chat: bool = True) -> Stops:
    """All that ends an answer: the tokenizer's end of sequence, `eos_token_id` and `stop_strings` of the base model's
    `generation` (the content of generation_config.json), and the end of the assistant's turn in the chat template.

    The first token ends the answers that were learnt: with `is_chat` that of a turn, else that of a sequence.
    """
    token, text = turn_end(tokenizer)
    own = [token, tokenizer.eos_token_id] if is_chat else [tokenizer.eos_token_id, token]
    given = [*own, *_as_list(generation.get("eos_token_id"))]
    texts = [text, *_as_list(generation.get("stop_strings"))]
    return Stops(
        tuple(dict.fromkeys(id for id in given if isinstance(id, int) and id >= 0)),
        tuple(dict.fromkeys(stop for stop in texts if isinstance(stop, str) and stop)),
    )


def model_stops(model: Any, tokenizer: Any) -> Stops:
    """`find_stops` of a loaded model."""
    generation = getattr(model, "generation_config", None)
    return find_stops(tokenizer, {} if generation is None else generation.to_dict())


def turn_end(tokenizer: Any) -> tuple[int | None, str]:
    """How the chat template ends the assistant's turn: the id of the token, or None; and the text before that token.

    The token is the first one behind the content that the tokenizer holds as an added token, special or not. A text
    that stands before it, or in its place, is what the model learns to write at the end of an answer. White space
    alone is not learnt, so it is not a text. (None, "") is the result without a template, and for a template that
    writes nothing there or refuses a question with its answer.
    """
    if not tokenizer.chat_template:
        return None, ""
    asked = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    written = _render(tokenizer, asked)
    if written is None or _ANSWER not in written:
        return None, ""
    tail = written.rpartition(_ANSWER)[2].strip()
    ends = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    ends |= {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}
    found = [(tail.find(content), -len(content), content) for content in ends if content.strip() and content in tail]
    if not found:
        return None, tail
    at, _, content = min(found)
    return ends[content], tail[:at].strip()


def turn_remark(tokenizer: Any) -> str | None:
    """What a person should know about a chat template that ends the assistant's turn with no token of its own."""
    token, text = turn_end(tokenizer)
    if token is not None or not tokenizer.chat_template:
        return None
    if text:
        return (
            f"the chat template ends an answer with the text {text!r} and not with one token: SGM stops there, and "
            "other programs must be told to"
        )
    return (
        "the chat template writes nothing after an answer, so the model does not learn where to stop; let it end the "
        "assistant's turn with eos_token"
    )


def reasoning_remark(tokenizer: Any) -> str | None:
    """What a person should know about a chat template that asks for reasoning, where no answer in the data has any."""
    if not tokenizer.chat_template:
        return None
    try:
        usual, own = (
            asked_text([{"role": "user", "content": _QUESTION}], tokenizer, reasons=reasons)
            for reasons in (True, False)
        )
    except UserError:  # a template that wants more than a question
        return None
    if usual == own:
        return None
    how = f"with {own[len(usual) :]!r}" if own.startswith(usual) else f"without {usual[len(own) :]!r}"
    switch = " (enable_thinking=false)" if "enable_thinking" in tokenizer.get_chat_template() else ""
    return (
        f"no answer in the data has reasoning, so SGM ends a question {how}; tell other programs to ask so too{switch}"
    )


def _render(tokenizer: Any, conversation: Sequence[Mapping[str, str]], ask: bool = False) -> str | None:
    try_template(tokenizer)
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=ask))
    except Exception:  # a template raises any type
        return None


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


@contextmanager
def stopping_at(model: Any, stops: Stops) -> Iterator[None]:
    """Lets a plain `model.generate()` of another library stop at the tokens of `stops`."""
    generation = model.generation_config
    before = generation.eos_token_id
    generation.eos_token_id = list(stops.tokens) or before
    try:
        yield
    finally:
        generation.eos_token_id = before


def stored_generation(folder: Path, config: Any) -> dict[str, Any]:
    """The content of the base model's generation_config.json; where it has none, what its config.json says of it."""
    path = folder / GENERATION_CONFIG
    if path.is_file():
        return require_json_object(path)
    from transformers import GenerationConfig

    return GenerationConfig.from_model_config(config).to_diff_dict()


def save_tokenizer(tokenizer: Any, folder: Path, generation: Mapping[str, Any] | None, is_chat: bool) -> None:
    """Writes the tokenizer, and generation_config.json from that of the base model, `generation`, for other programs:
    both say where an answer ends. `generation` is None for a model that generates nothing."""
    if generation is None:
        tokenizer.save_pretrained(folder)
        return
    stops = find_stops(tokenizer, generation, is_chat)
    _write_generation_config(folder, generation, stops)
    stopping_tokenizer(tokenizer, stops).save_pretrained(folder)


def _write_generation_config(folder: Path, generation: Mapping[str, Any], stops: Stops) -> None:
    """Writes all that the base model's file says, with the tokens that end an answer.

    Transformers' `generate()` and vLLM stop there. A text is not added to the file: `generate()` refuses one without a
    tokenizer.
    """
    content = {key: value for key, value in generation.items() if key != "_from_model_config"}
    match stops.tokens:
        case [one]:
            content["eos_token_id"] = one
        case [_, *_]:
            content["eos_token_id"] = list(stops.tokens)
    write_json(folder / GENERATION_CONFIG, content)


def stopping_tokenizer(tokenizer: Any, stops: Stops) -> Any:
    """The tokenizer for other programs, many of which stop at its end-of-sequence token alone.

    This is a copy whose end-of-sequence token ends the answers that were learnt. It is the tokenizer itself where that
    is so already, or where the copy would tokenise or write a conversation in another way.
    """
    if not stops.tokens or stops.tokens[0] == tokenizer.eos_token_id or stops.tokens[0] >= len(tokenizer):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = tokenizer.convert_ids_to_tokens(stops.tokens[0])
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    same = tokenizer("a")["input_ids"] == changed("a")["input_ids"] and all(
        _render(tokenizer, turns[:end], ask) == _render(changed, turns[:end], ask)
        for end, ask in ((1, True), (3, True), (4, False))
    )
    return changed if same else tokenizer
