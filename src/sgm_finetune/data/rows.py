"""Turns tables into normalised rows: the column of each role, read and checked, with labels as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sgm_finetune.base.config import DECODER_TASKS, DataConfig, LabelKind, Role, Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.data import columns
from sgm_finetune.data.conversations import read_conversations, unread_columns
from sgm_finetune.data.labels import LabelReader, check_labels_given, is_unlabelled, read_tagged
from sgm_finetune.data.preferences import read_pairs, read_verdicts
from sgm_finetune.data.sources import Source, Split
from sgm_finetune.data.tables import Table

Rows = dict[str, list]
"""Column -> values, with the columns of `DataSplits`, and `row`: the table and the number of each row in it."""
Origin = tuple[str, int]


@dataclass
class Normalised:
    """What `normalise` finds."""

    rows: dict[Split, Rows]
    labels: tuple[str, ...] = ()
    """Class or tag names in id order."""
    label_kind: LabelKind | None = None
    notes: list[str] = field(default_factory=list)
    """For the description."""
    unread: list[str] = field(default_factory=list)
    """Columns that nothing reads."""


def normalise(source: Source, config: DataConfig, task: Task, labels: LabelReader | None = None) -> Normalised:
    """The rows of each split of the source, and what they are. `labels` knows the classes of earlier sources.

    Raises UserError for a split without text, and as data/columns.py and data/labels.py.
    """
    train = source.tables["train"]
    layout = columns.choose_layout(train, config.columns, task, config.format)
    rows: dict[Split, Rows] = {}
    labels, num_noted = labels or LabelReader(), len(labels.notes) if labels else 0
    notes: list[str] = []
    used: dict[Split, dict[Role, str]] = {}
    unread: dict[str, None] = {}
    num_empty = 0
    for split, table in source.tables.items():  # train first: it defines the classes
        column = columns.find_columns(table, layout, config.columns, task)
        if "label" in column and split != "train" and is_unlabelled(table, column["label"]):
            notes.append(f"{table.name} has no labels and is not used")
            continue
        texts, column = _read_rows(layout.name, table, column, config)
        used[split] = column
        unread |= dict.fromkeys(unread_columns(table, column))
        texts["row"] = [(table.name, number) for number in range(1, num_rows(texts) + 1)]
        if layout.name == "verdict":
            texts["label"] = read_verdicts(table, column["label"])
        elif "label" in column:
            texts["label"] = labels.read(table, column["label"], split, config.label_kind)
        if "tags" in column:
            texts["tags"] = labels.tag_ids(table, column["tags"], split, texts["tags"])
        if layout.roles == ("text",):
            filled = [index for index, text in enumerate(texts["text"]) if text.strip()]
            num_empty += num_rows(texts) - len(filled)
            texts = take(texts, filled)
        if not num_rows(texts):
            raise UserError(f"{table.name} ({split}) contains no text")
        rows[split] = texts
    _check_same_form(rows)
    if task in (*DECODER_TASKS, "reward") and not train.is_running_text:
        notes.append(f"format {layout.name} ({', '.join(f'`{name}`' for name in used['train'].values())})")
    if num_empty:
        notes.append(f"{num_empty:,} empty texts dropped")
    found = [*notes, *labels.notes[num_noted:]]
    return Normalised(rows, labels.names, labels.kind, found, list(unread))


def check_head(source: Source, config: DataConfig, task: Task) -> None:
    """Raises the UserErrors of `normalise` that the first rows of each table already show: its columns and texts."""
    layout = columns.choose_layout(source.tables["train"], config.columns, task, config.format)
    for table in source.tables.values():
        column = columns.find_columns(table, layout, config.columns, task)
        _read_rows(layout.name, table, column, config)
        if layout.name == "verdict":
            read_verdicts(table, column["label"])
        elif "label" in column:
            check_labels_given(table, column["label"], config.label_kind)


def _read_rows(layout: str, table: Table, column: dict[Role, str], config: DataConfig) -> tuple[Rows, dict[Role, str]]:
    """The rows of a table, without their labels; and the columns that are read."""
    match layout:
        case "chat" | "sharegpt":
            return read_conversations(table, column, layout), column
        case "alpaca":
            for role in ("instruction", "output"):
                columns.read_texts(table, column[role], may_be_empty=False)
            return read_conversations(table, column, layout), column
        case "completion" | "verdict":
            if _has_messages(table, column):
                return read_conversations(table, column, "completion"), column
            column = _without_messages(table, column, config)
        case "preference":
            return read_pairs(table, column, config.columns)
        case "tagged":
            tokens, tags = read_tagged(table, column["tokens"], column["tags"])
            return {"tokens": tokens, "tags": tags}, column
    may_be_empty = ("prompt", "text") if layout in ("completion", "verdict", "text") else ()
    return {
        role: columns.read_texts(table, name, may_be_empty=role in may_be_empty)
        for role, name in column.items()
        if role != "label"
    }, column


def _has_messages(table: Table, column: dict[Role, str]) -> bool:
    """Whether prompts and completions are lists of messages. Raises UserError when some are and others are not."""
    prompts, completions = (table.columns[column[role]][:] for role in ("prompt", "completion"))
    kinds = ("a text", "a list of messages")
    expected = isinstance(prompts[0], list)
    for number, pair in enumerate(zip(prompts, completions, strict=True), start=1):
        if any(isinstance(value, list) != expected for value in pair):
            asked, answered = (kinds[isinstance(value, list)] for value in pair)
            raise UserError(
                f"{table.name}, row {number}: `{column['prompt']}` is {asked} and `{column['completion']}` is "
                f"{answered}, where the first prompt is {kinds[expected]}; write all of them as texts, or all as "
                "lists of messages"
            )
    return expected


def _without_messages(table: Table, column: dict[Role, str], config: DataConfig) -> dict[Role, str]:
    """The columns of prompts and completions that are texts. Raises UserError when `data.columns` names others."""
    for role in ("system", "tools"):
        if role in config.columns:
            raise UserError(
                f"data.columns: {table.name} has texts as prompts, which cannot have `{role}`; write prompt and "
                "completion as lists of messages"
            )
    return {role: name for role, name in column.items() if role not in ("system", "tools")}


def _check_same_form(rows: dict[Split, Rows]) -> None:
    """Raises UserError when one split has conversations and another has texts."""
    with_messages = [split for split, texts in rows.items() if "messages" in texts]
    if with_messages and len(with_messages) < len(rows):
        other = next(split for split in rows if split not in with_messages)
        raise UserError(
            f"data.{with_messages[0]} has lists of messages and data.{other} has texts; write both in one form"
        )


def take(rows: Rows, indices: Sequence[int] | np.ndarray) -> Rows:
    """The rows at `indices`, in that order."""
    return {role: [values[index] for index in indices] for role, values in rows.items()}


def num_rows(rows: Rows) -> int:
    """The number of rows."""
    return len(next(iter(rows.values())))
