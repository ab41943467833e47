"""The weight matrices of a GGUF file, under the file's names, in every type that the gguf package can dequantise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line
from sgm_finetune.model.weights.fused import Cut
from sgm_finetune.model.weights.tensors import Parameter, Rows, assemble

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_EXPERTS = re.compile(r"_exps\.weight$")
_CONVOLUTION = re.compile(r"conv[^.]*\.weight$")


def gguf_tensors(file: Path) -> Iterator[tuple[str, Parameter | None]]:
    """Yields (name, parameter) for every tensor; None unless it is a weight matrix or a stack of experts.

    It reads only the header. Raises UserError when the gguf package is missing or cannot dequantise a type; ValueError,
    KeyError, IndexError or OSError for a damaged file.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import quant_shape_from_byte_shape
    except ImportError:
        raise UserError(f"{file} is a GGUF file, which needs the package gguf; {install_line('gguf')}") from None

    class Bounded(GGUFReader):
        """Refuses counts beyond the end of the file; gguf would follow those of a damaged file without end."""

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *order: Any, **options: Any) -> Any:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends before its header says")
            return super()._get(offset, dtype, count, *order, **options)

    reader = Bounded(file)
    if reader.byte_order != "I":
        raise UserError(f"{file} has the other byte order; convert it, or use the .safetensors model")
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        stored = tuple(int(size) for size in tensor.data.shape)
        shape = stored if kind.name in _FLOATS and kind.name != "BF16" else None
        if tensor.data.dtype == np.uint8:
            shape = tuple(int(size) for size in quant_shape_from_byte_shape(stored, kind))
        if shape is None or not _is_matrix(tensor.name, len(shape)):
            yield tensor.name, None
            continue
        if kind.name not in _FLOATS:
            _refuse_unknown(file, tensor.name, kind)
        rows, cols = shape[-2:]
        raw = partial(_mapped, file, tensor.data.dtype, tensor.data_offset, stored)
        if dtype := _FLOATS.get(kind.name):
            read = partial(_read_float, raw, kind.name)
        else:
            read = partial(_read_packed, raw, kind, (rows, cols))
        num_experts = shape[0] if len(shape) == 3 else None
        yield tensor.name, Parameter(tensor.name, file, dtype or kind.name, (rows, cols), num_experts, read)


def _is_matrix(name: str, num_dimensions: int) -> bool:
    if num_dimensions == 3:
        return bool(_EXPERTS.search(name))
    return num_dimensions == 2 and name.endswith(".weight") and not _CONVOLUTION.search(name)


def _refuse_unknown(file: Path, name: str, kind) -> None:
    """Raises UserError for a type that gguf knows but cannot dequantise."""
    from gguf import GGML_QUANT_SIZES, quants

    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise UserError(
            f"{name} in {file} is stored as {kind.name}, which the installed gguf package cannot dequantise; "
            "use another quantisation of the model"
        ) from None


def _mapped(file: Path, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor's bytes in the file, mapped. Nobody writes to them; copy-on-write only avoids torch's warning."""
    return np.memmap(file, dtype=dtype, mode="c", offset=offset, shape=shape)


def _read_float(raw, kind: str, expert: int | None, cut: Cut | None) -> Tensor:
    """The matrix as stored; NumPy sees bfloat16 as bytes."""
    matrix = torch.from_numpy(raw() if expert is None else raw()[expert])
    if kind == "BF16":
        matrix = matrix.view(torch.bfloat16)
    return matrix if cut is None else cut.of(matrix)


def _read_packed(raw, kind, shape: tuple[int, int], expert: int | None, cut: Cut | None) -> Tensor:
    """The matrix in float32, from blocks along each row (rows, bytes), a few rows at a time."""
    from gguf import quants

    packed = raw() if expert is None else raw()[expert]
    rows: Rows = lambda start, stop: torch.from_numpy(quants.dequantize(packed[start:stop], kind))  # noqa: E731
    return assemble(shape, rows, cut)
