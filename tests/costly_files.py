"""Small files that cost much to read, unless a reader has bounds: what each takes in a process of its own.

    python tests/costly_files.py [NAME ...]

prints a row for each file: its size, the processor seconds and the memory above the start that reading it takes, and
the outcome. SGM_RECORD=FILE appends the rows to FILE. tests/test_costly_files.py holds them to bounds.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from fuzz_seeds import read_chats
from gguf import GGUFWriter
from safetensors.torch import save_file

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.untrusted import read_json, read_torch
from sgm_finetune.data.chat import written_answers
from sgm_finetune.data.encoding import encode
from sgm_finetune.data.library import load_folder
from sgm_finetune.data.splits import load_splits
from sgm_finetune.model.architecture import check_model
from sgm_finetune.model.classes import Head
from sgm_finetune.model.load import load_model
from sgm_finetune.model.weights.stored import stored_matrices

resource = pytest.importorskip("resource")  # not on Windows

SECONDS, MIB = 60, 12 * 1024
"""Where a reader without bounds is stopped."""


class Costly(NamedTuple):
    """A file that costs much: `write` makes it in a folder and returns its path, `read` is what SGM does with it."""

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]


class Cost(NamedTuple):
    """What reading a file took."""

    num_bytes: int
    seconds: float
    mib: float
    outcome: str


def write_text(name: str, content: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    return write


def many_storages(folder: Path) -> Path:
    torch.save({str(n): torch.zeros(1) for n in range(24_000)}, folder / "a.pth")
    return folder / "a.pth"


def tensors(number: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_file({f"layers.{n}.q.weight": torch.ones(1, 1) for n in range(number)}, folder / "model.safetensors")
        return folder

    return write


def weights(path: Path) -> None:
    for matrix in stored_matrices(path):
        matrix.load()


def many_texts(folder: Path) -> Path:
    return gguf(folder, lambda writer: writer.add_array("tokenizer.ggml.tokens", [f"t{n}" for n in range(500_000)]))


def many_keys(folder: Path) -> Path:
    def add(writer: GGUFWriter) -> None:
        for n in range(40_000):
            writer.add_uint8(f"k{n}", 1)

    return gguf(folder, add)


def gguf(folder: Path, add: Callable[[GGUFWriter], None]) -> Path:
    writer = GGUFWriter(folder / "model.gguf", "llama")
    add(writer)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def packed_zeros(folder: Path) -> Path:
    with gzip.open(folder / "train.csv.gz", "wb", compresslevel=9) as file:
        file.write(b"text,label\n")
        for _ in range(600):
            file.write(bytes(2**20))
    return folder


def card_with_an_address(folder: Path) -> Path:
    (folder / "train.csv").write_text("text,label\na,b\n", encoding="utf-8")
    head = "configs:\n- config_name: default\n  data_files: http://127.0.0.1:9/train.csv"
    (folder / "README.md").write_text(f"---\n{head}\n---\n", encoding="utf-8")
    return folder


def long_chat(folder: Path) -> Path:
    turn = [{"role": "user", "content": "film"}, {"role": "assistant", "content": "good"}]
    rows = [{"messages": [{"role": "user", "content": f"a{n}"}, *turn[1:], *turn * 8_000]} for n in range(6)]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "data.json"


def long_text(folder: Path) -> Path:
    rows = [{"text": f"film {n}", "label": "ab"[n % 2]} for n in range(36)]
    rows[0]["text"] = "good film " * 10_000_000
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "data.json"


def encoded(path: Path) -> None:
    task = "sequence-classification"
    splits = load_splits(load_config(None, [f"data.train={path}"]).data, task)
    for split in (splits.train, splits.validation, splits.test):
        encode(split, make_tokenizer(), task, 128)


def template(text: str) -> Costly:
    def read(path: Path) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        written_answers([{"role": "user", "content": "film"}, {"role": "assistant", "content": "good"}], tokenizer)

    return Costly(write_text("chat_template.jinja", text), read)


def described(**changes: Any) -> Costly:
    """A pico model whose config.json has other numbers."""

    def write(folder: Path) -> Path:
        make_model().save_pretrained(folder)
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**values, **changes}), encoding="utf-8")
        return folder

    def read(path: Path) -> None:
        model = ModelConfig(name=str(path), task="sequence-classification")
        check_model(model, path, 8)
        load_model(model, path, Head(("a", "b"), "class", 0))

    return Costly(write, read)


def config(path: Path) -> Any:
    return load_config(path)


def merges(levels: int) -> str:
    """Mappings of which each takes the keys of the one before ten times."""
    names = "abcdefghijklmnop"[:levels]
    lines = [f"{b}: &{b}\n  <<: [{', '.join(['*' + a] * 10)}]" for a, b in itertools.pairwise(names)]
    return "\n".join(["a: &a {x: 1}", *lines, ""])


def json_object(num_keys: int) -> str:
    return "{" + ",".join(f'"k{n:08}":1' for n in range(num_keys)) + f',"k{num_keys - 1:08}":1}}'


COSTLY: dict[str, Costly] = {
    "JSON, the last of 13,000 keys twice": Costly(write_text("a.json", json_object(13_000)), read_json),
    "JSON, the last of 26,000 keys twice": Costly(write_text("a.json", json_object(26_000)), read_json),
    "YAML, the last of 20,000 keys twice": Costly(
        write_text("a.yaml", "".join(f"k{n}: 1\n" for n in [*range(20_000), 19_999])), config),
    "YAML, a list of 450,000 numbers": Costly(write_text("a.yaml", "a: [" + "1," * 450_000 + "]"), config),
    "YAML, mappings that merge each other": Costly(write_text("a.yaml", merges(8)), config),
    "config.json, 10,000 layers": described(num_hidden_layers=10_000),
    "config.json, hidden_size 10**9": described(hidden_size=10**9),
    "config.json, intermediate_size 10**8": described(intermediate_size=10**8),
    "chat template, loops in loops": template(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
    "chat template, a text of 3 GB": template("{{ 'a' * 3000000000 }}"),
    "safetensors, 15,000 tensors": Costly(tensors(15_000), weights),
    "safetensors, 100,000 tensors": Costly(tensors(100_000), weights),
    "GGUF, a list of 500,000 texts": Costly(many_texts, weights),
    "GGUF, 40,000 keys": Costly(many_keys, weights),
    "data folder, 600 MiB in a .gz": Costly(packed_zeros, load_folder),
    "data folder, a card with an address": Costly(card_with_an_address, load_folder),
    "a conversation of 16,000 messages": Costly(long_chat, read_chats),
    "one text of 100 MB": Costly(long_text, encoded),
    ".pth, 24,000 storages": Costly(many_storages, read_torch),
}  # fmt: skip


def cost(case: Costly) -> Cost:
    """Reads the file in a process of its own, a copy of this one."""
    with tempfile.TemporaryDirectory(prefix="sgm-costly-") as name:
        path = case.write(Path(name))
        size = sum(file.stat().st_size for file in Path(name).rglob("*") if file.is_file())
        answer, told = os.pipe()
        if not (child := os.fork()):
            try:
                os.write(told, json.dumps(_read(case, path)).encode())
            finally:
                os._exit(0)
        os.close(told)
        with os.fdopen(answer, "rb") as held:
            found = held.read()
        _, status, used = os.wait4(child, 0)
    if not found:
        return Cost(size, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024 - _resident(), f"died ({status})")
    return Cost(size, *json.loads(found))


def _read(case: Costly, path: Path) -> tuple[float, float, str]:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MIB * 2**20,) * 2)
    before, begun = _resident(), time.process_time()
    try:
        case.read(path)
        outcome = "a result"
    except UserError as error:
        outcome = f"one line: {str(error).replace(str(path.parent), '')}"
    except ValueError as error:  # what base/untrusted.py raises for its caller
        outcome = f"one line: {error}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"[:200]
    used = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() - begun + used[1].ru_utime + used[1].ru_stime
    return seconds, used[0].ru_maxrss / 1024 - before, outcome


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")


def main(*chosen: str) -> None:
    for name in chosen or COSTLY:
        found = cost(COSTLY[name])
        print(f"| {name} | {found.num_bytes / 1000:,.0f} kB | {found.seconds:.1f} s | {found.mib:,.0f} MiB | "
              f"{found.outcome[:150]} |", flush=True)  # fmt: skip
        if file := os.environ.get("SGM_RECORD"):
            row = {"date": time.strftime("%Y-%m-%d"), "file": name, **found._asdict()}
            row |= {"seconds": round(found.seconds, 2), "mib": round(found.mib), "outcome": found.outcome[:150]}
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
