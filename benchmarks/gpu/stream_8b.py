"""Steps of an 8B model in NF4 that stays in the host's memory, beside those with all of it on the GPU; then of 70B.

    python benchmarks/gpu/stream_8b.py --out gpu-results/stream.json          # on a GPU
    python benchmarks/gpu/stream_8b.py --out /tmp/stream.json --pico          # on a CPU: whether it works

LoRA of rank 8 on q, k, v, o, checkpointing, Liger's kernels, spectral descent. Each row says tokens per second, GiB
allocated at the peak, and the floor: the bytes that a step moves, over the bus. Before the steps that are timed, one
computes attention with plain products, whose sums do not change from run to run, and the row says whether its loss and
all gradients equal those of the model on the GPU; a row of the model on the GPU, whether it equals itself. The model of
70B has no such counterpart.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.record import update
from llama_8b import DEVICE, LLAMA_8B, LLAMA_70B, PICO, build, with_liger
from peft import LoraConfig, get_peft_model
from step_gpu import synchronize

from sgm_finetune.model.residence import host
from sgm_finetune.model.residence.host import HostBase, keep_on_host
from sgm_finetune.train.adapters.optimizer import create_optimizer
from sgm_finetune.train.fast.adapter_forward import use_fast_step
from sgm_finetune.train.fast.head_loss import HeadLoss, slice_sizes

RUNS = ((1, 512), (2, 2048), (8, 2048))
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def made(shape: dict[str, Any], place: str) -> tuple[Any, HostBase]:
    """The adapted model, away from its start, in training; and what of it is in the host's memory."""
    kept = HostBase(torch.device(DEVICE))
    base = build(shape, after_block=kept.take_block) if place == "host" else build(shape)
    if place == "host":
        for name in ("model.embed_tokens", "lm_head"):
            kept.take_table(name, base.get_submodule(name).weight)
        for remark in keep_on_host(base, kept):
            print(remark, flush=True)
    print(f"Liger's kernels: {with_liger(base)}", flush=True)
    torch.manual_seed(1)
    model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=KINDS, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    use_fast_step(model)
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    return model.train(), kept


def measure(model: Any, batch: int, length: int, repeats: int, shape: dict[str, Any]) -> tuple[dict, list[Tensor]]:
    """Speed and peak of a step; the loss and gradients of one with plain attention, on the host."""
    in_parts = HeadLoss(model.get_base_model().base_model, model.get_base_model().lm_head)
    optimizer = create_optimizer(model, lr=0.001)
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, shape["vocab_size"], (batch, length), generator=draw).to(DEVICE)
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]

    def loss_and_gradients() -> Tensor:
        loss = in_parts.mean(model, {"input_ids": ids, "labels": ids})
        loss.backward()
        return loss.detach()

    with sdpa_kernel(SDPBackend.MATH):  # fused kernels add up in another order each time
        kept = [loss_and_gradients().cpu(), *(p.grad.cpu() for p in trained)]
    optimizer.zero_grad()
    seconds = []
    for _ in range(1 + (3 * repeats if batch * length <= 512 else repeats)):  # short steps vary most
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        started = time.perf_counter()
        loss_and_gradients()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - started)
    with torch.no_grad():
        for parameter, value in zip(trained, start, strict=True):
            parameter.copy_(value)
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
    taken = statistics.median(seconds[1:] or seconds)
    return {
        "tokens_per_second": round(batch * length / taken, 1), "seconds": round(taken, 4), "all_seconds": [
            round(one, 4) for one in seconds
        ], "peak_gib": round(peak, 3), "loss": round(float(kept[0]), 4),
    }, kept  # fmt: skip


def bus(kept: HostBase) -> float:
    """Bytes a second of copies of a block from the host."""
    source = next(iter(kept.blocks.values())).host
    target = torch.empty_like(source, device=DEVICE)
    seconds = []
    for _ in range(5):
        synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize()
        seconds.append(time.perf_counter() - started)
    return source.numel() / min(seconds)


def moved(kept: HostBase, tokens: int) -> int:
    """Bytes that a step copies: the blocks forward and backward, the output layer once for each part of the tokens."""
    blocks = 2 * sum(block.host.numel() for block in kept.blocks.values())
    table = kept.tables["lm_head"].host
    _, together = slice_sizes(torch.device(DEVICE), len(table))
    return blocks + -(-tokens // together) * table.numel() * table.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pico", action="store_true")
    parser.add_argument("--repeats", type=int, default=4)
    asked = parser.parse_args()
    small = asked.pico
    shape, runs = (PICO, ((1, 16), (2, 32))) if small else (LLAMA_8B, RUNS)
    large = PICO | {"num_hidden_layers": 5} if small else LLAMA_70B
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    rows: list[dict[str, Any]] = []
    update(asked.out, device=card, torch=torch.__version__)
    expected = {}
    model, _ = made(shape, "device")
    for batch, length in runs:
        found, expected[batch, length] = measure(model, batch, length, asked.repeats, shape)
        _, again = measure(model, batch, length, 0, shape)
        equal = all(torch.equal(*pair) for pair in zip(again, expected[batch, length], strict=True))
        rows.append({"model": "8B", "residence": "device", "batch": batch, "length": length, **found, "equal": equal})
        update(asked.out, rows=rows)
    del model
    for name, number, form in (("8B", 2, shape), ("8B", 3, shape), ("70B", 2, large)):
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        host.NUM_BUFFERS = number
        started = time.perf_counter()
        model, kept = made(form, "host")
        prepared, rate = time.perf_counter() - started, bus(kept)
        on_host = sum(block.host.numel() for block in kept.blocks.values())
        for batch, length in runs if name == "8B" else runs[:2]:
            found, seen = measure(model, batch, length, asked.repeats if name == "8B" else 2, form)
            bytes_moved = moved(kept, batch * (length - 1))
            row = {
                "model": name, "residence": "host", "buffers": number, "batch": batch, "length": length, **found,
                "moved_gib": round(bytes_moved / 2**30, 3), "floor_seconds": round(bytes_moved / rate, 4),
                "bus_gb_per_second": round(rate / 1e9, 2), "blocks_gib": round(on_host / 2**30, 3),
                "prepared_seconds": round(prepared, 1),
                "pinned": all(block.memory.is_pinned for block in kept.blocks.values()),
            }  # fmt: skip
            if name == "8B":
                pairs = zip(seen, expected[batch, length], strict=True)
                row["equal"] = all(torch.equal(one, other) for one, other in pairs)
            rows.append(row)
            update(asked.out, rows=rows)
        del model, kept


if __name__ == "__main__":
    main()
