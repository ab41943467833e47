"""How well the gradients of matrices agree, side by side (docs/method.md section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sgm_finetune.method.plan import MatrixNumbers
from sgm_finetune.method.subspace import (
    SIDES,
    Side,
    Sketch,
    cosines,
    energy_kept,
    equalised,
    leading_basis,
    leading_rows,
    pairwise_retention,
    shared_basis,
)

Halves = tuple[Tensor, Tensor]  # of one layer and side, from the two halves of the batches


@dataclass(frozen=True)
class _SideMeasures:
    """The probe's numbers on one side of matrices of equal width there, each the mean of fitting on either half and
    looking at the other."""

    rank: int
    sketches: list[Halves]
    rows: list[Halves]
    own: list[float]
    retention: np.ndarray

    def kept_together(self, indices: Sequence[int]) -> list[float]:
        """Per matrix of `indices`: held-out energy kept by the basis shared by all of them."""
        kept = [0.0] * len(indices)
        for fit, held_out in ((0, 1), (1, 0)):
            shared = shared_basis([self.rows[i][fit] for i in indices], self.rank)
            for position, i in enumerate(indices):
                kept[position] += energy_kept(shared, self.sketches[i][held_out]) / 2
        return kept

    def relative(self, kept: Sequence[float], indices: Sequence[int]) -> list[float]:
        """What `kept_together(indices)` says over what their own bases keep."""
        return [k / max(self.own[i], 1e-12) for k, i in zip(kept, indices, strict=True)]

    def shares_of_all(self) -> list[float]:
        everyone = range(len(self.own))
        return self.relative(self.kept_together(everyone), everyone)

    def start(self, indices: Sequence[int]) -> Tensor:
        return shared_basis([half for i in indices for half in self.rows[i]], self.rank)


def _measure_side(members: Sequence[MatrixNumbers], side: Side, rank: int) -> _SideMeasures:
    loud = equalised([half.side(side) for matrix in members for half in _halves(matrix)])
    sketches = list(zip(loud[::2], loud[1::2], strict=True))
    one, two = [first for first, _ in sketches], [second for _, second in sketches]
    own = [(energy_kept(leading_basis(a, rank), b) + energy_kept(leading_basis(b, rank), a)) / 2 for a, b in sketches]
    retention = ((pairwise_retention(one, two, rank) + pairwise_retention(two, one, rank)) / 2).numpy()
    rows = [(leading_rows(a, rank), leading_rows(b, rank)) for a, b in sketches]
    return _SideMeasures(rank, sketches, rows, own, retention)


@dataclass(frozen=True)
class _KindMeasures:
    """The probe's numbers on one kind's layers, or nothing where the probe did not run."""

    sides: dict[Side, _SideMeasures]
    cosines: np.ndarray | None
    """None for stacks of experts, whose sketches are of another matrix than one expert's."""
    other_half: list[float] | None


def _halves(matrix: MatrixNumbers) -> tuple[Sketch, Sketch]:
    assert matrix.halves is not None
    return matrix.halves


def _measure_kind(members: Sequence[MatrixNumbers], rank: int) -> _KindMeasures | None:
    if any(matrix.halves is None for matrix in members):
        return None
    first, second = ([_halves(matrix)[index] for matrix in members] for index in (0, 1))
    sides: dict[Side, _SideMeasures] = {side: _measure_side(members, side, rank) for side in SIDES}
    if members[0].num_experts is not None:
        return _KindMeasures(sides, None, None)
    between = ((cosines(first) + cosines(second)) / 2).numpy()
    return _KindMeasures(sides, between, cosines(first, second).tolist())


def _pairs(table: np.ndarray) -> np.ndarray:
    return table[np.triu_indices(len(table), 1)]


def _mean_of_pairs(tables: Sequence[np.ndarray]) -> float:
    return float(np.mean(np.concatenate([_pairs(table) for table in tables])))
