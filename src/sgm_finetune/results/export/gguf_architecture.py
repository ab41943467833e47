"""Which models llama.cpp computes as Transformers does, and the keys of a GGUF file that describe one.

What llama.cpp's own graph of an architecture fixes, such as its activation, has no key. A model that differs there is
refused.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line

ARCHITECTURES = {
    "gemma2": "GEMMA2", "gemma3_text": "GEMMA3", "gpt2": "GPT2", "llama": "LLAMA", "mistral": "LLAMA",
    "mixtral": "LLAMA", "phi3": "PHI3", "qwen2": "QWEN2", "qwen2_moe": "QWEN2MOE", "qwen3": "QWEN3",
    "qwen3_moe": "QWEN3MOE",
}  # fmt: skip
"""Decoders: model_type of config.json -> the gguf package's name."""
CLASSIFIERS = {"bert": "BERT"}
"""The same for classifiers of texts, which llama.cpp computes with pooling type "rank"."""
_READ_BY_TRANSFORMERS = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose GGUF files Transformers reads as well (5.23 computes something else from those of the others)."""
_WINDOWS = {"GEMMA2": 2, "GEMMA3": 6}
"""Architectures whose sliding windows llama.cpp computes -> every which layer has none, if no key says otherwise."""
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
_ACTIVATIONS = {"BERT": ("gelu", *_TANH_GELU), "GEMMA2": _TANH_GELU, "GEMMA3": _TANH_GELU, "GPT2": _TANH_GELU}
"""Activations that llama.cpp computes in an MLP; silu in the others."""
_GEMMA_ROUNDS_AS = {"q8_0": "q6_k", "q6_k": "q5_k_m", "q5_k_m": "q4_k_m"}
"""Type -> the type whose tolerance a Gemma in it has (measured on one of 270M, docs/LOG.md)."""
_LARGEST_GEMMA = {"GEMMA2": 46, "GEMMA3": 62}
"""Number of layers by which llama.cpp knows a Gemma of 27B, whose attention has another scale."""


def gguf_name(config: PreTrainedConfig) -> str:
    """Returns the gguf package's name of a supported base's architecture."""
    return {**ARCHITECTURES, **CLASSIFIERS}[config.model_type]


def architecture_of(config: PreTrainedConfig) -> Any:
    """Returns the gguf.MODEL_ARCH of a supported base."""
    import gguf

    return getattr(gguf.MODEL_ARCH, gguf_name(config))


def check_architecture(config: PreTrainedConfig, to: str, instead: str, is_classifier: bool = False) -> None:
    """Raises UserError for a base that llama.cpp does not compute as Transformers does."""
    kind, known = config.model_type, CLASSIFIERS if is_classifier else ARCHITECTURES
    if kind not in known:
        raise UserError(
            f"--to {to} supports {', '.join(known)}, and this base is a {kind}; take {instead}, and llama.cpp's own "
            "converter"
        )
    if kind not in _READ_BY_TRANSFORMERS and importlib.util.find_spec("llama_cpp") is None:
        raise UserError(
            f"--to {to} needs llama.cpp for a {kind}, which alone can check it; {install_line('llama-cpp')}, or take "
            f"{instead}"
        )
    for what in _refused(config):
        raise UserError(f"--to {to} does not support this {kind}, because llama.cpp has no {what}; take {instead}")


def _refused(config: PreTrainedConfig) -> Iterator[str]:
    """Yields what the base has and llama.cpp lacks for its architecture."""
    name, heads = gguf_name(config), config.num_attention_heads
    types = {"default", "linear", *{"LLAMA": ["llama3"], "PHI3": ["longrope"]}.get(name, [])}
    full, sliding = _rotary(config)
    if full["rope_type"] not in types:
        yield f"positions of rope_type {full['rope_type']} there"
    if name == "GEMMA3" and sliding["rope_type"] != "default":
        yield f"positions of rope_type {sliding['rope_type']} in its windows"
    allowed = _ACTIVATIONS.get(name, ("silu", "swish"))
    activation = next(
        value
        for key in ("hidden_activation", "hidden_act", "activation_function")
        if (value := getattr(config, key, None)) is not None
    )
    if activation not in allowed:
        yield f"activation {activation} there, but {allowed[0]}"
    if name in ("PHI3", "QWEN2", "QWEN2MOE") and head_dim(config) * heads != config.hidden_size:
        yield f"{heads} heads of {head_dim(config)} numbers in a model of width {config.hidden_size}"
    match name:
        case "GEMMA2" | "GEMMA3":
            yield from _refused_of_gemma(config, name)
        case "BERT":
            if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
                yield f"positions of type {config.position_embedding_type} there"
            if config.is_decoder:
                yield "attention to earlier tokens alone"
        case "GPT2" if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
            yield "attention whose scale differs from layer to layer, or that has none"
        case "QWEN2MOE" | "QWEN3MOE":
            if config.norm_topk_prob != (name == "QWEN3MOE"):
                yield f"norm_topk_prob={str(config.norm_topk_prob).lower()} there"
            if config.decoder_sparse_step != 1 or config.mlp_only_layers:
                yield "layers without experts there"
            if name == "QWEN2MOE" and config.tie_word_embeddings:
                yield "tied embeddings there"


def _refused_of_gemma(config: PreTrainedConfig, name: str) -> Iterator[str]:
    if config.num_hidden_layers == _LARGEST_GEMMA[name]:
        scale = config.hidden_size // config.num_attention_heads
    else:
        scale = head_dim(config)
    if config.query_pre_attn_scalar != scale:
        yield f"query_pre_attn_scalar={config.query_pre_attn_scalar} there, but {scale}"
    if name == "GEMMA2" and not config.tie_word_embeddings:
        yield "output matrix of its own there"
    if name == "GEMMA2" and not all(getattr(config, key) for key in _SOFTCAPS):
        yield "way to leave its soft-capping out"
    if name == "GEMMA3" and config.attn_logit_softcapping:
        yield "soft-capping of attention there"
    if getattr(config, "use_bidirectional_attention", False):
        yield "attention in both directions there"


def computed_as(config: PreTrainedConfig, stored_in: str) -> str:
    """Returns the type whose tolerance holds for what llama.cpp computes from a file stored so.

    llama.cpp reads GELU from a table in half precision. It rounds activations as well where the matrices are in 8 bits
    or fewer, and those of Gemma span a wide range.
    """
    name = gguf_name(config)
    if stored_in == "float32" and name in _ACTIVATIONS:
        return "float16"
    return _GEMMA_ROUNDS_AS.get(stored_in, stored_in) if name in _WINDOWS else stored_in


def ignored_window(config: PreTrainedConfig) -> int | None:
    """Returns the sliding window that llama.cpp does not compute: up to that length, a text is computed as trained."""
    window = _window(config)
    if gguf_name(config) in _WINDOWS or window is None or window >= config.max_position_embeddings:
        return None
    return window


def _window(config: PreTrainedConfig) -> int | None:
    """Returns the sliding window, if a layer has one."""
    layers = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if layers is None or "sliding_attention" in layers else None


def write_hyperparameters(writer: Any, config: PreTrainedConfig) -> None:
    """Adds the keys of the architecture to a gguf.GGUFWriter."""
    import gguf

    name, heads = gguf_name(config), config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(ignored_window(config) or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(_mlp_width(config))
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", heads))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_vocab_size(config.vocab_size)
    if name == "BERT":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_causal_attention(False)
        writer.add_pooling_type(gguf.PoolingType.RANK)
        writer.add_token_type_count(config.type_vocab_size)
        names: dict[Any, str] = config.id2label or {}
        writer.add_classifier_output_labels([names[number] for number in sorted(names)])
    elif name == "GPT2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        _write_positions(writer, config)
    if name in _WINDOWS and _window(config) is not None:
        writer.add_sliding_window(_window(config))
        windowed = [kind == "sliding_attention" for kind in config.layer_types]
        if windowed != [(number + 1) % _WINDOWS[name] != 0 for number in range(len(windowed))]:
            writer.add_sliding_window_pattern(windowed)
    if name == "GEMMA2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if name in _WINDOWS and config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if (experts := _num_experts(config)) is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if name in ("QWEN2MOE", "QWEN3MOE"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if name == "QWEN2MOE":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _mlp_width(config: PreTrainedConfig) -> int:
    if config.model_type == "gpt2":
        return config.n_inner or 4 * config.hidden_size
    return config.intermediate_size


def _num_experts(config: PreTrainedConfig) -> int | None:
    for key in ("num_local_experts", "num_experts"):
        if (found := getattr(config, key, None)) is not None:
            return found
    return None


def head_dim(config: PreTrainedConfig) -> int:
    """Returns the numbers of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _write_positions(writer: Any, config: PreTrainedConfig) -> None:
    import gguf

    rope, sliding = _rotary(config)
    writer.add_rope_dimension_count(_rotated(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(_length_before(config))
        writer.add_rope_scaling_attn_factors(_initial(config)[1])
    if sliding != rope:
        writer.add_rope_freq_base_swa(sliding["rope_theta"])


def rotary_factors(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Returns name in GGUF -> divisors of the rotary frequencies, for positions that are stretched unevenly."""
    import gguf

    rope, _ = _rotary(config)
    names = {
        key: f"{gguf.TENSOR_NAMES[getattr(gguf.MODEL_TENSOR, kind)]}.weight"
        for key, kind in (
            ("all", "ROPE_FREQS"),
            ("long_factor", "ROPE_FACTORS_LONG"),
            ("short_factor", "ROPE_FACTORS_SHORT"),
        )
    }
    if rope["rope_type"] == "longrope":
        return {names[key]: torch.tensor(rope[key], dtype=torch.float32) for key in ("long_factor", "short_factor")}
    if rope["rope_type"] != "llama3":
        return {}
    dimensions = torch.arange(0, head_dim(config), 2, dtype=torch.float32) / head_dim(config)
    return {names["all"]: (1.0 / rope["rope_theta"] ** dimensions) / _initial(config)[0]}


def _initial(config: PreTrainedConfig) -> tuple[Tensor, float]:
    """Returns the rotary frequencies and the factor of attention, as Transformers computes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[_rotary(config)[0]["rope_type"]](config, torch.device("cpu"))


def _length_before(config: PreTrainedConfig) -> int:
    """Returns the length up to which the factors for short texts hold."""
    before = getattr(config, "original_max_position_embeddings", None)
    return before or _rotary(config)[0]["original_max_position_embeddings"]


def _rotated(config: PreTrainedConfig) -> int:
    """Returns how many numbers of a head are rotated."""
    return math.floor(head_dim(config) * _rotary(config)[0].get("partial_rotary_factor", 1.0))


def _rotary(config: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of the rotary positions in layers without and with a sliding window."""
    given: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    usual = {"rope_theta": 10_000.0, "rope_type": "default"}
    kinds = ("full_attention", "sliding_attention")
    full, sliding = (
        {**usual, **(given.get(kind) or {})} if kinds[0] in given else {**usual, **given} for kind in kinds
    )
    return full, sliding
