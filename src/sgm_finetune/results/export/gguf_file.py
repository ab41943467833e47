"""A merged decoder as one GGUF file, tensor by tensor, by the gguf package."""

from __future__ import annotations

import importlib.util
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from sgm_finetune.base.errors import UserError
from sgm_finetune.results.export.gguf_vocabulary import Vocabulary, vocabulary
from sgm_finetune.results.export.merge import MergedTensor, checked_finite
from sgm_finetune.results.load import Result

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
STORED_IN: dict[GgufType, str] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}
"""Keys of check.TOLERANCES."""
_FILE_TYPES: dict[GgufType, str] = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""model_type of config.json -> the gguf package's name."""


def check_exportable(result: Result, config: PreTrainedConfig) -> Vocabulary:
    """The tokenizer as GGUF has it. Raises UserError for what a GGUF file of this kind cannot hold."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--to gguf needs the package gguf; pip install 'sgm-finetune[gguf]'")
    if result.config.model.task != "causal-lm":
        raise UserError(f"--to gguf is for model.task=causal-lm, this is {result.config.model.task}; take --to merged")
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"--to gguf knows {', '.join(ARCHITECTURES)}, and this base is a {kind}; take --to merged, and "
            "the converter of llama.cpp"
        )
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise UserError(f"--to gguf does not know positions of type {rope['rope_type']}; take --to merged")
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", kind == "mistral")
    if windowed and config.sliding_window < config.max_position_embeddings:
        raise UserError(
            f"--to gguf does not write sliding windows, and this {kind} has one of {config.sliding_window}; take "
            "--to merged"
        )
    return vocabulary(result.tokenizer, config.vocab_size)


def write_gguf(
    tensors: Sequence[MergedTensor],
    config: PreTrainedConfig,
    words: Vocabulary,
    result: Result,
    kind: GgufType,
    file: Path,
    progress: Callable[..., None] = lambda *_: None,
) -> None:
    """Matrices in `kind` (q8_0: rows that are no multiple of 32 in f16), vectors in f32; from float32, rounded once."""
    import gguf

    architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    _write_numbers(writer, config, file.stem, kind)
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        result.tokenizer.save_pretrained(folder)
        words.write(writer, Path(folder))
    planned = _planned(tensors, config, architecture)
    types = [_type(tensor.shape, kind) for _, tensor, _ in planned]
    for (name, tensor, _), stored in zip(planned, types, strict=True):
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, stored) if _is_packed(stored) else tensor.shape
        dtype = _numpy_type(stored)
        writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize, stored)
    factors = _rope_factors(config)
    if factors is not None:
        array = factors.numpy()
        writer.add_tensor_info("rope_freqs.weight", array.shape, array.dtype, array.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for at, ((name, tensor, change), stored) in enumerate(zip(planned, types, strict=True), start=1):
        values = change(tensor.read().to(torch.float32))
        if stored == gguf.GGMLQuantizationType.F16:
            checked_finite(values.to(torch.float16), name)
        writer.write_tensor_data(gguf.quants.quantize(checked_finite(values, name).contiguous().numpy(), stored))
        progress(at, len(planned))
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    writer.close()


def num_bytes(tensors: Sequence[MergedTensor], kind: GgufType) -> int:
    """About what the file will take."""
    width = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}[kind]
    return int(sum(math.prod(t.shape) * (width if len(t.shape) > 1 else 4) for t in tensors)) + 2**24


def rope_order(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key matrix (or bias) as llama.cpp turns them: pairs side by side, where Transformers has each
    head's first halves before the second ones.

    >>> rope_order(torch.arange(8.0), num_heads=2).tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _planned(
    tensors: Sequence[MergedTensor], config: PreTrainedConfig, architecture: Any
) -> list[tuple[str, MergedTensor, Callable[[Tensor], Tensor]]]:
    """(name in GGUF, tensor, what is done to it); without an output matrix that is the embedding."""
    import gguf

    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = []
    for tensor in tensors:
        if tensor.model_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(tensor.model_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"GGUF has no name for `{tensor.model_name}`; take --to merged")
        change: Callable[[Tensor], Tensor] = lambda values: values  # noqa: E731
        if architecture == gguf.MODEL_ARCH.LLAMA:  # the others turn as Transformers does
            if ".q_proj." in tensor.model_name:
                change = lambda values: rope_order(values, config.num_attention_heads)  # noqa: E731
            elif ".k_proj." in tensor.model_name:
                change = lambda values: rope_order(values, config.num_key_value_heads)  # noqa: E731
        found.append((name, tensor, change))
    return found


def _write_numbers(writer: Any, config: PreTrainedConfig, name: str, kind: GgufType) -> None:
    import gguf

    heads = config.num_attention_heads
    head_dim = _head_dim(config)
    rope = _rope(config)
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[kind]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    return {"rope_theta": 10_000.0, **(getattr(config, "rope_parameters", None) or {})}


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """What llama.cpp divides the angles' frequencies by, for Llama 3's long contexts; None elsewhere."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dimensions = torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config)
    return (1.0 / rope["rope_theta"] ** dimensions) / scaled


def _type(shape: Sequence[int], kind: GgufType) -> Any:
    import gguf

    if len(shape) == 1 or kind == "f32":
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[kind.upper()]


def _is_packed(stored: Any) -> bool:
    return stored.name not in ("F32", "F16")


def _numpy_type(stored: Any) -> Any:
    import numpy as np

    return np.dtype({"F32": "float32", "F16": "float16"}.get(stored.name, "uint8"))


@contextmanager
def _quiet() -> Iterator[None]:
    """The gguf package says on standard error what it adds."""
    logger = logging.getLogger("gguf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
