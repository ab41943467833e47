"""Compares a training step of an 8B model with PEFT's on one GPU: tokens per second and peak allocated memory.

    python benchmarks/step_gpu.py                       # batches of 1, 2 and 8 x 2048 tokens, with and without
    python benchmarks/step_gpu.py --runs 2:on 2:offload # checkpointing; offload: the host keeps the blocks' inputs
    python benchmarks/step_gpu.py --table              # prints the last run, each figure beside its floor

The model is a Llama of 8B (random weights, drawn on the GPU) in NF4 with nested scales, with LoRA of rank 16 on every
linear layer. All ways run in one process and share the quantised weights; they take turns, step by step. The script
prints its table and appends to benchmarks/results/step_gpu.json, or writes to --out (`make gpu`). On a CPU, where only
--pico is sensible, Liger's kernels are left out and no memory is measured.

    PEFT QLoRA          as PEFT documents it: prepare_model_for_kbit_training (norms, embeddings, head in float32),
                        bfloat16 by autocast; fused AdamW, as in all ways but "SGM"
    PEFT, bfloat16      the same without these casts
    PEFT, Liger         the same with Liger's kernels for norms, rotary, SwiGLU and loss
    fast                training.step=fast without Liger
    fast, Liger         with it: training.step=fast when Liger is installed
    fast, compiled      the blocks by torch.compile instead of Liger
    SGM                 "fast, Liger" with spectral descent; q, k, v and gate, up share A: what sgm trains
    SGM, compiled       the same, the blocks by torch.compile instead of Liger
    SGM, bitsandbytes' kernels  SGM, its 4-bit weights dequantised by bitsandbytes' three kernels instead of one of ours
    SGM, recorded       SGM, forward and backward recorded as one CUDA graph (gpu/recorded_step.py, an experiment)
    SGM, reduced overhead   SGM, the blocks by torch.compile(mode="reduce-overhead") instead of Liger (an experiment)
    frozen              the base alone, forward and backward to its embeddings, with Liger and the loss in parts
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import shlex
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu.record import update
from gpu.recorded_step import RecordedStep, packed_loss
from llama_8b import DEVICE, LLAMA_8B, PICO, build, floor
from recording import RESULTS, append_run, versions
from step import mean_loss, share_readers

WAYS = (
    "PEFT QLoRA",
    "PEFT, bfloat16",
    "PEFT, Liger",
    "fast",
    "fast, Liger",
    "fast, compiled",
    "SGM",
    "SGM, compiled",
    "SGM, bitsandbytes' kernels",
    "SGM, recorded",
    "SGM, reduced overhead",
    "frozen",
)
RANK, LENGTH, PICO_LENGTH = 16, 2048, 32
WITHOUT_LIGER = ("PEFT QLoRA", "PEFT, bfloat16", "fast", "compiled", "reduced overhead")
"""Ends of the names of ways without Liger's kernels."""
RUNS = ["1:on", "1:off", "2:on", "2:off", "2:offload", "8:on", "8:off"]
_WARM = 2
"""Steps of each way before the measured ones: kernels are compiled and chosen, memory is allocated."""


def sharing_weights(model: Any, own_plain_weights: bool) -> Any:
    """A copy of the modules that shares the weights (`own_plain_weights`: only the quantised ones)."""
    kept = [p for p in model.parameters() if not (own_plain_weights and p.is_floating_point())]
    return copy.deepcopy(model, {id(p): p for p in kept})


class Way:
    """One way to compute the step, over the shared base."""

    def __init__(self, way: str, base: Any):
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers.integrations.liger import apply_liger_kernel
        from transformers.models.llama import modeling_llama

        from sgm_finetune.model.matrices import adaptable
        from sgm_finetune.train.adapters.optimizer import create_optimizer
        from sgm_finetune.train.fast.adapter_forward import use_fast_step
        from sgm_finetune.train.fast.head_loss import HeadLoss

        self.way = way
        model = sharing_weights(base, own_plain_weights=way == "PEFT QLoRA")
        self.module, self.rotary = modeling_llama, modeling_llama.apply_rotary_pos_emb  # Liger replaces it for all ways
        self.autocast = way == "PEFT QLoRA"
        self.in_parts = None
        self.recorded: RecordedStep | None = None
        peft = way.startswith("PEFT")
        if way == "PEFT QLoRA":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if DEVICE == "cuda" and not way.endswith(WITHOUT_LIGER):
            before = self.rotary
            apply_liger_kernel(model, {"fused_linear_cross_entropy": peft})
            self.rotary, modeling_llama.apply_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb, before
        if not peft:
            self.in_parts = HeadLoss(model.base_model, model.lm_head)
        self.base = model
        self.optimizer: Any = None
        if way != "frozen":
            torch.manual_seed(0)
            names = list(adaptable(model))
            model = get_peft_model(
                model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, task_type="CAUSAL_LM")
            )
            if way.startswith("SGM"):
                share_readers(model, names)
            if not peft and (slow := use_fast_step(model)):  # type: ignore[arg-type]
                raise SystemExit(f"{len(slow)} layers keep PEFT's forward")
            trained = [p for p in model.parameters() if p.requires_grad]
            self.optimizer = (
                create_optimizer(model, lr=0.0125)  # type: ignore[arg-type]
                if way.startswith("SGM")
                else torch.optim.AdamW(trained, lr=1e-4, fused=True)
            )
        if way.endswith(("compiled", "reduced overhead")):
            torch._dynamo.config.recompile_limit = 64  # all ways and kinds of blocks share code objects
            settings: dict[str, Any] = {"mode": "reduce-overhead"} if way.endswith("reduced overhead") else {}
            if DEVICE == "cpu":
                settings = {"backend": "eager"}  # others need a C++ compiler
            for layer in self.base.model.layers:
                layer.compile(**settings)
        self.model = model.train()
        self.checkpointing = "off"

    def resident(self) -> int:
        """Bytes of the weights, scales, adapters and optimizer."""
        found: dict[int, int] = {}

        def note(tensors: Iterable[Any]) -> None:
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor) and tensor.device.type == DEVICE:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()

        note((*self.model.parameters(), *self.model.buffers()))
        for parameter in self.model.parameters():
            if (state := getattr(parameter, "quant_state", None)) is not None:
                inner = state.state2
                note((state.absmax, state.code, state.offset))
                note((inner.absmax, inner.code) if inner is not None else ())
        for state in self.optimizer.state.values() if self.optimizer is not None else ():
            note(state.values())
        return sum(found.values()) + (self.recorded.bytes if self.recorded is not None else 0)

    def checkpoint(self, kind: str) -> None:
        """Sets checkpointing: on, off, or offload, with which the host keeps the blocks' inputs."""
        if self.checkpointing != kind:
            self.recorded = None
            if self.checkpointing != "off":
                self.base.activation_checkpointing_disable()
            if kind != "off":
                # a graph's recording cannot read the state of random numbers, of which there are none
                settings = {"use_reentrant": False, "preserve_rng_state": not self.way.endswith("recorded")}
                self.base.activation_checkpointing_enable(settings, offload=kind == "offload")
            self.checkpointing = kind

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        self.module.apply_rotary_pos_emb = self.rotary
        if self.way.endswith("recorded"):
            return packed_loss(self.base.base_model, self.base.lm_head, ids)
        inputs: dict[str, Any] = {"input_ids": ids}
        if self.way == "frozen":
            inputs = {"inputs_embeds": self.base.get_input_embeddings()(ids).requires_grad_()}
        with torch.autocast(DEVICE, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            return mean_loss(self.model, inputs, ids, self.in_parts)

    def forward_and_backward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.way.endswith("recorded"):
            if self.recorded is None or self.recorded.ids.shape != ids.shape:
                self.recorded = None  # frees the memory of the graph before
                trained = [p for p in self.model.parameters() if p.requires_grad]
                self.recorded = RecordedStep(self.loss, trained, ids)
            return self.recorded(ids)
        if self.way.endswith("reduced overhead"):
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.loss(ids)
        loss.backward()
        return loss.detach()

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        with three_kernels() if self.way.endswith("bitsandbytes' kernels") else contextlib.nullcontext():
            loss = self.forward_and_backward(ids)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss


def three_kernels() -> Any:
    """Makes the fast step dequantise 4-bit weights by bitsandbytes' kernels inside the context."""
    from bitsandbytes.functional import dequantize_4bit

    def dequantize(weight: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_4bit(weight, state).to(dtype)

    return patch("sgm_finetune.train.fast.adapter_forward._dequantize_function", lambda on_gpu: dequantize)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def time_step(way: Way, ids: torch.Tensor) -> dict:
    """Seconds, loss and bytes of one step, without the memory of the other ways."""
    synchronize()
    resident = way.resident()
    before = torch.cuda.memory_allocated()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    loss = way.step(ids)
    synchronize()
    seconds = time.perf_counter() - started
    grown = torch.cuda.max_memory_allocated() - before
    return {"seconds": seconds, "loss": float(loss), "peak": resident + grown, "resident": resident}


def synchronisations(way: Way, ids: torch.Tensor) -> int:
    """How often a step makes the CPU wait for the GPU."""
    if DEVICE == "cpu":
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            way.step(ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def kernels(way: Way, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of a step's kernels, without the gaps between them, and the number of kernels."""
    if DEVICE == "cpu":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        way.step(ids)
        torch.cuda.synchronize()
    ran = [event for event in profile.key_averages() if event.self_device_time_total]
    seconds = sum(event.self_device_time_total for event in ran) / 1e6
    return {"kernel_seconds": round(seconds, 4), "num_kernels": sum(event.count for event in ran)}


def random_ids(vocabulary: int, batch: int, length: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, length), generator=draw).to(DEVICE)


def measure(ways: list[Way], ids: torch.Tensor, checkpointing: str, repeats: int) -> list[dict]:
    batch, length = ids.shape
    found: dict[str, list[dict]] = {}
    failed: dict[str, str] = {}
    for turn in range(_WARM + repeats):
        for way in ways:
            if way.way in failed:
                continue
            way.checkpoint(checkpointing)
            try:
                taken = time_step(way, ids)
                if turn >= _WARM:
                    found.setdefault(way.way, []).append(taken)
            except torch.OutOfMemoryError:
                failed[way.way] = "out of memory"
            except Exception as error:  # the other ways continue, and the table shows the error
                traceback.print_exc()
                failed[way.way] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            if way.way in failed:
                way.recorded = None
                if way.optimizer is not None:
                    way.optimizer.zero_grad()
                gc.collect()
                torch.cuda.empty_cache()
    rows = []
    for way in ways:
        row: dict[str, Any] = {"way": way.way, "batch": batch, "length": length, "checkpointing": checkpointing}
        if way.way in failed:
            row["failed"] = failed[way.way]
        else:
            steps = found[way.way]
            row |= {
                "tokens_per_second": round(batch * length / statistics.median(s["seconds"] for s in steps), 1),
                "seconds": [round(s["seconds"], 4) for s in steps],
                "peak_gib": round(max(s["peak"] for s in steps) / 2**30, 3),
                "resident_gib": round(steps[-1]["resident"] / 2**30, 3),
                "losses": [round(s["loss"], 4) for s in steps],
                "synchronisations": synchronisations(way, ids),
                **kernels(way, ids),
            }
        rows.append(row)
    return rows


def table(rows: list[dict], tflops: float) -> str:
    """The table; its floors are the speed of the card's own products alone and the least memory."""
    lines = []
    for row in rows:
        against = next((r for r in rows if r["way"] == "PEFT QLoRA" and same(r, row) and "failed" not in r), None)
        place = f"| {row['batch']} × {row['length']:,} | {row['checkpointing']} | {row['way']} |"
        if "failed" in row:
            lines.append(f"{place} {row['failed']} | | | | | |")
            continue
        least = row["floor"]["weights_gib"] + row["floor"]["activations_gib"]
        fastest = row["batch"] * row["length"] * tflops / row["floor"]["tera_operations"]
        speed, memory = row["tokens_per_second"], row["peak_gib"]
        ratios = (
            (f"{speed / against['tokens_per_second']:.2f}", f"{memory / against['peak_gib']:.2f}")
            if against
            else ("–", "–")
        )
        lines.append(
            f"{place} {speed:,.0f} | {ratios[0]} | {100 * speed / fastest:.0f} % | {memory:.2f} | {ratios[1]} | "
            f"{memory / least:.2f} |"
        )
    return "\n".join(lines)


def same(one: dict, other: dict) -> bool:
    return (one["batch"], one["checkpointing"]) == (other["batch"], other["checkpointing"])


def gradient_differences(ways: list[Way], ids: torch.Tensor) -> dict[str, float]:
    """‖g − g'‖/‖g'‖ over all adapters; g' is PEFT's gradient in bfloat16, at the same factors away from their start."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for way in ways:
        if way.way == "frozen" or way.way.startswith("SGM"):
            continue
        way.checkpoint("off")
        torch.manual_seed(1)
        factors = {n: p for n, p in way.model.named_parameters() if p.requires_grad}
        kept = {n: p.detach().clone() for n, p in factors.items()}
        with torch.no_grad():
            for p in factors.values():
                p.copy_(torch.randn(p.shape, device=DEVICE) * 0.02)
        way.loss(ids).backward()
        found[way.way] = {n: p.grad for n, p in factors.items()}  # type: ignore
        with torch.no_grad():
            for n, p in factors.items():
                p.grad = None
                p.copy_(kept[n])
    wanted = found.get("PEFT, bfloat16")
    if wanted is None:
        return {}
    size = sum(float(g.double().square().sum()) for g in wanted.values()) ** 0.5
    return {way: round(_distance(grads, wanted) / size, 5) for way, grads in found.items()}


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name].double() - g.double()).square().sum()) for name, g in other.items()) ** 0.5


def ceilings() -> dict[str, float]:
    """Rates of this card: bfloat16 products of 8192² matrices, and copies (bytes read plus bytes written).

    On a CPU smaller ones, which only show that this works.
    """
    size, entries = (8192, 2**29) if DEVICE == "cuda" else (128, 2**16)

    def seconds(act: Callable[[], Any], repeats: int = 10) -> float:
        for _ in range(3):
            act()
        synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            act()
        synchronize()
        return (time.perf_counter() - started) / repeats

    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    source = torch.randn(entries, device=DEVICE)
    target = torch.empty_like(source)
    return {
        "bfloat16_tflops": round(2 * size**3 / seconds(lambda: a @ b) / 1e12, 4),
        "copy_tb_per_second": round(2 * 4 * entries / seconds(lambda: target.copy_(source)) / 1e12, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runs", nargs="+", default=RUNS, help="batch:checkpointing (on, off; offload: SGM alone)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--table", action="store_true", help="print the table of the last recorded run")
    parser.add_argument("--pico", action="store_true", help="a model of seconds, also on a CPU")
    parser.add_argument("--out", type=Path, help="write there, row by row, instead of to benchmarks/results")
    asked = parser.parse_args()
    if asked.table:
        last = json.loads((RESULTS / "step_gpu.json").read_text(encoding="utf-8"))[-1]
        print(table(last["rows"], last["bfloat16_tflops"]))
        return
    started = time.perf_counter()
    shape, length = (PICO, PICO_LENGTH) if asked.pico else (LLAMA_8B, LENGTH)
    packages = (
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        *(("liger-kernel", "triton") if DEVICE == "cuda" else ()),
    )
    card = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU", **ceilings()}
    record(asked.out, **card, shape=shape, versions=versions(packages))
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    base = build(shape)
    print(f"built in {time.perf_counter() - started:.0f} s", flush=True)
    ways = [Way(way, base) for way in asked.ways]
    gc.collect()
    gc.freeze()  # otherwise it traverses all ways' modules during a step
    print(f"ready in {time.perf_counter() - started:.0f} s", flush=True)
    rows: list[dict] = []
    for run in asked.runs:
        batch, checkpointing = int(run.partition(":")[0]), run.partition(":")[2]
        chosen = [way for way in ways if checkpointing != "offload" or way.way == "SGM"]
        new = measure(chosen, random_ids(shape["vocab_size"], batch, length, batch), checkpointing, asked.repeats)
        for row in new:
            row["floor"] = floor(batch, length, checkpointing != "off", shape)
        rows += new
        print(table(new, card["bfloat16_tflops"]), f"\n{time.perf_counter() - started:.0f} s", flush=True)
        record(asked.out, rows=rows)
    differences = gradient_differences(ways, random_ids(shape["vocab_size"], 1, min(512, length), 5))
    print(json.dumps(differences), flush=True)
    record(asked.out, gradient_differences=differences)
    if asked.out is None:
        command = f"python benchmarks/step_gpu.py --repeats {asked.repeats} --runs {' '.join(asked.runs)}"
        if tuple(asked.ways) != WAYS:
            command += f" --ways {shlex.join(asked.ways)}"
        append_run("step_gpu", command, started, rows, packages, **card, gradient_differences=differences)


def record(out: Path | None, **entries: Any) -> None:
    if out is not None:
        update(out, **entries)


if __name__ == "__main__":
    main()
