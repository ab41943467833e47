"""Trains on pairs of film reviews with several seeds: preferences on SmolLM2, or a reward model on MiniLM.

    python benchmarks/preferences.py preference --seeds 0 1 2
    python benchmarks/preferences.py reward --seeds 0 1 2

The pairs are those of docs/tutorials/preferences.md: a praising and a panning sentence of about the same length answer
one question. A finished run is appended to benchmarks/results/preferences.jsonl, and is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recording import processor, versions

RESULTS = Path(__file__).parent / "results" / "preferences.jsonl"
SETTINGS = {
    "preference": (
        "model.name=smollm2-135m-instruct", "model.task=preference", "preference.loss=dpo", "preference.beta=0.1",
        "data.num_train=128", "data.num_validation=16", "data.num_test=60", "training.batch_size=8",
        "evaluation.num_generated=4",
    ),
    "reward": (
        "model.name=all-minilm-l6-v2", "model.task=reward", "data.num_train=640", "data.num_validation=32",
        "data.num_test=400", "training.batch_size=16",
    ),
}  # fmt: skip
"""The settings of each task, for `sgm finetune`."""
KEPT = (
    "before", "after", "steps", "best_step", "trainable_parameters", "peak_memory_bytes", "predicted", "seconds",
)  # fmt: skip
"""What is recorded of metrics.json."""


def write_pairs(path: Path) -> None:
    from sgm_finetune.data.embedded import movie_reviews

    reviews = movie_reviews("rotten-tomatoes").columns
    good, bad = (
        sorted((t for t, label in zip(reviews["text"], reviews["label"], strict=True) if label == kind), key=len)
        for kind in (1, 0)
    )
    pairs = list(zip(good, bad, strict=False))
    random.Random(0).shuffle(pairs)
    question = {"role": "user", "content": "Write a good film review."}
    with path.open("w", encoding="utf-8") as file:
        for better, worse in pairs:
            sides = {"chosen": better, "rejected": worse}
            row = {side: [question, {"role": "assistant", "content": text}] for side, text in sides.items()}
            file.write(json.dumps(row) + "\n")


def run(task: str, seed: int, threads: int) -> dict:
    """One run of `sgm finetune`; what it measured. In float32 where the processor has no bfloat16 instructions."""
    dtype = "auto" if processor()["bfloat16_instructions"] else "float32"
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder) / "pairs.jsonl")
        (Path(folder) / "empty.yaml").write_text("")
        settings = [
            *SETTINGS[task],
            f"model.dtype={dtype}",
            "data.train=pairs.jsonl",
            "data.max_length=128",
            f"training.seed={seed}",
        ]
        command = [sys.executable, "-m", "sgm_finetune", "finetune", "--config", "empty.yaml", *settings]
        subprocess.run(command, cwd=folder, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        metrics = json.loads((Path(folder) / "output" / "metrics.json").read_text(encoding="utf-8"))
    return {
        "task": task, "seed": seed, "threads": threads, "command": f"sgm finetune {' '.join(settings)}",
        "date": time.strftime("%Y-%m-%d"), **processor(), "versions": versions(("torch", "transformers", "peft")),
        **{key: metrics[key] for key in KEPT},
    }  # fmt: skip


def summary(runs: list[dict]) -> str:
    """Each metric before and after, as mean ± standard error over the seeds."""
    lines = []
    for key, value in runs[0]["after"].items():
        if isinstance(value, float):
            found = {}
            for when in ("before", "after"):
                values = [run[when][key] for run in runs if run[when].get(key) is not None]
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
                found[when] = f"{statistics.fmean(values):.4f} ± {error:.4f}" if values else "none"
            lines.append(f"{key}: {found['before']} -> {found['after']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*SETTINGS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for seed in options.seeds:
        if not any((one["task"], one["seed"]) == (options.task, seed) for one in done):
            done.append(run(options.task, seed, options.threads))
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]) + "\n")
    print(summary([one for one in done if one["task"] == options.task and one["seed"] in options.seeds]))


if __name__ == "__main__":
    main()
