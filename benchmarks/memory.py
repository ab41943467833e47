"""Compares predicted peak memory, which `sgm finetune` prints before a run, with the measured peak of the run.

    python benchmarks/memory.py              # runs the configurations that are missing on this machine
    python benchmarks/memory.py --predict    # predicts the measured configurations again (`sgm estimate`)
    python benchmarks/memory.py --table      # prints the tables of docs/estimate.md from the recorded runs

Each configuration is a whole run in a separate process (test, probe, a few steps, validation, test), appended to
benchmarks/results/memory.jsonl. Each processor has its own table. The measured peak is resident memory on a CPU and
allocated memory on a GPU. The allocator's shares in the prediction were chosen with the first of these results in view
(docs/estimate.md).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from recording import RESULTS, processor

FILE = RESULTS / "memory.jsonl"
ROOT = Path(__file__).parent.parent
THREADS = 2
_SHORT = ("training.max_steps=4", "probe.num_batches=4", "evaluation.num_generated=0")
_LM = ("model.task=causal-lm", "data.name=jane-austen", "data.num_validation=16", "data.num_test=16", *_SHORT)
_CHAT = ("model.task=causal-lm", "data.name=xsum", "data.num_train=64", "data.num_validation=16", "data.num_test=16")
_REVIEWS = (
    "model.name=all-minilm-l6-v2", "data.num_train=600", "data.num_validation=64", "data.num_test=64", *_SHORT,
)  # fmt: skip
CONFIGURATIONS = {
    "SmolLM2, batch 2 x 256": (*_LM, "training.batch_size=2"),
    "SmolLM2, batch 3 x 256": (*_LM, "training.batch_size=3"),
    "SmolLM2, batch 6 x 256": (*_LM, "training.batch_size=6"),
    "SmolLM2, batch 12 x 256": (*_LM, "training.batch_size=12"),
    "SmolLM2, batch 16 x 128": (*_LM, "training.batch_size=16", "data.max_length=128"),
    "SmolLM2, batch 4 x 512": (*_LM, "training.batch_size=4", "data.max_length=512"),
    "SmolLM2, batch 2 x 1024": (*_LM, "training.batch_size=2", "data.max_length=1024"),
    "SmolLM2, batch 32 in micro-batches of 4": (*_LM, "training.batch_size=32", "training.micro_batch_size=4"),
    "SmolLM2, rank 64": (*_LM, "training.batch_size=6", "adapter.rank=64", "probe.sketch_size=128"),
    "SmolLM2, AdamW": (*_LM, "training.batch_size=6", "training.optimizer=adamw"),
    "SmolLM2, 8-bit AdamW, rank 64": (
        *_LM, "training.batch_size=6", "adapter.rank=64", "probe.sketch_size=64", "training.optimizer=adamw_8bit",
    ),
    "SmolLM2, nothing shared, no probe": (*_LM, "training.batch_size=6", "merge.side=none"),
    "SmolLM2, checkpointing": (*_LM, "training.batch_size=12", "training.checkpointing=true", "probe.batch_size=2"),
    "SmolLM2, upper quarter of the layers": (
        *_LM, "training.batch_size=6", "selection.top_fraction=0.25", "selection.by=depth", "merge.side=none",
    ),
    "SmolLM2, PEFT's step": (*_LM, "training.batch_size=6", "training.step=peft"),
    "SmolLM2, float32": (*_LM, "training.batch_size=6", "model.dtype=float32"),
    "SmolLM2, NF4": (*_LM, "training.batch_size=6", "model.quantization=nf4"),
    "SmolLM2, NF4, batch 2 x 512": (
        *_LM, "training.batch_size=2", "data.max_length=512", "model.quantization=nf4",
    ),
    "SmolLM2, 8 bit": (*_LM, "training.batch_size=6", "model.quantization=int8"),
    "SmolLM2, answers, chat": (*_CHAT, "data.max_length=384", "training.max_steps=4", "training.batch_size=4"),
    "MiniLM, batch 32 x 64": (*_REVIEWS, "data.name=rotten-tomatoes", "data.max_length=64"),
    "MiniLM, batch 32 x 256": (*_REVIEWS, "data.name=imdb", "data.max_length=256"),
    "MiniLM, batch 96 x 128": (*_REVIEWS, "data.name=imdb", "data.max_length=128", "training.batch_size=96"),
    "MiniLM, batch 16 x 512, NF4": (
        *_REVIEWS, "data.name=imdb", "data.max_length=512", "training.batch_size=16", "model.quantization=nf4",
    ),
    "MiniLM, names, batch 32": (
        "model.name=all-minilm-l6-v2", "model.task=token-classification", "data.name=conll-sample",
        "training.max_steps=4", "probe.num_batches=4",
    ),
}  # fmt: skip
"""Name -> overrides of the default configuration."""


def said(command: str, name: str) -> dict:
    """The JSON object that `sgm COMMAND --json` prints."""
    with tempfile.TemporaryDirectory() as folder:
        blank = Path(folder) / "config.yaml"
        blank.write_text("{}\n")
        arguments = [command, "--json", *CONFIGURATIONS[name], "--config", str(blank), f"output.dir={folder}/out"]
        ran = subprocess.run(
            [sys.executable, "-m", "sgm_finetune", *arguments],
            capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
        )  # fmt: skip
    if ran.returncode:
        raise SystemExit(f"{name}: {ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def predict_again(row: dict) -> dict:
    predicted = said("estimate", row["configuration"])
    return {
        **row,
        "predicted_mib": round(predicted["peak_bytes"] / 2**20),
        "off": round(predicted["peak_bytes"] / 2**20 / row["measured_mib"] - 1, 4),
        "phase": predicted["peak_phase"],
        "predicted_seconds": round(sum(predicted["seconds"].values()), 1),
        "command": "python benchmarks/memory.py --predict",
        "predicted_date": time.strftime("%Y-%m-%d"),
    }


def measure(name: str) -> dict:
    metrics = said("finetune", name)
    predicted, measured = metrics["predicted"]["peak_bytes"], metrics["peak_memory_bytes"]
    return {
        "configuration": name,
        "overrides": list(CONFIGURATIONS[name]),
        "predicted_mib": round(predicted / 2**20),
        "measured_mib": round(measured / 2**20),
        "off": round(predicted / measured - 1, 4),
        "phase": metrics["predicted"]["peak_phase"],
        "predicted_seconds": round(sum(metrics["predicted"]["seconds"].values()), 1),
        "measured_seconds": round(sum(metrics["seconds"][k] for k in ("probe", "train", "evaluate")), 1),
        "threads": THREADS,
        "device": metrics["environment"]["device"],
        **processor(),
        "versions": {package: version(package) for package in ("torch", "transformers", "peft", "bitsandbytes")},
        "command": "python benchmarks/memory.py",
        "date": time.strftime("%Y-%m-%d"),
    }


def append(row: dict) -> None:
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    peaks = f"{row['predicted_mib']:,} predicted, {row['measured_mib']:,} measured, {row['off']:+.1%}"
    print(f"{row['configuration']}: {peaks}", flush=True)


def recorded_runs() -> dict[str, dict[str, dict]]:
    """Machine -> configuration -> its last run on that machine."""
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    found: dict[str, dict[str, dict]] = {}
    for row in map(json.loads, lines):
        found.setdefault(machine(row), {})[row["configuration"]] = row
    return found


def machine(row: dict) -> str:
    """Name of a run's machine, with its bfloat16 units: virtual processors of several generations share one name."""
    return row["processor"] + (", bfloat16 units" if row["bfloat16_units"] else "")


def table(name: str, rows: dict[str, dict]) -> str:
    lines = [
        f"{name}\n",
        "| configuration | most memory while | predicted, MiB | measured, MiB | off | time, predicted / measured |",
        "|---|---|---|---|---|---|",
    ]
    for name in CONFIGURATIONS:
        if (row := rows.get(name)) is not None:
            times = f"{row['predicted_seconds']:.0f} / {row['measured_seconds']:.0f} s"
            off = f"{100 * row['off']:+.1f} %".replace("-", "−")
            sizes = f"{row['predicted_mib']:,} | {row['measured_mib']:,}"
            lines.append(f"| {name} | {row['phase']} | {sizes} | {off} | {times} |")
    offs = [abs(row["off"]) for row in rows.values()]
    near = sum(off <= 0.05 for off in offs)
    lines.append(
        f"\n{len(offs)} configurations, {near} within 5 %: off by {100 * statistics.median(offs):.1f} % in the median, "
        f"{100 * max(offs):.1f} % at most."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables of the recorded runs")
    parser.add_argument("--predict", action="store_true", help="predict the measured configurations again")
    parser.add_argument("--only", nargs="+", help="measure these configurations, even if they are recorded")
    asked = parser.parse_args()
    here = recorded_runs().get(machine(processor()), {})
    if asked.predict:
        for row in here.values():
            if asked.only is None or row["configuration"] in asked.only:
                append(predict_again(row))
    elif not asked.table:
        for name in asked.only or [name for name in CONFIGURATIONS if name not in here]:
            append(measure(name))
    print("\n\n".join(table(name, rows) for name, rows in recorded_runs().items()))


if __name__ == "__main__":
    main()
