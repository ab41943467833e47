"""Steps of an 8B model in NF4 whose blocks stay in the host's memory, beside the same steps with all of it on the GPU.

    python benchmarks/gpu/stream_8b.py --out gpu-results/stream.json          # on a GPU
    python benchmarks/gpu/stream_8b.py --out /tmp/stream.json --pico          # on a CPU: whether it works

LoRA of rank 8 on q, k, v, o, checkpointing. Each row says tokens per second, GiB allocated at the peak, whether loss
and all gradients equal those of the model on the GPU, and the floor: the bytes that a step moves, over the bus.
Embeddings and output layer stay on the GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.record import update
from llama_8b import DEVICE, LLAMA_8B, PICO, build
from peft import LoraConfig, get_peft_model

from sgm_finetune.model.names import block_of
from sgm_finetune.model.residence.buffers import Buffers, stream
from sgm_finetune.train.fast.adapter_forward import use_fast_step
from sgm_finetune.train.fast.head_loss import HeadLoss

RUNS = ((1, 512), (2, 2048), (8, 2048))
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def made(shape: dict[str, Any]) -> Any:
    """The adapted model on the GPU, away from its start, in training."""
    base = build(shape)
    torch.manual_seed(1)
    model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=KINDS, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    use_fast_step(model)
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    return model.train()


def frozen(model: nn.Module) -> dict[str, list[Tensor]]:
    """Block -> its frozen tensors, with the packed scales of 4-bit weights."""
    found: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if (block := block_of(name)) is not None and not parameter.requires_grad:
            state: Any = getattr(parameter, "quant_state", None)
            scales = [state.absmax, state.state2.absmax] if state is not None and state.state2 is not None else []
            found.setdefault(block, []).extend([parameter, *scales])
    return found


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(model: Any, batch: int, length: int, repeats: int, shape: dict[str, Any]) -> tuple[dict, list[Tensor]]:
    """Speed and peak of a step, and its loss and gradients on the host."""
    in_parts = HeadLoss(model.get_base_model().base_model, model.get_base_model().lm_head)
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, shape["vocab_size"], (batch, length), generator=draw).to(DEVICE)
    seconds, kept = [], []
    for number in range(repeats + 1):
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        started = time.perf_counter()
        loss = in_parts.mean(model, {"input_ids": ids, "labels": ids})
        loss.backward()
        synchronize()
        seconds.append(time.perf_counter() - started)
        if number == repeats:
            kept = [loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]
        model.zero_grad()
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
    tokens = batch * length / statistics.median(seconds[1:])
    return {"tokens_per_second": round(tokens, 1), "peak_gib": round(peak, 3)}, kept


def bus(buffers: Buffers) -> float:
    """Bytes a second of copies of blocks from the host."""
    source, target = buffers.blocks[0].host, buffers.buffers[0]
    seconds = []
    for _ in range(5):
        synchronize()
        started = time.perf_counter()
        target[: source.numel()].copy_(source, non_blocking=True)
        synchronize()
        seconds.append(time.perf_counter() - started)
    return source.numel() / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pico", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    shape, runs = (PICO, ((1, 16), (2, 32))) if asked.pico else (LLAMA_8B, RUNS)
    rows: list[dict[str, Any]] = []
    model = made(shape)
    expected = {}
    for batch, length in runs:
        found, expected[batch, length] = measure(model, batch, length, asked.repeats, shape)
        rows.append({"residence": "device", "batch": batch, "length": length, **found})
        update(asked.out, rows=rows)
    del model
    for number in (2, 3):
        model = made(shape)
        buffers = stream(model, frozen(model), torch.device(DEVICE), number)
        moved = 2 * sum(block.host.numel() for block in buffers.blocks)
        floor = moved / bus(buffers)
        buffers.holds, buffers.current = [None] * number, None  # the buffer was used as a target
        for batch, length in runs:
            found, kept = measure(model, batch, length, asked.repeats, shape)
            equal = all(torch.equal(one, other) for one, other in zip(kept, expected[batch, length], strict=True))
            row = {"residence": "host", "buffers": number, "batch": batch, "length": length, **found}
            rows.append(row | {"equal": equal, "floor_seconds": round(floor, 4), "moved_gib": round(moved / 2**30, 3)})
            update(asked.out, rows=rows)
        del model, buffers


if __name__ == "__main__":
    main()
