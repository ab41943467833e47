"""What weight files hold: tensors, and the weight matrices made of them. Neither is read before it is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgm_finetune.model.weights.fused import Cut

FLOATS = ("float64", "float32", "float16", "bfloat16")
CHUNK = 2**22
"""Number of elements that are dequantised at a time."""

Rows = Callable[[int, int], Tensor]
"""(start, stop) -> these rows of a matrix, in float32."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file, not yet read."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """In torch's words, such as `float32`."""
    read: Callable[[int | None], Tensor]
    """Index of the first dimension -> that part of the tensor; None -> the whole tensor."""
    memory: Any = None
    """Equal for tensors that share their memory (torch checkpoints only)."""

    @property
    def is_float(self) -> bool:
        """Whether its values are plain floats."""
        return self.dtype in FLOATS

    def get(self) -> Tensor:
        """The whole tensor."""
        return self.read(None)


@dataclass(frozen=True)
class Parameter:
    """A weight matrix of the model, or a stack with one matrix per expert."""

    name: str
    file: Path
    dtype: str
    """In torch's words, or the quantised format: nf4, gptq-4bit ..."""
    shape: tuple[int, int]
    """(rows, columns); for a stack, of one expert."""
    num_experts: int | None
    """None when it is not a stack."""
    read: Callable[[int | None, Cut | None], Tensor]
    """(expert, part) -> matrix on the CPU."""
    transposed: bool = False
    """Whether the file is known to hold the transpose of the model's matrix."""


def assemble(shape: tuple[int, int], rows: Rows, cut: Cut | None) -> Tensor:
    """The matrix, or the part of it that `cut` names, in float32, built from a few rows at a time."""
    result = torch.empty(shape if cut is None else cut.shape(shape))
    step, done = max(1, CHUNK // max(shape[1], 1)), 0
    for begin, end in [(0, shape[0])] if cut is None else cut.row_ranges(shape[0]):
        for start in range(begin, end, step):
            chunk = rows(start, min(start + step, end))
            result[done : done + len(chunk)] = chunk if cut is None or cut.axis == 0 else cut.of(chunk)
            done += len(chunk)
    return result


def parameter_of_rows(
    tensor: StoredTensor,
    dtype: str,
    shape: tuple[int, int],
    prepare: Callable[[int | None], Rows],
    num_experts: int | None = None,
    name: str | None = None,
    transposed: bool = False,
) -> Parameter:
    """The parameter stored in `tensor`, with float32 rows from `prepare(expert)`."""

    def read(expert: int | None, cut: Cut | None) -> Tensor:
        return assemble(shape, prepare(expert), cut)

    return Parameter(name or tensor.name, tensor.file, dtype, shape, num_experts, read, transposed)


def plain(tensor: StoredTensor) -> Parameter:
    """The parameter that a float tensor holds: a matrix (rows, cols) or a stack of them (experts, rows, cols)."""

    def read(expert: int | None, cut: Cut | None) -> Tensor:
        matrix = tensor.read(expert)
        return matrix if cut is None else cut.of(matrix)

    rows, cols = tensor.shape[-2:]
    num_experts = tensor.shape[0] if len(tensor.shape) == 3 else None
    return Parameter(tensor.name, tensor.file, tensor.dtype, (rows, cols), num_experts, read)
