"""Reads files as tables: columns of plain Python values, each format with its strictest reader.

The readers guess nothing: a malformed file raises UserError with its name and, if possible, the line.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import listed, one_line
from sgm_finetune.data.text_file import CHUNK, PACKINGS, inner_suffix, open_text, packing_of, read_text

Format = Literal["csv", "tsv", "json", "jsonl", "parquet", "text", "conll"]

ENDINGS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
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
    note: str = ""
    """How the file was read, where that is not what its name says."""
    fills_nulls: bool = False
    """Whether nested values have fixed types (Arrow), so that a key that only other rows have is there with None."""


def type_of(path: Path, key: str, format: Format | Literal["auto"] = "auto") -> Format:
    """The type of an existing file: `format`, or inferred from its extension. `key` is its key, for messages.

    Raises UserError for a folder, a missing file or an unknown extension.
    """
    if path.is_dir():
        raise UserError(f"{key}={path} is a folder; name a file, or give a data set's folder as data.name")
    if not path.is_file():
        several = "; for several files, give their folder as data.name" if re.search(r"[*?]|, ", str(path)) else ""
        raise UserError(f"{key}={path} does not exist (looked in {Path.cwd()}){several}")
    if format == "auto":
        suffix = inner_suffix(path)
        if suffix in (".xlsx", ".xls", ".ods"):
            raise UserError(f"{key}={path} is a spreadsheet; save the sheet as CSV (UTF-8)")
        if suffix not in ENDINGS:
            known, packed = " ".join(ENDINGS), " ".join(PACKINGS)
            raise UserError(
                f"{key}={path}: unknown extension `{suffix or path.suffix}` (known: {known}, and {packed} after them); "
                "set data.file_type"
            )
        return ENDINGS[suffix]
    return format


def read_file(path: Path, key: str, format: Format | Literal["auto"] = "auto", num_rows: int | None = None) -> Table:
    """The table in a file, or its first `num_rows` rows if its format can be read in part (csv, tsv, json, jsonl).

    A packed file (.gz, .bz2, .xz, .zst) is unpacked while it is read. `key` is the configuration key that names the
    file, for messages.

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

                if packing_of(path) is not None:
                    raise UserError(f"{path} is a packed Parquet file; unpack it, because Parquet is packed within")
                table = read_parquet(path)
            case "text":
                table = running_text(path.name, [read_text(path)])
            case "conll":
                table = _read_conll(path)
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


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
SAMPLE = 2**16
"""Characters of a file that tell its separator."""


def find_separator(path: Path, usual: str) -> str:
    """What separates the fields of a file: `usual`, unless only another separator divides its first line.

    Where several do, it is the first that gives every row as many fields. Raises as `open_text`.
    """
    with open_text(path, newline="") as file:
        sample = file.read(SAMPLE)
    lines = list(io.StringIO(sample, newline=""))
    if len(sample) == SAMPLE:
        lines = lines[:-1] or lines  # it may be cut
    widths = {by: _widths(lines, by) for by in sorted(SEPARATORS, key=lambda by: by != usual)}
    dividing = [by for by in widths if widths[by] and widths[by][0] > 1]
    return next((by for by in dividing if len(set(widths[by])) == 1), dividing[0] if dividing else usual)


def tells_separator(path: Path) -> bool:
    """Whether the first line of a file is Excel's `sep=;`, which only tells the separator. Raises as `open_text`."""
    with open_text(path, newline="") as file:
        return re.fullmatch(r"sep=.[\r\n]*", file.readline(8)) is not None


def _widths(lines: Sequence[str], delimiter: str) -> list[int]:
    """The number of fields of each row, as far as the rows can be read."""
    widths = []
    with _unlimited_fields(), suppress(csv.Error):  # a quoted field that goes on after the sample
        widths.extend(len(row) for row in csv.reader(lines, delimiter=delimiter, strict=True) if row)
    return widths


def _read_separated(path: Path, usual: str, num_rows: int | None) -> Table:
    delimiter = find_separator(path, usual)
    with open_text(path, newline="") as lines, _unlimited_fields():
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            if tells_separator(path):
                next(reader)
            header = next(reader, [])
            twice = next((name for name in header if name and header.count(name) > 1), None)
            if twice is not None:
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
    filled = [(name, column) for name, column in zip(header, columns, strict=True) if name or any(column)]
    if sum(not name for name, _ in filled) > 1:
        raise UserError(f"{path} has values in several columns without a name; name each column in the first line")
    note = "" if delimiter == usual else f"separated by {SEPARATORS[delimiter]}"
    return Table(path.name, dict(filled), note=note)


@contextmanager
def _unlimited_fields() -> Iterator[None]:
    """Lifts the csv module's limit of 131,072 characters a field, for the duration of the block."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


_ROWS_WITHIN = ("data", "rows", "train", "validation", "test", "examples", "records", "items", "instances")
"""Keys under which a file that is one object has its rows."""


def _read_json(path: Path, num_rows: int | None) -> Table:
    """The table in one JSON list of objects, in one object a line, or in one object that holds such a list."""
    with open_text(path) as file:
        columns = _columns(path, itertools.islice(_json_rows(path, file), num_rows))
    if not columns or len(next(iter(columns.values()))) != 1:
        return Table(path.name, columns)
    only = {name: values[0] for name, values in columns.items()}
    if {"columns", "data"} <= set(only) or all(isinstance(v, dict) and "0" in v for v in only.values()):
        raise UserError(
            f"{path} holds whole columns, as pandas writes them, and not rows; write it with "
            "to_json(..., orient='records')"
        )
    within = {name: value for name, value in only.items() if name in _ROWS_WITHIN and _is_rows(value)}
    if len(within) > 1:
        raise UserError(f"{path} holds several lists of rows: {listed(list(within))}; write each into its own file")
    for name, rows in within.items():
        places = ((f"`{name}`, row {number}", row) for number, row in enumerate(rows[:num_rows], start=1))
        return Table(path.name, _columns(path, places), note=f"rows of `{name}`")
    return Table(path.name, columns)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _columns(path: Path, rows: Iterable[tuple[str, Any]]) -> dict[str, list]:
    """The columns of rows that come with their places. Raises UserError for a row that is not an object."""
    columns: dict[str, list] = {}
    for count, (where, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path} {where} is not a JSON object; write {{'text': ..., 'label': ...}}")
        for name, value in row.items():
            if name not in columns:
                columns[name] = [None] * count
            columns[name].append(value)
        if len(row) < len(columns):
            for name, column in columns.items():
                if name not in row:
                    column.append(None)
    return columns


_SPACE = re.compile(r"[ \t\n\r]*")
_HALF = re.compile(r"\\ud[89a-f]", re.IGNORECASE)
"""Perhaps half of a surrogate pair."""


def _json_rows(path: Path, file: IO[str]) -> Iterator[tuple[str, Any]]:
    """The place and the value of each row: an element of one list, or a line."""
    skipped, first = 0, file.readline(CHUNK)
    while first and not first.strip():
        skipped, first = skipped + first.endswith("\n"), file.readline(CHUNK)
    is_list = first.lstrip().startswith("[")
    for where, row, text in (_json_elements if is_list else _json_lines)(path, first, file, skipped):
        if _HALF.search(text) and not _is_text(row):
            raise UserError(f"{path} {where} has half of a surrogate pair (\\ud8..), which is not a character")
        yield where, row


def _json_elements(path: Path, buffer: str, file: IO[str], lines_before: int) -> Iterator[tuple[str, Any, str]]:
    """Place, value and text of each element of a list. The list may stand on one line and be as long as the file."""
    decoder, at, number, is_whole = json.JSONDecoder(), buffer.index("[") + 1, 0, False
    while True:
        try:
            found = _next_element(decoder, buffer, at, first=not number)
            if not is_whole and (found is None or found[1] >= len(buffer)):
                found = "more"  # the element or what follows the list may go on after the buffer
        except json.JSONDecodeError as error:
            if is_whole:
                line = lines_before + error.lineno
                raise UserError(f"{path} line {line} is not JSON: {error.msg}") from None
            found = "more"
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read as JSON: {one_line(error)}") from None
        if found == "more":
            lines_before += buffer.count("\n", 0, at)
            read = file.read(max(CHUNK, len(buffer) - at))
            buffer, at, is_whole = buffer[at:] + read, 0, not read
        elif found is None:
            return
        else:
            number += 1
            begin, at = at, found[1]
            yield f"row {number}", found[0], buffer[begin:at]


def _next_element(decoder: json.JSONDecoder, text: str, at: int, first: bool) -> tuple[Any, int] | None:
    """The element of a list that follows `at`, and where it ends; None at the end of the list."""
    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    following = text[at : at + 1]
    if following == "]":
        rest = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
        if rest < len(text):
            raise json.JSONDecodeError("Extra data", text, rest)
        return None
    if not first:
        if following != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
    return decoder.raw_decode(text, at)


def _is_text(row: Any) -> bool:
    """Whether every text in the row can be written in UTF-8."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_lines(path: Path, first: str, file: IO[str], lines_before: int) -> Iterator[tuple[str, Any, str]]:
    """Place, value and text of each line, or of the one object that the file is.

    `first` may be the beginning of a long line.
    """
    lines = itertools.chain([first if first.endswith("\n") else first + file.readline()], file)
    for number, line in enumerate(lines, start=lines_before + 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line), line
            except (ValueError, RecursionError) as error:
                goes_on = isinstance(error, json.JSONDecodeError) and error.pos >= len(line.rstrip())
                if goes_on and number == lines_before + 1:
                    whole = line + file.read()
                    with suppress(ValueError, RecursionError):
                        yield "row 1", json.loads(whole), whole
                        return
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
    for number, line in enumerate(read_text(path).split("\n"), start=1):
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
