"""The cache of encoded data: files in the cache folder, under all that the token sequences follow from.

Writing tens of thousands of chats by their template takes a minute or more. Other texts, another tokenizer, template,
length or version have another key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash
from datasets.table import InMemoryTable

from sgm_finetune.base.config import Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import rename, whole_file
from sgm_finetune.base.processes import processes
from sgm_finetune.data.encoding import COUNTS, Encoded, fingerprint, pack
from sgm_finetune.data.encoding_parts import encode_in_parts
from sgm_finetune.data.rows import Origin
from sgm_finetune.model.folder import cache_dir

FEWEST = 2000
"""Rows of the smallest split that is cached. Fewer take a second or two."""
KEPT = 48
"""Files that stay in the cache: those that were used last."""
_CODE = ("arrow.py", "chat.py", "encoding.py", "encoding_parts.py", "pair_encoding.py", "token_lists.py", "tokens.py")
"""The files of this folder that decide what the tokens of a row are."""
_LIBRARIES = ("datasets", "jinja2", "tokenizers", "transformers")


def encode_or_recall(
    split: datasets.Dataset,
    tokenizer: Any,
    task: Task,
    max_length: int,
    origins: Sequence[Origin] | None,
    packs: bool,
) -> Encoded:
    """`encode_in_parts`, and `pack` if it `packs`; from the cache if that has the result, else into it.

    Small splits, and those of a tokenizer without tokenizer.json, are encoded each time.
    """
    file = None
    if len(split) >= FEWEST and tokenizer.is_fast:
        file = cache_dir() / "encoded" / f"{content_key(split, tokenizer, task, max_length, packs)}.arrow"
        if (recalled := _recall(file)) is not None:
            return recalled
    encoded = encode_in_parts(split, tokenizer, task, max_length, origins)
    if packs:
        encoded = pack(encoded, max_length)
    if file is not None and processes().is_main_process:
        _remember(file, encoded)
    return encoded


def content_key(split: datasets.Dataset, tokenizer: Any, task: Task, max_length: int, packs: bool) -> str:
    """The cache's key: 32 hexadecimal digits of the rows and of everything that turns them into tokens."""
    digest = xxhash.xxh3_128()
    for part in (_described(tokenizer), task, max_length, packs, *map(version, _LIBRARIES), *map(_source, _CODE)):
        digest.update(f"{part}\0".encode("utf-8", "surrogatepass"))
    with pa.PythonFile(_Digested(digest), mode="w") as sink:
        tables: Any = split.with_format("arrow").iter(10_000)
        for table in tables:
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
    return digest.hexdigest()


class _Digested:
    """A file that only hashes what is written into it."""

    closed = False

    def __init__(self, digest: Any):
        self._digest = digest

    def write(self, data: Any) -> int:
        self._digest.update(memoryview(data))
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _described(tokenizer: Any) -> str:
    """What a tokenizer does, in one text. How a call truncates and pads is left out: each call says it. A template that
    writes the date makes another text each day."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["truncation"] = rules["padding"] = None
    template = str(tokenizer.chat_template)
    settings = {
        name: getattr(tokenizer, name) for name in ("special_tokens_map", "truncation_side", "model_max_length")
    }
    day = time.strftime("%Y-%m-%d") if "strftime_now" in template else ""
    return json.dumps([rules, template, settings, type(tokenizer).__name__, day], default=str)


def _source(name: str) -> str:
    return hashlib.sha256((Path(__file__).parent / name).read_bytes()).hexdigest()


def _recall(file: Path) -> Encoded | None:
    """The encoded data in a file of the cache; None where there is none, or another one than was written."""
    try:
        with pa.OSFile(str(file)) as source, pa.ipc.open_file(source) as stored:
            table = stored.read_all()
        counts = json.loads((table.schema.metadata or {})[b"sgm"])
        dataset = datasets.Dataset(InMemoryTable(table))
        if fingerprint(dataset) != counts.pop("fingerprint"):
            return None
        os.utime(file)
        counts |= {name: tuple(counts[name]) for name in ("unread", "written")}
        return Encoded(dataset, **counts, is_recalled=True)
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError):
        return None


def _remember(file: Path, encoded: Encoded) -> None:
    """Writes encoded data into the cache, whole or not at all, and deletes what was not used for longest. Does nothing
    when the cache folder cannot be written."""
    counts = {name: getattr(encoded, name) for name in COUNTS} | {"fingerprint": fingerprint(encoded.dataset)}
    table: Any = encoded.dataset.with_format("arrow")[:]
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"sgm": json.dumps(counts).encode()})
    own = file.with_suffix(f".{os.getpid()}")  # two runs may write the same
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with contextlib.suppress(UserError, OSError, pa.ArrowException):
        with (
            whole_file(own) as scratch,
            pa.OSFile(str(scratch), "wb") as sink,
            pa.ipc.new_file(sink, table.schema, options=options) as stream,
        ):
            stream.write_table(table)
        rename(own, file)
        by_use = sorted(file.parent.glob("*.arrow"), key=lambda path: path.stat().st_mtime)
        for old in by_use[:-KEPT]:
            old.unlink(missing_ok=True)
