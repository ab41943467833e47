"""The model of the GPU benchmarks: a Llama of 8B with random weights in NF4 or bfloat16, and the floor of its step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "tie_word_embeddings": False,
    "attention_bias": False, "use_cache": False,
}  # fmt: skip
PICO: dict[str, Any] = LLAMA_8B | {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
"""The same in small: it shows on a CPU that a benchmark works."""
LLAMA_70B: dict[str, Any] = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
NESTED = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4 with nested scales."""


def build(
    shape: dict[str, Any], quantised: bool = True, after_block: Callable[[str, nn.Module], None] = lambda *_: None
) -> Any:
    """The base with its blocks in NF4, or all of it in bfloat16. Its random weights are drawn on the device, and packed
    there, one after the other; `after_block(name, block)` is called when a block has them."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    torch.manual_seed(0)
    config = LlamaConfig(**shape)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    for index, block in enumerate(model.model.layers):
        for name, module in list(block.named_modules()):
            if quantised and type(module) is nn.Linear:
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, _packed(module))
        _draw(block)
        after_block(f"model.layers.{index}", block)
    _draw(model)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(DEVICE)
    model.is_loaded_in_4bit = quantised
    return model.requires_grad_(False)


def _draw(model: nn.Module) -> None:
    """Gives parameters without numbers random ones; vectors are 1."""
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            made = torch.ones if parameter.dim() == 1 else torch.randn
            filled = made(parameter.shape, dtype=torch.bfloat16, device=DEVICE) * (1 if parameter.dim() == 1 else 0.02)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(filled, requires_grad=False))


def _packed(module: nn.Linear) -> nn.Module:
    """A layer in NF4 with the shape of `module`, its random weights drawn on the device."""
    import bitsandbytes as bnb

    weight = torch.randn(module.out_features, module.in_features, dtype=torch.bfloat16, device=DEVICE) * 0.02
    packed: Any = bnb.nn.Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    packed.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed
    ).to(DEVICE)
    packed.support_avx512bf16_for_cpu = False  # bitsandbytes otherwise repacks the weight in a forward pass
    return packed


def with_liger(model: Any) -> str:
    """Makes Liger's kernels compute, as a run does on a GPU; says whether they do, and what a run would object to."""
    from sgm_finetune.base.errors import UserError
    from sgm_finetune.train.fast.liger import use_liger

    if DEVICE == "cpu":
        return "no GPU"
    ids = torch.randint(0, model.config.vocab_size, (1, 64), device=DEVICE)
    try:
        return use_liger(model, {"input_ids": ids}) or "used"
    except UserError as error:  # random weights amplify rounding more than trained ones; the kernels stay
        return f"used, though {error}"


def floor(batch: int, length: int, checkpointing: bool, shape: dict[str, Any] = LLAMA_8B) -> dict[str, float]:
    """The products of the frozen model's step, in 10¹² operations, and the least memory in GiB.

    Weights are in NF4 with nested scales, embeddings and head in bfloat16; of the activations, it counts what any
    method must keep of a block, in bfloat16.
    """
    h, f, layers, vocab = (
        shape[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    kv, tokens = h * shape["num_key_value_heads"] // shape["num_attention_heads"], batch * length
    block = 2 * h * h + 2 * h * kv + 3 * h * f
    forward = 2 * tokens * (layers * block + vocab * h) + layers * 2 * tokens * length * h  # causal
    backward = 2 * tokens * (layers * block + vocab * h) + 2.5 * layers * 2 * tokens * length * h
    again = 2 * tokens * layers * block + layers * 2 * tokens * length * h if checkpointing else 0
    weights = layers * block * NESTED + 2 * 2 * vocab * h
    # inputs of both norms and of q, k, v, of gate, up; q, k, v; attention's output; gate, up and their product
    kept = 2 * (6 * h + 2 * kv + 3 * f)
    activations = layers * tokens * 2 * h + tokens * kept if checkpointing else layers * tokens * kept
    return {
        "tera_operations": round((forward + backward + again) / 1e12, 6),
        "weights_gib": round(weights / 2**30, 6),
        "activations_gib": round(activations / 2**30, 6),
    }
