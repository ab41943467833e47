"""A valid file of every kind that SGM reads from others, and its reader: the seeds of the fuzzing."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from conftest import make_model, make_tokenizer
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import save

from sgm_finetune.base.config import Config, ModelConfig
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.encoding import encode
from sgm_finetune.data.splits import load_splits
from sgm_finetune.measure.plan_file import load_plan
from sgm_finetune.measure.scan_formats import load_scan
from sgm_finetune.measure.scan_result import by_parameter
from sgm_finetune.method.parameter_count import adapter_parameters
from sgm_finetune.model.architecture import check_model, read_model_config
from sgm_finetune.model.classes import choose_head
from sgm_finetune.model.folder import refuse_adapter
from sgm_finetune.model.load import Head, skeleton
from sgm_finetune.model.tokenizer import load_tokenizer
from sgm_finetune.model.weights.stored import stored_matrices
from sgm_finetune.results.claim import as_it_began
from sgm_finetune.results.folder import recall_start
from sgm_finetune.results.kept_prompts import load_prompts
from sgm_finetune.results.load import attach_untrained
from sgm_finetune.results.pth import load_pth, lora_config, stored_config
from sgm_finetune.results.report.run_files import load_run
from sgm_finetune.results.stops import GENERATION_CONFIG, find_stops, save_tokenizer, stored_generation
from sgm_finetune.train.checkpoints import CONTENTS, is_whole, seal


@dataclass(frozen=True)
class Reader:
    """A reader with a valid input. `good` is the bytes of a file, or plain data that `write` turns into bytes.

    `read` receives the path of a changed file.
    """

    file: str
    good: Any
    read: Callable[[Path], object]
    write: Callable[[Any], bytes] | None = None
    beside: dict[str, bytes] | None = None


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def as_yaml(value: Any) -> bytes:
    return yaml.safe_dump(value).encode()


def as_torch(value: Any) -> bytes:
    held = io.BytesIO()
    torch.save(value, held)
    return held.getvalue()


@cache
def finished_run() -> Path:
    """A run of four steps on a pico LLaMA, with a checkpoint."""
    from rich.console import Console

    from sgm_finetune.commands.finetune import finetune

    folder = Path(mkdtemp(prefix="sgm-fuzz-"))
    make_model("causal-lm").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "data.csv").write_bytes(as_csv())
    settings = [
        f"model.name={folder / 'model'}", "model.dtype=float32", f"data.train={folder / 'data.csv'}",
        "data.max_length=16", "probe.num_batches=2", "probe.batch_size=4", "probe.sketch_size=12", "adapter.rank=4",
        "training.max_steps=4", "training.batch_size=8", f"output.dir={folder / 'out'}",
    ]  # fmt: skip
    finetune(load_config(None, settings), Console(quiet=True))
    return folder


def rows() -> list[dict[str, str]]:
    words = ["good", "bad", "fine", "film", "plot", "cast"]
    return [{"text": f"{words[n % 6]} {words[n // 6 % 6]}", "label": "ab"[n % 2]} for n in range(36)]


CHAT_TEMPLATE = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}[{{ m.role }}]{{ m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chats() -> list[dict[str, Any]]:
    """Conversations with everything that a row and a message may have."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"town": 3}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    return [
        {"system": "good", "tools": [tool], "messages": [
            {"role": "user", "content": [{"type": "text", "text": f"film {n}"}], "name": "a"},
            {"role": "assistant", "content": "bad", "weight": 0, "reasoning_content": "plot"},
            {"role": "user", "content": "cast"}, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "fine", "tool_call_id": "c1"}, {"role": "assistant", "content": f"good {n}"},
        ]}
        for n in range(6)
    ]  # fmt: skip


def sharegpt() -> list[dict[str, Any]]:
    called = '{"name": "f", "arguments": "{\\"town\\": 3}"}'
    turns = [("human", "film"), ("function_call", called), ("observation", "fine"), ("gpt", "good")]
    return [
        {"system": "good", "tools": '[{"name": "f", "parameters": {}}]', "source": "web",
         "conversations": [{"from": who, "value": f"{what}{n if who == 'human' else ''}"} for who, what in turns]}
        for n in range(6)
    ]  # fmt: skip


def alpaca() -> list[dict[str, Any]]:
    return [
        {"instruction": f"film {n}", "input": "plot", "output": "good", "system": "fine", "history": [["cast", "bad"]]}
        for n in range(6)
    ]


def chats_in_two_columns() -> list[dict[str, Any]]:
    return [
        {"prompt": row["messages"][:-1], "completion": row["messages"][-1:], "tools": row["tools"]} for row in chats()
    ]


def as_csv() -> bytes:
    held = io.StringIO()
    writer = csv.DictWriter(held, ["text", "label"])
    writer.writeheader()
    writer.writerows(rows())
    return held.getvalue().encode()


def as_semicolons() -> list[str]:
    """The lines of a file that has semicolons between its fields."""
    return as_csv().decode().replace(",", ";").splitlines(keepends=True)


def as_packed(lines: Any) -> bytes:
    text = "".join(map(str, lines)) if isinstance(lines, list) else str(lines)
    return gzip.compress(text.encode("utf-8", "surrogatepass"))


def as_parquet() -> bytes:
    held = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows()), held)
    return held.getvalue()


def as_conll() -> bytes:
    return "\n".join("".join(f"{word}\tO\n" for word in row["text"].split()) + "x\tB-X\n" for row in rows()).encode()


def as_gguf() -> bytes:
    path = Path(mkdtemp(prefix="sgm-fuzz-")) / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 32), np.float32))
    packed = np.zeros((4, 34), np.uint8)
    writer.add_tensor("blk.0.attn_k.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def read_data(path: Path, task: str = "sequence-classification") -> None:
    config = load_config(None, [f"data.train={path}", f"model.task={task}"])
    load_splits(config.data, config.model.task)


def read_chats(path: Path) -> None:
    """Reads conversations and writes them with a template, as far as the tokens."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    splits = load_splits(load_config(None, [f"data.train={path}", "model.task=causal-lm"]).data, "causal-lm")
    encode(splits.train, tokenizer, "causal-lm", 256, splits.origins["train"])


def list_rows() -> list[dict]:
    """Rows whose labels are vectors of 0 and 1."""
    return [{**row, "label": [n % 2, 1, int(n % 3 == 0)]} for n, row in enumerate(rows())]


def as_lists_in_csv() -> bytes:
    held = io.StringIO()
    writer = csv.DictWriter(held, ["text", "label"])
    writer.writeheader()
    writer.writerows({**row, "label": f"['{row['label']}', 'c']"} for row in rows())
    return held.getvalue().encode()


def read_head(path: Path) -> None:
    """Chooses the head of a model by its config.json."""
    described = read_model_config(ModelConfig(name="x"), path.parent)
    for labels in (("neg", "pos"), ("0", "1"), ()):
        for task in ("sequence-classification", "token-classification"):
            choose_head(labels, described, task)


def read_adapter(path: Path) -> None:
    """Names the base model of an adapter that was given for a model, in the one line that refuses it."""
    with suppress(UserError):
        refuse_adapter(path.parent)
        raise AssertionError(f"{path} is not refused")


def read_weights(path: Path) -> None:
    for matrix in stored_matrices(path if path.suffix == ".gguf" else path.parent):
        matrix.load()


def read_scan(path: Path) -> None:
    scan = load_scan(path)
    by_parameter(scan)
    scan.to_dict()


def read_plan(path: Path) -> None:
    adapter_parameters(load_plan(path))


def read_pth(path: Path) -> None:
    """Reads the file as `sgm evaluate` does, but builds the model without weights."""
    content = load_pth(path)
    config = stored_config(content, path, Config(), [])
    assert not config.model.trust_remote_code
    lora_config(content)
    base = skeleton(ModelConfig(name="pico", dtype="float32"), finished_run() / "model", Head(("a", "b"), "class", 0))
    attach_untrained(base, content, path)


def read_progress(path: Path) -> None:
    output = path.parent.parent
    as_it_began(load_config(None, ["memory.budget=8GiB"]), output)
    recall_start(output, load_plan(finished_run() / "out" / "plan.json"), {})


def read_run(path: Path) -> None:
    load_run(path.parent)


def read_contents(path: Path) -> None:
    is_whole(path.parent)


def read_config_of_model(path: Path) -> None:
    check_model(ModelConfig(name=str(path.parent)), path.parent, 8)


def read_tokenizer(path: Path) -> None:
    load_tokenizer(path.parent)("good film")


def read_overrides(path: Path) -> None:
    load_config(None, path.read_text(encoding="utf-8", errors="replace").split("\n"))


def read_generation(path: Path) -> None:
    generation, tokenizer = stored_generation(path.parent, None), make_tokenizer()
    find_stops(tokenizer, generation)
    save_tokenizer(tokenizer, path.parent / "copy", generation, is_chat=False)


def readers() -> dict[str, Reader]:
    folder = finished_run()
    model, out = folder / "model", folder / "out"
    scan = {"model": "pico", "estimator": "mp", "matrices": [
        {"name": f"layers.{n}.q", "kind": "layers.*.q", "layer": n, "shape": [8, 8], "sigma": 1.0, "edge": 4.0,
         "signal_rank": 1, "snr": 0.5, "snr_db": -3.0, "parameter": f"layers.{n}.q.weight", "energy": 2.0}
        for n in range(2)
    ]}  # fmt: skip
    weights = {"layers.0.q.weight": torch.ones(4, 6), "layers.1.q.weight": torch.zeros(6, 4, dtype=torch.bfloat16)}
    pth = torch.load(out / "sgm_finetuned.pth", weights_only=True)
    tokenizer = {path.name: path.read_bytes() for path in model.iterdir() if "token" in path.name}
    run = ("metrics.json", "history.json", "pictures.json", "examples.json", "plan.json", "plan.safetensors",
           "config.yaml")  # fmt: skip
    lines = b"\n".join(map(as_json, rows()))
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "a.bin").write_bytes(b"abc")
    seal(checkpoint)
    return {
        "config.yaml": Reader(
            "config.yaml", yaml.safe_load((out / "config.yaml").read_text()), lambda path: load_config(path), as_yaml
        ),
        "key=value": Reader("keys.txt", b"training.epochs=2\nmodel.name=a\ndata.columns={text: t}", read_overrides),
        "plan": Reader("plan.json", json.loads((out / "plan.json").read_text()), read_plan, as_json,
                       {"plan.safetensors": (out / "plan.safetensors").read_bytes()}),
        "plan's starts": Reader("plan.safetensors", (out / "plan.safetensors").read_bytes(),
                                lambda path: read_plan(path.with_suffix(".json")), None,
                                {"plan.json": (out / "plan.json").read_bytes()}),
        "scan": Reader("scan.json", scan, read_scan, as_json),
        "published scan": Reader("scan.json", {"layers.0.q": {"snr": 1.5, "type": "q"}}, read_scan, as_json),
        ".pth, bytes": Reader("sgm_finetuned.pth", (out / "sgm_finetuned.pth").read_bytes(), read_pth),
        ".pth, content": Reader("sgm_finetuned.pth", pth, read_pth, as_torch),
        "index of shards": Reader(
            "model.safetensors.index.json", {"weight_map": dict.fromkeys(weights, "a.safetensors")}, read_weights,
            as_json, {"a.safetensors": save(weights)}),
        ".safetensors": Reader("model.safetensors", save(weights), read_weights),
        ".bin": Reader("pytorch_model.bin", as_torch(weights), read_weights),
        ".gguf": Reader("model.gguf", as_gguf(), read_weights),
        "a model's config.json": Reader("config.json", json.loads((model / "config.json").read_text()),
                                        read_config_of_model, as_json),
        "tokenizer.json": Reader("tokenizer.json", json.loads(tokenizer["tokenizer.json"]), read_tokenizer, as_json,
                                 tokenizer),
        "tokenizer_config.json": Reader("tokenizer_config.json", json.loads(tokenizer["tokenizer_config.json"]),
                                        read_tokenizer, as_json, tokenizer),
        GENERATION_CONFIG: Reader(
            GENERATION_CONFIG, {"eos_token_id": [2, 1], "stop_strings": ["#"], "top_k": 5}, read_generation, as_json),
        "prompts.json": Reader(
            "prompts.json", {"format": "sgm-prompts/1", "prompts": [[1, 2], [3]], "max_new_tokens": 3},
            lambda path: load_prompts(path.parent, 8, 4), as_json),
        ".csv": Reader("data.csv", as_csv(), read_data),
        ".json": Reader("data.json", rows(), read_data, as_json),
        ".jsonl": Reader("data.jsonl", lines, read_data),
        ".jsonl.gz": Reader("data.jsonl.gz", gzip.compress(lines), read_data),
        ".csv.bz2": Reader("data.csv.bz2", bz2.compress(as_csv()), read_data),
        ".json.xz": Reader("data.json.xz", lzma.compress(as_json(rows())), read_data),
        ".jsonl.zst": Reader("data.jsonl.zst", pa.Codec("zstd").compress(lines, asbytes=True), read_data),
        "packed text": Reader("data.csv.gz", as_semicolons(), read_data, as_packed),
        ".parquet": Reader("data.parquet", as_parquet(), read_data),
        "vectors of labels": Reader("data.json", list_rows(), read_data, as_json),
        "lists in .csv": Reader("data.csv", as_lists_in_csv(), read_data),
        "a head's config.json": Reader(
            "config.json",
            {"model_type": "bert", "architectures": ["BertForSequenceClassification"],
             "id2label": {"0": "pos", "1": "neg"}, "label2id": {"pos": 0, "neg": 1}},
            read_head, as_json),
        "adapter_config.json": Reader("adapter_config.json", {"base_model_name_or_path": "owner/name", "r": 8},
                                      read_adapter, as_json),
        ".conll": Reader("data.conll", as_conll(), lambda path: read_data(path, "token-classification")),
        "chats": Reader("data.json", chats(), read_chats, as_json),
        "ShareGPT": Reader("data.json", sharegpt(), read_chats, as_json),
        "Alpaca": Reader("data.json", alpaca(), read_chats, as_json),
        "chats as prompt and completion": Reader("data.json", chats_in_two_columns(), read_chats, as_json),
        "progress.json": Reader("checkpoints/progress.json",
                                json.loads((out / "checkpoints" / "progress.json").read_text()), read_progress,
                                as_json, {"config.yaml": (out / "config.yaml").read_bytes()}),
        "contents.json": Reader(f"checkpoint-1/{CONTENTS}", json.loads((checkpoint / CONTENTS).read_text()),
                                read_contents, as_json, {"checkpoint-1/a.bin": b"abc"}),
        **{
            name: Reader(name, json.loads((out / name).read_text()), read_run, as_json,
                         {other: (out / other).read_bytes() for other in run if other != name})
            for name in run if name.endswith(".json") and name != "plan.json"
        },
    }  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values within plain data."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))
