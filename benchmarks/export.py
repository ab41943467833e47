"""Measures each export: the difference of its logits, its size, its seconds and its memory.

    python benchmarks/export.py                # a short run of SmolLM2-135M in 4 bits, exported every way
    python benchmarks/export.py --base         # film reviews: into which weights it is merged, and what each type loses
    python benchmarks/export.py --four-bits    # film reviews, not quantised in training: what 4 bits lose;
                                               # with the output.dir of such a run behind it, that run is exported
    python benchmarks/export.py --large 8      # memory to merge 8 layers of an 8B model's size

Each row comes from a separate process and is a line of benchmarks/results/export.jsonl.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any

from recording import RESULTS, process_memory, processor

EXPORTS = (
    ("adapter", None),
    ("merged", None),
    *(("gguf", kind) for kind in ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")),
    ("gguf-adapter", None),
)
PACKAGES = (
    "torch", "transformers", "peft", "safetensors", "gguf", "llama-cpp-python", "bitsandbytes", "auto-round",
    "compressed-tensors",
)  # fmt: skip
SGM = [sys.executable, "-c", "import sys; from sgm_finetune.commands.cli import main; main(sys.argv[1:])"]


def train_small_run(folder: Path) -> list[str]:
    """Trains eight steps on made-up answers; returns the arguments with which `sgm export` finds the result."""
    rows = [
        {"prompt": f"How far is mill {i}?", "completion": f" It is {3 * i + 7} leagues, by the old river road."}
        for i in range(120)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.yaml").write_text("")
    where = ["--config", str(folder / "empty.yaml"), f"output.dir={folder / 'out'}"]
    overrides = [
        "model.task=causal-lm", "model.quantization=nf4", f"data.train={folder / 'rows.jsonl'}", "data.max_length=48",
        "training.max_steps=8", "training.batch_size=8", "evaluation.num_generated=0",
    ]  # fmt: skip
    subprocess.run([*SGM, "finetune", *where, *overrides], check=True)
    return where


def train_on_reviews(folder: Path, *more: str) -> list[str]:
    """Trains 24 steps of 4 x 64 tokens of film reviews; returns the arguments for `sgm export`."""
    (folder / "empty.yaml").write_text("")
    where = ["--config", str(folder / "empty.yaml"), f"output.dir={folder / 'out'}"]
    overrides = [
        "model.name=smollm2-135m-instruct", "model.task=causal-lm", "model.quantization=nf4",
        "data.name=rotten-tomatoes", "data.max_length=64", "data.num_validation=160", "data.num_test=16",
        "data.num_train=2000", "probe.num_batches=2", "probe.batch_size=4", "training.max_steps=24",
        "training.batch_size=4", "training.eval_steps=24", "evaluation.num_generated=0", *more,
    ]  # fmt: skip
    subprocess.run([*SGM, "finetune", *where, *overrides], check=True)
    return where


def export_row(where: list[str], to: str, kind: str | None, *more: str) -> dict[str, Any]:
    folder = Path(where[1]).parent / f"{to}-{kind}"
    options = ["--to", to, "--output", str(folder), *(["--gguf-type", kind] if kind else []), *more]
    done = subprocess.run([*SGM, "export", "--json", *options, *where], check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    del report["folder"]
    return {"what": "sgm export", **report}


def save_large(folder: Path, num_layers: int) -> None:
    """Writes a LLaMA of random bfloat16 weights, with an adapter of rank 16 on every matrix."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from sgm_finetune.base.config_file import load_config
    from sgm_finetune.measure.make_plan import make_plan
    from sgm_finetune.measure.scan import scan
    from sgm_finetune.model.folder import local_folder
    from sgm_finetune.results.pth import save_pth
    from sgm_finetune.train.adapters.apply import apply_plan

    sizes = LlamaConfig(
        vocab_size=49152, hidden_size=4096, intermediate_size=14336, num_hidden_layers=num_layers,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(sizes)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(local_folder("smollm2-135m-instruct")).save_pretrained(folder / "model")
    settings = [f"model.name={folder / 'model'}", "model.task=causal-lm", "merge.side=none", "data.name=none"]
    config = load_config(None, settings)
    plan = make_plan(scan(folder / "model"), None, config, model)
    adapted = apply_plan(model, plan)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    save_pth(folder / "out" / "sgm_finetuned.pth", adapted, plan, config, (), None)


def written(folder: Path, to: str) -> dict[str, Any]:
    """Peak anonymous memory, in MiB above what the process held before, of writing without the comparison."""
    from rich.console import Console

    from sgm_finetune.base.config_file import load_config
    from sgm_finetune.base.console import StepLog
    from sgm_finetune.results.export.answer_check import result_stops
    from sgm_finetune.results.export.gguf_file import write_gguf
    from sgm_finetune.results.export.gguf_tensors import gguf_tensors
    from sgm_finetune.results.export.gguf_vocabulary import read_vocabulary
    from sgm_finetune.results.export.merge import merged_tensors
    from sgm_finetune.results.export.shards import SHARD_BYTES, write_shards
    from sgm_finetune.results.load import read_result

    result = read_result(load_config(None, [f"output.dir={folder / 'out'}"]), [], StepLog(Console(file=StringIO())))
    tensors, skeleton = merged_tensors(result)
    target = folder / to
    target.mkdir()
    held, most, done = process_memory("RssAnon"), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], process_memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    if to == "merged":
        write_shards(tensors, target, SHARD_BYTES)
    else:
        stops = result_stops(result, skeleton.config)
        words = read_vocabulary(result.tokenizer, skeleton.config.vocab_size, stops)
        write_gguf(gguf_tensors(tensors, skeleton.config), skeleton.config, words, "q8_0", target / "model.gguf")
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {
        "what": "writing alone",
        "format": to,
        "stored_in": "bfloat16" if to == "merged" else "q8_0",
        "base_bytes": sum(tensor.num_bytes for tensor in tensors),
        "largest_tensor_bytes": max(tensor.num_bytes for tensor in tensors),
        "seconds": round(seconds, 1),
        "anonymous_mib": round(most[0] - held),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def record_four_bits(where: list[str]) -> None:
    """The formats in 4 bits, and the merged model that they are rounded from."""
    record(export_row(where, "merged", None))
    record(export_row(where, "bnb-4bit", None))
    record(export_row(where, "compressed-tensors", None))


def record(row: dict[str, Any]) -> None:
    versions = {name: found for name in PACKAGES if (found := _version(name))}
    run = {"date": time.strftime("%Y-%m-%d"), **row, **processor(), "versions": versions}
    print(json.dumps(row))
    with (RESULTS / "export.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")


def main(arguments: list[str]) -> None:
    match arguments:
        case ["--save", folder, num_layers]:
            save_large(Path(folder), int(num_layers))
        case ["--write", folder, to]:
            record(written(Path(folder), to))
        case ["--large", num_layers]:
            with tempfile.TemporaryDirectory() as folder:
                for steps in (
                    ["--save", folder, num_layers],
                    ["--write", folder, "merged"],
                    ["--write", folder, "gguf"],
                ):
                    subprocess.run([sys.executable, __file__, *steps], check=True)
        case ["--base"]:
            with tempfile.TemporaryDirectory() as folder:
                where = train_on_reviews(Path(folder))
                record(export_row(where, "merged", None))
                record(export_row(where, "gguf-adapter", None))
                for kind in ("q8_0", "q6_k", "q5_k_m", "q4_k_m"):
                    record(export_row(where, "gguf", kind, "--base", "original"))
        case ["--four-bits"]:
            with tempfile.TemporaryDirectory() as folder:
                record_four_bits(train_on_reviews(Path(folder), "model.quantization=none", "model.dtype=float32"))
        case ["--four-bits", run]:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "empty.yaml").write_text("")
                record_four_bits(["--config", str(Path(folder) / "empty.yaml"), f"output.dir={run}"])
        case []:
            with tempfile.TemporaryDirectory() as folder:
                where = train_small_run(Path(folder))
                for to, kind in EXPORTS:
                    record(export_row(where, to, kind))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
