"""Writes conversations as text: with the chat template, or a single question in the format of Alpaca."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import one_line
from sgm_finetune.data.conversations import Message, has_reasoning, is_learnt
from sgm_finetune.data.template_trial import try_template

ALPACA = "Below is an instruction that describes a task. Write a response that completes it.\n\n### Instruction:\n"
"""Start of an instruction for a model without a chat template."""

MAX_MESSAGES = 1_000
"""Maximum messages of a conversation. The template writes each beginning of it that ends with an answer."""

Tools = list[dict[str, Any]] | None
Span = tuple[int, int]
Written = tuple[str, list[Span]]
"""A text and the [begin, end) characters of the answers in it."""

CHECKED_ELSEWHERE = ("role", "content", "weight", "tool_calls", "function_call")
"""Keys of messages that `UnreadFields` does not look for."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NO_REASONING = re.compile(r"(?:<(\w+)>\s*</\1>|\[(\w+)\]\s*\[/\2\])\s*")
"""An empty reasoning, such as <think></think>."""
_OPENED = re.compile(r"(?:<\w+>|\[\w+\])\s*\Z")
"""The beginning of a reasoning at the end of a question, such as <think>."""


def written_answers(conversation: list[Message], tokenizer: Any, tools: Tools = None) -> list[Written]:
    """The conversation as the chat template writes it, with the [begin, end) characters of each answer to learn.

    Where the template marks what the assistant generates (`{% generation %}`), its marks count. Otherwise an answer is
    what the template writes for a turn of the assistant behind the question, up to the token that ends the turn,
    without an empty reasoning that the conversation does not have. There is one text when the template writes every
    beginning of the conversation as a beginning of the whole. Otherwise there is one text for each answer, as the model
    sees it when it gives that answer: a template may drop the reasoning of earlier turns.

    Raises UserError when the template refuses the conversation, leaves out its calls or writes a question differently
    before its answer.
    """
    if len(conversation) > MAX_MESSAGES:
        raise UserError(
            f"The conversation has {len(conversation):,} messages, and SGM reads up to {MAX_MESSAGES:,}; divide it"
        )
    turns = [n for n, message in enumerate(conversation) if is_learnt(message)]
    messages, whole = _accepted(conversation[: turns[-1] + 1], tokenizer, tools)
    if _MARKS.search(tokenizer.get_chat_template(tools=tools)):
        return [(whole, _marked(messages, conversation, tokenizer, tools))]
    parts = []
    for n in turns:
        text = _render(messages[: n + 1], tokenizer, tools)
        asked = _render(messages[:n], tokenizer, tools, ask=True)
        parts.append((_without_opened_reasoning(asked, text, messages[n]), text))
    begins = [
        _answer_begin(messages[:n], messages[n], asked, text, tokenizer, tools)
        for n, (asked, text) in zip(turns, parts, strict=True)
    ]
    spans = [(begin, max(begin + 1, len(text.rstrip()))) for begin, (_, text) in zip(begins, parts, strict=True)]
    if all(text.startswith(asked) and whole.startswith(text) for asked, text in parts):
        return [(whole, spans)]
    for asked, text in parts:
        if not text.startswith(asked):
            raise UserError(
                "This model's chat template does not write a question the same way with and without its answer, so "
                "the answer cannot be found; give prompt and completion as texts instead (data.format=completion)"
            )
    return [(text, [span]) for (_, text), span in zip(parts, spans, strict=True)]


def _answer_begin(
    before: list[Message], message: Message, asked: str, answered: str, tokenizer: Any, tools: Tools
) -> int:
    """Where the answer begins: behind the question, and behind an empty reasoning that the message does not have.

    The empty reasoning ends where the template lets a question end that asks for none (`enable_thinking=False`).
    """
    if "enable_thinking" in tokenizer.get_chat_template(tools=tools) and not has_reasoning([message]):
        quiet = _render(before, tokenizer, tools, ask=True, enable_thinking=False)
        if len(quiet) > len(asked) and answered.startswith(quiet):
            return len(quiet)
    return _behind_empty_reasoning(answered, len(asked), message)


def _without_opened_reasoning(asked: str, answered: str, message: Message) -> str:
    """The question without the beginning of a reasoning, where the template writes the answer without reasoning."""
    if answered.startswith(asked) or has_reasoning([message]):
        return asked
    shorter = _OPENED.sub("", asked)
    return shorter if answered.startswith(shorter) else asked


def _behind_empty_reasoning(text: str, begin: int, message: Message, header: int = 0) -> int:
    """Where an answer that begins at `begin` goes on behind an empty reasoning which its message does not have.

    The question may end within it: with its opening mark. `header` characters may stand before it.
    """
    for empty in _NO_REASONING.finditer(text, max(0, begin - 100)):
        if empty.start() > begin + header and text[begin : empty.start()].strip():
            break
        is_own = str(message.get("content", "")).lstrip()[1:].startswith(empty[1] or empty[2])
        if empty.end() > begin and not is_own:
            return empty.end()
    return begin


def _marked(messages: list[Message], conversation: list[Message], tokenizer: Any, tools: Tools) -> list[Span]:
    """What the template marks as generated: one mark for each turn, or the turns are all learnt."""
    text, spans = _rendered(messages, tokenizer, tools, return_assistant_tokens_mask=True)
    turns = [said for said in conversation[: len(messages)] if said["role"] == "assistant"]
    if not spans:
        raise UserError("This model's chat template marks nothing as generated in this conversation; remove it")
    if len(spans) == len(turns):
        return [
            (min(_behind_empty_reasoning(text, begin, said, header=100), end - 1), end)
            for said, (begin, end) in zip(turns, spans, strict=True)
            if is_learnt(said)
        ]
    if all(is_learnt(said) for said in turns):
        return spans
    raise UserError(
        f"This model's chat template marks {len(spans)} texts as generated in {len(turns)} turns of the assistant, so "
        "the turns that are not to be learnt (weight 0) cannot be found; remove them"
    )


def asked_text(conversation: list[Message], tokenizer: Any, tools: Tools = None, reasons: bool = True) -> str:
    """The text that the model reads before it answers.

    The chat template writes the conversation. With reasons=False the text has the empty reasoning with which the
    template begins an answer without one, and not the beginning of a reasoning: a model that was trained on such
    answers goes on from there. Without a template, a single question becomes an Alpaca instruction. Raises UserError
    for a longer conversation without a template, and when the template refuses it.
    """
    if tokenizer.chat_template is not None:
        messages, asked = _accepted(conversation, tokenizer, tools, ask=True)
        if reasons:
            return asked
        answer = {"role": "assistant", "content": "answer"}
        try:
            answered = _render([*messages, answer], tokenizer, tools)
        except UserError:  # the conversation ends with the beginning of an answer
            return asked
        asked = _without_opened_reasoning(asked, answered, answer)
        if not answered.startswith(asked):
            return asked
        return answered[: _answer_begin(messages, answer, asked, answered, tokenizer, tools)]
    if tools or [message["role"] for message in conversation] != ["user"]:
        raise UserError(needs_template(len(conversation)))
    return f"{ALPACA}{conversation[0]['content']}\n\n### Response:\n"


def needs_template(num_messages: int) -> str:
    """The message for a conversation that a tokenizer without a chat template cannot write."""
    return (
        f"this model's tokenizer has no chat template, which a conversation of {num_messages} messages needs; use an "
        "instruction-tuned model, or give prompt and completion (data.format=completion)"
    )


def _fields_written(
    conversation: list[Message], tokenizer: Any, tools: Tools, fields: Sequence[str]
) -> Iterator[tuple[str, bool]]:
    """Each of `fields` that the conversation has, and whether the template writes something else without it.

    `tools` are the row's; every other field is one of its messages.
    """
    messages, whole = _accepted(conversation, tokenizer, tools)
    for field in fields:
        without = [{key: value for key, value in said.items() if key != field} for said in messages]
        if without == messages and not (field == "tools" and tools):
            continue
        try:
            yield field, _render(without, tokenizer, None if field == "tools" else tools) != whole
        except UserError:  # a field that the template needs
            yield field, True


def _accepted(
    conversation: list[Message], tokenizer: Any, tools: Tools, ask: bool = False
) -> tuple[list[Message], str]:
    """The messages in the first form that the template takes, and their text.

    A missing content may have to be null or empty, and the arguments of a call a JSON text. Without `tool_calls` in the
    template, ShareGPT's text of a call is the message's content. Texts lose their own special tokens where the template
    writes the same ones beside them. Raises UserError for calls that the template does not write.
    """
    refusal, loses_calls = None, False
    for messages in _forms(conversation):
        try:
            text = _render(messages, tokenizer, tools, ask)
        except UserError as error:
            refusal = refusal or error
            continue
        if _writes_python(messages, text):
            continue
        if _loses_calls(messages, text, tokenizer, tools, ask):
            loses_calls = True
            continue
        single = _without_own_tokens(messages, text, tokenizer)
        return (messages, text) if single == messages else (single, _render(single, tokenizer, tools, ask))
    if loses_calls:
        return _accepted(_with_calls_as_text(conversation), tokenizer, tools, ask)
    raise refusal or UserError("The model's chat template writes the arguments of a call as Python does, not as JSON")


def _forms(conversation: list[Message]) -> Iterator[list[Message]]:
    """The conversation as it is, then in the forms that some templates need instead."""
    hidden = ("weight", "function_call")
    plain = [{key: value for key, value in said.items() if key not in hidden} for said in conversation]
    forms = [plain]
    if any("content" not in said for said in plain):
        forms += [[{"content": content, **said} for said in plain] for content in (None, "")]
    yield from forms
    if any("tool_calls" in said for said in plain):
        yield from ([_with_written_arguments(said) for said in form] for form in forms)


def _with_written_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as JSON texts."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _writes_python(messages: list[Message], text: str) -> bool:
    """Whether the text has a null content or the arguments of a call as Python prints them."""
    if any(said.get("content", "") is None for said in messages):
        own = json.dumps(messages, ensure_ascii=False).count("None")
        if text.count("None") > own:
            return True
    for call in (call for said in messages for call in said.get("tool_calls", ())):
        arguments = call["function"]["arguments"]
        printed = repr(arguments)
        is_python = isinstance(arguments, dict) and printed != json.dumps(arguments, ensure_ascii=False)
        if is_python and text.count(printed) > sum(str(said.get("content")).count(printed) for said in messages):
            return True
    return False


def _loses_calls(messages: list[Message], text: str, tokenizer: Any, tools: Tools, ask: bool) -> bool:
    """Whether the template writes the same text without the calls."""
    if not any("tool_calls" in said for said in messages):
        return False
    without = [
        {key: value for key, value in said.items() if key != "tool_calls"} | {"content": said.get("content") or ""}
        for said in messages
    ]
    try:
        return _render(without, tokenizer, tools, ask) == text
    except UserError:  # a template that needs the calls
        return False


def _with_calls_as_text(conversation: list[Message]) -> list[Message]:
    """The conversation with ShareGPT's texts of calls as contents. Raises UserError for calls that have no text."""
    found = []
    for number, said in enumerate(conversation, start=1):
        if "tool_calls" in said:
            if "function_call" not in said:
                raise UserError(
                    f"The model's chat template does not write `tool_calls` (message {number}), so the model would not "
                    "learn to call; take a model whose template does, or write the calls into `content`"
                )
            said = {key: value for key, value in said.items() if key != "tool_calls"} | {
                "content": said["function_call"]
            }
        found.append(said)
    return found


def _without_own_tokens(messages: list[Message], text: str, tokenizer: Any) -> list[Message]:
    """The messages without a beginning-of-sequence token, and without a last token, that the template writes too."""
    bos, special = tokenizer.bos_token, _special_tokens(tokenizer)
    has_bos = bool(bos) and text.lstrip().startswith(bos)
    found = []
    for said in messages:
        content = said.get("content") or ""
        if has_bos and content.lstrip().startswith(bos):
            content = content.lstrip().removeprefix(bos)
        if content.rstrip().endswith(special):
            last = next(token for token in special if content.rstrip().endswith(token))
            if re.search(rf"{re.escape(content.strip())}\s*{re.escape(last)}", text):
                content = content.rstrip().removesuffix(last)
        found.append(said if content == (said.get("content") or "") else {**said, "content": content})
    return found


@functools.lru_cache(maxsize=4)
def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens: those with a name, and those that the tokenizer marks so."""
    marked = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    named = [token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token]
    return tuple(token for token in dict.fromkeys([*named, *marked]) if token)


def _render(messages: list[Message], tokenizer: Any, tools: Tools, ask: bool = False, **options: Any) -> str:
    return _rendered(messages, tokenizer, tools, add_generation_prompt=ask, **options)[0]


def _rendered(messages: list[Message], tokenizer: Any, tools: Any, **options: Any) -> tuple[str, list[Span]]:
    """The text of the messages, and what the template marks as generated, in characters.

    `apply_chat_template` does the same, but it leaves out a null, which some templates need for a missing content, and
    it gives the marks in tokens, and only for a tokenizer that knows the characters of a token.
    """
    if not messages:
        raise UserError("The conversation begins with the assistant; begin it with a question, or remove the row")
    try_template(tokenizer, tools)
    try:
        texts, marks = render_jinja_template(
            [messages], tools, chat_template=tokenizer.get_chat_template(tools=tools),
            **{**tokenizer.special_tokens_map, **options},
        )  # fmt: skip
    except Exception as error:  # a template raises any type
        raise UserError(f"The model's chat template refuses this conversation: {one_line(error)}") from None
    return texts[0], [(begin, end) for begin, end in marks[0] if end > begin] if marks else []  # type: ignore[misc]


_LOOKS = 50
"""Conversations with a field, of which none may show that the template reads it, before it counts as unread."""


class UnreadFields:
    """Finds the fields of messages that the chat template does not write."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._looks: dict[str, int] = {}  # field -> conversations looked at; _LOOKS + 1 for a field that is written

    def look_at(self, conversation: list[Message], tools: list[dict] | None) -> None:
        fields = dict.fromkeys(key for message in conversation for key in message if key not in CHECKED_ELSEWHERE)
        fields |= {"tools": None} if tools else {}
        open_fields = [name for name in fields if self._looks.setdefault(name, 0) < _LOOKS]
        for name, is_written in (
            _fields_written(conversation, self._tokenizer, tools, open_fields) if open_fields else ()
        ):
            self._looks[name] = _LOOKS + 1 if is_written else self._looks[name] + 1

    def unread(self) -> tuple[str, ...]:
        return tuple(name for name, looks in self._looks.items() if looks <= _LOOKS)

    def written(self) -> tuple[str, ...]:
        return tuple(name for name, looks in self._looks.items() if looks > _LOOKS)
