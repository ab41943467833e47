"""The weight matrices of a loaded model that an adapter can change."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D

from sgm_finetune.base.errors import UserError
from sgm_finetune.model.names import block_of, weight_conversions


@dataclass(frozen=True)
class Matrix:
    """A weight that an adapter can change: a linear layer's, or a stack with one matrix per expert."""

    module: nn.Module
    shape: tuple[int, int]
    """(d_out, d_in); for a stack, of one expert."""
    num_experts: int | None = None
    """None for a linear layer."""
    parameter: str = "weight"
    """Name of the weight in `module`."""

    @property
    def transposed(self) -> bool:
        """Whether each expert's matrix is stored as d_in x d_out."""
        return bool(getattr(self.module, "is_transposed", False))


def adaptable(model: nn.Module, names: Collection[str] | None = None) -> dict[str, Matrix]:
    """Name -> weight, in `named_modules()` order: `names`, or all inside numbered layers (no heads, no embeddings).

    A linear layer has the name of its module, a stack of experts that of its parameter:
    `model.layers.0.mlp.experts.down_proj`. Raises UserError when a name is not such a weight, and when a model without
    `names` has none.
    """
    beyond = set(out_of_reach(model))
    found = {name: matrix for name, matrix in _all_matrices(model).items() if name not in beyond}
    if names is None:
        inside = {name: matrix for name, matrix in found.items() if block_of(name) is not None}
        if not inside:
            raise UserError(
                f"{type(model).__name__} has no linear layers inside numbered blocks; nothing can be adapted"
            )
        return inside
    missing = [name for name in names if name not in found]
    if missing:
        kinds = sorted({name.rpartition(".")[2] for name in found})
        raise UserError(f"No linear layer is called `{missing[0]}`; this {type(model).__name__} has {', '.join(kinds)}")
    wanted = set(names)
    return {name: matrix for name, matrix in found.items() if name in wanted}


def _all_matrices(model: nn.Module) -> dict[str, Matrix]:
    return {
        name: matrix
        for module_name, module in model.named_modules()
        for name, matrix in _matrices_of(module_name, module)
        if name
    }


def _matrices_of(name: str, module: nn.Module) -> Iterator[tuple[str, Matrix]]:
    if isinstance(module, nn.Linear | Conv1D):
        shape = matrix_shape(module)
        if min(shape) > 1:  # a single row or column has no spectrum
            yield name, Matrix(module, shape)
    elif isinstance(getattr(module, "num_experts", None), int):
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.is_floating_point():
                num_experts, rows, cols = parameter.shape
                shape = (cols, rows) if getattr(module, "is_transposed", False) else (rows, cols)
                yield f"{name}.{leaf}", Matrix(module, shape, num_experts, leaf)


def out_of_reach(model: nn.Module) -> list[str]:
    """Names of linear layers beside experts that PEFT cannot adapt.

    PEFT takes a target such as `...shared_expert.gate_proj` for the name under which the files store the experts, and
    adapts the experts instead.
    """
    stored_leaves = set()
    for conversion in weight_conversions(model):
        if isinstance(conversion, WeightConverter):
            for pattern in conversion.source_patterns:
                if ".experts.*." in f".{pattern}":
                    stored_leaves.add(pattern.removesuffix(".weight").rpartition(".")[2])
    stored_leaves.discard("")
    if not stored_leaves:
        return []
    return [
        name for name in _all_matrices(model) if name.rpartition(".")[2] in stored_leaves and ".experts." not in name
    ]


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, also of a packed 4-bit one and of Transformers' Conv1D, whose weight is
    transposed."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features
