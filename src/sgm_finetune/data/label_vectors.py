"""Labels that are lists: written as text, and vectors with a 0 or 1 for every class."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import short_repr
from sgm_finetune.data.columns import is_missing
from sgm_finetune.data.tables import Table

_LIST = re.compile(r"\[[^\[\]]*\]")
"""A list without lists in it, as Python, JSON, pandas and NumPy write it."""
_ARRAY = re.compile(r"\[\s*[01]\.?(\s+[01]\.?)*\s*\]")
"""A NumPy array of 0 and 1, which has no commas."""
_ENTRY = re.compile(
    r"""\s*(?:(?P<name>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<other>True|False|[+-]?[0-9]{1,9}(?:\.[0-9]*)?))\s*(?:,|$)"""
)
"""A name in quotes, a truth value or a number in a list as Python writes it."""
_MAX_TEXT = 100_000
_ENTRIES: dict[Any, int] = {0: 0, 1: 1, "0": 0, "1": 1}  # False, True, 0.0 and 1.0 are equal to 0 and 1


def with_lists(table: Table, column: str, asked: str) -> Table:
    """The table with lists in the place of texts such as "[1, 0, 1]" or "['a', 'b']", if all labels are written so.

    With `asked` (`data.label_kind`) "classes", a text is also a list of names with commas between them; where no text
    has a comma, with semicolons or vertical bars.
    """
    values = table.columns[column][:]
    texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
    if column in table.class_names or not texts or asked in ("class", "number"):
        return table
    read: dict[str, list | None] = {}
    if all(len(text) <= _MAX_TEXT and _LIST.fullmatch(text) for text in texts):
        read = {text: _read_list(text) for text in dict.fromkeys(texts)}
    if asked == "classes" and (not read or None in read.values()):
        by = name_separator(texts) or ","
        read = {text: [name for name in text.split(by) if name.strip()] for text in dict.fromkeys(texts)}
    if not read or None in read.values():
        return table
    lists = [read.get(value.strip(), value) if isinstance(value, str) else value for value in values]
    return replace(table, columns={**table.columns, column: lists})


def name_separator(texts: Iterable[str]) -> str | None:
    """What stands between names in texts: commas, else semicolons, else vertical bars; None for none of them."""
    return next((by for by in ",;|" if any(by in text for text in texts)), None)


def _read_list(text: str) -> list | None:
    """The list that a text writes; None where it writes none.

    >>> _read_list("[true, 1.0]"), _read_list("['a', True]"), _read_list("[1 0 1]"), _read_list("[POS]")
    ([True, 1.0], ['a', True], [1, 0, 1], None)
    """
    if _ARRAY.fullmatch(text):
        return [int(float(entry)) for entry in text[1:-1].split()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    entries, inner, at = [], text[1:-1].strip(), 0
    while at < len(inner):
        found = _ENTRY.match(inner, at)
        if found is None:
            return None
        try:
            entries.append(ast.literal_eval(found["name"] or found["other"].lstrip("+")))
        except (ValueError, SyntaxError):  # an unknown escape in a name, or a number such as 007
            return None
        at = found.end()
    return entries


def vector_width(table: Table, column: str) -> int | None:
    """The number of classes if each label is a vector with a 0 or 1 for every class; None for lists of classes.

    Class ids of a row are never repeated, so a list that repeats 0 or 1 is a vector, and so is one of booleans or of
    floats. Lists of both 0 and 1 in every row are vectors, because as ids all rows would be equal. Raises UserError for
    vectors of different lengths, and for vectors of one number.
    """
    if column in table.class_names:
        return None
    rows = [(row, value) for row, value in enumerate(table.columns[column][:], start=1) if not is_missing(value)]
    values = [value for _, value in rows]
    if not any(values) or not all(isinstance(value, list) and all(map(_is_entry, value)) for value in values):
        return None
    first, width = rows[0][0], len(values[0])
    are_vectors = any(
        len(value) > len({_ENTRIES[entry] for entry in value})
        or any(isinstance(entry, bool | float) for entry in value)
        for value in values
    )
    if not are_vectors:
        return 2 if all(len(value) == 2 for value in values) else None
    for row, value in rows:
        if len(value) != width:
            raise UserError(
                f"{table.name}, row {row}: `{column}` is {short_repr(value)} and has {len(value)} numbers, row {first} "
                f"has {width}; write a 0 or 1 for every class, or a list of names"
            )
    if width == 1:
        raise UserError(f"{table.name}: `{column}` holds lists of one number; write the number alone")
    if all(value == values[0] for value in values):
        raise UserError(
            f"{table.name}: every label in `{column}` is {short_repr(values[0])}; classification needs different labels"
        )
    return width


def read_vectors(table: Table, column: str, width: int) -> list[list[float]]:
    """The vector of each row. Raises UserError with the row that has no 0 or 1 for each of `width` classes."""
    vectors = []
    for row, value in enumerate(table.columns[column][:], start=1):
        if not isinstance(value, list) or len(value) != width or not all(map(_is_entry, value)):
            what = "is missing" if is_missing(value) else f"is {short_repr(value)}"
            raise UserError(f"{table.name}, row {row}: `{column}` {what}; write a 0 or 1 for each of {width} classes")
        vectors.append([float(_ENTRIES[entry]) for entry in value])
    return vectors


def only_single_ids(table: Table, column: str) -> bool:
    """Whether every label is a list of one 0 or 1: a class id here, though it could be a vector."""
    values: Sequence[Any] = table.columns[column][:]
    return all(isinstance(value, list) and len(value) == 1 and _is_entry(value[0]) for value in values)


def _is_entry(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) and value in _ENTRIES
