"""What the columns of a table look like: the `data.columns`, and perhaps the task, that a message proposes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sgm_finetune.base.config import Role, Task
from sgm_finetune.base.untrusted import Written
from sgm_finetune.data.tables import Table

NAMES: dict[Role, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "chat", "dialog", "dialogue", "turns"),
    "instruction": ("instruction", "question", "query", "prompt", "problem"),
    "input": ("input", "context", "passage", "background"),
    "output": ("output", "response", "answer", "completion", "reply", "solution", "target"),
    "prompt": (
        "prompt", "question", "query", "instruction", "input", "source", "problem", "request", "user", "human",
        "article", "document", "dialogue", "context", "text",
    ),
    "completion": (
        "completion", "answer", "response", "output", "reply", "solution", "target", "assistant", "highlights",
        "summary", "chosen",
    ),
    "chosen": ("chosen", "preferred", "better", "accepted", "winner", "chosen_response", "response_chosen"),
    "rejected": ("rejected", "dispreferred", "worse", "refused", "loser", "rejected_response", "response_rejected"),
    "source": ("source", "article", "document", "dialogue", "input", "src", "text", "question", "query", "prompt"),
    "target": ("target", "highlights", "summary", "output", "tgt", "answer", "response", "completion"),
    "text": (
        "text", "sentence", "review", "comment", "tweet", "post", "body", "content", "message", "utterance",
        "statement", "document", "article", "abstract", "premise", "sentence1", "question1", "text1", "question",
        "query", "input", "headline", "title", "description",
    ),
    "label": (
        "label", "labels", "class", "category", "sentiment", "emotion", "polarity", "intent", "topic", "genre", "stars",
        "rating", "score", "target",
    ),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "labels", "pos_tags", "chunk_tags"),
}  # fmt: skip
"""Names that people give to the column of a role, the likeliest first."""
PAIRS = {"premise": "hypothesis", "sentence1": "sentence2", "question1": "question2", "text1": "text2"}
"""Names of two texts that are classified together."""
SHAPES: dict[Task, tuple[tuple[Role, ...], ...]] = {
    "preference": (("chosen", "rejected"),),
    "reward": (("chosen", "rejected"),),
    "token-classification": (("tokens", "tags"),),
    "causal-lm": (
        ("messages",), ("instruction", "input", "output"), ("instruction", "output"), ("prompt", "completion"),
    ),
    "sequence-classification": (("text", "label"),),
    "seq2seq-lm": (("source", "target"),),
}  # fmt: skip
"""Roles that make an example of each task, in the order in which SGM looks for them."""


def propose_columns(
    table: Table, task: Task, roles: Sequence[Role], chosen: Mapping[Role, str], only: bool
) -> tuple[Task, dict[Role, str]] | None:
    """The task and the columns that the table looks like; None where it looks like nothing known.

    `roles` are those of the layout that lacks a column. only=True proposes columns for them alone, because data.format
    names the layout. Columns that are `chosen` (`data.columns`) keep their roles.
    """
    order: list[Task] = [task] if only or chosen else [task, *(other for other in SHAPES if other != task)]
    for possible in order:
        for shape in (tuple(roles),) if only else SHAPES[possible]:
            found = _match(table, shape, chosen) if set(chosen) <= set(shape) else None
            if shape == ("instruction", "output") and not only and found and found["instruction"] != "instruction":
                continue  # a question and its answer are a prompt and its completion
            if found:
                return possible, found
    if task == "sequence-classification" and (found := columns_by_content(table)):
        return task, {**found, **chosen}
    texts = [name for name, values in table.columns.items() if not all(map(_is_plain_number, values[:]))]
    if task == "causal-lm" and not chosen and not only and len(texts) == 1 and _suits(table, texts[0], "text"):
        return task, {"text": texts[0]}
    return None


def _is_plain_number(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float)


def is_headless(table: Table) -> bool:
    """Whether the names of the columns look like a row: one of them is among the values of its column."""
    return any(name and name in values[:] for name, values in table.columns.items())


def _match(table: Table, roles: Sequence[Role], chosen: Mapping[Role, str]) -> dict[Role, str] | None:
    """A column for each role, by its name and its first value; None when a role has none."""
    by_name = {_plain(name): name for name in reversed(list(table.columns))}
    found: dict[Role, str] = dict(chosen)
    for role in roles:
        if role in found:
            continue
        likely = (by_name[name] for name in NAMES.get(role, (role,)) if name in by_name)
        column = next((name for name in likely if name not in found.values() and _suits(table, name, role)), None)
        if column is None:
            return None
        found[role] = column
    pair = PAIRS.get(_plain(found.get("text", "")))
    if pair in by_name and by_name[pair] not in found.values():
        found["text_pair"] = by_name[pair]
    return found


def _plain(name: str) -> str:
    """A column's name without differences in case, spaces and hyphens.

    >>> _plain("NER Tags"), _plain("ner-tags"), _plain("Sentence_1")
    ('ner_tags', 'ner_tags', 'sentence1')
    """
    return re.sub(r"_(\d)$", r"\1", re.sub(r"[\s-]+", "_", str(name).strip().lower()))


def _suits(table: Table, column: str, role: Role) -> bool:
    """Whether the values of a column can have a role: lists, texts, or few different labels."""
    values = [value for value in table.columns[column][:] if value is not None]
    if not values:
        return False
    if role == "messages":
        return isinstance(values[0], list) and all(isinstance(turn, dict) for turn in values[0])
    if role in ("tokens", "tags"):
        return all(isinstance(value, list) for value in values)
    if role == "label":
        return column in table.class_names or _is_label(values, len(values))
    if role in ("prompt", "completion", "chosen", "rejected") and isinstance(values[0], list):
        return all(isinstance(value, list) and all(isinstance(turn, dict) for turn in value) for value in values)
    return all(isinstance(value, str) for value in values)


def _is_label(values: Sequence[Any], num_rows: int) -> bool:
    """Whether values repeat as labels do, or are lists of labels, or numbers to predict, also written as texts."""
    if any(isinstance(value, list | float) for value in values):
        return True
    if all(re.fullmatch(r"[+-]?[0-9]*\.[0-9]+", str(value).strip()) for value in values):
        return True
    return len({str(value) for value in values}) <= max(2, num_rows // 2)


def columns_by_content(table: Table) -> dict[Role, str] | None:
    """A text and a label by their values: the longest texts on average, and the fewest different values.

    None where several columns can be the label.
    """
    lengths = {name: _mean_length(values[:]) for name, values in table.columns.items()}
    texts = {name: length for name, length in lengths.items() if length is not None}
    if not texts:
        return None
    text = max(texts, key=texts.__getitem__)
    num_values = {
        name: len({str(value) for value in values[:]}) for name, values in table.columns.items() if name != text
    }
    label = min(num_values, key=num_values.__getitem__, default=None)
    if label is None or num_values[label] > max(2, len(table.columns[text]) // 2):
        return None
    if list(num_values.values()).count(num_values[label]) > 1:  # as a column of 0 and 1 for each class
        return None
    return {"text": text, "label": label}


def _mean_length(values: Sequence[Any]) -> float | None:
    """Mean number of characters of the values; None when there are none or one of them is not a text."""
    if not values or not all(isinstance(value, str) for value in values):
        return None
    return sum(map(len, values)) / len(values)


def describe_columns(columns: Mapping[Role, str]) -> str:
    """`data.columns` for the command line, as a shell reads it.

    >>> print(describe_columns({"prompt": "question", "completion": "the answer: short"}))
    data.columns='{prompt: question, completion: "the answer: short"}'
    """
    pairs = ", ".join(f"{role}: {_quoted(name)}" for role, name in columns.items())
    inner = pairs.replace("'", "'\\''")
    return f"data.columns='{{{inner}}}'"


def _quoted(name: str) -> str:
    is_plain = re.fullmatch(r"\w[\w. -]*\w|\w", name) and not Written(name).is_null
    return name if is_plain else json.dumps(name, ensure_ascii=False)
