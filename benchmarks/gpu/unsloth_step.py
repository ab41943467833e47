"""Measures the step of benchmarks/step_gpu.py in Unsloth: tokens per second and peak allocated memory.

    python benchmarks/gpu/unsloth_step.py --out gpu-results/unsloth.json --runs 2:on 1:off

Unsloth changes Transformers for its whole process, so it has a process of its own. It loads the checkpoint that it is
given in 4 bits, by its own loader, and adds LoRA of rank 16 to every linear layer. With --pico, on a CPU, nothing is in
4 bits; and where Unsloth is not installed, Transformers and PEFT load the model: it shows that all the rest works.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if importlib.util.find_spec("unsloth") is not None:
    with contextlib.suppress(Exception):  # before Transformers, as it asks; load_unsloth tells what is wrong
        import unsloth  # type: ignore  # noqa: F401

import torch
from checkpoint import checkpoint_folder, write_checkpoint
from llama_8b import DEVICE, LLAMA_8B, PICO, floor
from record import update
from recording import versions

INSTALLED = importlib.util.find_spec("unsloth") is not None
RANK, LENGTH, PICO_LENGTH = 16, 2048, 32
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_WARM, _REPEATS = 2, 5


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of three words: Unsloth's loader wants one, and the batches are token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "<eos>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)


def load_unsloth(folder: Path, checkpointing: bool) -> Any:
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=LENGTH, dtype=torch.bfloat16, load_in_4bit=DEVICE == "cuda",
        fix_tokenizer=False, local_files_only=True,
    )  # fmt: skip
    return FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=2 * RANK, lora_dropout=0, bias="none", target_modules=KINDS,
        use_gradient_checkpointing="unsloth" if checkpointing else False, max_seq_length=LENGTH,
    )  # fmt: skip


def load_peft(folder: Path, checkpointing: bool) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=KINDS, task_type="CAUSAL_LM"))


def measure(model: Any, batch: int, length: int, vocabulary: int, repeats: int) -> dict[str, Any]:
    """Tokens per second, GiB and losses of a step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=DEVICE == "cuda")
    draw = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, vocabulary, (batch, length), generator=draw).to(DEVICE)
    model.train()
    seconds, losses = [], []
    for turn in range(_WARM + repeats):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss.detach()), 4))
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        if turn >= _WARM:
            seconds.append(round(time.perf_counter() - began, 4))
    return {
        "tokens_per_second": round(batch * length / statistics.median(seconds), 1),
        "seconds": seconds,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pico", action="store_true")
    parser.add_argument("--runs", nargs="+", default=["2:on", "1:off"], help="batch:checkpointing (on, off)")
    options = parser.parse_args()
    shape, length = (PICO, PICO_LENGTH) if options.pico else (LLAMA_8B, LENGTH)
    folder = checkpoint_folder(options.out, options.pico)
    write_checkpoint(folder, shape, DEVICE)
    write_tokenizer(folder)
    if not INSTALLED and not options.pico:
        raise SystemExit("Unsloth is not installed; `make gpu-pack` gathers it (docs/gpu.md)")
    packages = ("torch", "transformers", "peft", *(("unsloth", "unsloth_zoo", "bitsandbytes") if INSTALLED else ()))
    update(options.out, shape=shape, device=torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
           versions=versions(packages))  # fmt: skip
    rows: list[dict[str, Any]] = []
    way, load = ("Unsloth", load_unsloth) if INSTALLED else ("PEFT", load_peft)
    # one model for all batches with the same checkpointing; a fresh one would take a minute to load
    for kind in dict.fromkeys(run.partition(":")[2] for run in options.runs):
        model = None
        for run in options.runs:
            batch, checkpointing = int(run.partition(":")[0]), run.partition(":")[2]
            if checkpointing != kind:
                continue
            row: dict[str, Any] = {"way": way, "batch": batch, "length": length, "checkpointing": checkpointing}
            try:
                model = model or load(folder, checkpointing == "on")
                repeats = 1 if options.pico else _REPEATS
                row |= measure(model, batch, length, shape["vocab_size"], repeats)
            except Exception as error:  # the next run may work, and the table shows the error
                traceback.print_exc()
                row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            row["floor"] = floor(batch, length, checkpointing != "off", shape)
            rows.append(row)
            update(options.out, rows=rows)
        del model
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    if all("failed" in row for row in rows):
        raise SystemExit(f"every run failed: {rows[0]['failed']}")


if __name__ == "__main__":
    main()
