"""Reads conversations from the rows of a table: chat, ShareGPT, Alpaca, and lists of messages as prompt and completion.

A message becomes {role, content, ...} as a chat template reads it: calls as `tool_calls` with their arguments as
objects, `content` as one text, and every other field as the file has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sgm_finetune.base.config import Role
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import one_line, short_repr
from sgm_finetune.base.untrusted import check_bounded, parse_json
from sgm_finetune.data.columns import LAYOUTS, is_missing, read_texts
from sgm_finetune.data.tables import Table

Message = dict[str, Any]
"""One message of a conversation: its `role`, its `content`, and what else the chat template may read.

Two keys are not for the template. `weight`: 0 where the loss does not count the message. `function_call`: a call as
ShareGPT's text has it, for a template that writes no `tool_calls`."""

SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant",
    "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool", "ipython": "tool",
    "developer": "system",
}  # fmt: skip
"""Other names for the roles in a conversation."""
CALLERS = ("function_call", "tool_call", "tool_calls")
"""Names that ShareGPT has for a message that calls a function."""
KNOWN_SPEAKERS = ("system", "user", "assistant", "tool")
_WEIGHTS = ("weight", "train", "training")
"""Names of the field that says whether a message is learnt: OpenAI's 0 and 1, and the false and true of other tools."""
_READ_HERE = ("role", "from", "content", "value", *_WEIGHTS, "tool_calls", "function_call")
_ANSWERS_IN: dict[str, Role] = {"alpaca": "output", "completion": "completion"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the field for what the assistant thinks; Transformers gives a template the name that it reads."""
_SPOKEN = ("role", "content", *_REASONING, "tool_calls", "function_call")


def read_conversations(
    table: Table, column: Mapping[Role, str], layout: str, answered: bool = True
) -> dict[str, list[Any]]:
    """The `messages` of each row and, where a row has some, its `tools`.

    `column` is the column of each role of the layout. Raises UserError with the row of an invalid conversation and,
    with answered=True, of one without an answer to learn.
    """
    rows: dict[Role, Any] = {role: table.columns[name][:] for role, name in column.items()}
    conversations, tools = [], []
    for at in range(len(next(iter(rows.values())))):
        row: dict[Role, Any] = {role: values[at] for role, values in rows.items()}
        reader = RowReader(f"{table.name}, row {at + 1}", column, table.fills_nulls)
        try:
            messages = reader.conversation(row, layout)
            tools.append(reader.tools(row.get("tools")))
        except RecursionError:
            raise UserError(f"{reader.row} is nested too deeply; correct or remove the row") from None
        if answered and not any(answers(message) for message in messages):
            raise UserError(
                f"{reader.where(_ANSWERS_IN.get(layout, 'messages'))} has no answer by the assistant, so there is "
                "nothing to learn; correct or remove the row"
            )
        conversations.append(messages)
    return {"messages": conversations, **({"tools": tools} if any(tools) else {})}


def read_questions(table: Table, columns: Mapping[Role, str], answered: bool = False) -> list[Any] | None:
    """The conversations of a table without the answers at their ends; None if the table has no conversations.

    With answered=True, they keep the answers. `columns` is `data.columns`. A conversation with tools is {"messages",
    "tools"}, every other one a list of messages.
    """
    for layout in LAYOUTS["causal-lm"]:
        needed = layout.column(layout.roles[0], columns)
        if layout.name == "text" or needed not in table.columns:
            continue
        if layout.name == "completion" and not isinstance(table.columns[needed][:][0], list):
            continue
        if layout.name == "alpaca":
            read_texts(table, needed, may_be_empty=False)
        names: dict[Role, str] = {role: layout.column(role, columns) for role in (*layout.roles, *layout.optional)}
        there: dict[Role, str] = {role: name for role, name in names.items() if name in table.columns}
        read = read_conversations(table, there, layout.name, answered=False)
        tools = read.get("tools") or [None] * len(read["messages"])
        read["messages"] = [turns if answered else _question(turns) for turns in read["messages"]]
        return [
            {"messages": turns, "tools": offered} if offered else turns
            for turns, offered in zip(read["messages"], tools, strict=True)
        ]
    return None


def _question(turns: list[Message]) -> list[Message]:
    """The conversation without the answers at its end.

    >>> _question([{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}])
    [{'role': 'user', 'content': '1 + 1?'}]
    """
    end = len(turns)
    while end > 0 and turns[end - 1]["role"] == "assistant":
        end -= 1
    return turns[:end] if end > 0 else turns


def is_learnt(message: Message) -> bool:
    """Whether the loss counts the message: the assistant writes it, and its weight is not 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def answers(message: Message) -> bool:
    """Whether the loss counts the message and it says something."""
    return is_learnt(message) and bool(str(message.get("content") or "").strip() or message.get("tool_calls"))


def has_reasoning(messages: Sequence[Message]) -> bool:
    """Whether the assistant reasons before it answers: in a field of its own, or in its content."""
    return any(
        said["role"] == "assistant"
        and (any(key in said for key in _REASONING) or "</think>" in (said.get("content") or ""))
        for said in messages
    )


def spoken(messages: Sequence[Message]) -> list[Message]:
    """What is said in a conversation, without names, numbers and times of its messages: equal for duplicates."""
    found = []
    for message in messages:
        said = {key: message[key] for key in _SPOKEN if key in message}
        if "tool_calls" in said:
            said["tool_calls"] = [call["function"] for call in said["tool_calls"]]
        found.append(said)
    return found


def read_messages(text: str, where: str) -> list[Message]:
    """The messages that a JSON text holds; `where` says for errors where it stands."""
    return RowReader(where, {"messages": "messages"}, fills_nulls=False).messages("messages", {"messages": text})


class RowReader:
    """Reads one row; its errors name the row and the column."""

    def __init__(self, row: str, column: Mapping[Role, str], fills_nulls: bool):
        self.row, self.column, self.fills_nulls = row, column, fills_nulls

    def where(self, role: Role) -> str:
        return f"{self.row}: `{self.column[role]}`"

    def conversation(self, row: Mapping[Role, Any], layout: str) -> list[Message]:
        if layout == "completion":
            asked = [{**said, "weight": 0} if is_learnt(said) else said for said in self.messages("prompt", row)]
            answer = self.messages("completion", row) if "completion" in row else []
            return self.after_system(row.get("system"), [*asked, *answer], "prompt")
        if layout == "alpaca":
            what, given = row["instruction"], row.get("input")
            question = what if is_missing(given) or not str(given).strip() else f"{what}\n\n{given}"
            turn = [{"role": "user", "content": question}, {"role": "assistant", "content": row.get("output", "")}]
            return self.after_system(row.get("system"), [*self._history(row.get("history")), *turn], "history")
        return self.after_system(row.get("system"), self.messages("messages", row), "messages")

    def messages(self, role: Role, row: Mapping[Role, Any]) -> list[Message]:
        """The messages in the column of a role, also where they are written as a JSON text."""
        turns = self._parsed(row[role], self.where(role)) if is_json_list(row[role]) else row[role]
        if not isinstance(turns, list) or not turns:
            raise UserError(
                f"{self.where(role)} is {short_repr(turns)}, not a list of messages; "
                "write [{'role': ..., 'content': ...}]"
            )
        return [self._message(turn, f"{self.where(role)}, message {number}") for number, turn in enumerate(turns, 1)]

    def tools(self, value: Any) -> list[dict[str, Any]] | None:
        """The tools of a row as the list of {type, function} that chat templates read; None without tools."""
        if is_missing(value) or not value or (isinstance(value, str) and not value.strip()):
            return None
        where = self.where("tools")
        tools = self._parsed(value, where) if isinstance(value, str) else value
        tools = [tools] if isinstance(tools, dict) else tools
        if not isinstance(tools, list):
            raise UserError(f"{where} is {short_repr(tools)}, not a list of tools; correct it, or rename the column")
        found = []
        for tool in tools:
            tool = self._parsed(tool, where) if isinstance(tool, str) and tool.lstrip().startswith("{") else tool
            function = tool.get("function", tool) if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise UserError(
                    f"{where} holds {short_repr(tool)}, not a tool; write "
                    "{'type': 'function', 'function': {'name': ..., 'parameters': ...}}, or rename the column"
                )
            tool = self._plain(tool, where)
            found.append(tool if "function" in tool else {"type": "function", "function": tool})
        return found or None

    def after_system(self, system: Any, messages: list[Message], role: Role) -> list[Message]:
        """The messages behind the system message that the row has in a column of its own."""
        if is_missing(system) or system == "":
            return messages
        if not isinstance(system, str):
            raise UserError(f"{self.where('system')} is {short_repr(system)}, not a text; correct or remove the row")
        if messages[0]["role"] == "system":
            if messages[0].get("content") == system:
                return messages
            raise UserError(
                f"{self.where('system')} and `{self.column[role]}` have different system messages; keep one of them"
            )
        return [{"role": "system", "content": system}, *messages]

    def _history(self, value: Any) -> list[Message]:
        """The turns before an Alpaca row: pairs of question and answer, or messages."""
        if is_missing(value) or not value:
            return []
        where = self.where("history")
        turns = self._parsed(value, where) if isinstance(value, str) else value
        if not isinstance(turns, list):
            raise UserError(f"{where} is {short_repr(turns)}; write pairs [[question, answer], ...]")
        found: list[Message] = []
        for number, turn in enumerate(turns, start=1):
            if isinstance(turn, dict):
                found.append(self._message(turn, f"{where}, message {number}"))
            elif isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
                found += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
            else:
                raise UserError(f"{where}, turn {number} is {short_repr(turn)}; write [question, answer]")
        return found

    def _message(self, turn: Any, where: str) -> Message:
        if not isinstance(turn, dict):
            raise UserError(f"{where} is {short_repr(turn)}; write {{'role': ..., 'content': ...}}")
        role = _first(turn, "role", "from")
        role = SPEAKERS.get(str(role), role)
        given = _first(turn, "content", "value")
        if role in CALLERS:
            return self._caller(given, where) | self._weight(turn, where)
        if role not in KNOWN_SPEAKERS:
            raise UserError(f"{where} has the role {short_repr(role)}; known roles: {', '.join(KNOWN_SPEAKERS)}")
        calls = self._calls(_first(turn, "tool_calls", "function_call"), where)
        content = self._content(given, where)
        if content is None and not calls:
            raise UserError(
                f"{where} has the content {short_repr(given)}, which is not a text; write one, or remove the row"
            )
        message: Message = {"role": str(role), **({} if content is None else {"content": content})}
        if calls:
            message["tool_calls"] = calls
        others = {key: value for key, value in turn.items() if key not in _READ_HERE and not is_missing(value)}
        weight = self._weight(turn, where)
        return message | (self._plain(others, where) if others else {}) | (weight if role == "assistant" else {})

    def _content(self, value: Any, where: str) -> str | None:
        """The text of a message, with the parts of a divided one joined; None for a missing one."""
        if isinstance(value, str) or is_missing(value):
            return None if is_missing(value) else value
        if not isinstance(value, list):
            raise UserError(f"{where} has the content {short_repr(value)}, which is not a text")
        texts = []
        for part in value:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str) or (isinstance(part, dict) and "text" not in str(part.get("type", "text"))):
                kind = part.get("type") if isinstance(part, dict) else part
                raise UserError(
                    f"{where} has a part of the type {short_repr(kind)}; SGM reads parts of the type 'text' only"
                )
            texts.append(text)
        return "".join(texts)

    def _weight(self, turn: Mapping[str, Any], where: str) -> Message:
        """{"weight": 0} for a message that the loss does not count, else {}."""
        given = {name: turn[name] for name in _WEIGHTS if not is_missing(turn.get(name))}
        for name, value in given.items():
            if value not in (0, 1):
                raise UserError(f"{where} has the {name} {short_repr(value)}; write 1 to learn the message, 0 not to")
        return {"weight": 0} if 0 in given.values() else {}

    def _caller(self, value: Any, where: str) -> Message:
        """ShareGPT's message that calls a function: the call, or the text if it is none."""
        if isinstance(value, str):
            try:
                calls = self._calls(parse_json(value), where)
            except (ValueError, UserError):
                return {"role": "assistant", "content": value}
            text = value
        else:
            calls, text = self._calls(value, where), json.dumps(value, ensure_ascii=False)
        if not calls:
            raise UserError(f"{where} calls no function; write {{'name': ..., 'arguments': ...}}")
        return {"role": "assistant", "tool_calls": calls, "function_call": text}

    def _calls(self, value: Any, where: str) -> list[dict[str, Any]]:
        """The calls of a message as a list of {type, function: {name, arguments}}, the arguments as objects."""
        value = self._parsed(value, where) if isinstance(value, str) and value.strip() else value
        if is_missing(value) or not value:
            return []
        found = []
        for call in [value] if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            call = self._plain(call, where)
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise UserError(
                    f"{where} calls {short_repr(call)}; write {{'type': 'function', 'function': "
                    "{'name': ..., 'arguments': {...}}}"
                )
            about = {key: value for key, value in call.items() if key == "id" or "function" in call}
            found.append({**about, "type": "function", "function": self._function(function, where)})
        return found

    def _function(self, function: dict[str, Any], where: str) -> dict[str, Any]:
        """The name and the arguments of a call; OpenAI writes the arguments as a JSON text."""
        given = function.get("arguments")
        arguments = self._parsed(given, f"{where}, arguments") if isinstance(given, str) and given.strip() else given
        if not isinstance(arguments or {}, dict):
            raise UserError(
                f"{where} calls `{function['name']}` with {short_repr(given)}; write arguments as an object"
            )
        return {"name": function["name"], "arguments": arguments or {}}

    def _parsed(self, text: str, where: str) -> Any:
        """The value that a JSON text holds."""
        try:
            found = parse_json(text)
        except ValueError as error:
            reason = one_line(error).removeprefix("not JSON: ")
            raise UserError(
                f"{where} is {short_repr(text)}, which is not JSON: {reason}; write it as json.dumps does"
            ) from None
        return _checked(found, where)

    def _plain(self, value: Any, where: str) -> Any:
        """A nested value, checked; without the nulls that a table of fixed types fills in for keys that others have."""
        value = _checked(value, where)
        return _without_nulls(value) if self.fills_nulls else value


def _first(turn: Mapping[str, Any], *keys: str) -> Any:
    return next((turn[key] for key in keys if not is_missing(turn.get(key))), None)


def is_json_list(value: Any) -> bool:
    """Whether a value is a text that begins as a list of messages does in JSON."""
    return isinstance(value, str) and value.lstrip().startswith("[{")


def _checked(value: Any, where: str) -> Any:
    """A nested value that JSON can hold; dates and the like become texts. Raises UserError for any other value."""
    try:
        check_bounded(value, leaf=_check_leaf)
    except ValueError as error:
        raise UserError(f"{where}: {one_line(error)}; correct or remove the row") from None
    return _with_texts(value)


def _with_texts(value: Any) -> Any:
    match value:
        case dict():
            return {str(key): _with_texts(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_with_texts(inner) for inner in value]
        case None | bool() | int() | float() | str():
            return value
    return str(value)


def _check_leaf(value: Any) -> None:
    """Raises ValueError for a value that JSON cannot hold."""
    match value:
        case None | bool():
            return
        case int():
            if not -(2**63) <= value < 2**63:
                raise ValueError("an integer has more than 64 bits")
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{value} is not a number in JSON")
        case str():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("a text has half of a surrogate pair (\\ud8..), which is not a character") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def unread_columns(table: Table, column: Mapping[Role, str]) -> Iterator[str]:
    """The columns of a table that no role reads."""
    return (name for name in table.columns if name not in column.values())
