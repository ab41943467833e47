"""Trains all matrices of a small model whole, with optimizers of different state: loss against state bytes.

    python benchmarks/full_weights.py --methods AdamW 'merged r=32'       sweeps the rates of these methods
    python benchmarks/full_weights.py --seeds 3                           and tests all methods at their best rates
    python benchmarks/full_weights.py --list                              the methods
    python benchmarks/full_weights.py --tables                            docs/full-results.md from the recorded runs

The tasks are those of benchmarks/quality.py, shorter: the methods are many, the machine is small. The rates of a method
are tried on validation data with a seed of their own until the best one lies inside. Weights and states are float32;
matrix products are bfloat16 (autocast) where the processor has instructions for it, else float32. Gradients are kept
and clipped to norm 1, as for all of quality.py's methods.
Every run is appended to benchmarks/results/full_weights.jsonl and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from full_tables import products_of, write_page
from quality_adapt import Base, Method
from quality_full import FULL
from quality_run import evaluate, load, optimizers_of, train
from quality_tables import ROOT
from quality_tasks import TASKS, TUNING_SEED
from torch import Tensor

from sgm_finetune.base.device import multiplies_bfloat16
from sgm_finetune.method.rate_search import best_rate, next_rate

RESULTS = Path(__file__).parent / "results" / "full_weights.jsonl"
SHORT = {
    "short-topics": replace(
        TASKS["topics"], name="short-topics", num_steps=60,
        overrides=("data.max_length=32", "data.validation_fraction=0.2"),
    ),
    "short-sentiment": replace(TASKS["sentiment"], name="short-sentiment", num_steps=120, batch_size=16),
    "short-stories": replace(
        TASKS["stories"], name="short-stories", num_steps=30,
        overrides=(*TASKS["stories"].overrides, "model.dtype=float32"),
    ),
}  # fmt: skip
MOST_TRIES = 7
PRODUCTS = "bfloat16" if multiplies_bfloat16() else "float32"
"""The type of matrix products here."""


class Runs:
    """The recorded runs, and new ones: one base model at a time, which every run of its seed starts from."""

    def __init__(self) -> None:
        self.done = {key_of(run): run for run in recorded_runs()}
        self.base: tuple[tuple[str, int], Base, dict[str, Tensor]] | None = None

    def run(self, task: str, method: Method, rate: float, seed: int) -> dict[str, Any]:
        """The recorded run, or a new one, which is recorded. A test run counts only with this machine's products."""
        key = (task, method.name, rate, seed)
        if key not in self.done or (seed != TUNING_SEED and products_of(self.done[key]) != PRODUCTS):
            self.done[key] = self._new(task, method, rate, seed)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.done[key]) + "\n")
            print(*key, self.done[key].get("validation", self.done[key].get("test")), file=sys.stderr, flush=True)
        return self.done[key]

    def _new(self, task: str, method: Method, rate: float, seed: int) -> dict[str, Any]:
        base = self._base(task, seed)
        torch.manual_seed(seed)
        adapted = method.adapt(base)
        optimizers = optimizers_of(adapted, rate)
        held = [0]
        optimizers[0].register_step_post_hook(lambda optimizer, *_: held.append(held_bytes(optimizer)))
        losses, seconds = train(adapted, optimizers, base, SHORT[task])
        part = "validation" if seed == TUNING_SEED else "test"
        measured = evaluate(adapted.model, getattr(base.prepared, part).dataset, base.prepared)
        if adapted.model is not base.model:  # adapters stay in it
            self.base = None
        return {
            "task": task, "method": method.name, "rate": rate, "seed": seed, "rank": adapted.rank,
            "steps": len(losses), "batch_size": SHORT[task].batch_size, "products": PRODUCTS,
            "state_bytes": max(held),
            "train_loss": round(statistics.fmean(losses[-20:]), 4),
            part: measured if math.isfinite(measured["loss"]) else {**measured, "loss": 99.0},
            "seconds_per_step": round(statistics.median(seconds), 3),
            "command": f"python benchmarks/full_weights.py --tasks {task} --methods '{method.name}'",
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip

    def _base(self, task: str, seed: int) -> Base:
        if self.base is None or self.base[0] != (task, seed):
            base = load(SHORT[task], seed)
            if PRODUCTS == "bfloat16":
                base.model.forward = torch.autocast("cpu", torch.bfloat16)(base.model.forward)
            self.base = (task, seed), base, {name: value.clone() for name, value in base.model.state_dict().items()}
        _, base, start = self.base
        base.model.load_state_dict(start)
        base.model.zero_grad()
        return base


def recorded_runs() -> list[dict[str, Any]]:
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def key_of(run: dict[str, Any]) -> tuple[str, str, float, int]:
    return run["task"], run["method"], run["rate"], run["seed"]


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's tensors: states, bases in its groups, and the matrices of GaLore's projectors."""
    held = [value for state in optimizer.state.values() for value in state.values()]
    held += [value for group in optimizer.param_groups for name, value in group.items() if name != "params"]
    held += [getattr(value, "ortho_matrix", None) for value in held]
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor) and t.dim())


def sweep(runs: Runs, task: str, method: Method) -> float:
    """The rate of the lowest validation loss; rates beyond the best one are tried while it is at the edge."""
    losses = {rate: runs.run(task, method, rate, TUNING_SEED)["validation"]["loss"] for rate in method.rates}
    while (beyond := next_rate(losses, MOST_TRIES)) is not None:
        losses[beyond] = runs.run(task, method, beyond, TUNING_SEED)["validation"]["loss"]
    return best_rate(losses)


def write_results(root: Path = ROOT) -> Path:
    """Writes docs/full-results.md below `root` from the recorded runs; returns its path."""
    return write_page(recorded_runs(), SHORT, {name: method.rates for name, method in FULL.items()}, root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(SHORT), choices=SHORT)
    parser.add_argument("--methods", nargs="+", default=list(FULL), choices=FULL)
    parser.add_argument("--seeds", type=int, default=0, help="test runs at the best rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--tables", action="store_true", help="only write docs/full-results.md")
    options = parser.parse_args()
    if options.list:
        print("\n".join(FULL))
        return
    torch.set_num_threads(options.threads)
    runs = Runs()
    for task in [] if options.tables else options.tasks:
        best = {name: sweep(runs, task, FULL[name]) for name in options.methods}
        for seed in range(options.seeds):
            for name, rate in best.items():
                runs.run(task, FULL[name], rate, seed)
    print(write_results())


if __name__ == "__main__":
    main()
