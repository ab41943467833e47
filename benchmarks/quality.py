"""Quality at an equal number of trained adapter parameters: all methods on the same tasks, with as many tries each.

    python benchmarks/quality.py                      run what is missing, then print the tables
    python benchmarks/quality.py --table              print the tables of what there is
    python benchmarks/quality.py --tasks sentiment --methods LoRA SGM

For each task and method three learning rates are tried with a seed of their own and the validation loss decides; then
`--seeds` (3) seeds are trained with it and measured on the test data. All methods see the same batches, warm up for 6 %
of the steps, then fall linearly, with gradients clipped to norm 1; a new classification head learns at 1e-3 everywhere.

Each run is a process of its own and is appended to benchmarks/results/quality.jsonl when it is done, with versions,
seed and command, so that an interrupted benchmark goes on where it stopped. Threads: --threads (2).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
CPU_TIER = ("sentiment", "arithmetic")
TUNING_SEED = 100
HEAD_RATE = 1e-3
WARMUP = 0.06


def train_once(task_name: str, method_name: str, rate: float, seed: int, threads: int) -> dict[str, Any]:
    """One whole run; its record."""
    import torch
    from quality_methods import METHODS, Base, adapter_only, budget_of, head_parameters
    from quality_tasks import TASKS
    from recording import processor
    from rich.console import Console
    from transformers.utils import logging

    from sgm_finetune.config import load_config
    from sgm_finetune.models import linear_layers
    from sgm_finetune.pipeline import load_base, prepare
    from sgm_finetune.trainer import LengthGroupedSampler
    from sgm_finetune.voice import Voice

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    task, method, voice = TASKS[task_name], METHODS[method_name], Voice(Console(quiet=True))
    with tempfile.TemporaryDirectory() as scratch:
        config = load_config(None, [*task.configuration(Path(scratch)), f"adapter.rank={task.rank}",
                                    f"training.seed={seed}"])  # fmt: skip
        materials = prepare(config, voice)
    base_model = load_base(config, materials)
    budget = budget_of(base_model, task.rank)
    num_layers = len(linear_layers(base_model))
    torch.manual_seed(seed)
    adapted = method.adapt(Base(config, materials, base_model, voice, budget))
    model = adapted.model
    optimizers = adapted.optimizers(rate)
    if heads := head_parameters(model):
        optimizers.append(torch.optim.AdamW(heads, lr=HEAD_RATE, weight_decay=0.0))
    warmup = max(1, round(WARMUP * task.num_steps))

    def share(step: int) -> float:
        return min((step + 1) / warmup, (task.num_steps - step) / (task.num_steps - warmup + 1))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    dataset = materials.train.dataset
    sampler = LengthGroupedSampler([len(ids) for ids in dataset["input_ids"]], task.batch_size, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    losses, started, step = [], time.perf_counter(), 0
    while step < task.num_steps:
        sampler.set_epoch(step * task.batch_size // len(sampler))
        order = list(sampler)
        for at in range(0, len(order), task.batch_size):
            batch = materials.collate([dataset[i] for i in order[at : at + task.batch_size]])
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
            if step == task.num_steps or not math.isfinite(losses[-1]):
                break
        if not math.isfinite(losses[-1]):
            break
    seconds = time.perf_counter() - started
    adapter = adapter_only(model)
    state = sum(
        t.numel() * t.element_size()
        for p in adapter
        for optimizer in optimizers
        for t in optimizer.state.get(p, {}).values()
        if isinstance(t, torch.Tensor) and t.dim()
    )
    return {
        "task": task_name,
        "method": method_name,
        "rate": rate,
        "seed": seed,
        "rank": adapted.rank,
        "steps": step,
        "layers": num_layers,
        "trained_parameters": sum(p.numel() for p in adapter),
        "budget": budget,
        "optimizer_bytes": state,
        "adapter_file_bytes": adapter_file(model),
        "measuring_seconds": round(adapted.seconds, 1),
        "seconds_per_step": round(seconds / step, 4),
        "train_loss": round(statistics.fmean(losses[-20:]), 4),
        "validation": evaluate(model, materials.validation.dataset, materials, config.model.task),
        "test": evaluate(model, materials.test.dataset, materials, config.model.task),
        "threads": threads,
        "device": processor()["processor"],
        "versions": {
            "python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers", "peft")},
        },
    }  # fmt: skip


def adapter_file(model: Any) -> int:
    """Bytes of what `save_pretrained` writes, without a classification head."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        from safetensors.torch import load_file

        stored = load_file(Path(folder) / "adapter_model.safetensors")
        return sum(t.numel() * t.element_size() for name, t in stored.items() if "classifier" not in name)


def evaluate(model: Any, dataset: Any, materials: Any, task: str, batch_size: int = 64) -> dict[str, float]:
    """Mean loss per example (classification) or answer token; accuracy, or the share of answers whose every token,
    the end included, is the model's first choice: those that greedy decoding gives to the letter."""
    import torch

    from sgm_finetune.evaluation import by_length

    model.eval()
    order, total, count, right = by_length(dataset), 0.0, 0, 0
    with torch.inference_mode():
        for at in range(0, len(order), batch_size):
            batch = materials.collate([dataset[i] for i in order[at : at + batch_size]])
            labels = batch.pop("labels")
            logits = model(**batch).logits
            if task == "causal-lm":
                logits, labels = logits[:, :-1], labels[:, 1:]
                right += int(((logits.argmax(-1) == labels) | (labels == -100)).all(1).sum())
                logits, labels = logits[labels != -100].float(), labels[labels != -100]
            else:
                right += int((logits.argmax(-1) == labels).sum())
            total += float(torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
            count += len(labels)
    model.train()
    return {"loss": round(total / count, 5), "right": round(right / len(order), 5), "num_examples": len(order)}


# What has been run, and what is missing


def recorded() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []


def run_missing(task: str, method: str, rate: float, seed: int, threads: int, runs: list[dict]) -> dict:
    """The recorded run, or a new one in a process of its own."""
    for run in runs:
        if (run["task"], run["method"], run["rate"], run["seed"]) == (task, method, rate, seed):
            return run
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        wanted = json.dumps([task, method, rate, seed, threads, answer.name])
        process = subprocess.Popen([sys.executable, __file__, "--one", wanted])
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{task}, {method}, learning rate {rate}, seed {seed}: the run failed")
        run = json.loads(answer.read())
    run["peak_resident_bytes"] = usage.ru_maxrss * 1024
    run["command"] = f"python benchmarks/quality.py --tasks {task} --methods {method}"
    run["date"] = time.strftime("%Y-%m-%d")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")
    runs.append(run)
    return run


def best_rate(task: str, method: str, rates: tuple[float, ...], runs: list[dict]) -> float | None:
    """The rate with the lowest validation loss; None where one has not been tried."""
    tried = {
        run["rate"]: run["validation"]["loss"]
        for run in runs
        if (run["task"], run["method"], run["seed"]) == (task, method, TUNING_SEED)
    }
    if not set(rates) <= set(tried):
        return None
    return min(rates, key=lambda rate: tried[rate] if math.isfinite(tried[rate]) else math.inf)


def tables(tasks: list[str], methods: list[str], rates: dict[str, tuple[float, ...]], runs: list[dict]) -> None:
    for task in tasks:
        rows = []
        finished: dict[str, dict[int, dict]] = {}
        for method in methods:
            rate = best_rate(task, method, rates[method], runs)
            finished[method] = {
                run["seed"]: run
                for run in runs
                if (run["task"], run["method"], run["rate"]) == (task, method, rate) and run["seed"] != TUNING_SEED
            }
        for method, found in finished.items():
            if found:
                rows.append(row(method, found, finished.get("LoRA", {})))
        if rows:
            print(f"\n{task}\n")
            print("| method | trained | optimizer | rank | rate | test loss | minus LoRA | right | s/step | seeds |")
            print("|---|---|---|---|---|---|---|---|---|---|")
            print("\n".join(rows))


def row(method: str, found: dict[int, dict], lora: dict[int, dict]) -> str:
    one = next(iter(found.values()))
    losses = [run["test"]["loss"] for run in found.values()]
    paired = [found[seed]["test"]["loss"] - lora[seed]["test"]["loss"] for seed in found if seed in lora]
    difference = "–" if method == "LoRA" or not paired else mean_error(paired, "+.4f")
    return (
        f"| {method} | {one['trained_parameters'] / 1e6:.3f} M | {one['optimizer_bytes'] / 2**20:.2f} MiB | "
        f"{one['rank'] or '–'} | {one['rate']:g} | {mean_error(losses, '.4f')} | {difference} | "
        f"{mean_error([100 * run['test']['right'] for run in found.values()], '.1f')} % | "
        f"{statistics.median(run['seconds_per_step'] for run in found.values()):.2f} | {len(found)} |"
    )


def mean_error(values: list[float], form: str) -> str:
    """Mean ± standard error."""
    mean = format(statistics.fmean(values), form).replace("-", "−")
    if len(values) < 2:
        return mean
    return f"{mean} ± {format(statistics.stdev(values) / math.sqrt(len(values)), form.lstrip('+'))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(CPU_TIER))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        *wanted, answer = json.loads(options.one)
        Path(answer).write_text(json.dumps(train_once(*wanted)), encoding="utf-8")
        return
    from quality_methods import METHODS

    methods = options.methods or list(METHODS)
    rates = {name: METHODS[name].rates for name in methods}
    runs = recorded()
    if not options.table:
        for task in options.tasks:
            for method in methods:
                for rate in rates[method]:
                    run_missing(task, method, rate, TUNING_SEED, options.threads, runs)
                rate = best_rate(task, method, rates[method], runs)
                assert rate is not None
                for seed in range(options.seeds):
                    run = run_missing(task, method, rate, seed, options.threads, runs)
                    print(f"{task} {method} {rate:g} seed {seed}: {run['test']}", file=sys.stderr, flush=True)
    tables(options.tasks, methods, rates, runs)


if __name__ == "__main__":
    main()
