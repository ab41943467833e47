"""A checkpoint of an 8B Llama, written where it is needed: random bfloat16 weights with planted signal, in shards."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from scan import spiked_matrix
from unpack import scratch


def checkpoint_folder(out: Path, pico: bool) -> Path:
    """Where the checkpoint is written: the large one once for all items, the small one beside the results file."""
    return out.parent / "llama-pico" if pico else scratch() / "llama-8b"


def matrices_of_a_block(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    h, f = shape["hidden_size"], shape["intermediate_size"]
    kv = h * shape["num_key_value_heads"] // shape["num_attention_heads"]
    return {
        "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h), "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f),
    }  # fmt: skip


def shard(number: int, shape: dict[str, Any], device: str) -> dict[str, torch.Tensor]:
    """The tensors of block `number`; behind the last block, the embeddings, the head and the last norm."""
    draw = torch.Generator(device).manual_seed(number)
    h, vocabulary = shape["hidden_size"], shape["vocab_size"]
    norm = torch.ones(h, dtype=torch.bfloat16)
    if number == shape["num_hidden_layers"]:
        named = {
            name: torch.randn(vocabulary, h, generator=draw, device=device).mul_(0.02).bfloat16()
            for name in ("model.embed_tokens.weight", "lm_head.weight")
        }
        return named | {"model.norm.weight": norm}
    block = f"model.layers.{number}"
    named = {
        f"{block}.{name}.weight": spiked_matrix(*size, min(16 + 4 * number, min(size) // 2), 1.2 + 0.02 * number, draw)
        for name, size in matrices_of_a_block(shape).items()
    }
    return named | {f"{block}.{name}.weight": norm.clone() for name in ("input_layernorm", "post_attention_layernorm")}


def write_checkpoint(folder: Path, shape: dict[str, Any], device: str) -> float:
    """Writes what `folder` lacks, a shard a block, with index and config; returns the seconds that it took."""
    from transformers import LlamaConfig

    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    total = shape["num_hidden_layers"] + 1
    index: dict[str, str] = {}
    for number in range(total):
        file = folder / f"model-{number + 1:05d}-of-{total:05d}.safetensors"
        listed = file.with_suffix(".json")
        if not file.exists():
            tensors = {name: tensor.cpu().contiguous() for name, tensor in shard(number, shape, device).items()}
            listed.write_text(json.dumps(sorted(tensors)))
            save_file(tensors, file.with_suffix(".partial"), metadata={"format": "pt"})
            file.with_suffix(".partial").rename(file)
        index |= dict.fromkeys(json.loads(listed.read_text()), file.name)
        print(f"\rwrote {number + 1} of {total} shards", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return round(time.perf_counter() - began, 1)
