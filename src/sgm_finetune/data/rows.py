"""Turns tables into normalised rows: the column of each role, read and checked, with labels as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sgm_finetune.base.config import DataConfig, LabelKind, Role, Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.data import columns
from sgm_finetune.data.labels import LabelReader, check_labels_given, is_unlabelled, read_tagged
from sgm_finetune.data.sources import Source, Split
from sgm_finetune.data.tables import Table

Rows = dict[str, list]
"""Column -> values, with the columns of `DataSplits`."""


def normalise(
    source: Source, config: DataConfig, task: Task
) -> tuple[dict[Split, Rows], tuple[str, ...], LabelKind | None, list[str]]:
    """The rows of each split of the source, the class names, the label kind, and notes for the description.

    Raises UserError for a split without text, and as data/columns.py and data/labels.py.
    """
    train = source.tables["train"]
    layout = columns.choose_layout(train, config.columns, task, config.format)
    rows: dict[Split, Rows] = {}
    labels = LabelReader()
    notes: list[str] = []
    num_empty = 0
    for split, table in source.tables.items():  # train first: it defines the classes
        column = columns.find_columns(table, layout, config.columns)
        if "label" in column and split != "train" and is_unlabelled(table, column["label"]):
            notes.append(f"{table.name} has no labels and is not used")
            continue
        texts = _read_rows(layout.name, table, column)
        if "label" in column:
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
    if task == "causal-lm" and not train.is_running_text:
        there = columns.find_columns(train, layout, config.columns)
        notes.append(f"format {layout.name} ({', '.join(f'`{name}`' for name in there.values())})")
    if num_empty:
        notes.append(f"{num_empty:,} empty texts dropped")
    return rows, labels.names, labels.kind, [*notes, *labels.notes]


def check_head(source: Source, config: DataConfig, task: Task) -> None:
    """Raises the UserErrors of `normalise` that the first rows of each table already show: its columns and texts."""
    layout = columns.choose_layout(source.tables["train"], config.columns, task, config.format)
    for table in source.tables.values():
        column = columns.find_columns(table, layout, config.columns)
        _read_rows(layout.name, table, column)
        if "label" in column:
            check_labels_given(table, column["label"], config.label_kind)


def _read_rows(layout: str, table: Table, column: dict[Role, str]) -> Rows:
    """The rows of a table, without their labels."""
    match layout:
        case "chat" | "sharegpt":
            return {"messages": columns.read_conversations(table, column["messages"])}
        case "alpaca":
            what, answers = (columns.read_texts(table, column[role], False) for role in ("instruction", "output"))
            given = columns.read_inputs(table, column["input"]) if "input" in column else [""] * len(what)
            return {"messages": columns.alpaca_conversations(what, given, answers)}
        case "tagged":
            tokens, tags = read_tagged(table, column["tokens"], column["tags"])
            return {"tokens": tokens, "tags": tags}
    may_be_empty = ("prompt", "text") if layout in ("completion", "text") else ()
    return {
        role: columns.read_texts(table, name, may_be_empty=role in may_be_empty)
        for role, name in column.items()
        if role != "label"
    }


def take(rows: Rows, indices: Sequence[int] | np.ndarray) -> Rows:
    """The rows at `indices`, in that order."""
    return {role: [values[index] for index in indices] for role, values in rows.items()}


def num_rows(rows: Rows) -> int:
    """The number of rows."""
    return len(next(iter(rows.values())))
