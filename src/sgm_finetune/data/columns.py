"""Tables -> normalised rows: which column plays which role, values checked, labels turned into classes or numbers."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgm_finetune.base.config import LabelKind, Role, Task
from sgm_finetune.base.errors import UserError
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


def read_texts(table: Table, column: str, may_be_empty: bool) -> list[str]:
    """The column's texts as they are; a missing value, or one that is no text, raises with its row."""
    texts = table.columns[column][:]
    for row, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            what = "is missing" if _is_missing(text) else f"is {_short(text)}, no text"
            raise UserError(f"{table.name}, row {row}: `{column}` {what}; correct or remove the row")
        if not may_be_empty and not text.strip():
            raise UserError(f"{table.name}, row {row}: `{column}` is empty; correct or remove the row")
    return list(texts)


def read_inputs(table: Table, column: str) -> list[str]:
    """Texts of an optional column: a missing value is an empty text."""
    return ["" if _is_missing(text) else str(text) for text in table.columns[column][:]]


Message = dict[str, str]


def read_conversations(table: Table, column: str, answered: bool = True) -> list[list[Message]]:
    """Conversations as lists of {role, content}, from those or from ShareGPT's {from, value}. Raises with the row for
    what is no conversation, and, where they have to be `answered`, for one in which the assistant says nothing."""
    conversations = []
    for row, turns in enumerate(table.columns[column][:], start=1):
        where = f"{table.name}, row {row}: `{column}`"
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{where} is {_short(turns)}, no list of messages; write [{{'role': ..., 'content': ...}}]")
        messages = [_message(turn, where, number) for number, turn in enumerate(turns, start=1)]
        if answered and all(message["role"] != "assistant" or not message["content"].strip() for message in messages):
            raise UserError(f"{where} has no answer of the assistant, so nothing to learn; correct or remove the row")
        conversations.append(messages)
    return conversations


def _message(turn: Any, where: str, number: int) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}, message {number} is {_short(turn)}; write {{'role': ..., 'content': ...}}")
    role, content = (turn.get(a, turn.get(b)) for a, b in (("role", "from"), ("content", "value")))
    role = SPEAKERS.get(str(role), role)
    if role not in KNOWN_SPEAKERS:
        raise UserError(f"{where}, message {number} is by {_short(role)}; known: {', '.join(KNOWN_SPEAKERS)}")
    if not isinstance(content, str):
        raise UserError(f"{where}, message {number} has the content {_short(content)}, no text")
    return {"role": str(role), "content": content}


def instructions(instruction: Sequence[str], input: Sequence[str], output: Sequence[str]) -> list[list[Message]]:
    """Alpaca's rows as conversations.

    >>> instructions(["Add."], ["1 + 1"], ["2"])[0][0]
    {'role': 'user', 'content': 'Add.\\n\\n1 + 1'}
    """
    return [
        [
            {"role": "user", "content": f"{what}\n\n{given}" if given.strip() else what},
            {"role": "assistant", "content": answer},
        ]
        for what, given, answer in zip(instruction, input, output, strict=True)
    ]


def is_unlabelled(table: Table, column: str) -> bool:
    """Whether every label is the -1 by which published test sets withhold them."""
    return column in table.class_names and all(value in (-1, None) for value in table.columns[column][:])


def label_kind(table: Table, column: str, asked: str) -> LabelKind:
    """What `data.label_kind` says, or the values: lists are classes, fractional numbers numbers, all else a class."""
    if asked != "auto":
        return asked  # type: ignore[return-value]
    if column in table.class_names:
        return "class"
    values = [value for value in table.columns[column][:] if not _is_missing(value)]
    if any(isinstance(value, list) for value in values):
        return "classes"
    names = [str(value).strip() for value in values]
    if values and all(map(_is_number, names)) and not all(map(_is_integer, names)):
        if all(float(name).is_integer() for name in names):
            raise UserError(
                f"{table.name}: `{column}` holds {names[0]}, which can be a class or a number to predict; say "
                "data.label_kind=class or data.label_kind=number"
            )
        return "number"
    return "class"


def read_labels(table: Table, column: str) -> list[str]:
    """The class name of each row, whatever type the column has; raises with the row for what is no class."""
    known = table.class_names.get(column)
    names = []
    for row, value in enumerate(table.columns[column][:], start=1):
        value = _named(value, known)
        if _is_missing(value) or (isinstance(value, str) and not value.strip()):
            raise UserError(f"{table.name}, row {row} has no label in `{column}`; fill it in or remove the row")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, bool | int | str):
            raise UserError(
                f"{table.name}, row {row}: label {_short(value)} in `{column}` is no name and no integer; "
                "data.label_kind says what labels are"
            )
        names.append(str(value).strip())
    return names


def read_numbers(table: Table, column: str) -> list[float]:
    """The number of each row; raises with the row for what is none."""
    numbers = []
    for row, value in enumerate(table.columns[column][:], start=1):
        text = str(value).strip()
        if isinstance(value, bool) or not _is_number(text) or not math.isfinite(float(text)):
            what = "has no label" if _is_missing(value) or not text else f"has the label {_short(value)}, no number,"
            raise UserError(f"{table.name}, row {row} {what} in `{column}`; correct or remove the row")
        numbers.append(float(text))
    return numbers


def read_label_sets(table: Table, column: str) -> list[list[str]]:
    """The class names of each row: a list, or a text that commas divide; none is possible."""
    known = table.class_names.get(column)
    sets = []
    for row, value in enumerate(table.columns[column][:], start=1):
        if isinstance(value, str):
            value = [name for name in value.split(",") if name.strip()]
        if not isinstance(value, list):
            what = "is missing" if _is_missing(value) else f"is {_short(value)}, no list"
            raise UserError(f"{table.name}, row {row}: `{column}` {what}; write a list of names, [] for none")
        names = [_named(name, known) for name in value]
        if not all(isinstance(name, str | int) and str(name).strip() for name in names):
            raise UserError(f"{table.name}, row {row}: `{column}` holds {_short(value)}; write a list of names")
        sets.append([str(name).strip() for name in names])
    return sets


def class_names(table: Table, column: str, labels: Sequence[str], num_rows: int | None = None) -> tuple[str, ...]:
    """The classes of the training data in id order: as its feature declares them, else sorted, integers as numbers."""
    names = table.class_names.get(column)
    if names is None:
        numeric = all(map(_is_integer, labels))
        names = sorted(set(labels), key=lambda name: (int(name) if numeric else 0, name))
    if len(set(labels)) < 2:
        what = f"every label in `{column}` is {labels[0]!r}" if labels else f"`{column}` holds no label at all"
        raise UserError(f"{table.name}: {what}; classification needs two classes or more")
    if len(names) > max(20, (num_rows or len(labels)) // 2):
        raise UserError(
            f"{table.name}: `{column}` has {len(names):,} different values in {num_rows or len(labels):,} rows; "
            "is it the label? Say which is with data.columns (numbers to predict: data.label_kind=number)"
        )
    return tuple(names)


def label_ids(table: Table, split: str, labels: Sequence[str], names: Sequence[str]) -> list[int]:
    """Class names as ids; one that the training data lacks raises."""
    ids = {name: index for index, name in enumerate(names)}
    return [_label_id(label, ids, table, split, row) for row, label in enumerate(labels, start=1)]


def label_vectors(table: Table, split: str, sets: Sequence[Sequence[str]], names: Sequence[str]) -> list[list[float]]:
    """Sets of class names as vectors of 0 and 1; a name that the training data lacks raises."""
    ids = {name: index for index, name in enumerate(names)}
    vectors = []
    for row, labels in enumerate(sets, start=1):
        chosen = {_label_id(label, ids, table, split, row) for label in labels}
        vectors.append([float(index in chosen) for index in range(len(names))])
    return vectors


def _label_id(label: str, ids: Mapping[str, int], table: Table, split: str, row: int) -> int:
    if label not in ids:
        known = ", ".join(list(ids)[:10]) + (", ..." if len(ids) > 10 else "")
        raise UserError(
            f"{table.name}, row {row} ({split}): label {label!r} is not in the training data (known: {known})"
        )
    return ids[label]


def read_tagged(table: Table, tokens: str, tags: str) -> tuple[list[list[str]], list[list[str]]]:
    """Words and the tag of each; raises with the row for what is no list of words with as many tags."""
    known = table.class_names.get(tags)
    words, names = [], []
    for row, (left, right) in enumerate(zip(table.columns[tokens][:], table.columns[tags][:], strict=True), start=1):
        for column, value in ((tokens, left), (tags, right)):
            if not isinstance(value, list) or not value:
                raise UserError(
                    f"{table.name}, row {row}: `{column}` is {_short(value)}; token classification needs a list of "
                    "words and one of their tags (json, jsonl, parquet)"
                )
        if len(left) != len(right):
            raise UserError(f"{table.name}, row {row} has {len(left)} words in `{tokens}` and {len(right)} `{tags}`")
        if not all(isinstance(word, str) and word.strip() for word in left):
            raise UserError(f"{table.name}, row {row}: `{tokens}` holds {_short(left)}; write words")
        tagged = [_named(tag, known) for tag in right]
        if not all(isinstance(tag, str | int) and str(tag).strip() for tag in tagged):
            raise UserError(f"{table.name}, row {row}: `{tags}` holds {_short(right)}; write names")
        words.append(left)
        names.append([str(tag).strip() for tag in tagged])
    return words, names


def _named(value: Any, names: Sequence[str] | None) -> Any:
    """The name that an integer stands for in a column with `class_names` (None: for none of them); else the value."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_integer(name: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", name) is not None


def _is_number(name: str) -> bool:
    return re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", name) is not None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
