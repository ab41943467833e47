"""Steps of an 8B model in bfloat16 whose blocks' matrices train whole, on one GPU: tokens per second and memory.

    python benchmarks/gpu/full_8b.py --out gpu-results/full.json          # on a GPU
    python benchmarks/gpu/full_8b.py --out /tmp/full.json --pico          # on a CPU: whether it works

A step is that of `adapter.kind=full`: each matrix steps inside the backward pass and is rounded stochastically,
gradients are clipped by the running norm 1, blocks are checkpointed, the loss is computed in parts, and Liger's kernels
compute where they are installed. Embeddings, norms and head are frozen. The rows are named by `training.optimizer`;
"gradients kept" is the usual step beside them: all gradients are there before bitsandbytes' AdamW8bit changes the
bfloat16 weights themselves.

The goals: 17 GiB for 1 and 2 x 2048 tokens (the weights alone take 14.96); above the weights at most half of what
"gradients kept" takes (`of_kept`); and 1,650 tokens/s times the ratio of the cards' rates of bfloat16 products.
torchtune reports 18.9 GiB and those 1,650 tokens/s for 2 x 2048 tokens on an RTX 4090.

Memory is the most that was allocated from the second step on, since the first makes the states. All steps take the same
batch, so their losses fall if they learn.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.record import update
from llama_8b import DEVICE, LLAMA_8B, PICO, build, with_liger
from recording import versions
from step_gpu import LENGTH, PICO_LENGTH, ceilings, random_ids, synchronize

from sgm_finetune.model.matrices import adaptable
from sgm_finetune.train.fast.head_loss import HeadLoss
from sgm_finetune.train.full.optimizers import make_optimizers
from sgm_finetune.train.full.update import BackwardUpdates

KEPT = "gradients kept"
RUNS = (
    ("adafactor", 1, "on"), ("adafactor", 2, "on"), ("adafactor", 2, "offload"), (KEPT, 1, "on"), (KEPT, 2, "on"),
    ("adamw_8bit", 1, "on"), ("adamw_8bit", 2, "on"), ("muon", 1, "on"),
)  # fmt: skip
"""Optimizer, number of sequences and checkpointing, most valuable first. Muon's states alone take 26 GiB."""
RATE, PICO_RATE = 1e-5, 1e-3
"""Learning rates at which the loss falls from step to step, tried on Llamas of up to 24 blocks of width 1024; Muon's is
ten times as large."""
MAX_NORM = 1.0


def prepared(shape: dict[str, Any], checkpointing: str) -> tuple[Any, dict[str, nn.Parameter], str]:
    """The model in training, its trained matrices by name, and what Liger's kernels do."""
    model = build(shape, quantised=False)
    liger = with_liger(model)
    trained: dict[str, Any] = {f"{name}.weight": matrix.module.weight for name, matrix in adaptable(model).items()}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    model.activation_checkpointing_enable(
        {"use_reentrant": False}, offload=checkpointing == "offload" and DEVICE == "cuda"
    )
    return model.train(), trained, liger


@contextmanager
def updating(way: str, trained: dict[str, nn.Parameter], rate: float) -> Iterator[Callable[[], None]]:
    """A context in which backward passes train; the function that it gives ends a step after each."""
    if way == KEPT:
        from bitsandbytes.optim import AdamW8bit

        parameters = list(trained.values())
        optimizer = AdamW8bit(parameters, lr=rate, weight_decay=0.0)

        def step() -> None:
            nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()

        yield step
    else:
        updates = BackwardUpdates(
            trained, lambda shadows: make_optimizers(way, shadows, set(trained), rate, 0.0), rate, MAX_NORM
        )
        with updates.attached():
            yield updates.step


def measure(
    way: str, ids: Tensor, checkpointing: str, repeats: int, shape: dict[str, Any], rate: float
) -> dict[str, Any]:
    """Speed, memory and losses of one way to step, with a model of its own, which is gone afterwards."""
    model, trained, liger = prepared(shape, checkpointing)
    in_parts = HeadLoss(model.base_model, model.lm_head)
    seconds, losses = [], []
    with updating(way, trained, rate) as step:
        for number in range(1 + repeats):
            synchronize()
            if DEVICE == "cuda" and number == 1:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            loss = in_parts.mean(model, {"input_ids": ids, "labels": ids})
            loss.backward()
            step()
            synchronize()
            seconds.append(time.perf_counter() - started)
            losses.append(float(loss.detach()))
            del loss
    weights = sum(p.nbytes for p in model.parameters()) / 2**30
    peak, resident = weights, weights
    if DEVICE == "cuda":
        peak, resident = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.memory_allocated() / 2**30
    return {
        "tokens_per_second": round(ids.numel() / statistics.median(seconds[1:]), 1),
        "seconds": [round(one, 4) for one in seconds[1:]],
        "peak_gib": round(peak, 3),
        "weights_gib": round(weights, 3),
        "above_weights_gib": round(peak - weights, 3),
        "resident_gib": round(resident, 3),
        "losses": [round(one, 4) for one in losses],
        "learns": losses[-1] < losses[0],
        "finite": all(bool(torch.isfinite(p).all()) for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "rate": rate,
        "liger": liger,
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds to each row its memory above the weights relative to that of the same batch with gradients kept."""
    kept = {row["batch"]: row["above_weights_gib"] for row in rows if row["way"] == KEPT and "failed" not in row}
    for row in rows:
        if "failed" not in row and kept.get(row["batch"]):
            row["of_kept"] = round(row["above_weights_gib"] / kept[row["batch"]], 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pico", action="store_true", help="a model of seconds, also on a CPU")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    started = time.perf_counter()
    shape, length, rate = (PICO, PICO_LENGTH, PICO_RATE) if asked.pico else (LLAMA_8B, LENGTH, RATE)
    liger = ("liger-kernel", "triton") if importlib.util.find_spec("liger_kernel") is not None else ()
    update(
        asked.out, device=torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU", shape=shape,
        versions=versions(("torch", "transformers", "bitsandbytes", *liger)), **ceilings(),
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for way, batch, checkpointing in RUNS:
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        row: dict[str, Any] = {"way": way, "batch": batch, "length": length, "checkpointing": checkpointing}
        try:
            ids = random_ids(shape["vocab_size"], batch, length, batch)
            row |= measure(way, ids, checkpointing, asked.repeats, shape, 10 * rate if way == "muon" else rate)
        except Exception as error:  # the other rows are measured all the same
            traceback.print_exc()
            row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        rows.append(row)
        compare(rows)
        update(asked.out, rows=rows)
        print(f"{time.perf_counter() - started:.0f} s {json.dumps(row)}", flush=True)
    if failed := [row for row in rows if "failed" in row]:
        raise SystemExit(f"{len(failed)} of {len(rows)} rows failed: {failed[0]['failed']}")


if __name__ == "__main__":
    main()
