"""Tables -> normalised rows: which column plays which role, values checked, labels turned into classes or numbers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgm_finetune.base.config import Role, Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import short_repr
from sgm_finetune.data.tables import Table


@dataclass(frozen=True)
class Layout:
    """How a row is written: the roles that it fills."""

    name: str
    roles: tuple[Role, ...]
    optional: tuple[Role, ...] = ()
    """Roles that are filled where the table has a column for them."""
    columns: Mapping[Role, str] = field(default_factory=dict)
    """Columns that roles are looked for in, where that is not the role's own name."""

    def column(self, role: Role, chosen: Mapping[Role, str]) -> str:
        return chosen.get(role) or self.columns.get(role, role)


LAYOUTS: dict[Task, tuple[Layout, ...]] = {
    "causal-lm": (
        Layout("chat", ("messages",)),
        Layout("sharegpt", ("messages",), columns={"messages": "conversations"}),
        Layout("alpaca", ("instruction", "output"), ("input",)),
        Layout("completion", ("prompt", "completion")),
        Layout("text", ("text",)),
    ),
    "sequence-classification": (Layout("labelled", ("text", "label"), ("text_pair",)),),
    "token-classification": (Layout("tagged", ("tokens", "tags")),),
    "seq2seq-lm": (Layout("pairs", ("source", "target")),),
}
"""The layouts of each task, those that are recognised first before the others."""

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant"}
"""Other names of the roles in a conversation."""
KNOWN_SPEAKERS = ("system", "user", "assistant", "tool")


def choose_layout(table: Table, columns: Mapping[Role, str], task: Task, format: str = "auto") -> Layout:
    """The layout that `data.format` names, or the first whose columns are there."""
    layouts = LAYOUTS[task]
    known: list[Role] = list(dict.fromkeys(role for layout in layouts for role in (*layout.roles, *layout.optional)))
    for role in columns:
        if role not in known:
            raise UserError(
                f"data.columns: role `{role}` has no place in model.task={task}, which takes {', '.join(known)}"
            )
    if format != "auto" and task != "causal-lm":
        raise UserError(f"data.format={format} goes with model.task=causal-lm, not with {task}; leave it out")
    if table.is_running_text and task != "causal-lm":
        raise UserError(
            f"{table.name} is running text, which model.task={task} cannot learn from; use it with "
            "model.task=causal-lm, or give rows (csv, tsv, json, jsonl, parquet)"
        )
    fitting = [layout for layout in layouts if set(columns) <= {*layout.roles, *layout.optional}]
    if not fitting:
        raise UserError(f"data.columns: `{'`, `'.join(columns)}` belong to different formats; keep those of one")
    if format != "auto":
        named = next(layout for layout in layouts if layout.name == format)
        if named not in fitting:
            stray = next(role for role in columns if role not in (*named.roles, *named.optional))
            raise UserError(f"data.columns: data.format={format} has no `{stray}`, it takes {', '.join(named.roles)}")
        return named
    for layout in fitting:
        if all(layout.column(role, columns) in table.columns for role in layout.roles) and _speaks(
            layout, table, columns
        ):
            return layout
    return fitting[-1]  # whose missing column is what the error names


def _speaks(layout: Layout, table: Table, columns: Mapping[Role, str]) -> bool:
    """Chat and ShareGPT may have the same column; the keys of a message tell them apart."""
    if "messages" not in layout.roles:
        return True
    rows = table.columns[layout.column("messages", columns)][:]
    first = next((row[0] for row in rows if isinstance(row, list) and row and isinstance(row[0], dict)), None)
    return first is None or (("from" in first) == (layout.name == "sharegpt"))


def find_columns(table: Table, layout: Layout, columns: Mapping[Role, str]) -> dict[Role, str]:
    """The column of each role: the one that `data.columns` names, else the layout's own."""
    there = list(table.columns)
    found: dict[Role, str] = {}
    for role in (*layout.roles, *layout.optional):
        name = layout.column(role, columns)
        if name in there:
            found[role] = name
            continue
        if role in layout.optional and role not in columns:
            continue
        has = f"(has: {', '.join(there)})"
        if role in columns:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.6)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise UserError(f"data.columns: `{name}` for {role} is no column of {table.name} {has}{hint}")
        free = [column for column in there if column not in found.values() and column not in columns.values()]
        example = (difflib.get_close_matches(role, free, n=1) or free or ["..."])[0]
        raise UserError(
            f"{table.name} has no column `{name}` {has}; say which with data.columns='{{{role}: {example}}}'"
        )
    if len(set(found.values())) < len(found):
        raise UserError(f"data.columns: `{' and '.join(found)}` are the same column `{found[layout.roles[0]]}`")
    return found


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_texts(table: Table, column: str, may_be_empty: bool) -> list[str]:
    """The column's texts as they are; a missing value, or one that is no text, raises with its row."""
    texts = table.columns[column][:]
    for row, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            what = "is missing" if is_missing(text) else f"is {short_repr(text)}, no text"
            raise UserError(f"{table.name}, row {row}: `{column}` {what}; correct or remove the row")
        if not may_be_empty and not text.strip():
            raise UserError(f"{table.name}, row {row}: `{column}` is empty; correct or remove the row")
    return list(texts)


def read_inputs(table: Table, column: str) -> list[str]:
    """Texts of an optional column: a missing value is an empty text."""
    return ["" if is_missing(text) else str(text) for text in table.columns[column][:]]


Message = dict[str, str]


def read_conversations(table: Table, column: str, answered: bool = True) -> list[list[Message]]:
    """Conversations as lists of {role, content}, from those or from ShareGPT's {from, value}. Raises with the row for
    what is no conversation, and, where they have to be `answered`, for one in which the assistant says nothing."""
    conversations = []
    for row, turns in enumerate(table.columns[column][:], start=1):
        where = f"{table.name}, row {row}: `{column}`"
        if not isinstance(turns, list) or not turns:
            raise UserError(
                f"{where} is {short_repr(turns)}, no list of messages; write [{{'role': ..., 'content': ...}}]"
            )
        messages = [_message(turn, where, number) for number, turn in enumerate(turns, start=1)]
        if answered and all(message["role"] != "assistant" or not message["content"].strip() for message in messages):
            raise UserError(f"{where} has no answer of the assistant, so nothing to learn; correct or remove the row")
        conversations.append(messages)
    return conversations


def _message(turn: Any, where: str, number: int) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}, message {number} is {short_repr(turn)}; write {{'role': ..., 'content': ...}}")
    role, content = (turn.get(a, turn.get(b)) for a, b in (("role", "from"), ("content", "value")))
    role = SPEAKERS.get(str(role), role)
    if role not in KNOWN_SPEAKERS:
        raise UserError(f"{where}, message {number} is by {short_repr(role)}; known: {', '.join(KNOWN_SPEAKERS)}")
    if not isinstance(content, str):
        raise UserError(f"{where}, message {number} has the content {short_repr(content)}, no text")
    return {"role": str(role), "content": content}


def alpaca_conversations(
    instruction: Sequence[str], input: Sequence[str], output: Sequence[str]
) -> list[list[Message]]:
    """Alpaca's rows as conversations.

    >>> alpaca_conversations(["Add."], ["1 + 1"], ["2"])[0][0]
    {'role': 'user', 'content': 'Add.\\n\\n1 + 1'}
    """
    return [
        [
            {"role": "user", "content": f"{what}\n\n{given}" if given.strip() else what},
            {"role": "assistant", "content": answer},
        ]
        for what, given, answer in zip(instruction, input, output, strict=True)
    ]
