"""Which rows or columns of a fused parameter belong to which matrix: query, key and value; gate and up.

A model computes q, k and v (or gate and up) with one product of one stored parameter and then cuts the result. Its
modeling file fixes where it cuts, so the tables below find the layout by the `model_type` of config.json. The sizes
come from config.json too; a parameter whose shape does not fit them stays whole.

Letters: `h` hidden size, `n` heads, `m` key/value heads, `d` dimension of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Cut:
    """One part of a fused matrix: `start:stop` of each of the `groups` equal groups along `axis`.

    >>> import torch
    >>> Cut("up", axis=1, groups=2, start=1, stop=2).of(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])).tolist()
    [[2, 4], [6, 8]]
    """

    name: str
    axis: int
    groups: int
    start: int
    stop: int

    def of(self, matrix: Tensor) -> Tensor:
        """The part of `matrix`; a view if the part is contiguous."""
        grouped = matrix.unflatten(self.axis, (self.groups, -1))
        return grouped.narrow(self.axis + 1, self.start, self.stop - self.start).flatten(self.axis, self.axis + 1)

    def shape(self, whole: tuple[int, int]) -> tuple[int, int]:
        """The part's shape; `whole` is the shape of the fused matrix."""
        length = self.groups * (self.stop - self.start)
        return (length, whole[1]) if self.axis == 0 else (whole[0], length)

    def row_ranges(self, num_rows: int) -> Iterator[tuple[int, int]]:
        """Yields the ranges of the fused matrix's rows that contain the part, in order."""
        if self.axis == 1:
            yield 0, num_rows
            return
        length = num_rows // self.groups
        for group in range(self.groups):
            yield group * length + self.start, group * length + self.stop


@dataclass(frozen=True)
class Layout:
    """How the outputs are arranged: the parts one after another, repeated `groups` times."""

    parts: tuple[tuple[str, int], ...]
    """(name, length within one group)"""
    groups: int = 1

    @property
    def length(self) -> int:
        """Number of outputs."""
        return self.groups * sum(length for _, length in self.parts)

    def cuts(self, axis: int) -> tuple[Cut, ...]:
        """The parts, when the outputs lie along `axis`."""
        found, start = [], 0
        for name, length in self.parts:
            found.append(Cut(name, axis, self.groups, start, start + length))
            start += length
        return tuple(found)


Rule = Callable[[Config, int], Layout]
"""(config, number of outputs) -> layout. Raises KeyError when config.json lacks a size."""


def thirds(config: Config, outputs: int) -> Layout:
    """q, k, v one after another, each of the hidden size."""
    h = _hidden_size(config)
    return Layout((("q", h), ("k", h), ("v", h)))


def grouped(config: Config, outputs: int) -> Layout:
    """q of n heads, then k and v of m heads each (grouped-query attention)."""
    n, d = _num_heads(config), _head_size(config)
    m = config.get("num_key_value_heads") or (config.get("attn_config") or {}).get("kv_n_heads") or n
    return Layout((("q", n * d), ("k", m * d), ("v", m * d)))


def per_head(config: Config, outputs: int) -> Layout:
    """q, k, v of the first head, then of the second, and so on."""
    d = _head_size(config)
    return Layout((("q", d), ("k", d), ("v", d)), groups=_num_heads(config))


def falcon(config: Config, outputs: int) -> Layout:
    """Falcon's three layouts: per group of heads (new decoder), one k and v for all heads (multi-query), per head."""
    n, d = _num_heads(config), _head_size(config)
    if config.get("new_decoder_architecture", False):
        m = config.get("num_kv_heads") or n
        return Layout((("q", n // m * d), ("k", d), ("v", d)), groups=m)
    if config.get("multi_query", True):
        return Layout((("q", n * d), ("k", d), ("v", d)))
    return per_head(config, outputs)


def bigcode(config: Config, outputs: int) -> Layout:
    """GPT-BigCode: one k and v for all heads (multi-query), or per head."""
    n, d = _num_heads(config), _head_size(config)
    return Layout((("q", n * d), ("k", d), ("v", d))) if config.get("multi_query", True) else per_head(config, outputs)


def codegen(config: Config, outputs: int) -> Layout:
    """CodeGen: four groups, each with q, v and k of a quarter of the heads."""
    quarter = _hidden_size(config) // 4
    return Layout((("q", quarter), ("v", quarter), ("k", quarter)), groups=4)


def halves(config: Config, outputs: int) -> Layout:
    """gate (the half that the activation function takes), then up."""
    return Layout((("gate", outputs // 2), ("up", outputs // 2)))


def swapped_halves(config: Config, outputs: int) -> Layout:
    """up, then gate."""
    return Layout((("up", outputs // 2), ("gate", outputs // 2)))


def alternating(config: Config, outputs: int) -> Layout:
    """gate and up in turn, one output each."""
    return Layout((("gate", 1), ("up", 1)), groups=outputs // 2)


LAYOUTS: tuple[tuple[str, Rule, str], ...] = (
    ("c_attn", thirds, "gpt2 imagegpt decision_transformer openai-gpt"),
    ("c_attn", bigcode, "gpt_bigcode"),
    ("query_key_value", per_head, "gpt_neox gpt_neox_japanese bloom persimmon"),
    ("query_key_value", falcon, "falcon"),
    ("qkv_proj", grouped, "phi3 phi4_multimodal"),
    ("qkv_proj", per_head, "minimax"),
    ("qkv_proj", codegen, "codegen"),
    ("qkv_proj", thirds, "gte"),
    ("Wqkv", thirds, "mpt modernbert nomic_bert jina_embeddings_v3"),
    ("Wqkv", grouped, "dbrx"),
    ("Wi", halves, "modernbert modernbert-decoder"),
    (
        "gate_up_proj",
        halves,
        "phi3 phi4_multimodal glm glm4 glm4v glm_image glm_ocr zamba2 minimax_m3_vl dia_encoder dia_decoder hrm_text",
    ),
    ("up_gate_proj", swapped_halves, "gte"),
    ("input_linear", halves, "granitemoe granitemoeshared granitemoehybrid"),
)
"""(last part of the parameter's name, its layout, model types with this layout)"""

EXPERT_LAYOUTS: tuple[tuple[str, Rule, str], ...] = (
    ("gate_up_proj", alternating, "gpt_oss"),
    (
        "gate_up_proj",
        halves,
        "afmoe aria axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 "
        "deepseek_v4 diffusion_gemma dots1 dots3_note ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint "
        "gemma4 glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa granitemoe granitemoe_swa granitemoehybrid "
        "granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 jamba kimi_linear kolibri1 laguna lfm2_moe llama4 "
        "longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl mistral4 mistral_large4 mixtral "
        "muse_spark olmoe openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe "
        "qwen3_vl_moe qwen4_exp solar_open step3p7 unlimited_ocr zaya",
    ),
    ("input_linear", halves, "granitemoe granitemoeshared granitemoehybrid"),
)
"""The same for one expert of a stack."""

_OUTPUTS_IN_COLUMNS = (
    "gpt2", "imagegpt", "decision_transformer", "openai-gpt", "gpt_oss", "llama4", "openai_privacy_filter", "aria",
    "qwen3_vl_moe",
)  # fmt: skip
"""Model types whose outputs are columns in the file (h x outputs). They only decide which axis is tried first: a
quantised checkpoint may hold the transpose."""


def cuts(
    parameter: str, shape: tuple[int, int], config: Config, *, expert: bool = False, transposed: bool = False
) -> tuple[Cut, ...]:
    """The parts of a fused parameter, which together make up the whole; () when the parameter is one matrix.

    `shape` is the shape of the matrix; with `expert`, of one expert in a stack. `transposed` says that the file holds
    the transpose of the model's matrix, if that is known. Torch's own `in_proj_weight` needs no config.

    >>> [(cut.name, cut.axis, cut.start, cut.stop) for cut in cuts("h.0.attn.c_attn.weight", (4, 12),
    ...     {"model_type": "gpt2", "n_embd": 4, "n_head": 2})]
    [('q', 1, 0, 4), ('k', 1, 4, 8), ('v', 1, 8, 12)]
    """
    leaf = parameter.removesuffix(".weight").rpartition(".")[2]
    if leaf == "in_proj_weight":
        return thirds({"hidden_size": shape[1]}, shape[0]).cuts(0) if shape[0] == 3 * shape[1] else ()
    for part in _nested_configs(config):
        model_type = str(part.get("model_type")).removesuffix("_text")
        for name, rule, model_types in EXPERT_LAYOUTS if expert else LAYOUTS:
            if name == leaf and model_type in model_types.split():
                for axis in (1, 0) if (model_type in _OUTPUTS_IN_COLUMNS) != transposed else (0, 1):
                    if layout := _layout_that_fits(rule, part, outputs=shape[axis], inputs=shape[1 - axis]):
                        return layout.cuts(axis)
    return ()


def _layout_that_fits(rule: Rule, config: Config, outputs: int, inputs: int) -> Layout | None:
    """The layout, if the sizes in `config` are those of the matrix."""
    try:
        if inputs != _hidden_size(config):
            return None
        layout = rule(config, outputs)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):  # a size is missing or not a number
        return None
    return layout if layout.length == outputs > 0 else None


def _nested_configs(config: Config) -> Iterator[Config]:
    """Yields the config, then the ones inside it (of the text model, the decoder ...)."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _nested_configs(value)


def _first(config: Config, *names: str) -> int:
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise KeyError(names[0])


def _hidden_size(config: Config) -> int:
    return _first(config, "hidden_size", "n_embd", "d_model")


def _num_heads(config: Config) -> int:
    return _first(config, "num_attention_heads", "n_head", "n_heads")


def _head_size(config: Config) -> int:
    return config.get("head_dim") or _hidden_size(config) // _num_heads(config)
