"""How well the gradients of several matrices agree (docs/method.md sections 3.1 and 3.2).

Every number is held out: a basis is fitted to the sketch of one half of the batches and evaluated on the other half.
Each number is the mean of both directions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sgm_finetune.method.plan import MatrixNumbers
from sgm_finetune.method.pools import owners
from sgm_finetune.method.sides import SIDES, Side
from sgm_finetune.method.subspace import (
    Sketch,
    cosines_of,
    energy_kept,
    equalise_channels,
    leading_parts,
    reconstruct_all,
    retention_of_pairs,
    shared_basis,
)

TensorHalves = tuple[Tensor, Tensor]
"""Tensors of one matrix and side, from the first and the second half of the batches."""


@dataclass(frozen=True)
class SideAgreement:
    """How well n matrices of equal width on one side can share a basis of `rank` directions there."""

    rank: int
    sketches: list[TensorHalves]
    """Of each matrix: its two sketches (k x d) with equally loud channels (eq. 11b), float64."""
    rows: list[TensorHalves]
    """Of each matrix: the `leading_rows` (rank x d) of its two sketches, float64."""
    kept_own: list[float]
    """Of each matrix: the share of held-out energy that its own basis keeps (eq. 11)."""
    retention: np.ndarray
    """(n x n), float64: `pairwise_retention` (eq. 14)."""

    def kept_shared(self, indices: Sequence[int]) -> list[float]:
        """Share of held-out energy that one basis for all of `indices` keeps of each of them (eq. 11, 12)."""
        kept = [0.0] * len(indices)
        for fit, held_out in ((0, 1), (1, 0)):
            shared = shared_basis([self.rows[i][fit] for i in indices], self.rank)
            for position, i in enumerate(indices):
                kept[position] += energy_kept(shared, self.sketches[i][held_out]) / 2
        return kept

    def relative_to_own(self, kept: Sequence[float], indices: Sequence[int]) -> list[float]:
        """Each share in `kept`, of the matrix at the same place in `indices`, over what its own basis keeps."""
        return [share / max(self.kept_own[i], 1e-12) for share, i in zip(kept, indices, strict=True)]

    def retention_of_all(self) -> list[float]:
        """What one basis for all matrices keeps of each, over what its own basis keeps (eq. 14b is their mean)."""
        everyone = range(len(self.kept_own))
        return self.relative_to_own(self.kept_shared(everyone), everyone)

    def start(self, indices: Sequence[int]) -> Tensor:
        """Q (d x rank) of the matrices `indices` from both halves (eq. 12), where their shared factor starts."""
        return self._basis(indices, self.rank)

    def pool_start(self, indices: Sequence[int]) -> Tensor:
        """Directions (d x rank) of unit length where the pool of the matrices `indices` starts: for each the leading
        ones of its owners alone."""
        parts = []
        for layers, directions in itertools.groupby(owners(len(indices), self.rank)):
            parts.append(self._basis([indices[layer] for layer in layers], len(list(directions))))
        return torch.cat(parts, dim=1)

    def _basis(self, indices: Sequence[int], rank: int) -> Tensor:
        return shared_basis([half for i in indices for half in self.rows[i]], rank)


@dataclass(frozen=True)
class KindAgreement:
    """How well the layers of one kind and shape agree, on both sides and as whole gradients."""

    sides: dict[Side, SideAgreement]
    cosines: np.ndarray | None
    """(n x n), float64, between layers (eq. 13b). None for stacks of experts: their sketches are not of one expert's
    matrix."""
    cosines_other_half: list[float] | None
    """Of each layer with itself on the other half. None for stacks of experts."""


def side_agreement(members: Sequence[MatrixNumbers], side: Side, rank: int) -> SideAgreement:
    """Returns how well `members`, which have been probed and are equally wide on `side`, can share a basis there."""
    loud = equalise_channels([half.side(side) for matrix in members for half in probed_halves(matrix)])
    sketches = list(zip(loud[::2], loud[1::2], strict=True))
    parts = [leading_parts(torch.stack(half), rank) for half in zip(*sketches, strict=True)]
    rows = [values[:, :, None] * columns.mT for values, columns in parts]
    directions = []
    for fit, half in ((0, 1), (1, 0)):
        tests = torch.stack([pair[half] for pair in sketches])
        own = (tests @ parts[fit][1]).square().sum((1, 2))  # of a unit norm, or of zeros
        directions.append((own, retention_of_pairs(rows[fit], own, tests)))
    (kept_first, first), (kept_second, second) = directions
    kept_own = ((kept_first + kept_second) / 2).tolist()
    retention = ((first + second) / 2).numpy()
    return SideAgreement(rank, sketches, list(zip(*rows, strict=True)), kept_own, retention)


def kind_agreement(members: Sequence[MatrixNumbers], rank: int) -> KindAgreement | None:
    """Returns how well `members`, of one kind and shape, agree; None if the probe did not measure all of them."""
    if any(matrix.halves is None for matrix in members):
        return None
    sides: dict[Side, SideAgreement] = {side: side_agreement(members, side, rank) for side in SIDES}
    if members[0].num_experts is not None:
        return KindAgreement(sides, cosines=None, cosines_other_half=None)
    first, second = (reconstruct_all([probed_halves(matrix)[half] for matrix in members]) for half in (0, 1))
    between_layers = ((cosines_of(first) + cosines_of(second)) / 2).numpy()
    return KindAgreement(sides, between_layers, cosines_of(first, second).tolist())


def probed_halves(matrix: MatrixNumbers) -> tuple[Sketch, Sketch]:
    """The two sketches of a matrix that the probe measured."""
    assert matrix.halves is not None
    return matrix.halves


def pair_values(table: np.ndarray) -> np.ndarray:
    """The n(n-1)/2 entries of a symmetric n x n table that belong to two different matrices.

    >>> pair_values(np.array([[1.0, 0.5], [0.5, 1.0]])).tolist()
    [0.5]
    """
    return table[np.triu_indices(len(table), 1)]


def mean_of_pairs(tables: Sequence[np.ndarray]) -> float:
    """Mean of the `pair_values` of all `tables`."""
    return float(np.mean(np.concatenate([pair_values(table) for table in tables])))
