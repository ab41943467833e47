"""Which layers share a factor: groups from a matrix of similarities (docs/method.md section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import linkage, to_tree
from scipy.spatial.distance import squareform

_NEVER = 1e6  # a distance that no threshold accepts


def group_layers(
    similarity: np.ndarray,
    threshold: float,
    snr_db: Sequence[float],
    snr_tolerance_db: float | None,
    max_group_size: int | None,
    accept: Callable[[list[int]], bool] = lambda members: True,
) -> list[list[int]]:
    """Returns a partition of the layers 0..n-1: sorted groups, in the order of their first members.

    Complete linkage on 1 - similarity (n x n): within a group *every* pair has a similarity of at least `threshold`,
    and SNRs at most `snr_tolerance_db` apart (None: any distance). From the top of the dendrogram down, a node becomes
    a group if its pairs allow it, if it holds at most `max_group_size` layers, and if `accept(members)` (the joint
    test) is true. Otherwise its two branches are tried. A layer that fits nowhere stays alone.

    >>> group_layers(np.array([[1, .9, .1], [.9, 1, .2], [.1, .2, 1]]), 0.8, [0, 0, 0], None, None)
    [[0, 1], [2]]
    """
    num_layers = len(similarity)
    if num_layers < 2:
        return [[i] for i in range(num_layers)]
    distance = 1.0 - np.asarray(similarity, dtype=np.float64)
    if snr_tolerance_db is not None:
        levels = np.asarray(snr_db, dtype=np.float64)
        distance = np.where(np.abs(levels[:, None] - levels[None, :]) > snr_tolerance_db, _NEVER, distance)
    distance = np.maximum(distance, 0.0)
    np.fill_diagonal(distance, 0.0)
    root: Any = to_tree(linkage(squareform(distance, checks=False), method="complete"))
    limit = 1.0 - threshold + 1e-12

    def cut(node: Any) -> list[list[int]]:
        members = sorted(node.pre_order())
        small_enough = max_group_size is None or len(members) <= max_group_size
        if node.is_leaf() or (node.dist <= limit and small_enough and accept(members)):
            return [members]
        return cut(node.get_left()) + cut(node.get_right())

    return sorted(cut(root))
