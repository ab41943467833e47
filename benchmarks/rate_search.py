"""Which learning rate a number of steps wants: the quality benchmark's tasks with other steps and batches.

    python benchmarks/rate_search.py --task sentiment --methods "LoRA, our step" --rates 0.025 0.05 0.1 --steps 30
    python benchmarks/rate_search.py --task sentiment --methods SGM --rates 0.006 0.0125 --steps 480 --batch-size 8

Each run takes the seed that chooses learning rates, is measured on validation data, and is appended to
benchmarks/results/rate_search.jsonl with its versions. Runs that are there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from quality_tasks import TASKS, TUNING_SEED

RESULTS = Path(__file__).parent / "results" / "rate_search.jsonl"
KEPT = (
    "task", "method", "rate", "seed", "tier", "rank", "steps", "batch_size", "trained_parameters", "train_loss",
    "validation", "device", "versions",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=["SGM", "LoRA, our step"])
    parser.add_argument("--rates", nargs="+", type=float, required=True)
    parser.add_argument("--steps", nargs="+", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--rank", type=int, help="of plain LoRA, which sets the budget")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    from quality_run import train_once

    task = TASKS[options.task]
    task = replace(task, batch_size=options.batch_size or task.batch_size, rank=options.rank or task.rank)
    for steps in options.steps or [task.num_steps]:
        TASKS[task.name] = replace(task, num_steps=steps)
        for method in options.methods:
            for rate in options.rates:
                wanted = (task.name, method, rate, steps, task.batch_size, options.rank)
                if wanted in finished():
                    continue
                run = train_once(task.name, method, rate, TUNING_SEED, options.threads)
                kept = {
                    **{key: run[key] for key in KEPT},
                    "given_rank": options.rank,
                    "date": time.strftime("%Y-%m-%d"),
                }
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(kept) + "\n")
                print(f"{wanted}: {run['validation']}", flush=True)


def finished() -> set[tuple]:
    """(task, method, rate, steps, batch size, rank that was given) of every recorded run."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    runs = [json.loads(line) for line in lines]
    return {(r["task"], r["method"], r["rate"], r["steps"], r["batch_size"], r["given_rank"]) for r in runs}


if __name__ == "__main__":
    main()
