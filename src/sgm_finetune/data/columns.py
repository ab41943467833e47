"""Tables -> normalised rows: which column plays which role, texts checked, labels turned into class names."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sgm_finetune.config import Task
from sgm_finetune.data.tables import Table
from sgm_finetune.errors import UserError

Role = Literal["text", "label", "prompt", "completion"]

ROLES: dict[Task, tuple[Role, ...]] = {
    "sequence-classification": ("text", "label"),
    "causal-lm": ("text", "prompt", "completion"),
}


def choose_roles(table: Table, columns: Mapping[Role, str], task: Task) -> tuple[Role, ...]:
    """The roles to fill: (text, label), (text,) or (prompt, completion)."""
    for role in columns:
        if role not in ROLES[task]:
            raise UserError(
                f"data.columns: role `{role}` has no place in model.task={task}, which takes {', '.join(ROLES[task])}"
            )
    if task == "sequence-classification":
        if table.is_running_text:
            raise UserError(
                f"{table.name} is running text without labels; use it with model.task=causal-lm, "
                "or give labelled data (csv, tsv, json, jsonl, parquet)"
            )
        return ("text", "label")
    paired = "prompt" in columns or "completion" in columns
    if paired and "text" in columns:
        raise UserError("data.columns: give `text`, or `prompt` and `completion`, not both")
    if paired or ("text" not in columns and {"prompt", "completion"} <= table.columns.keys()):
        return ("prompt", "completion")
    return ("text",)


def find_columns(table: Table, roles: Sequence[Role], columns: Mapping[Role, str]) -> dict[Role, str]:
    """The column of each role: the one that `data.columns` names, else the one of the role's own name."""
    there = list(table.columns)
    found: dict[Role, str] = {}
    for role in roles:
        name = columns.get(role, role)
        if name in there:
            found[role] = name
            continue
        has = f"(has: {', '.join(there)})"
        if role in columns:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.6)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise UserError(f"data.columns: `{name}` for {role} is no column of {table.name} {has}{hint}")
        free = [column for column in there if column not in found.values() and column not in columns.values()]
        example = (difflib.get_close_matches(role, free, n=1) or free or ["..."])[0]
        raise UserError(
            f"{table.name} has no column `{role}` {has}; say which with data.columns='{{{role}: {example}}}'"
        )
    if len(set(found.values())) < len(found):
        raise UserError(f"data.columns: `{' and '.join(found)}` are the same column `{found[roles[0]]}`")
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


def is_unlabelled(table: Table, column: str) -> bool:
    """Whether every label is the -1 by which published test sets withhold them."""
    return column in table.class_names and all(value in (-1, None) for value in table.columns[column][:])


def read_labels(table: Table, column: str) -> list[str]:
    """The class name of each row, whatever type the column has; raises with the row for what is no class."""
    known = table.class_names.get(column)
    names = []
    for row, value in enumerate(table.columns[column][:], start=1):
        if known is not None and isinstance(value, int):
            value = known[value] if 0 <= value < len(known) else None
        if _is_missing(value) or (isinstance(value, str) and not value.strip()):
            raise UserError(f"{table.name}, row {row} has no label in `{column}`; fill it in or remove the row")
        if isinstance(value, float):
            raise _no_regression(table, column, row, value)
        if not isinstance(value, bool | int | str):
            raise UserError(f"{table.name}, row {row}: label {_short(value)} is no name and no integer")
        names.append(str(value).strip())
    if known is None and all(map(_is_number, names)) and not all(map(_is_integer, names)):
        row = next(row for row, name in enumerate(names) if not _is_integer(name))
        raise _no_regression(table, column, row + 1, names[row])
    return names


def class_names(table: Table, column: str, labels: Sequence[str]) -> tuple[str, ...]:
    """The classes of the training data in id order: as its feature declares them, else sorted, integers as numbers."""
    names = table.class_names.get(column)
    if names is None:
        numeric = all(map(_is_integer, labels))
        names = sorted(set(labels), key=lambda name: (int(name) if numeric else 0, name))
    if len(set(labels)) < 2:
        raise UserError(
            f"{table.name}: every label in `{column}` is {labels[0]!r}; classification needs two classes or more"
        )
    if len(names) > max(20, len(labels) // 2):
        raise UserError(
            f"{table.name}: `{column}` has {len(names):,} different values in {len(labels):,} rows; "
            "is it the label? Say which is with data.columns"
        )
    return tuple(names)


def label_ids(table: Table, split: str, labels: Sequence[str], names: Sequence[str]) -> list[int]:
    """Class names as ids; one that the training data lacks raises."""
    ids = {name: index for index, name in enumerate(names)}
    for row, label in enumerate(labels, start=1):
        if label not in ids:
            known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise UserError(
                f"{table.name}, row {row} ({split}): label {label!r} is not in the training data (known: {known})"
            )
    return [ids[label] for label in labels]


def _no_regression(table: Table, column: str, row: int, value: Any) -> UserError:
    return UserError(
        f"{table.name}, row {row}: label {value} in `{column}` is a fractional number; regression is not supported, "
        "write classes as names or integers"
    )


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_integer(name: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", name) is not None


def _is_number(name: str) -> bool:
    return re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", name) is not None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
