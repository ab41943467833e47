"""A rank pool: the layers of a group share both factors, and each weights their directions by codes of its own.

ΔW_l = s·B·diag(c_l)·A (docs/method.md section 4, eq. 15b). PEFT's layer of each member holds the shared lora_A, and a
lora_B whose weight is the shared B times the member's codes, by `torch.nn.utils.parametrize`: to whatever reads or
merges it, it is a plain LoRA layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

ADAPTER = "default"
"""PEFT's name of our adapter."""
_SHARED, _CODES = "parametrizations.weight.original", "parametrizations.weight.0.codes"


class Codes(nn.Module):
    """Weights the r columns of a factor B (d_out x r) by the codes (1 x r, since PEFT warns of a single dimension)."""

    def __init__(self, codes: Tensor):
        super().__init__()
        self.codes = nn.Parameter(codes)

    def forward(self, b: Tensor) -> Tensor:
        return b * self.codes


def make_pool(layers: Sequence[Any], codes: Tensor) -> None:
    """Makes LoRA layers of equal shape the members of one pool; `codes` (members x r) are theirs.

    The factors of the first are shared.
    """
    first = layers[0]
    for layer, own in zip(layers, codes.split(1), strict=True):
        layer.lora_A[ADAPTER].weight = first.lora_A[ADAPTER].weight
        b = layer.lora_B[ADAPTER]
        parametrize.register_parametrization(b, "weight", Codes(own.to(b.weight)), unsafe=True)
        b.parametrizations.weight.original = first.lora_B[ADAPTER].parametrizations.weight.original


def codes_of(b: nn.Module) -> nn.Parameter | None:
    """The codes of a lora_B; None outside of pools."""
    if not parametrize.is_parametrized(b, "weight"):
        return None
    return b.parametrizations.weight[0].codes  # type: ignore[index, union-attr]


def shared_b(b: nn.Module) -> nn.Parameter:
    """The parameter of a lora_B: in a pool, the one that all members share."""
    return b.weight if codes_of(b) is None else b.parametrizations.weight.original  # type: ignore


def direction_strengths(a: Tensor, b: Tensor, codes: Tensor) -> Tensor:
    """|c_lj|·|a_j|·|b_j| (members x r, float64): how much each member of a pool uses each direction.

    `a` (r x d_in) and `b` (d_out x r) are the pool's factors and `codes` (members x r) its members'. It is the norm of
    the direction's part of ΔW_l, over the s that all members share. It does not depend on how that part is divided
    between a_j, b_j and c_lj.

    >>> a, b = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    >>> direction_strengths(a, b, torch.tensor([[1.0, 0.5], [-2.0, 0.0]])).tolist()
    [[5.0, 1.0], [10.0, 0.0]]
    """
    sizes = torch.linalg.vector_norm(a.double(), dim=1) * torch.linalg.vector_norm(b.double(), dim=0)
    return codes.double().abs() * sizes


def layers_per_direction(strengths: Tensor) -> float:
    """The number of layers that use a direction, from `strengths` (members x r): the mean over the directions of the
    participation ratio (Σ_l s_lj)²/Σ_l s_lj².

    1: every direction serves one layer. The number of members: all of them use each direction alike. Directions that
    no layer uses do not count; 0 if there is no other.

    >>> layers_per_direction(torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
    1.5
    """
    used = strengths[:, strengths.any(0)].double()
    ratios = used.sum(0).square() / used.square().sum(0)
    return float(ratios.mean()) if len(ratios) else 0.0


def plain_factors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter under the names of plain LoRA: B·diag(c_l) is written for each member of a pool."""
    plain = {}
    for name, tensor in state.items():
        if name.endswith(_SHARED):
            stem = name.removesuffix(_SHARED)
            plain[f"{stem}weight"] = tensor * state[stem + _CODES]
        elif not name.endswith(_CODES):
            plain[name] = tensor
    return plain
