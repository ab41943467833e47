"""Writes a merged decoder as one GGUF file, tensor by tensor, with the gguf package."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from sgm_finetune.base.config import DECODER_TASKS
from sgm_finetune.base.errors import UserError
from sgm_finetune.results.export.answer_check import result_stops
from sgm_finetune.results.export.gguf_vocabulary import Vocabulary, read_vocabulary
from sgm_finetune.results.export.merge import MergedTensor, checked_finite
from sgm_finetune.results.export.target import K_QUANTS, ExportFormat, GgufType
from sgm_finetune.results.load import Result

STORED_IN: dict[GgufType, str] = {
    "f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0", **{kind: kind for kind in K_QUANTS},
}  # fmt: skip
"""Option --gguf-type -> key of check.TOLERANCES."""
_FILE_TYPES: dict[GgufType, str] = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""model_type of config.json -> the gguf package's name."""


def check_exportable(result: Result, config: PreTrainedConfig, to: ExportFormat) -> Vocabulary:
    """Returns the tokenizer as GGUF stores it. Raises UserError for a result that SGM cannot write as GGUF."""
    instead = "--to adapter" if to == "gguf-adapter" else "--to merged"
    if result.config.model.task not in DECODER_TASKS:
        raise UserError(f"--to {to} needs model.task=causal-lm, and this is {result.config.model.task}; take {instead}")
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"--to {to} supports {', '.join(ARCHITECTURES)}, and this base is a {kind}; take {instead}, and "
            "llama.cpp's own converter"
        )
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise UserError(f"--to {to} does not support rope_type {rope['rope_type']}; take {instead}")
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", kind == "mistral")
    if windowed and config.sliding_window < config.max_position_embeddings:
        raise UserError(
            f"--to {to} does not support sliding windows, and this {kind} has one of {config.sliding_window} tokens; "
            f"take {instead}"
        )
    return read_vocabulary(result.tokenizer, config.vocab_size, result_stops(result, config))


@dataclass(frozen=True)
class _PlannedTensor:
    """One tensor of the GGUF file."""

    name: str
    """In GGUF."""
    source: MergedTensor
    reorder: Callable[[Tensor], Tensor]
    stored: Any
    """gguf.GGMLQuantizationType."""

    def add_info(self, writer: Any) -> None:
        """Announces name, shape and type, as the file's header lists them."""
        import gguf

        is_packed = self.stored.name not in ("F32", "F16")
        shape = gguf.quant_shape_to_byte_shape(self.source.shape, self.stored) if is_packed else self.source.shape
        dtype = np.dtype({"F32": "float32", "F16": "float16"}.get(self.stored.name, "uint8"))
        writer.add_tensor_info(self.name, shape, dtype, math.prod(shape) * dtype.itemsize, self.stored)

    def write(self, writer: Any) -> None:
        """Reads the tensor and writes it, rounded once from float32. Raises UserError when a number is not finite."""
        import gguf

        values = self.reorder(self.source.read().to(torch.float32))
        if self.stored == gguf.GGMLQuantizationType.F16:
            checked_finite(values.to(torch.float16), self.name)
        numbers = checked_finite(values, self.name).contiguous().numpy()
        writer.write_tensor_data(gguf.quants.quantize(numbers, self.stored))


def write_gguf(
    tensors: Sequence[MergedTensor],
    config: PreTrainedConfig,
    vocabulary: Vocabulary,
    kind: GgufType,
    file: Path,
    progress: Callable[..., None] = lambda *_: None,
) -> None:
    """Writes matrices in `kind` (q8_0: f16 where the row length is no multiple of 32) and vectors in f32."""
    import gguf

    architecture = architecture_of(config)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    _write_hyperparameters(writer, config, file.stem, kind)
    with quiet():
        vocabulary.write(writer)
    planned = _plan_tensors(tensors, config, kind)
    for tensor in planned:
        tensor.add_info(writer)
    factors = _rope_factors(config)
    if factors is not None:
        array = factors.numpy()
        writer.add_tensor_info("rope_freqs.weight", array.shape, array.dtype, array.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, tensor in enumerate(planned, start=1):
        tensor.write(writer)
        progress(done, len(planned))
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    writer.close()


def num_bytes(tensors: Sequence[MergedTensor], kind: GgufType) -> int:
    """Returns the approximate bytes on the disk while the file is written: a k-quant is made from a file in f16."""
    widths = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q6_k": 0.82, "q5_k_m": 0.71, "q4_k_m": 0.6}
    width = widths[kind] + (2.0 if kind in K_QUANTS else 0.0)
    return int(sum(math.prod(t.shape) * (width if len(t.shape) > 1 else 4) for t in tensors)) + 2**24


def rope_order(weight: Tensor, num_heads: int) -> Tensor:
    """Returns the rows of a query or key matrix (or bias) in llama.cpp's order for rotary positions.

    llama.cpp has the two rows of a rotated pair side by side. Transformers has the first rows of all pairs of a head
    before their second rows.

    >>> rope_order(torch.arange(8.0), num_heads=2).tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _plan_tensors(tensors: Sequence[MergedTensor], config: PreTrainedConfig, kind: GgufType) -> list[_PlannedTensor]:
    """Returns the file's tensors. A tied output matrix is left out: GGUF reads the embedding in its place."""
    name_of = tensor_names(config)
    return [
        _PlannedTensor(
            name_of(tensor.model_name), tensor, reordering(tensor.model_name, config), _stored_type(tensor.shape, kind)
        )
        for tensor in tensors
        if not (tensor.model_name == "lm_head.weight" and config.tie_word_embeddings)
    ]


def architecture_of(config: PreTrainedConfig) -> Any:
    """Returns the gguf.MODEL_ARCH of a supported base."""
    import gguf

    return getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])


def tensor_names(config: PreTrainedConfig) -> Callable[[str], str]:
    """Returns a function from a parameter's name in the model to its name in GGUF, which raises UserError where there
    is none."""
    import gguf

    names = gguf.get_tensor_name_map(architecture_of(config), config.num_hidden_layers)

    def name_of(parameter: str) -> str:
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"GGUF has no name for `{parameter}`; take --to merged")
        return name

    return name_of


def reordering(parameter: str, config: PreTrainedConfig) -> Callable[[Tensor], Tensor]:
    """Returns the function that puts the rows of a parameter into llama.cpp's order."""
    if ARCHITECTURES[config.model_type] != "LLAMA":  # llama.cpp rotates the others as Transformers does
        return _unchanged
    if ".q_proj." in parameter:
        return partial(rope_order, num_heads=config.num_attention_heads)
    if ".k_proj." in parameter:
        return partial(rope_order, num_heads=config.num_key_value_heads)
    return _unchanged


def _unchanged(values: Tensor) -> Tensor:
    return values


def _write_hyperparameters(writer: Any, config: PreTrainedConfig, name: str, kind: GgufType) -> None:
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
    """Returns the divisors of the rotary frequencies for Llama 3's long contexts; None for other position types."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dimensions = torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config)
    return (1.0 / rope["rope_theta"] ** dimensions) / scaled


def _stored_type(shape: Sequence[int], kind: GgufType) -> Any:
    import gguf

    if len(shape) == 1 or kind == "f32":
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[kind.upper()]


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the gguf package, which logs what it adds on standard error."""
    logger = logging.getLogger("gguf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
