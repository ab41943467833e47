"""Predicts which model trains on which machine: memory with the base on the device and elsewhere.

    python benchmarks/machines.py            # appended to results/machines.json
    python benchmarks/machines.py --table    # the tables of docs/large-models.md, from the last record

No model is built and nothing is computed: the predictions are those of `sgm estimate`, without a GPU and as with one,
for Llamas of several sizes in NF4.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
GPU_WAYS = {
    "gpu": ("model.residence=device", "merge.side=none"),
    "gpu, host": ("model.residence=host", "merge.side=none"),
    "gpu, host, probe": ("model.residence=host",),
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


def estimates(shape: dict[str, Any], ways: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """What `sgm estimate` predicts, in bytes."""
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
        for way, more in ways.items():
            names = [f"model.name={place}", f"data.train={place}/rows.jsonl", *more]
            config = load_config(None, [*SETTINGS, *names, f"output.dir={place}/out"])
            prepared = prepare_data(config, StepLog(Console(quiet=True)))
            with patch("sgm_finetune.train.budget.estimate.measure_speed", return_value=Speed(1e12, 1e10)):
                needed = estimate(config, prepared)
            found[way] = {
                "bytes": needed.firm_bytes, "phase": PHASES[needed.firm_phase], "pages": needed.mapped_bytes,
                "store": needed.store_bytes, "host": needed.host_bytes,
            }  # fmt: skip
    return found


@contextmanager
def as_with_a_gpu() -> Iterator[None]:
    """A context in which memory is predicted as on a machine with a GPU that has Liger's kernels."""
    from sgm_finetune.model.stand_ins import stand_in_kernels

    with ExitStack() as stack:
        for name, value in {
            "torch.cuda.is_available": lambda: True, "torch.cuda.get_device_name": lambda: "GPU",
            "sgm_finetune.train.fast.prepare.use_liger": lambda model, batch: stand_in_kernels(model),
            "sgm_finetune.train.budget.reading.copy_rate": lambda: 5e10,
        }.items():  # fmt: skip
            stack.enter_context(patch(name, value))
        yield


def predict(name: str) -> dict[str, Any]:
    """One row, in a process of its own, so that the memory of one prediction is no part of the next."""
    command = [sys.executable, __file__, "--one", name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def tables(rows: list[dict[str, Any]]) -> str:
    """Three tables: memory without a GPU, with one, and the largest model on each machine."""
    lines = [
        "| no GPU | in memory, GiB | on disk, GiB | of it pages of files | on disk, with the probe | new files, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        device, disk = row["device"], row["disk"]
        lines.append(
            f"| {row['model']} | {_gib(device['bytes'])} | {_gib(disk['bytes'])} | {_gib(disk['pages'])} | "
            f"{_gib(row['disk, probe']['bytes'])} | {_gib(disk['store'])} |"
        )
    lines += ["", "| GPU | on it, GiB | on the host, GiB of the GPU | the same with the probe | GiB of the host |"]
    lines += ["|---|---|---|---|---|"]
    for row in rows:
        parts = (*(row[way]["bytes"] for way in GPU_WAYS), row["gpu, host"]["host"])
        lines.append(f"| {row['model']} | {' | '.join(map(_gib, parts))} |")
    lines += ["", "| machine | in its memory | elsewhere | elsewhere, with the probe |", "|---|---|---|---|"]
    machines = [(f"{size} GB, no GPU", HOST_SHARE * size, WAYS) for size in HOSTS]
    machines += [(f"GPU of {size} GB", GPU_SHARE * size, GPU_WAYS) for size in GPUS]
    for name, limit, ways in machines:
        fitting = [_largest({row["model"]: row[way]["bytes"] for row in rows}, limit * 1e9) for way in ways]
        lines.append(f"| {name} | {' | '.join(fitting)} |")
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
        found = estimates(SHAPES[asked.one], WAYS)
        with as_with_a_gpu():
            found |= estimates(SHAPES[asked.one], GPU_WAYS)
        print(json.dumps({"model": asked.one, **found}))
        return
    if not asked.table:
        started = time.perf_counter()
        append_run("machines", "python benchmarks/machines.py", started, [predict(name) for name in SHAPES], _PACKAGES)
    print(tables(json.loads((RESULTS / "machines.json").read_text(encoding="utf-8"))[-1]["rows"]))


if __name__ == "__main__":
    main()
