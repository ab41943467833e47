"""Memory and traffic of each process when several share a run: computed from shapes, and measured while loading.

    python benchmarks/scale.py              # computes; runs nothing
    python benchmarks/scale.py --loading    # measures, on the CPU

Computed: Llama 3's 8B and 70B on the meta device, with rank 16 on all linear layers; readers of the same activations
share lora_A. Measured: 2 and 4 processes load and shard a Llama of random weights as a run with training.shard does; a
process's own memory is Linux's RssAnon, without pages of files, which the system can drop. The script prints the tables
of docs/scale.md and appends to benchmarks/results/scale.json and scale_loading.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from recording import append_run, process_memory
from transformers import AutoModelForCausalLM, LlamaConfig

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.method.parameter_count import adapter_parameters
from sgm_finetune.method.plan import Group, Plan, PlannedMatrix, PlanSettings
from sgm_finetune.model.load import load_model
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.model.names import block_of
from sgm_finetune.train.adapters.shard import shard_base

RANK = 16
MODELS = {
    "8B": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "70B": {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}
CASES = (
    ("8B", "none", 1), ("8B", "none", 8), ("8B", "nf4", 1), ("8B", "nf4", 2),
    ("70B", "none", 8), ("70B", "none", 16), ("70B", "nf4", 2), ("70B", "nf4", 8),
)  # fmt: skip
"""Model, quantisation, number of processes; 1: every process holds the whole base (data parallel)."""
NF4_WEIGHT, NF4_SCALE = 1 / 2, 4 / 64
"""Bytes of a weight in a block: the part that is sharded, and its share of the scales, which are not."""
READERS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
STATE = 3 * 4
"""Bytes of a trained number with its gradient and its momentum, in float32."""
GIB, MIB = 2**30, 2**20


def empty_model(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, tie_word_embeddings=False, **MODELS[name])
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def merged_plan(model: torch.nn.Module) -> Plan:
    matrices = {
        name: PlannedMatrix(name, name, None, matrix.shape, selected=True) for name, matrix in adaptable(model).items()
    }
    blocks = dict.fromkeys(block for name in matrices if (block := block_of(name)) is not None)
    groups = [
        Group(f"{block}/{kinds[0]}", "readers", "input", tuple(f"{block}.{kind}" for kind in kinds))
        for block in blocks
        for kinds in READERS
    ]
    return Plan("", PlanSettings(RANK, 2.0 * RANK), tuple(matrices.values()), tuple(groups))


def costs(name: str, quantization: str, processes: int) -> dict:
    """A row of the computed table: GiB; gradients in MiB."""
    model = empty_model(name)
    matrices = sum(rows * cols for rows, cols in (matrix.shape for matrix in adaptable(model).values()))
    base = sum(p.numel() * p.element_size() for p in model.parameters())
    block = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if block_of(n) == "model.layers.0")
    whole = 0.0
    if quantization == "nf4":
        num_blocks = MODELS[name]["num_hidden_layers"]
        base += (NF4_WEIGHT - 2) * matrices
        block += (NF4_WEIGHT - 2) * matrices / num_blocks
        whole = NF4_SCALE * matrices
    shared, plain = adapter_parameters(merged_plan(model))
    received = 2 * base * (processes - 1) / processes  # forward, and again backward
    return {
        "model": name,
        "quantization": quantization,
        "processes": processes,
        "base_gib": round((base / processes + whole) / GIB, 2),
        "block_gib": round(block / GIB, 2),
        "trained_gib": round(STATE * shared / GIB, 2),
        "gradients_mib": round(4 * shared / MIB),
        "gradients_without_sharing_mib": round(4 * plain / MIB),
        "gathered_gib": round(received / GIB, 1),
    }


def line(row: dict) -> str:
    alone = row["processes"] == 1
    cells = [
        f"{row['model']}{' nf4' * (row['quantization'] == 'nf4')}, {'data parallel' if alone else 'sharded'}",
        "any" if alone else str(row["processes"]),
        f"{row['base_gib']:.2f}",
        "–" if alone else f"{row['block_gib']:.2f}",
        f"{row['trained_gib']:.2f}",
        f"{row['gradients_mib']} ({row['gradients_without_sharing_mib']})",
        "–" if alone else f"{row['gathered_gib']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def load_and_cut(folder: str, quantization: str) -> None:
    """Runs one of the processes; the first prints its memory above the start, in MiB, as JSON."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    before = highest = process_memory("RssAnon")

    def watch() -> None:
        nonlocal highest
        while True:
            highest = max(highest, process_memory("RssAnon"))
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    device = torch.device("cpu")
    model, _ = load_model(
        ModelConfig(name=folder, task="causal-lm", quantization=quantization), Path(folder), device=device
    )
    loaded = process_memory("RssAnon")
    cut = shard_base(model, device)
    if torch.distributed.get_rank() == 0:
        held = {"base_mib": cut.whole / MIB, "piece_mib": cut.here / MIB}
        held |= {"loaded_mib": loaded - before, "highest_mib": highest - before}
        print(json.dumps({key: round(value, 1) for key, value in held.items()}), flush=True)
    torch.distributed.barrier()


def loading() -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, num_attention_heads=16,
            num_key_value_heads=4, vocab_size=32000, tie_word_embeddings=False,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")
        for quantization in ("none", "nf4"):
            for processes in (2, 4):
                launcher = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    f"--nproc_per_node={processes}",
                ]
                done = subprocess.run(
                    [*launcher, __file__, "--process", folder, quantization], check=True, capture_output=True, text=True
                )
                said = next(line for line in done.stdout.splitlines() if line.startswith("{"))
                rows.append({"quantization": quantization, "processes": processes, **json.loads(said)})
                print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)
    return rows


def main() -> None:
    started = time.perf_counter()
    match sys.argv[1:]:
        case ["--process", folder, quantization]:
            load_and_cut(folder, quantization)
        case ["--loading"]:
            packages = ("torch", "transformers", "bitsandbytes")
            append_run("scale_loading", "python benchmarks/scale.py --loading", started, loading(), packages)
        case _:
            rows = [costs(*case) for case in CASES]
            for row in rows:
                print(line(row))
            append_run("scale", "python benchmarks/scale.py", started, rows, ("torch", "transformers"))


if __name__ == "__main__":
    main()
