"""Reads labels and tags from a column and turns them into numbers."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sgm_finetune.base.config import LabelKind
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import listed, short_repr
from sgm_finetune.data.columns import is_missing
from sgm_finetune.data.label_vectors import (
    name_separator,
    only_single_ids,
    read_vectors,
    vector_width,
    with_lists,
)
from sgm_finetune.data.sources import Split
from sgm_finetune.data.tables import Table

_TRUTHS = {"false": 0, "true": 1, "0": 0, "1": 1, "0.0": 0, "1.0": 1}
_SPELLINGS = (("False", "True"), ("false", "true"), ("FALSE", "TRUE"), ("0", "1"))
"""Names of the two classes false and true."""


class LabelReader:
    """Reads labels and tags as numbers. The training data comes first: it defines the kind of label and the classes."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.kind: LabelKind | None = None
        self.width: int | None = None
        """The number of classes where a label is a vector of 0 and 1."""
        self.notes: list[str] = []
        """What a person should know about the classes."""

    def read(self, table: Table, column: str, split: Split, asked: str) -> list:
        """The label of each row: an id, a vector of 0 and 1, or a number. `asked` is `data.label_kind`."""
        table, is_first = with_lists(table, column, asked), self.kind is None
        self.kind = self.kind or infer_label_kind(table, column, asked)
        match self.kind:
            case "number":
                return read_numbers(table, column)
            case "classes":
                if is_first and (width := vector_width(table, column)):
                    self.width, self.names = width, tuple(map(str, range(width)))
                    self.notes.append(f"`{column}` is a 0 or 1 for each of {width} classes")
                if self.width is not None:
                    return read_vectors(table, column, self.width)
                return self._read_sets(table, column, split)
            case "class":
                labels = read_labels(table, column)
                if is_first:
                    labels = self._merge_truths(labels, column)
                    self._name(table, column, labels)
                elif any(set(self.names) == set(spelling) for spelling in _SPELLINGS):
                    known = {_TRUTHS[name.casefold()]: name for name in self.names}
                    labels = [known.get(_TRUTHS.get(label.casefold(), -1), label) for label in labels]
                return label_ids(table, split, labels, self.names)

    def tag_ids(self, table: Table, column: str, split: Split, tags: list[list[str]]) -> list[list[int]]:
        """The ids of the tags of each row."""
        if not self.names:
            self._name(table, column, list(itertools.chain(*tags)))
        return [label_ids(table, split, row, self.names) for row in tags]

    def _read_sets(self, table: Table, column: str, split: Split) -> list[list[float]]:
        sets = read_label_sets(table, column)
        if not self.names:
            self._name(table, column, list(itertools.chain(*sets)), len(sets))
            if only_single_ids(table, column):
                self.notes.append(f"the lists of one 0 or 1 in `{column}` are read as class ids")
        return label_vectors(table, split, sets, self.names)

    def _name(self, table: Table, column: str, labels: Sequence[str], num_rows: int | None = None) -> None:
        self.names = class_names(table, column, labels, num_rows)
        if column not in table.class_names:
            self.notes += class_doubts(self.names)

    def _merge_truths(self, labels: list[str], column: str) -> list[str]:
        """The labels of the training data, with one spelling of true and one of false."""
        written = list(dict.fromkeys(labels))
        if not all(name.casefold() in _TRUTHS for name in written) or any(set(written) <= set(p) for p in _SPELLINGS):
            return labels
        has_words = any(name.isalpha() for name in written)
        spelling = _SPELLINGS[0] if has_words else _SPELLINGS[-1]
        self.notes.append(f"{listed(written)} in `{column}` are read as {spelling[0]} and {spelling[1]}")
        return [spelling[_TRUTHS[label.casefold()]] for label in labels]


def is_unlabelled(table: Table, column: str) -> bool:
    """Whether every label is -1 or missing. Published test sets withhold their labels in this way."""
    return column in table.class_names and all(value in (-1, None) for value in table.columns[column][:])


def check_labels_given(table: Table, column: str, asked: str) -> None:
    """Raises UserError with the first row that has no label, where a label is one name or one number."""
    values = table.columns[column][:]
    if asked == "classes" or any(isinstance(value, list) for value in values):
        return
    for row, value in enumerate(values, start=1):
        if is_missing(value) or (isinstance(value, str) and not value.strip()):
            raise UserError(_no_label(table, row, column))


def _no_label(table: Table, row: int, column: str) -> str:
    return f"{table.name}, row {row} has no label in `{column}`; fill it in or remove the row"


def infer_label_kind(table: Table, column: str, asked: str) -> LabelKind:
    """The kind of label: `asked` (`data.label_kind`), or for auto inferred from the values.

    A list means classes, a fractional number means number, everything else means class. Raises UserError for numbers
    such as 1.0, which can be a class or a number.
    """
    if asked != "auto":
        return asked  # type: ignore[return-value]
    values = [value for value in table.columns[column][:] if not is_missing(value)]
    if any(isinstance(value, list) for value in values):
        return "classes"
    if column in table.class_names:
        return "class"
    names = [str(value).strip() for value in values]
    if values and all(map(_is_number, names)) and not all(map(_is_integer, names)):
        if all(float(name).is_integer() for name in names):
            raise UserError(
                f"{table.name}: `{column}` holds {names[0]}, which can be a class or a number to predict; set "
                "data.label_kind=class or data.label_kind=number"
            )
        return "number"
    return "class"


def read_labels(table: Table, column: str) -> list[str]:
    """The class name of each row, for a column of any type. Raises UserError with the row of an invalid label."""
    known = table.class_names.get(column)
    names = []
    for row, value in enumerate(table.columns[column][:], start=1):
        value = _name(value, known)
        if is_missing(value) or (isinstance(value, str) and not value.strip()):
            raise UserError(_no_label(table, row, column))
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, bool | int | str):
            raise UserError(
                f"{table.name}, row {row}: label {short_repr(value)} in `{column}` is neither a name nor an integer; "
                "set data.label_kind"
            )
        names.append(str(value).strip())
    return names


def read_numbers(table: Table, column: str) -> list[float]:
    """The number of each row. Raises UserError with the row of a label that is missing or not a finite number."""
    numbers = []
    for row, value in enumerate(table.columns[column][:], start=1):
        text = str(value).strip()
        if isinstance(value, bool) or not _is_number(text) or not math.isfinite(float(text)):
            what = f"has the label {short_repr(value)} in `{column}`, which is not a number"
            remedy = "correct or remove the row"
            if is_missing(value) or not text:
                what = f"has no label in `{column}`"
            elif re.fullmatch(r"[+-]?[0-9.]*,[0-9]+", text):
                remedy = "write numbers with a decimal point, such as 0.5, and without separators of thousands"
            raise UserError(f"{table.name}, row {row} {what}; {remedy}")
        numbers.append(float(text))
    return numbers


def read_label_sets(table: Table, column: str) -> list[list[str]]:
    """The class names of each row, from a list; a row may have none.

    Raises UserError with the row of an invalid value.
    """
    known = table.class_names.get(column)
    sets = []
    for row, value in enumerate(table.columns[column][:], start=1):
        if isinstance(value, str) and not value.strip():
            value = []
        if not isinstance(value, list):
            what = "is missing" if is_missing(value) else f"is {short_repr(value)}, not a list"
            raise UserError(f"{table.name}, row {row}: `{column}` {what}; write a list of names, [] for none")
        names = [_name(name, known) for name in value]
        if not all(isinstance(name, str | int) and str(name).strip() for name in names):
            are_numbers = all(isinstance(name, int | float) for name in names)
            more = ", or a 0 or 1 for every class" if are_numbers else ""
            raise UserError(
                f"{table.name}, row {row}: `{column}` holds {short_repr(value)}; write a list of names{more}"
            )
        sets.append([str(name).strip() for name in names])
    return sets


def class_names(table: Table, column: str, labels: Sequence[str], num_rows: int | None = None) -> tuple[str, ...]:
    """The classes of the training data in id order: as its feature declares them, else sorted (integers by value).

    Raises UserError for fewer than two classes, and for so many that the column is probably not the label.
    """
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
            "is it the label? Name the label with data.columns; for numbers to predict, set data.label_kind=number"
        )
    return tuple(names)


def class_doubts(names: Sequence[str]) -> list[str]:
    """Notes about classes that a person may have meant as one.

    >>> class_doubts(["neg", "Pos", "pos"]), class_doubts(["0", "1", "pos"])
    (['classes that differ only in case: Pos, pos'], ['both numbers and words are classes: 0, 1, pos'])
    >>> class_doubts(["a", "a;b", "b"])
    ["'a;b' is one class; for several classes a row, set data.label_kind=classes"]
    """
    notes = []
    folded = Counter(name.casefold() for name in names)
    if alike := sorted((name for name in names if folded[name.casefold()] > 1), key=str.casefold):
        notes.append(f"classes that differ only in case: {listed(alike)}")
    by = name_separator(names)
    parts = {part.strip() for name in names for part in name.split(by)}
    if by is not None and len(parts) < len(names) and "" not in parts:
        several = next(name for name in names if by in name)
        notes.append(f"{several!r} is one class; for several classes a row, set data.label_kind=classes")
    numbers = [name for name in names if _is_integer(name)]
    if numbers and len(numbers) < len(names):
        words = [name for name in names if not _is_integer(name)]
        notes.append(f"both numbers and words are classes: {listed([*numbers[:3], *words[:3]])}")
    return notes


def label_ids(table: Table, split: str, labels: Sequence[str], names: Sequence[str]) -> list[int]:
    """The ids of class names. Raises UserError for a name that the training data lacks."""
    ids = {name: index for index, name in enumerate(names)}
    return [_label_id(label, ids, table, split, row) for row, label in enumerate(labels, start=1)]


def label_vectors(table: Table, split: str, sets: Sequence[Sequence[str]], names: Sequence[str]) -> list[list[float]]:
    """Sets of class names as vectors of 0 and 1. Raises UserError for a name that the training data lacks."""
    ids = {name: index for index, name in enumerate(names)}
    vectors = []
    for row, labels in enumerate(sets, start=1):
        chosen = {_label_id(label, ids, table, split, row) for label in labels}
        vectors.append([float(index in chosen) for index in range(len(names))])
    return vectors


def _label_id(label: str, ids: Mapping[str, int], table: Table, split: str, row: int) -> int:
    if label not in ids:
        known = ", ".join(list(ids)[:10]) + (", ..." if len(ids) > 10 else "")
        defined = "the training data"
        if split == "train":  # of a later source
            defined = "the first source of data.mixture, which defines the classes"
        raise UserError(f"{table.name}, row {row} ({split}): label {label!r} is not in {defined} (known: {known})")
    return ids[label]


def read_tagged(table: Table, tokens: str, tags: str) -> tuple[list[list[str]], list[list[str]]]:
    """The words and tags of each row. Raises UserError with the row that is not a list of words with as many tags."""
    known = table.class_names.get(tags)
    words, names = [], []
    for row, (left, right) in enumerate(zip(table.columns[tokens][:], table.columns[tags][:], strict=True), start=1):
        for column, value in ((tokens, left), (tags, right)):
            if not isinstance(value, list) or not value:
                raise UserError(
                    f"{table.name}, row {row}: `{column}` is {short_repr(value)}; token classification needs a list of "
                    "words and a list of tags (json, jsonl, parquet)"
                )
        if len(left) != len(right):
            raise UserError(
                f"{table.name}, row {row} has {len(left)} words in `{tokens}` and {len(right)} tags in `{tags}`"
            )
        if not all(isinstance(word, str) and word.strip() for word in left):
            raise UserError(f"{table.name}, row {row}: `{tokens}` holds {short_repr(left)}; write words")
        tagged = [_name(tag, known) for tag in right]
        if not all(isinstance(tag, str | int) and str(tag).strip() for tag in tagged):
            raise UserError(f"{table.name}, row {row}: `{tags}` holds {short_repr(right)}; write names")
        words.append(left)
        names.append([str(tag).strip() for tag in tagged])
    return words, names


def _name(value: Any, names: Sequence[str] | None) -> Any:
    """The class name of an integer in a column with class `names` (None: no such class); other values unchanged."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def _is_integer(name: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", name) is not None


def _is_number(name: str) -> bool:
    return re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", name) is not None
