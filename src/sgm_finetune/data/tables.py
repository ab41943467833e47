"""Reads files as tables: columns of plain Python values, each format with its strictest reader.

The readers guess nothing: a malformed file raises UserError with its name and, if possible, the line.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import one_line

Format = Literal["csv", "tsv", "json", "jsonl", "parquet", "text", "conll"]

ENDINGS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".conll": "conll",
}
PASSAGE_LENGTH = 2000
"""Characters. A passage of running text has between one and two times this length."""
SHORTEST_PASSAGE = 100
"""Characters. Short texts give shorter passages, so that each of three splits gets some, but none shorter than this."""


@dataclass(frozen=True)
class Table:
    """The rows of a file or data set. `column[:]` is the list of a column's values, and may load them only then."""

    name: str
    """Name in messages: the file's name, or for example `imdb (test)`."""
    columns: Mapping[str, Sequence[Any]]
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Class names of the columns with integers, or lists of integers, that stand for them (`datasets.ClassLabel`)."""
    is_running_text: bool = False
    """Whether the rows are passages of running text, in the single column `text`."""
    fills_nulls: bool = False
    """Whether nested values have fixed types (Arrow), so that a key that only other rows have is there with None."""


def type_of(path: Path, key: str, format: Format | Literal["auto"] = "auto") -> Format:
    """The type of an existing file: `format`, or inferred from its extension. `key` is its key, for messages.

    Raises UserError for a folder, a missing file or an unknown extension.
    """
    if path.is_dir():
        raise UserError(f"{key}={path} is a folder; name a file, or give a data set's folder as data.name")
    if not path.is_file():
        raise UserError(f"{key}={path} does not exist (looked in {Path.cwd()})")
    if format == "auto":
        if path.suffix.lower() not in ENDINGS:
            known = " ".join(ENDINGS)
            raise UserError(f"{key}={path}: unknown extension `{path.suffix}` (known: {known}); set data.file_type")
        return ENDINGS[path.suffix.lower()]
    return format


def read_file(path: Path, key: str, format: Format | Literal["auto"] = "auto", num_rows: int | None = None) -> Table:
    """The table in a file, or its first `num_rows` rows if its format can be read in part (csv, tsv, jsonl).

    `key` is the configuration key that names the file, for messages.

    Raises UserError for a missing, malformed or empty file.
    """
    format = type_of(path, key, format)
    try:
        match format:
            case "csv":
                table = _read_separated(path, ",", num_rows)
            case "tsv":
                table = _read_separated(path, "\t", num_rows)
            case "json" | "jsonl":
                table = _read_json(path, num_rows)
            case "parquet":
                from sgm_finetune.data.arrow import read_parquet  # here: it takes seconds to load

                table = read_parquet(path)
            case "text":
                table = running_text(path.name, [path.read_text(encoding="utf-8-sig")])
            case "conll":
                table = _read_conll(path)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path} is not UTF-8: byte 0x{byte:02x} at {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not table.columns or not len(next(iter(table.columns.values()))):
        raise UserError(f"{path} has no rows")
    return table


def running_text(name: str, documents: Sequence[str]) -> Table:
    """The table of the passages of `documents`, in order. No passage spans two documents."""
    total = sum(len(document) for document in documents)
    length = max(SHORTEST_PASSAGE, min(PASSAGE_LENGTH, total // 50))
    texts = [text for document in documents for part in passages(document, length) if (text := part.strip())]
    return Table(name, {"text": texts}, is_running_text=True)


def passages(document: str, length: int) -> Iterator[str]:
    """Consecutive passages of `length` to `2 * length` characters (the last one may be shorter).

    A passage ends at the end of a paragraph if possible, else of a line, else of a word. The passages joined are the
    document.

    >>> list(passages("one two\\n\\nthree four", length=5))
    ['one two\\n\\n', 'three four']
    """
    start = 0
    while len(document) - start > 2 * length:
        window = document[start + length : start + 2 * length]
        cut = 2 * length
        for boundary in (r"\n\s*\n", r"\n", r"\s"):
            if found := re.search(boundary, window):
                cut = length + found.end()
                break
        yield document[start : start + cut]
        start += cut
    if start < len(document):
        yield document[start:]


def _read_separated(path: Path, delimiter: str, num_rows: int | None) -> Table:
    with path.open(encoding="utf-8-sig", newline="") as lines, _unlimited_fields():
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise UserError(f"{path} names the column `{twice}` twice; the first line must name each column once")
            columns: list[list[str]] = [[] for _ in header]
            for row in itertools.islice(reader, num_rows):
                if not row:
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"{path} line {reader.line_num} has {len(row)} fields, the first line {len(header)}; "
                        "put double quotes around fields that hold a separator"
                    )
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
        except csv.Error as error:
            raise UserError(
                f"{path} line {reader.line_num}: {one_line(error)}; write a double quote inside a quoted field twice"
            ) from None
    return Table(path.name, dict(zip(header, columns, strict=True)))


@contextmanager
def _unlimited_fields() -> Iterator[None]:
    """Lifts the csv module's limit of 131,072 characters a field, for the duration of the block."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _read_json(path: Path, num_rows: int | None) -> Table:
    """The table in one JSON list of objects, or in one object a line, for both extensions."""
    with path.open(encoding="utf-8-sig") as lines:
        text = "".join(itertools.islice(lines, num_rows))
        if text.lstrip().startswith("["):
            text += lines.read()
    try:
        if text.lstrip().startswith("["):
            where, rows = "row", list(enumerate(json.loads(text), start=1))
        else:
            where, rows = "line", list(_json_lines(path, text))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {one_line(error)}") from None
    half = re.search(r"\\ud[89a-f]", text, re.IGNORECASE) is not None  # perhaps half of a surrogate pair
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{path} {where} {number} is not a JSON object; write {{'text': ..., 'label': ...}}")
        if half and not _is_text(row):
            raise UserError(f"{path} {where} {number} has half of a surrogate pair (\\ud8..), which is not a character")
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    return Table(path.name, {name: [row.get(name) for _, row in rows] for name in names})


def _is_text(row: dict[str, Any]) -> bool:
    """Whether every text in the row can be written in UTF-8."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
                raise UserError(
                    f"{path} line {number} is not JSON: {reason}; write one object a line, or one list of objects"
                ) from None


def _read_conll(path: Path) -> Table:
    """The words and tags in a file in the format of CoNLL-2003.

    Each line is a word: its first field is the word, its last field the tag. An empty line ends a sentence. The reader
    skips `-DOCSTART-` lines, and lines before a sentence that begin with `# `.
    """
    sentences: list[list[tuple[str, str]]] = [[]]
    width = 0
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        fields = line.strip().split("\t") if "\t" in line else line.split()
        if not line.strip() or fields[0] == "-DOCSTART-":
            sentences.append([])
        elif sentences[-1] or not line.startswith("# "):
            width = width or len(fields)
            if len(fields) != width or width < 2:
                raise UserError(
                    f"{path} line {number} has {len(fields)} field(s), the first word {width}; write the word first "
                    "and its tag last on every line, and an empty line after each sentence"
                )
            sentences[-1].append((fields[0], fields[-1]))
    found = [sentence for sentence in sentences if sentence]
    columns = {name: [[word[at] for word in words] for words in found] for at, name in enumerate(("tokens", "tags"))}
    return Table(path.name, columns)
