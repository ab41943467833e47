"""Compares adapters at an equal number of trained parameters, on the same tasks, with the same number of tries.

    python benchmarks/quality.py                      the CPU tier: runs what is missing, then writes docs/results.md
    python benchmarks/quality.py --tables             writes docs/results.md and README's table from the recorded runs
    python benchmarks/quality.py --tasks topics --methods LoRA SGM --seeds 5

For each task and method, three or four learning rates are tried with a separate seed, and more of them beyond the best
one while that is the smallest or the largest. The validation loss chooses one. Then `--seeds` (3) other seeds are
trained with it, and with the method's default rate if it has one, and measured on the test data
(benchmarks/quality_run.py).

Each run is a separate process. When it is done, it is appended to benchmarks/results/quality.jsonl with versions, seed
and command, so that an interrupted benchmark continues where it stopped. `--jobs` (2) runs share the machine, with
`--threads` (1) each; their seconds per step are recorded, but only --speed compares seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shlex
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quality_tasks import TASKS, TUNING_SEED, dtype_of

if TYPE_CHECKING:
    from quality_adapt import Method

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
CPU_TASKS = ("sentiment", "summaries")
CPU_METHODS = (
    "untouched", "LoRA", "rsLoRA", "LoRA+", "VeRA", "Lily", "MiSS", "SGM", "SGM, AdamW", "LoRA, our step",
    "SGM, a third of the bytes", "LoRA, our step, a third of the bytes",
    "SGM, nothing shared", "SGM, random groups", "SGM, random start", "SGM, across layers",
    "SGM, across layers, wrong side", "SGM, across layers, random groups", "SGM, one group a kind", "SGM, fast step",
    "LoRA, highest SNR", "LoRA, upper half", "LoRA, random half", "LoRA, lowest SNR", "LoRA, published SNR",
)  # fmt: skip

OVER_BUDGET = "over_budget"
"""Key of a run that a method's smallest size makes impossible."""
MOST_TRIES = 9
"""Learning rates of a method on a task, at most."""

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["quality_run"])
_appending = threading.Lock()


def recorded_runs() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []


def in_a_process(what: str, *wanted: str | float) -> tuple[Any, int]:
    """The result of the function `what` of quality_run for `wanted`, and the peak resident bytes of its process.

    The process is a fork of one that has imported the libraries; every run starts from the same state.
    """
    answer, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=send, args=(sender, what, *wanted))
    process.start()
    sender.close()
    try:
        result, peak, complaint = answer.recv()
    except EOFError:
        result, peak, complaint = None, 0, "the process ended without an answer"
    process.join()
    if complaint:
        raise SystemExit(f"{complaint}\n{wanted}: the run failed")
    return result, peak


def send(answer: Connection, what: str, *wanted: str | float) -> None:
    """Runs `what` with the process' standard error silenced, and sends (its result, peak bytes, traceback)."""
    import quality_run
    from quality_adapt import OverBudgetError

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    made = complaint = None
    try:
        made = getattr(quality_run, what)(*wanted)
    except OverBudgetError as error:
        made = {OVER_BUDGET: str(error)}
    except BaseException:  # the parent says it
        complaint = traceback.format_exc()
    answer.send((made, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, complaint))


def run_missing(task: str, method: str, rate: float, seed: int, threads: int, runs: list[dict]) -> dict:
    """The recorded run, or a new one in a separate process. A test run counts only in the type of this machine."""
    for run in list(runs):
        same = (run["task"], run["method"], run["rate"], run["seed"]) == (task, method, rate, seed)
        if same and (seed == TUNING_SEED or dtype_of(run) == TASKS[task].dtype):
            return run
    run, peak = in_a_process("train_once", task, method, rate, seed, threads)
    if OVER_BUDGET in run:
        return run
    run["peak_resident_bytes"] = peak
    run["command"] = f"python benchmarks/quality.py --tasks {task} --methods '{method}'"
    run["date"] = time.strftime("%Y-%m-%d")
    with _appending:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        runs.append(run)
    measured = run.get("test", run.get("validation"))
    print(f"{task} · {method} · {rate:g} · seed {seed} · {measured}", file=sys.stderr, flush=True)
    return run


def run_method(task: str, method: Method, seeds: int, submit: Callable[..., Future]) -> None:
    """Submits the tries, then the seeds at the rate of the lowest validation loss and at the method's default rate.

    `submit(task, method, rate, seed)` starts a run. While the best rate is the smallest or the largest one, the next
    one beyond it is tried too.
    """
    from sgm_finetune.method.rate_search import best_rate, next_rate

    first, *others = method.rates
    tries = {first: submit(task, method.name, first, TUNING_SEED)}
    if why := tries[first].result().get(OVER_BUDGET):
        print(f"{task} · {method.name} · left out: {why}", file=sys.stderr, flush=True)
        return
    tries |= {rate: submit(task, method.name, rate, TUNING_SEED) for rate in others}
    while True:
        losses = {rate: run.result()["validation"]["loss"] for rate, run in tries.items()}
        beyond = next_rate(losses, MOST_TRIES)
        if beyond is None:
            break
        tries[beyond] = submit(task, method.name, beyond, TUNING_SEED)
    best = best_rate(losses)
    tried = tries[first].result()
    tested = dict.fromkeys([best] if method.default is None else [best, method.default(tried["rank"], tried["steps"])])
    for run in [submit(task, method.name, rate, seed) for rate in tested for seed in range(seeds)]:
        run.result()


def run_all(tasks: list[str], chosen: list[Method], options: argparse.Namespace) -> None:
    """Runs what is missing of all tasks and methods, `options.jobs` runs at a time, method by method.

    The first run that fails stops the rest.
    """
    runs = recorded_runs()
    with ThreadPoolExecutor(options.jobs) as workers, ThreadPoolExecutor(options.jobs + 1) as methods:

        def submit(task: str, method: str, rate: float, seed: int) -> Future:
            return workers.submit(run_missing, task, method, rate, seed, options.threads, runs)

        waiting = [
            methods.submit(run_method, task, method, options.seeds, submit) for task in tasks for method in chosen
        ]
        try:
            for one in as_completed(waiting):
                one.result()
        except BaseException:
            methods.shutdown(wait=False, cancel_futures=True)
            workers.shutdown(wait=False, cancel_futures=True)
            raise


def compare_speed(tasks: list[str], methods: list[str], threads: int, repeats: int = 3) -> None:
    """Records seconds per step: medians of interleaved repeats, always with LoRA. Nothing else should run then."""
    from recording import append_run, processor

    methods = ["LoRA", *(method for method in methods if method not in ("LoRA", "untouched"))]
    started = time.perf_counter()
    rows = []
    for task in tasks:
        seconds: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(repeats):
            for method in methods:
                seconds[method].append(in_a_process("time_steps", task, method, threads)[0])
        reference = statistics.median(seconds["LoRA"])
        for method, measured in seconds.items():
            middle = statistics.median(measured)
            ratio = round(middle / reference, 3)
            rows.append({"task": task, "method": method, "seconds_per_step": round(middle, 4), "ratio_to_lora": ratio})
            print(f"{task} · {method} · {middle:.3f} s/step · {ratio:.2f} of LoRA's", flush=True)
    command = shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]])
    append_run("quality_speed", command, started, rows, ("torch", "transformers", "peft"), **processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(CPU_TASKS))
    parser.add_argument("--methods", nargs="+", default=list(CPU_METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--speed", action="store_true", help="record seconds per step, interleaved with LoRA's")
    options = parser.parse_args()
    if options.speed:
        compare_speed(options.tasks, options.methods, options.threads)
        return
    from quality_budgets import write_budgets
    from quality_methods import MEASUREMENTS, METHODS
    from quality_tables import write_page

    if not options.tables:
        with tempfile.TemporaryDirectory() as shared:
            os.environ[MEASUREMENTS] = shared
            run_all(options.tasks, [METHODS[name] for name in options.methods], options)
    write_page(recorded_runs(), TASKS, METHODS, TUNING_SEED)
    write_budgets(recorded_runs(), TASKS, METHODS, TUNING_SEED)


if __name__ == "__main__":
    main()
