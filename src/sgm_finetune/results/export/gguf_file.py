"""Writes a merged decoder as one GGUF file, tensor by tensor, with the gguf package."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from sgm_finetune.base.config import DECODER_TASKS
from sgm_finetune.base.errors import UserError
from sgm_finetune.results.export.answer_check import result_stops
from sgm_finetune.results.export.gguf_architecture import (
    CLASSIFIERS,
    architecture_of,
    check_architecture,
    rotary_factors,
    write_hyperparameters,
)
from sgm_finetune.results.export.gguf_vocabulary import Vocabulary, read_vocabulary, read_word_pieces
from sgm_finetune.results.export.merge import MergedTensor, checked_finite
from sgm_finetune.results.export.target import K_QUANTS, ExportFormat, GgufType
from sgm_finetune.results.load import Result

STORED_IN: dict[GgufType, str] = {
    "f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0", **{kind: kind for kind in K_QUANTS},
}  # fmt: skip
"""Option --gguf-type -> key of check.TOLERANCES."""
_FILE_TYPES: dict[GgufType, str] = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_EXACT = ("ffn_gate_inp", "position_embd", "token_types")
"""Small matrices that decide much, such as a router, or that llama.cpp adds to others: in f32 always."""


def check_exportable(result: Result, config: PreTrainedConfig, to: ExportFormat) -> Vocabulary:
    """Returns the tokenizer as GGUF stores it. Raises UserError for a result that SGM cannot write as GGUF."""
    instead = "--to adapter" if to == "gguf-adapter" else "--to merged"
    task = result.config.model.task
    is_classifier = task == "sequence-classification" and to == "gguf"
    if task not in DECODER_TASKS and not (is_classifier and config.model_type in CLASSIFIERS):
        also = f", or of {', '.join(CLASSIFIERS)} classifiers of texts" if is_classifier else ""
        raise UserError(f"--to {to} needs model.task=causal-lm{also}, and this is {task}; take {instead}")
    check_architecture(config, to, instead, is_classifier)
    if is_classifier:
        return read_word_pieces(result.tokenizer, config.vocab_size)
    return read_vocabulary(result.tokenizer, config.vocab_size, result_stops(result, config))


@dataclass(frozen=True)
class _PlannedTensor:
    """One tensor of the GGUF file."""

    source: MergedTensor
    stored: Any
    """gguf.GGMLQuantizationType."""

    def add_info(self, writer: Any) -> None:
        """Announces name, shape and type, as the file's header lists them."""
        import gguf

        is_packed = self.stored.name not in ("F32", "F16")
        shape = gguf.quant_shape_to_byte_shape(self.source.shape, self.stored) if is_packed else self.source.shape
        dtype = np.dtype({"F32": "float32", "F16": "float16"}.get(self.stored.name, "uint8"))
        writer.add_tensor_info(self.source.name, shape, dtype, math.prod(shape) * dtype.itemsize, self.stored)

    def write(self, writer: Any) -> None:
        """Reads the tensor and writes it, rounded once from float32. Raises UserError when a number is not finite."""
        import gguf

        values = self.source.read().to(torch.float32)
        if self.stored == gguf.GGMLQuantizationType.F16:
            checked_finite(values.to(torch.float16), self.source.name)
        numbers = checked_finite(values, self.source.name).contiguous().numpy()
        writer.write_tensor_data(gguf.quants.quantize(numbers, self.stored))


def write_gguf(
    tensors: Sequence[MergedTensor],
    config: PreTrainedConfig,
    vocabulary: Vocabulary,
    kind: GgufType,
    file: Path,
    progress: Callable[..., None] = lambda *_: None,
) -> None:
    """Writes what `gguf_tensors` returns: matrices in `kind` (q8_0: f16 where the row length is no multiple of 32), and
    in f32 vectors and a few small matrices."""
    import gguf

    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture_of(config)])
    writer.add_name(file.stem)
    write_hyperparameters(writer, config)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[kind]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    with quiet():
        vocabulary.write(writer)
    planned = [_PlannedTensor(tensor, _stored_type(tensor, kind)) for tensor in tensors]
    for tensor in planned:
        tensor.add_info(writer)
    factors = {name: factor.numpy() for name, factor in rotary_factors(config).items()}
    for name, array in factors.items():
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, tensor in enumerate(planned, start=1):
        tensor.write(writer)
        progress(done, len(planned))
    for array in factors.values():
        writer.write_tensor_data(array)
    writer.close()


def num_bytes(tensors: Sequence[MergedTensor], kind: GgufType) -> int:
    """Returns the approximate bytes on the disk while the file is written: a k-quant is made from a file in f16."""
    widths = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q6_k": 0.82, "q5_k_m": 0.71, "q4_k_m": 0.6}
    width = widths[kind] + (2.0 if kind in K_QUANTS else 0.0)
    return int(sum(math.prod(t.shape) * (width if len(t.shape) > 1 else 4) for t in tensors)) + 2**24


def _stored_type(tensor: MergedTensor, kind: GgufType) -> Any:
    import gguf

    if len(tensor.shape) == 1 or kind == "f32" or any(part in tensor.name for part in _EXACT):
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and tensor.shape[-1] % 32:
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
