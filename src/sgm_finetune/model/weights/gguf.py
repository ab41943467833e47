"""The weight matrices of a GGUF file, under the file's names, in every type that the gguf package can dequantise."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line
from sgm_finetune.base.untrusted import MAX_DEPTH
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
        from gguf import GGUFReader, GGUFValueType
        from gguf.quants import quant_shape_from_byte_shape
    except ImportError:
        raise UserError(f"{file} is a GGUF file, which needs the package gguf; {install_line('gguf')}") from None

    class Bounded(GGUFReader):
        """Refuses counts beyond the end of the file; gguf would follow those of a damaged file without end.

        It steps over lists, such as the vocabulary: gguf makes two arrays for each of 500,000 texts, 1.1 GB.
        """

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *order: Any, **options: Any) -> Any:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends before its header says")
            self.data: Any = self.data.view(np.ndarray)  # each slice of a memmap takes ten times as long
            return super()._get(offset, dtype, count, *order, **options)

        def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            widths = {kind.value: np.dtype(dtype).itemsize for kind, dtype in self.gguf_scalar_to_np.items()}
            return _list_end(memoryview(self.data), int(orig_offs), widths) - orig_offs, [], [], [GGUFValueType.ARRAY]

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


_STRING, _LIST = 8, 9  # types of values in GGUF


def _list_end(data: memoryview, offset: int, widths: Mapping[int, int], depth: int = 0) -> int:
    """Where the list ends that begins at `offset`. Raises ValueError when it has an unknown type or leaves the file."""
    kind, count = _unpack("<IQ", data, offset)
    offset += 12
    if kind in widths:
        return _inside(data, offset + count * widths[kind])
    if kind not in (_STRING, _LIST) or depth > MAX_DEPTH:
        raise ValueError(f"it holds a list of the unknown type {kind}")
    for _ in range(count):
        if kind == _STRING:
            (size,) = _unpack("<Q", data, offset)
            offset = _inside(data, offset + 8 + size)
        else:
            offset = _list_end(data, offset, widths, depth + 1)
    return offset


def _unpack(layout: str, data: memoryview, offset: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, data, offset)
    except struct.error:
        raise ValueError("it ends before its header says") from None


def _inside(data: memoryview, offset: int) -> int:
    if offset > len(data):
        raise ValueError("it ends before its header says")
    return offset


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
