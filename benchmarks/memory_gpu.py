"""Compares the predicted GPU memory of steps with the measured one (benchmarks/results/step_gpu.json).

    python benchmarks/memory_gpu.py     # on any machine: nothing is computed

The script follows the steps of benchmarks/step_gpu.py over the 8B model's shapes, with the code by which `sgm estimate`
follows a run. It counts weights and adapters and fits nothing. It prints the table of docs/estimate.md.
"""

from __future__ import annotations

import json
import statistics
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from recording import RESULTS
from step import share_readers
from step_gpu import LLAMA_8B, NESTED, RANK
from torch import nn

from sgm_finetune.model.matrices import adaptable
from sgm_finetune.model.stand_ins import FUSED_ATTENTION, stand_in, stand_in_kernels
from sgm_finetune.train.adapters.optimizer import state_bytes, workspace_bytes
from sgm_finetune.train.budget.footprint import Footprint, saved_elsewhere
from sgm_finetune.train.fast.adapter_forward import use_fast_step
from sgm_finetune.train.fast.head_loss import HeadLoss

PREDICTED = ("fast", "fast, Liger", "SGM")


def predict_peak(way: str, batch: int, length: int, checkpointing: str) -> float:
    """Predicted peak of a step, in GiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model: Any = LlamaForCausalLM._from_config(LlamaConfig(**LLAMA_8B), dtype=torch.bfloat16)
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
    with Footprint(known, batch * (length - 1), LLAMA_8B["vocab_size"]) as footprint, elsewhere:  # type: ignore
        adapted.train()
        in_parts.mean(adapted, {"input_ids": ids, "labels": ids}).backward()
    optimizing = factors + (workspace_bytes(trained) if way == "SGM" else 0)
    return (weights + factors + state + max(footprint.peak, optimizing)) / 2**30


def main() -> None:
    rows = json.loads((RESULTS / "step_gpu.json").read_text())[-1]["rows"]
    print("| step | batch | checkpointing | predicted, GiB | measured, GiB | off |\n|---|---|---|---|---|---|")
    offs = []
    with patch("torch.cuda.is_available", return_value=True):
        for row in rows:
            if row["way"] in PREDICTED and "failed" not in row:
                found = predict_peak(row["way"], row["batch"], row["length"], row["checkpointing"])
                offs.append(found / row["peak_gib"] - 1)
                off = f"{100 * offs[-1]:+.1f} %".replace("-", "−")
                place = f"| {row['way']} | {row['batch']} × {row['length']:,} | {row['checkpointing']} |"
                print(f"{place} {found:.2f} | {row['peak_gib']:.2f} | {off} |", flush=True)
    off = [abs(off) for off in offs]
    near, median = sum(o <= 0.05 for o in off), 100 * statistics.median(off)
    print(
        f"\n{len(off)} steps, {near} within 5 %: off by {median:.1f} % in the median, {100 * max(off):.1f} % at most."
    )


if __name__ == "__main__":
    main()
