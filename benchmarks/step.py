"""Compares a training step with PEFT's on a CPU: tokens per second, and memory above the loaded model.

    python benchmarks/step.py                    # bfloat16 and NF4
    python benchmarks/step.py --repeats 9 --quantization none
    python benchmarks/step.py --dtype float32    # for a processor without bfloat16 instructions

The model is SmolLM2-135M with LoRA of rank 16 on every linear layer; batches have 4 x 256 tokens. Each way to compute
the step has its own process; the processes take turns, step by step, while the others wait. Peak memory is the peak of
resident memory minus the resident memory after loading (Linux). The script prints the table of docs/speed.md and
appends to benchmarks/results/step.json.

    PEFT                PEFT's LoRA, Transformers' loss and its default attention (sdpa), AdamW
    PEFT, eager attention   the same with the attention that SGM uses on a CPU
    fast, eager attention   the update in place, the loss in parts; AdamW
    fast, MLPs as they are  the same, with recomputed attention
    fast                training.step=fast: activations of MLPs are recomputed too
    fast, shared        the same; q, k, v and gate, up share A
    fast, spectral      the same as "fast, shared" with spectral descent: what SGM trains
    frozen              the base alone, forward and backward to its embeddings: the limit for any adapter with this loss
    frozen, in parts    the same with the loss in parts
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recording import append_run, process_memory, processor

WAYS = (
    "PEFT",
    "PEFT, eager attention",
    "fast, eager attention",
    "fast, MLPs as they are",
    "fast",
    "fast, shared",
    "fast, spectral",
    "frozen",
    "frozen, in parts",
)
RANK, BATCH, LENGTH = 16, 4, 256
THREADS = 2
READERS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
_MODEL = "smollm2-135m-instruct"


def share_readers(model: Any, names: Sequence[str]) -> None:
    """One lora_A for all matrices of a block that read the same activation."""
    from sgm_finetune.model.names import block_of
    from sgm_finetune.train.adapters.apply import lora_layers

    layers = lora_layers(model)
    for block in dict.fromkeys(block_of(name) for name in names):
        for kinds in READERS:
            first, *others = (layers[f"{block}.{kind}"] for kind in kinds)
            for other in others:
                other.lora_A["default"].weight = first.lora_A["default"].weight  # type: ignore[index, union-attr]


def mean_loss(model: Any, batch: dict[str, Any], labels: Any, in_parts: Any) -> Any:
    """The loss of a batch, by the model itself or by its `HeadLoss`."""
    if in_parts is None:
        return model(**batch, labels=labels).loss
    total, count = in_parts(model, batch, labels)
    return total / count


def prepare(way: str, quantization: str, dtype: str) -> Callable[[], float]:
    """The step as a function that returns the loss."""
    import torch
    from peft import LoraConfig, get_peft_model

    from sgm_finetune.base.config import ModelConfig
    from sgm_finetune.model.folder import local_folder
    from sgm_finetune.model.load import load_model
    from sgm_finetune.model.matrices import adaptable
    from sgm_finetune.train.adapters.optimizer import create_optimizer
    from sgm_finetune.train.fast.adapter_forward import use_fast_step
    from sgm_finetune.train.fast.attention import recompute_attention
    from sgm_finetune.train.fast.gated_mlp import recompute_mlps
    from sgm_finetune.train.fast.head_loss import find_head_loss

    torch.set_num_threads(THREADS)
    config = ModelConfig(name=_MODEL, task="causal-lm", quantization=quantization, dtype=dtype)  # type: ignore[arg-type]
    base, _ = load_model(config, local_folder(_MODEL))
    base.requires_grad_(False)
    if way == "PEFT":
        base.set_attn_implementation("sdpa")
    names = list(adaptable(base))
    torch.manual_seed(0)
    ids = torch.randint(0, base.config.vocab_size, (BATCH, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if way.startswith("frozen"):
        in_parts = find_head_loss(base, batch) if way.endswith("in parts") else None
        base.train()

        def frozen() -> float:
            embedded = {"inputs_embeds": base.get_input_embeddings()(ids).requires_grad_()}
            loss = mean_loss(base, embedded, ids, in_parts)
            loss.backward()
            return float(loss.detach())

        return frozen
    fast = way.startswith("fast")
    if fast and way != "fast, eager attention" and not recompute_attention(base, batch):
        raise SystemExit("Attention cannot be recomputed")
    if fast and way not in ("fast, eager attention", "fast, MLPs as they are") and not recompute_mlps(base, batch):
        raise SystemExit("MLPs cannot be recomputed")
    model: Any = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, task_type="CAUSAL_LM")
    )
    if way in ("fast, shared", "fast, spectral"):
        share_readers(model, names)
    if fast and (slow := use_fast_step(model)):
        raise SystemExit(f"{len(slow)} layers keep PEFT's forward")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = create_optimizer(model, lr=0.0125) if way == "fast, spectral" else torch.optim.AdamW(trained, lr=1e-4)
    in_parts = find_head_loss(model, batch) if fast else None
    if fast and in_parts is None:
        raise SystemExit("The loss cannot be computed in parts")
    model.train()

    def step() -> float:
        loss = mean_loss(model, batch, ids, in_parts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def work(way: str, quantization: str, dtype: str) -> None:
    """Runs one of the processes: for each line of stdin, takes a step and prints its seconds and loss as a line."""
    step = prepare(way, quantization, dtype)
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    loaded = process_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    print("{}", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_mib": process_memory("VmHWM") - loaded}), flush=True)


def measure(quantization: str, dtype: str, repeats: int, ways: Sequence[str]) -> list[dict]:
    workers = {
        way: subprocess.Popen(
            [sys.executable, __file__, "--work", way, "--quantization", quantization, "--dtype", dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for way in ways
    }  # fmt: skip
    said: dict[str, list[dict]] = {way: [] for way in ways}
    for worker in workers.values():  # waits until all are loaded
        read(worker)
    for _ in range(repeats + 1):
        for way, worker in workers.items():
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            said[way].append(read(worker))
    for worker in workers.values():
        worker.communicate()
    rows = []
    for way, steps in said.items():
        rows.append(
            {
                "quantization": quantization,
                "dtype": dtype,
                "way": way,
                "tokens_per_second": round(BATCH * LENGTH / statistics.median(s["seconds"] for s in steps[1:]), 1),
                "peak_mib": round(steps[-1]["peak_mib"]),
                "losses": [round(s["loss"], 4) for s in steps],
            }
        )
        against = rows[0]
        print(
            f"| {quantization} | {way} | {rows[-1]['tokens_per_second']:.0f} | "
            f"{rows[-1]['tokens_per_second'] / against['tokens_per_second']:.2f} | {rows[-1]['peak_mib']:,} | "
            f"{rows[-1]['peak_mib'] / against['peak_mib']:.2f} |",
            flush=True,
        )
    return rows


def read(worker: subprocess.Popen) -> dict:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"{worker.args} ended")
    return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="all of them are in memory together")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked.work, asked.quantization[0], asked.dtype)
        return
    started = time.perf_counter()
    rows = [
        row
        for quantization in asked.quantization
        for row in measure(quantization, asked.dtype, asked.repeats, asked.ways)
    ]
    command = f"python benchmarks/step.py --repeats {asked.repeats} --quantization {' '.join(asked.quantization)}"
    command += f" --dtype {asked.dtype}" + (f" --ways {shlex.join(asked.ways)}" if asked.ways != WAYS else "")
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    append_run("step", command, started, rows, packages, threads=THREADS, **processor())


if __name__ == "__main__":
    main()
