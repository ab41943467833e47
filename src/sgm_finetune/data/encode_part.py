"""One of several processes that encode a large split (data/encoding_parts.py). It loads no torch.

    python -m sgm_finetune.data.encode_part FOLDER

reads the numbers of parts from its standard input, and ends with it, so that it does not outlive the run.
"""

from __future__ import annotations

import pickle
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable

from sgm_finetune.base.config import Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.encoding import COUNTS, Encoded, encode
from sgm_finetune.data.rows import Origin

WORK = "work.pkl"
"""The file with what is the same for all parts: tokenizer, task, maximum length."""

Part = tuple[datasets.Dataset, Sequence[Origin]]
"""Rows and where they come from."""


def write_work(folder: Path, tokenizer: Any, task: Task, max_length: int) -> None:
    _write(folder / WORK, (tokenizer, task, max_length))


def write_part(folder: Path, number: int, part: Part) -> None:
    split, origins = part
    _write(folder / f"{number}.in", (split.features, _packed(split), list(origins)))


def take_encoded(folder: Path, number: int) -> Encoded | UserError:
    """What the process made of a part; deletes the part's files. Only that process writes into the folder."""
    found = pickle.loads((folder / f"{number}.out").read_bytes())
    for kind in ("in", "out"):
        (folder / f"{number}.{kind}").unlink()
    if isinstance(found, UserError):
        return found
    features, packed, counts = found
    return Encoded(_unpacked(features, packed), **counts)


def main(folder: Path) -> None:
    """Encodes the parts whose numbers come, a line each, and answers each with a line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the run ends this one
    tokenizer, task, max_length = pickle.loads((folder / WORK).read_bytes())
    for line in sys.stdin:
        number = int(line)
        features, packed, origins = pickle.loads((folder / f"{number}.in").read_bytes())
        try:
            made = encode(_unpacked(features, packed), tokenizer, task, max_length, origins)
            counts = {name: getattr(made, name) for name in COUNTS}
            found: Any = (made.dataset.features, _packed(made.dataset), counts)
        except UserError as error:
            found = error
        _write(folder / f"{number}.out", found)
        print("done", flush=True)


def _write(path: Path, value: Any) -> None:
    path.write_bytes(pickle.dumps(value))


def _packed(split: datasets.Dataset) -> bytes:
    """The rows as an Arrow stream, which holds no more than they, also where they are a part of a table."""
    table: Any = split.with_format("arrow")[:]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpacked(features: datasets.Features, packed: bytes) -> datasets.Dataset:
    table = pa.ipc.open_stream(packed).read_all()
    return datasets.Dataset(InMemoryTable(table), info=datasets.DatasetInfo(features=features))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
