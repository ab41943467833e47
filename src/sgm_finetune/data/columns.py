"""Finds the column of each role in a table, and reads texts and conversations from it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sgm_finetune.base.config import Role, Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import short_repr
from sgm_finetune.data.hints import describe_columns, is_headless, propose_columns
from sgm_finetune.data.tables import Table


@dataclass(frozen=True)
class Layout:
    """A way to write a row: the roles that its columns have."""

    name: str
    roles: tuple[Role, ...]
    optional: tuple[Role, ...] = ()
    """Roles that a row may leave out."""
    columns: Mapping[Role, str] = field(default_factory=dict)
    """Default column of each role whose column does not have the role's name."""
    is_named: bool = False
    """Whether data.format names the layout."""

    def column(self, role: Role, chosen: Mapping[Role, str]) -> str:
        """The column of a role: the chosen one (`data.columns`), else the default."""
        return chosen.get(role) or self.columns.get(role, role)


LAYOUTS: dict[Task, tuple[Layout, ...]] = {
    "causal-lm": (
        Layout("chat", ("messages",), ("system", "tools")),
        Layout("sharegpt", ("messages",), ("system", "tools"), columns={"messages": "conversations"}),
        Layout("alpaca", ("instruction", "output"), ("input", "system", "history", "tools")),
        Layout("completion", ("prompt", "completion"), ("system", "tools")),
        Layout("text", ("text",)),
    ),
    "sequence-classification": (Layout("labelled", ("text", "label"), ("text_pair",)),),
    "token-classification": (Layout("tagged", ("tokens", "tags")),),
    "seq2seq-lm": (Layout("pairs", ("source", "target")),),
    "preference": (
        Layout("preference", ("chosen", "rejected"), ("prompt", "system", "tools")),
        Layout("verdict", ("prompt", "completion", "label"), ("system", "tools")),
    ),
    "reward": (Layout("preference", ("chosen", "rejected"), ("prompt", "system", "tools")),),
}
"""The layouts of each task, in the order in which SGM tries them."""


def choose_layout(table: Table, columns: Mapping[Role, str], task: Task, format: str = "auto") -> Layout:
    """The layout that `format` (`data.format`) names, else the first layout whose columns the table has.

    Returns the last possible layout when no layout fits; `find_columns` then names the missing column. Raises UserError
    when `columns` or `format` does not go with the task.
    """
    layouts = LAYOUTS[task]
    needed: list[Role] = [role for layout in layouts for role in layout.roles]
    known: list[Role] = list(dict.fromkeys([*needed, *(role for layout in layouts for role in layout.optional)]))
    for role in columns:
        if role not in known:
            raise UserError(f"data.columns: model.task={task} has no role `{role}`; its roles are {', '.join(known)}")
    if format != "auto" and task != "causal-lm":
        raise UserError(f"data.format={format} needs model.task=causal-lm, not {task}; leave it out")
    if table.is_running_text and task != "causal-lm":
        raise UserError(
            f"{table.name} is running text, which model.task={task} cannot learn from; use it with "
            "model.task=causal-lm, or give rows (csv, tsv, json, jsonl, parquet)"
        )
    fitting = [layout for layout in layouts if set(columns) <= {*layout.roles, *layout.optional}]
    if not fitting:
        raise UserError(
            f"data.columns: `{'`, `'.join(columns)}` belong to different formats; keep the roles of one format"
        )
    if format != "auto":
        named = next(layout for layout in layouts if layout.name == format)
        if named not in fitting:
            stray = next(role for role in columns if role not in (*named.roles, *named.optional))
            raise UserError(
                f"data.columns: data.format={format} has no role `{stray}`; its roles are {', '.join(named.roles)}"
            )
        return replace(named, is_named=True)
    for layout in fitting:
        if all(layout.column(role, columns) in table.columns for role in layout.roles) and _has_format(
            layout, table, columns
        ):
            return layout
    if task == "reward" and {"prompt", "completion", "label"} <= set(table.columns):
        raise UserError(
            f"model.task=reward learns from pairs (chosen, rejected), and {table.name} has single answers with a "
            "label; take model.task=preference preference.loss=kto, or make pairs of them"
        )
    return fitting[-1]  # whose missing column is what the error names


def _has_format(layout: Layout, table: Table, columns: Mapping[Role, str]) -> bool:
    """Whether the messages are not ShareGPT's, for the layout chat. True for other layouts."""
    if layout.name != "chat":
        return True
    rows = table.columns[layout.column("messages", columns)][:]
    first = next((row[0] for row in rows if isinstance(row, list) and row and isinstance(row[0], dict)), None)
    return first is None or "from" not in first


def find_columns(table: Table, layout: Layout, columns: Mapping[Role, str], task: Task) -> dict[Role, str]:
    """The column of each role of a layout of `task`: the one in `columns` (`data.columns`), else the default.

    Raises UserError when the table lacks a column, or when two roles have the same column.
    """
    there = list(table.columns)
    found: dict[Role, str] = {}
    for role in (*layout.roles, *layout.optional):
        name = layout.column(role, columns)
        if role == "tools" and role not in columns and name not in there:
            name = "functions"  # OpenAI's older name
        if name in there:
            found[role] = name
            continue
        if role in layout.optional and role not in columns:
            continue
        has = f"(has: {', '.join(there)})"
        if role in columns:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.6)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise UserError(f"data.columns: {table.name} has no column `{name}` for {role} {has}{hint}")
        if len(there) == 1 and re.search("[;\t|]", there[0]):  # a file is read so, a folder is not
            raise UserError(f"{table.name} has the column `{there[0]}` alone; separate the fields with commas")
        raise UserError(f"{table.name} has no column `{name}` {has}; {_remedy(table, layout, columns, task)}")
    if len(set(found.values())) < len(found):
        raise UserError(f"data.columns: `{'` and `'.join(found)}` name the same column `{found[layout.roles[0]]}`")
    return found


def _remedy(table: Table, layout: Layout, columns: Mapping[Role, str], task: Task) -> str:
    """What to give for a table that lacks a column of `layout`: what its columns look like."""
    if is_headless(table):
        return f"its first line looks like a row, so write the names above it: {', '.join(layout.roles)}"
    found = propose_columns(table, task, layout.roles, columns, layout.is_named)
    if found is None:
        possible = (layout,) if layout.is_named or columns else LAYOUTS[task]
        roles = " or ".join(dict.fromkeys(", ".join(known.roles) for known in possible))
        return f"say with data.columns which of them are {roles}"
    likely, chosen = found
    named: dict[Role, str] = {role: column for role, column in chosen.items() if role != column}
    given = [f"model.task={likely}"] if likely != task else []
    given += [describe_columns(named)] if named else []
    return f"{'its columns look like' if likely != task else 'name it with'} {' '.join(given)}"


def is_missing(value: Any) -> bool:
    """Whether a table has no value here: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_texts(table: Table, column: str, may_be_empty: bool) -> list[str]:
    """The texts of a column, unchanged. Raises UserError with the row of a missing, empty or other value."""
    texts = table.columns[column][:]
    for row, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            what = "is missing" if is_missing(text) else f"is {short_repr(text)}, not a text"
            raise UserError(f"{table.name}, row {row}: `{column}` {what}; correct or remove the row")
        if not may_be_empty and not text.strip():
            raise UserError(f"{table.name}, row {row}: `{column}` is empty; correct or remove the row")
    return list(texts)
