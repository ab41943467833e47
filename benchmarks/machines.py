"""Predicts which model trains on which machine: memory with the base in memory and on disk, and on a GPU.

    python benchmarks/machines.py            # appended to results/machines.json
    python benchmarks/machines.py --table    # the tables of docs/large-models.md, from the last record

No model is built and nothing is computed: the predictions are those of `sgm estimate` for a machine without a GPU, and
of benchmarks/memory_gpu.py for a GPU, for Llamas of several sizes in NF4. Measured numbers stand in the tables only
where a record of another benchmark has them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llama_8b import LLAMA_8B
from recording import RESULTS, append_run

LENGTH, RANK = 512, 16
SETTINGS = (
    "model.task=causal-lm", "model.quantization=nf4", "model.dtype=bfloat16", f"data.max_length={LENGTH}",
    "training.micro_batch_size=1", "training.eval_batch_size=1", "training.checkpointing=true",
    f"adapter.rank={RANK}", "evaluation.num_generated=1",
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "3B": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "8B": {},
    "14B": {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 48, "num_attention_heads": 40},
    "32B": {"hidden_size": 5120, "intermediate_size": 27_648, "num_hidden_layers": 64, "num_attention_heads": 40},
    "70B": {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
}  # fmt: skip
"""What differs from the Llama of 8B; with the vocabulary of Llama 3."""
WAYS = {
    "device": ("model.residence=device", "merge.side=none"),
    "disk": ("model.residence=disk", "merge.side=none"),
    "disk, probe": ("model.residence=disk",),
}
HOSTS, HOST_SHARE = (8, 16, 32), 0.85
"""GB of memory of machines without a GPU, and the share of it that a run may take."""
GPUS, GPU_SHARE = (4, 6, 8, 12, 16, 24), 0.92
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def describe_model(folder: Path, shape: dict[str, Any]) -> None:
    """A model's folder as far as an estimate reads it, and texts that are longer than `LENGTH`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(**LLAMA_8B | shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    words = {word: number for number, word in enumerate(("<pad>", "<eos>", "<unk>", "word"))}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=8192, **special).save_pretrained(folder)
    rows = [json.dumps({"text": f"number {n} " + "word " * (LENGTH + 100)}) for n in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")


def on_a_host(shape: dict[str, Any]) -> dict[str, Any]:
    """What `sgm estimate` predicts without a GPU, in bytes."""
    from rich.console import Console

    from sgm_finetune.base.config_file import load_config
    from sgm_finetune.base.console import StepLog
    from sgm_finetune.data.prepared import prepare_data
    from sgm_finetune.train.budget.estimate import estimate
    from sgm_finetune.train.budget.needs import PHASES
    from sgm_finetune.train.budget.speed import Speed

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        describe_model(Path(place), shape)
        for way, more in WAYS.items():
            names = [f"model.name={place}", f"data.train={place}/rows.jsonl", *more]
            config = load_config(None, [*SETTINGS, *names, f"output.dir={place}/out"])
            prepared = prepare_data(config, StepLog(Console(quiet=True)))
            with patch("sgm_finetune.train.budget.estimate.measure_speed", return_value=Speed(1e12, 1e10)):
                needed = estimate(config, prepared)
            found[way] = {
                "bytes": needed.firm_bytes, "phase": PHASES[needed.firm_phase], "pages": needed.mapped_bytes,
                "store": needed.store_bytes,
            }  # fmt: skip
    return found


def on_a_gpu(shape: dict[str, Any]) -> float:
    """Predicted peak of a step in GiB."""
    from memory_gpu import predict_peak

    with patch("torch.cuda.is_available", return_value=True):
        return predict_peak("SGM", 1, LENGTH, "on", LLAMA_8B | shape)


def predict(name: str) -> dict[str, Any]:
    """One row, in a process of its own, so that the memory of one prediction is no part of the next."""
    command = [sys.executable, __file__, "--one", name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def tables(rows: list[dict[str, Any]]) -> str:
    """Two tables: memory, and the largest model on each machine."""
    lines = [
        "| model | in memory, GiB | on disk, GiB | of it pages of files | on disk, with the probe | new files, GiB |"
        " on a GPU, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        device, disk = row["device"], row["disk"]
        lines.append(
            f"| {row['model']} | {_gib(device['bytes'])} | {_gib(disk['bytes'])} | {_gib(disk['pages'])} | "
            f"{_gib(row['disk, probe']['bytes'])} | {_gib(disk['store'])} | {row['gpu_gib']:.2f} |"
        )
    lines += ["", "| machine | in memory | on disk | on disk, with the probe |", "|---|---|---|---|"]
    for size in HOSTS:
        fitting = [_largest({row["model"]: row[way]["bytes"] for row in rows}, HOST_SHARE * size * 1e9) for way in WAYS]
        lines.append(f"| {size} GB, no GPU | {' | '.join(fitting)} |")
    for size in GPUS:
        largest = _largest({row["model"]: row["gpu_gib"] * 2**30 for row in rows}, GPU_SHARE * size * 1e9)
        lines.append(f"| GPU of {size} GB | {largest} | – | – |")
    return "\n".join(lines)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}"


def _largest(sizes: dict[str, float], limit: float) -> str:
    """The last of the models, smallest first, whose bytes are within `limit`."""
    return next((model for model, size in reversed(sizes.items()) if size <= limit), "none of these")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables of the last record")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        os.environ["HF_HUB_OFFLINE"] = "1"
        shape = SHAPES[asked.one]
        print(json.dumps({"model": asked.one, **on_a_host(shape), "gpu_gib": round(on_a_gpu(shape), 3)}))
        return
    if not asked.table:
        started = time.perf_counter()
        append_run("machines", "python benchmarks/machines.py", started, [predict(name) for name in SHAPES], _PACKAGES)
    print(tables(json.loads((RESULTS / "machines.json").read_text(encoding="utf-8"))[-1]["rows"]))


if __name__ == "__main__":
    main()
