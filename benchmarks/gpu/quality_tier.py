"""The GPU tier of docs/results.md: every method of the tables on four generation tasks, for hundreds of steps.

    python benchmarks/gpu/quality_tier.py --out gpu-results/quality.json --jobs 12

The same runs as benchmarks/quality.py's, the rates first and then the seeds, but many at a time beside each other on
one GPU, in processes that stay. A run is written as soon as it is done, and what benchmarks/results/quality.jsonl or
--out holds is not run again; so a few minutes at a time add up to the table. A run that fails is noted and does not
stop the others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTHONWARNINGS", "ignore")

import torch
from quality import RESULTS, run_method
from quality_methods import MEASUREMENTS, METHODS
from quality_run import train_once
from quality_tables import SECTIONS
from quality_tasks import LONG, TASKS, Task
from record import read, update

from sgm_finetune.model.folder import local_folder

FIRST = ("LoRA", "LoRA, our step", "SGM")
"""The methods of the claims; every other one of the tables follows."""


def methods_in_order() -> list[str]:
    """Every method of the tables, the most valuable first."""
    return list(dict.fromkeys([*FIRST, *(method for names in SECTIONS.values() for method in names)]))


def one_run(task: Task, method: str, rate: float, seed: int) -> dict[str, Any]:
    """The record of a run, in one of the processes that stay."""
    TASKS[task.name] = task
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = train_once(task.name, method, rate, seed, 1)
    run["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    run["command"] = f"python benchmarks/gpu/quality_tier.py --tasks {task.name}"
    run["date"] = time.strftime("%Y-%m-%d")
    return run


class Tier:
    """The runs that are done, and the processes that compute the missing ones."""

    def __init__(self, out: Path, known: list[dict], workers: ProcessPoolExecutor) -> None:
        self.out, self.workers = out, workers
        self.done = {key(run): run for run in [*known, *read(out).get("runs", [])]}
        self.new: list[dict] = list(read(out).get("runs", []))
        self.failed: list[dict] = []
        self.writing = threading.Lock()

    def submit(self, task: str, method: str, rate: float, seed: int) -> Future:
        wanted = (task, method, rate, seed)
        if wanted in self.done:
            there: Future = Future()
            there.set_result(self.done[wanted])
            return there
        made = self.workers.submit(one_run, TASKS[task], method, rate, seed)
        made.add_done_callback(lambda future: self.note(wanted, future))
        return made

    def note(self, wanted: tuple[str, str, float, int], future: Future) -> None:
        with self.writing:
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                self.new.append(future.result())
                self.done[wanted] = future.result()
            else:
                self.failed.append({"run": list(wanted), "error": traceback.format_exception_only(error)[-1][:500]})
            update(self.out, runs=self.new, failed=self.failed)


def key(run: dict) -> tuple[str, str, float, int]:
    return run["task"], run["method"], run["rate"], run["seed"]


def pico_task(folder: Path) -> Task:
    """A task of seconds on a CPU: a model of two layers that knows 20 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(20)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<eos>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=64
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=2, bos_token_id=None,
        )
    ).save_pretrained(folder / "model")  # fmt: skip
    rows = [{"prompt": f"{a} {b}", "completion": f" {b} {a}"} for a in words[:10] for b in words[10:]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Task(
        name="pico", about="Two words, and the same in the other order.", model=str(folder / "model"),
        kind="causal-lm", batch_size=8, num_steps=3, rank=4,
        overrides=(f"data.train={folder / 'pairs.jsonl'}", "data.max_length=16", "model.dtype=float32",
                   "data.validation_fraction=0.1", "data.test_fraction=0.1", "probe.num_batches=4"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=[task.name for task in LONG])
    parser.add_argument("--methods", nargs="+", default=methods_in_order())
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=12, help="runs that share the GPU")
    parser.add_argument("--pico", action="store_true", help="one task of seconds, two methods")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as shared:
        os.environ[MEASUREMENTS] = shared
        tasks, chosen = options.tasks, options.methods
        if options.pico:
            TASKS["pico"] = pico_task(Path(shared))
            tasks, chosen = ["pico"], ["untouched", "SGM"]
        for task in (TASKS[name] for name in tasks):  # what is missing shows here, and is converted once
            local_folder(task.model, announce=print)
            task.configuration(Path(shared))
        known = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
        with (
            ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as workers,
            ThreadPoolExecutor(options.jobs + len(tasks)) as methods,
        ):
            tier = Tier(options.out, known, workers)
            waiting = [
                methods.submit(run_method, task, METHODS[method], options.seeds, tier.submit)
                for method in chosen
                for task in tasks
            ]
            for one in waiting:
                one.exception()  # waits
        print(f"{len(tier.new)} runs, {len(tier.failed)} failed", flush=True)
        if tier.failed:
            raise SystemExit(f"{tier.failed[0]['run']}: {tier.failed[0]['error']}")


if __name__ == "__main__":
    main()
