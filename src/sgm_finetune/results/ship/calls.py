"""Whether an answer is a call of tools, written as the model's chat template writes one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from sgm_finetune.base.errors import UserError
from sgm_finetune.data.chat import written_answers
from sgm_finetune.results.stops import Stops

_ARGUMENTS = ("arguments", "parameters")
_DECODER = json.JSONDecoder()


class CallReader:
    """Reads calls in the form of a chat template, whatever that is: an answer is one if the template, given the calls
    whose JSON stands in the answer, writes the answer itself. White space does not count, and words may come first."""

    def __init__(self, tokenizer: Any, stops: Stops, tools: Sequence[list[dict[str, Any]] | None]):
        self._tokenizer, self._stops = tokenizer, stops
        self._tools = next((offered for offered in tools if offered), None)
        self._names = {tool["function"]["name"] for offered in tools for tool in offered or ()}

    def is_call(self, ids: Sequence[int]) -> bool:
        """Whether the answer of these tokens ends with a call."""
        text = self._text(ids)
        calls = list(found_calls(text, self._names))
        written = self._written(calls) if calls else None
        return written is not None and _squeezed(text).endswith(_squeezed(written))

    def _text(self, ids: Sequence[int]) -> str:
        """The answer with its special tokens, in which some templates write calls, and without what ends it."""
        hidden = (*self._stops.tokens, self._tokenizer.pad_token_id)
        kept = [token for token in ids if token not in hidden]
        return self._stops.cut(str(self._tokenizer.decode(kept, skip_special_tokens=False)))

    def _written(self, calls: list[dict[str, Any]]) -> str | None:
        """The calls as the template writes them, without the end of the turn; None where it refuses them."""
        asked = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": calls}]
        try:
            text, spans = written_answers(asked, self._tokenizer, self._tools)[-1]
        except UserError:
            return None
        begin, end = spans[-1]
        written = text[begin:end].rstrip()
        tokens = [str(self._tokenizer.convert_ids_to_tokens(token)) for token in self._stops.tokens]
        for stop in (*tokens, *self._stops.texts):
            written = written.removesuffix(stop).rstrip()
        return written


def found_calls(text: str, names: set[str]) -> Iterator[dict[str, Any]]:
    """The calls in a text, as messages have them: JSON with a name and arguments, or arguments behind one of `names`.

    >>> list(found_calls('say({"a": 1})', {"say"}))
    [{'type': 'function', 'function': {'name': 'say', 'arguments': {'a': 1}}}]
    """
    before = 0
    for begin, end, value in _json_values(text):
        for one in value if isinstance(value, list) else [value]:
            given = one.get("function", one) if isinstance(one, dict) else None
            if not isinstance(given, dict):
                continue
            arguments = next((given[key] for key in _ARGUMENTS if isinstance(given.get(key), dict)), None)
            if isinstance(given.get("name"), str) and arguments is not None:
                about = {"id": one["id"]} if isinstance(one.get("id"), str) else {}
                yield {**about, "type": "function", "function": {"name": given["name"], "arguments": arguments}}
            elif name := _last_name(text[before:begin], names):
                yield {"type": "function", "function": {"name": name, "arguments": given}}
        before = end


def _json_values(text: str) -> Iterator[tuple[int, int, Any]]:
    """(begin, end, value) of the JSON objects and lists in a text that are in no other one."""
    at = 0
    while at < len(text):
        if text[at] in "{[":
            try:
                value, end = _DECODER.raw_decode(text, at)
            except RecursionError:
                return
            except ValueError:
                at += 1
                continue
            yield at, end, value
            at = end
        else:
            at += 1


def _last_name(text: str, names: set[str]) -> str | None:
    """Which of `names` stands last in a text; of two at one place the longer."""
    places = [(text.rfind(name), len(name), name) for name in sorted(names) if name in text]
    return max(places)[2] if places else None


def _squeezed(text: str) -> str:
    return "".join(text.split())
