"""Weights that are 8-bit or 4-bit values times a scale, or times a grid of scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sgm_finetune.model.weights.companions import Companions, float_scales
from sgm_finetune.model.weights.tensors import Parameter, Rows, StoredTensor, parameter_of_rows


def scaled(tensor: StoredTensor, companions: Companions) -> Parameter | None:
    """fp8 and compressed-tensors' int8: values times one scale for all, per row, per column, or per block.

    A block is a rectangle of rows and columns; the scales have the shape (rows of blocks, columns of blocks). Both
    names, `weight_scale` and `weight_scale_inv`, hold factors that multiply. E8M0 scales are powers of two, stored as
    their exponents. The format includes stacks of experts (experts, rows, cols).
    """
    is_fp8 = tensor.dtype in ("float8_e4m3fn", "float8_e5m2")
    if len(tensor.shape) not in (2, 3) or not (is_fp8 or tensor.dtype == "int8"):
        return None
    stored = companions.find(f"{tensor.name}_scale_inv") or companions.find(f"{tensor.name}_scale")
    if stored is None:
        if is_fp8 and companions.settings:
            raise companions.misfit(f"{tensor.name}_scale is missing")
        if not is_fp8:
            return None
    rows, cols = tensor.shape[-2:]
    num_experts = tensor.shape[0] if len(tensor.shape) == 3 else None
    grid = _grid(stored.shape if stored else (), (rows, cols), num_experts, companions)
    zero = companions.find(f"{tensor.name}_zero_point", stored.shape) if stored else None

    def prepare(expert: int | None) -> Rows:
        values = tensor.read(expert)
        scale = float_scales(stored.get()) if stored else torch.ones(1)
        shift = zero.get().float() if zero else torch.zeros_like(scale)
        if expert is not None and scale.numel() > 1:
            scale, shift = scale[expert], shift[expert]
        scale, shift = scale.view(grid.shape), shift.view(grid.shape)
        columns = torch.arange(cols) // grid.block[1]

        def chunk(start: int, stop: int) -> Tensor:
            line = torch.arange(start, stop) // grid.block[0]
            wide = values[start:stop].float()
            if zero is not None:
                wide -= shift[line][:, columns] if grid.shape[1] > 1 else shift[line]
            return wide.mul_(scale[line][:, columns] if grid.shape[1] > 1 else scale[line])

        return chunk

    return parameter_of_rows(tensor, "fp8" if is_fp8 else "int8", (rows, cols), prepare, num_experts)


@dataclass(frozen=True)
class _Grid:
    shape: tuple[int, int]
    """Number of scales along the rows and along the columns."""
    block: tuple[int, int]
    """Number of rows and of columns that share a scale."""


def _grid(scale: tuple[int, ...], shape: tuple[int, int], num_experts: int | None, companions: Companions) -> _Grid:
    """The grid of scales of a matrix. Raises UserError when scales of the shape `scale` do not fit the matrix."""
    counts = scale
    if num_experts is not None and scale and scale[0] == num_experts:
        counts = scale[1:]
    if all(size == 1 for size in counts):
        return _Grid((1, 1), shape)
    counts = counts if len(counts) == 2 else (*counts, 1)
    block = [
        _block(count, size, wanted) for count, size, wanted in zip(counts, shape, _block_size(companions), strict=False)
    ]
    if len(counts) != 2 or 0 in block or (num_experts is not None and scale[0] != num_experts):
        raise companions.misfit(f"scales of shape {list(scale)} do not fit a matrix of {shape[0]} x {shape[1]}")
    return _Grid((counts[0], counts[1]), (block[0], block[1]))


def _block(count: int, size: int, wanted: int) -> int:
    """How many of `size` rows share one of `count` scales: `wanted` if that fits (the last block may be smaller).

    0 when no number fits.
    """
    if count > 1 and wanted and -(-size // wanted) == count:
        return wanted
    return size // count if count and size % count == 0 else 0


def _block_size(companions: Companions) -> tuple[int, int]:
    """Rows and columns of a block, from config.json; the default is 128 x 128 for fp8 and (0, 0) for integers."""
    groups = companions.settings.get("config_groups")
    structures = [
        (group.get("weights") or {}).get("block_structure")
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping)
    ]
    for size in (companions.settings.get("weight_block_size"), *structures):
        if isinstance(size, list) and len(size) == 2:
            return int(size[0]), int(size[1])
    return (0, 0) if companions.tensor.dtype == "int8" else (128, 128)


_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def mxfp4(tensor: StoredTensor, companions: Companions) -> Parameter | None:
    """gpt-oss' experts: blocks (experts, o, g, 16), two E2M1 floats per byte, times 2^(scale - 127).

    The low bits of a byte come first; scales have the shape (experts, o, g). The matrix is listed as stored, (o, i);
    the model holds the transpose.
    """
    if not tensor.name.endswith("_blocks") or tensor.dtype != "uint8" or len(tensor.shape) != 4:
        return None
    base = tensor.name.removesuffix("_blocks")
    num_experts, o, g, width = tensor.shape
    scales = companions.need(f"{base}_scales", (num_experts, o, g))

    def prepare(expert: int | None) -> Rows:
        blocks, exponents, table = tensor.read(expert), scales.read(expert), torch.tensor(_FP4_VALUES)

        def chunk(start: int, stop: int) -> Tensor:
            packed = blocks[start:stop]
            values = table[torch.stack((packed & 15, packed >> 4), -1).int()]
            return values.flatten(2).mul_(float_scales(exponents[start:stop]).unsqueeze(-1)).flatten(1)

        return chunk

    return parameter_of_rows(tensor, "mxfp4", (o, 2 * g * width), prepare, num_experts, base, transposed=True)
