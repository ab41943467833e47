"""How a rank pool begins: which layers own which of its directions (docs/method.md section 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def owners(num_layers: int, rank: int) -> list[list[int]]:
    """The layers that begin with each of the `rank` directions of a pool.

    With more directions than layers, each layer owns some directions of its own, one more or less than the others. With
    fewer, neighbours share one.

    >>> owners(2, 5), owners(5, 2)
    ([[0], [0], [0], [1], [1]], [[0, 1, 2], [3, 4]])
    """
    if rank >= num_layers:
        return [[direction * num_layers // rank] for direction in range(rank)]
    found: list[list[int]] = [[] for _ in range(rank)]
    for layer in range(num_layers):
        found[layer * rank // num_layers].append(layer)
    return found


def first_codes(num_layers: int, rank: int) -> Tensor:
    """The codes (layers x rank) with which a pool begins: 1 for the owners of a direction, 0 for the others.

    >>> first_codes(3, 2).tolist()
    [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """
    codes = torch.zeros(num_layers, rank)
    for direction, layers in enumerate(owners(num_layers, rank)):
        codes[layers, direction] = 1.0
    return codes
