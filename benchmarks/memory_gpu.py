"""Compares the predicted GPU memory of steps with the measured one (benchmarks/results/step_gpu.json).

    python benchmarks/memory_gpu.py                        # on any machine: nothing is computed
    python benchmarks/memory_gpu.py --steps gpu-results/step.json --out gpu-results/planner.json

The script follows the steps of benchmarks/step_gpu.py over the model's shapes, with the code by which `sgm estimate`
follows a run. It counts weights and adapters and fits nothing. It prints the table of docs/estimate.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu.record import read, update
from llama_8b import LLAMA_8B, NESTED
from peft import LoraConfig, get_peft_model
from recording import RESULTS
from step import share_readers
from step_gpu import RANK
from torch import nn

from sgm_finetune.model.matrices import adaptable
from sgm_finetune.model.stand_ins import FUSED_ATTENTION, stand_in, stand_in_kernels
from sgm_finetune.train.adapters.optimizer import state_bytes, workspace_bytes
from sgm_finetune.train.budget.footprint import Footprint, saved_elsewhere
from sgm_finetune.train.fast.adapter_forward import use_fast_step
from sgm_finetune.train.fast.head_loss import HeadLoss

PREDICTED = ("fast", "fast, Liger", "SGM")


def predict_peak(way: str, batch: int, length: int, checkpointing: str, shape: dict[str, Any] = LLAMA_8B) -> float:
    """Predicted peak of a step of the Llama of that shape, in GiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model: Any = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
        model.set_attn_implementation(FUSED_ATTENTION)
        weights = 0.0
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and ".layers." in name:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, stand_in(module, "nf4"))
                weights += NESTED * module.weight.numel()  # stand-ins have plain scales
        weights += sum(2 * p.numel() for n, p in model.named_parameters() if ".layers." not in n or p.dim() == 1)
        model.is_loaded_in_4bit = True
        model.requires_grad_(False)
        if way != "fast":
            stand_in_kernels(model)
        names = list(adaptable(model))
        if checkpointing != "off":
            model.activation_checkpointing_enable({"use_reentrant": False})
        adapted: Any = get_peft_model(model, LoraConfig(r=RANK, target_modules=names, task_type="CAUSAL_LM"))
    if way == "SGM":
        share_readers(adapted, names)
    use_fast_step(adapted)
    in_parts = HeadLoss(model.base_model, model.lm_head)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    factors = sum(4 * p.numel() for p in trained)
    state = state_bytes(trained, "spectral" if way == "SGM" else "adamw")
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    known = [*adapted.parameters(), *adapted.buffers()]
    elsewhere = saved_elsewhere() if checkpointing == "offload" else nullcontext()
    with Footprint(known, batch * (length - 1), shape["vocab_size"]) as footprint, elsewhere:
        adapted.train()
        in_parts.mean(adapted, {"input_ids": ids, "labels": ids}).backward()
    optimizing = factors + (workspace_bytes(trained) if way == "SGM" else 0)
    return (weights + factors + state + max(footprint.peak, optimizing)) / 2**30


def table(rows: list[dict[str, Any]]) -> str:
    """The predictions beside the measurements, and how near they are."""
    lines = ["| step | batch | checkpointing | predicted, GiB | measured, GiB | off |", "|---|---|---|---|---|---|"]
    offs = []
    for row in rows:
        offs.append(row["predicted_gib"] / row["peak_gib"] - 1)
        off = f"{100 * offs[-1]:+.1f} %".replace("-", "−")
        place = f"| {row['way']} | {row['batch']} × {row['length']:,} | {row['checkpointing']} |"
        lines.append(f"{place} {row['predicted_gib']:.2f} | {row['peak_gib']:.2f} | {off} |")
    off = [abs(off) for off in offs]
    near, median = sum(o <= 0.05 for o in off), 100 * statistics.median(off)
    said = f"{len(off)} steps, {near} within 5 %: off by {median:.1f} % in the median, {100 * max(off):.1f} % at most."
    return "\n".join([*lines, "", said])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Path, help="results file of the item `step`; otherwise the last recorded run")
    parser.add_argument("--out", type=Path, help="write the rows there, one by one")
    options = parser.parse_args()
    if options.steps is None:
        measured = json.loads((RESULTS / "step_gpu.json").read_text(encoding="utf-8"))[-1]
    else:
        measured = read(options.steps)
    wanted = [row for row in measured.get("rows", []) if row["way"] in PREDICTED and "failed" not in row]
    if not wanted:
        raise SystemExit(f"{options.steps} holds no step whose memory could be predicted; run the item `step` first")
    rows: list[dict[str, Any]] = []
    with patch("torch.cuda.is_available", return_value=True):
        for row in wanted:
            where = {key: row[key] for key in ("way", "batch", "length", "checkpointing", "peak_gib")}
            found = predict_peak(
                row["way"], row["batch"], row["length"], row["checkpointing"], measured.get("shape", LLAMA_8B)
            )
            rows.append(where | {"predicted_gib": round(found, 6)})
            if options.out is not None:
                update(options.out, rows=rows)
    if all(row["peak_gib"] for row in rows):  # a CPU's steps measure none
        print(table(rows))


if __name__ == "__main__":
    main()
