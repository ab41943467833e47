"""The plan: what is trained and what is shared, with every number that led there. Plain data, and how it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from sgm_finetune.method.grouping import group_layers
from sgm_finetune.method.selection import above_threshold, top_fraction_per_kind
from sgm_finetune.method.subspace import (
    SIDES,
    Side,
    Sketch,
    cosines,
    energy_kept,
    leading_basis,
    leading_rows,
    pairwise_retention,
    shared_basis,
    squared_norm,
)

Halves = tuple[Tensor, Tensor]  # of one layer and side, from the two halves of the batches
SNR_TOLERANCE_DB = 3.0  # of criterion "snr" where none is given: a factor of two in energy


@dataclass(frozen=True)
class PlanSettings:
    """The choices a plan follows; meanings and ranges as the configuration keys of the same names."""

    rank: int
    alpha: float
    dropout: float = 0.0
    criterion: Literal["subspace", "cosine", "snr"] = "subspace"
    side: Literal["auto", "input", "output", "none"] = "auto"
    threshold: float = 0.85
    snr_tolerance_db: float | None = None
    max_group_size: int | None = None
    top_fraction: float | None = None
    snr_threshold: float | None = None


@dataclass(frozen=True)
class MatrixNumbers:
    """What was measured on one weight matrix; `halves` is None where the probe did not run."""

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    snr: float | None
    snr_db: float | None
    signal_rank: int | None
    halves: tuple[Sketch, Sketch] | None = None


@dataclass(frozen=True)
class Energy:
    """Shares of held-out gradient energy kept by a basis of `rank` directions, fitted on the other half (eq. 11)."""

    input: float
    output: float


@dataclass(frozen=True)
class PlannedMatrix:
    """One matrix: its numbers, whether it is trained, and its group (None: its own two factors)."""

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    """Rows (d_out) and columns (d_in)."""
    selected: bool
    group: str | None = None
    snr: float | None = None
    """Signal energy / noise energy; null: not scanned, or infinite under the published estimator."""
    snr_db: float | None = None
    """The same in decibels; null also where there is no signal at all (snr 0)."""
    signal_rank: int | None = None
    gradient_energy: float | None = None
    """Estimate of the squared norm of the probe's gradient (eq. 10)."""
    cosine_other_half: float | None = None
    """Cosine of the gradient with itself on the other half of the batches (eq. 13b): the noise ceiling."""
    kept_own: Energy | None = None
    """By a basis of its own."""
    kept_shared: float | None = None
    """By the group's basis, on the group's side."""


@dataclass(frozen=True)
class Group:
    """Layers that share one factor: lora_A on the input side, lora_B on the output side."""

    name: str
    kind: str
    side: Side
    members: tuple[str, ...]
    start: Literal["spectral", "random"] = "spectral"
    """Where the shared factor starts: the group's gradient spectrum, or PEFT's default initialisation."""
    similarity: float | None = None
    """Smallest pairwise similarity within, under the plan's criterion."""
    joint_retention: float | None = None
    """Smallest, over members, of (energy the group's basis keeps) / (energy the own basis keeps), held out."""
    snr_spread_db: float | None = None


@dataclass(frozen=True)
class KindNumbers:
    """What the selected layers of one kind have in common; means over all pairs of layers."""

    kind: str
    num_layers: int
    side: Side | None
    """The side on which its layers may merge (None: merging was off)."""
    retention_input: float | None = None
    retention_output: float | None = None
    """Of eq. 14, the mean over all pairs of layers."""
    retention_all_input: float | None = None
    retention_all_output: float | None = None
    """Energy kept by one basis for all the kind's layers / by own bases, the mean over layers (eq. 14b); `auto` takes
    the larger side."""
    cosine_mean: float | None = None
    cosine_max: float | None = None
    cosine_other_half: float | None = None
    """Of each layer with itself on other data: what perfect agreement would measure."""


@dataclass(frozen=True)
class Plan:
    """A whole plan. `starts` (group name -> d x rank basis) travels beside the JSON, in plan.safetensors."""

    __pydantic_config__: ClassVar = {"arbitrary_types_allowed": True, "extra": "forbid"}

    model: str
    settings: PlanSettings
    matrices: tuple[PlannedMatrix, ...]
    groups: tuple[Group, ...] = ()
    kinds: tuple[KindNumbers, ...] = ()
    estimator: str | None = None
    format: Literal["sgm-plan/1"] = "sgm-plan/1"
    starts: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def selected(self) -> tuple[PlannedMatrix, ...]:
        return tuple(matrix for matrix in self.matrices if matrix.selected)

    def shape_of(self, name: str) -> tuple[int, int]:
        return next(matrix.shape for matrix in self.matrices if matrix.name == name)


def adapter_parameters(plan: Plan) -> tuple[int, int]:
    """(trainable adapter parameters of the plan, the same without any sharing): r·(d_in + d_out) a matrix, less what
    groups share: r·d of the shared side for each member but the first."""
    rank = plan.settings.rank
    plain = sum(rank * sum(matrix.shape) for matrix in plan.selected)
    saved = 0
    for group in plan.groups:
        rows, cols = plan.shape_of(group.members[0])
        saved += rank * (cols if group.side == "input" else rows) * (len(group.members) - 1)
    return plain - saved, plain


def select(matrices: Sequence[MatrixNumbers], settings: PlanSettings) -> list[str]:
    """Names of the matrices that are trained, in order: by SNR (top fraction per kind, or threshold), else all."""
    if settings.top_fraction is None and settings.snr_threshold is None:
        return [matrix.name for matrix in matrices]
    snrs = {matrix.name: math.inf if matrix.snr is None else matrix.snr for matrix in matrices}
    if settings.top_fraction is not None:
        return top_fraction_per_kind(snrs, {m.name: m.kind for m in matrices}, settings.top_fraction)
    assert settings.snr_threshold is not None
    return above_threshold(snrs, settings.snr_threshold)


def build_plan(
    model: str, matrices: Sequence[MatrixNumbers], settings: PlanSettings, estimator: str | None = None
) -> Plan:
    """The plan that follows from the numbers (docs/method.md section 3): select, choose each kind's side, group, start.

    Kinds are taken with their shape: only equal shapes can share. Without probe numbers (`halves` None) or with
    side "none" there are no groups: a plain LoRA plan.
    """
    chosen = set(select(matrices, settings))
    by_kind: dict[tuple[str, tuple[int, int]], list[MatrixNumbers]] = {}
    for matrix in matrices:
        if matrix.name in chosen:
            by_kind.setdefault((matrix.kind, matrix.shape), []).append(matrix)
    groups: list[Group] = []
    kinds: list[KindNumbers] = []
    starts: dict[str, Tensor] = {}
    planned: dict[str, PlannedMatrix] = {}
    for (kind, shape), members in by_kind.items():
        label = kind if sum(k == kind for k, _ in by_kind) == 1 else f"{kind}[{shape[0]}x{shape[1]}]"
        measured = _measure_kind(members, settings.rank)
        numbers, found = _group_kind(label, members, measured, settings)
        kinds.append(numbers)
        for one in found:
            groups.append(one.group)
            starts[one.group.name] = one.start
        planned |= _planned_kind(members, measured, found)
    everything = tuple(planned.get(m.name) or _described(m, selected=False) for m in matrices)
    return Plan(model, settings, everything, tuple(groups), tuple(kinds), estimator, starts=starts)


@dataclass(frozen=True)
class _KindMeasures:
    """The probe's numbers on one kind's layers, or nothing where the probe did not run."""

    sketches: dict[Side, list[Halves]]
    rows: dict[Side, list[Halves]]
    own: dict[Side, list[float]]
    together: dict[Side, list[float]]
    retention: dict[Side, np.ndarray]
    cosines: np.ndarray
    other_half: list[float]


def _halves(matrix: MatrixNumbers) -> tuple[Sketch, Sketch]:
    assert matrix.halves is not None
    return matrix.halves


def _measure_kind(members: Sequence[MatrixNumbers], rank: int) -> _KindMeasures | None:
    """Every number is the mean of fitting on either half and looking at the other."""
    if any(matrix.halves is None for matrix in members):
        return None
    first, second = ([_halves(matrix)[index] for matrix in members] for index in (0, 1))
    own: dict[Side, list[float]] = {}
    retention: dict[Side, np.ndarray] = {}
    for side in SIDES:
        one, two = [s.side(side) for s in first], [s.side(side) for s in second]
        own[side] = [
            (energy_kept(leading_basis(a, rank), b) + energy_kept(leading_basis(b, rank), a)) / 2
            for a, b in zip(one, two, strict=True)
        ]
        retention[side] = ((pairwise_retention(one, two, rank) + pairwise_retention(two, one, rank)) / 2).numpy()
    between = ((cosines(first) + cosines(second)) / 2).numpy()
    sketches: dict[Side, list[Halves]] = {
        side: [(one.side(side), two.side(side)) for one, two in zip(first, second, strict=True)] for side in SIDES
    }
    rows: dict[Side, list[Halves]] = {
        side: [(leading_rows(one, rank), leading_rows(two, rank)) for one, two in pairs]
        for side, pairs in sketches.items()
    }
    together: dict[Side, list[float]] = {
        side: _kept_together(rows[side], sketches[side], range(len(members)), rank) for side in SIDES
    }
    other_half = cosines(first, second).tolist()
    return _KindMeasures(sketches, rows, own, together, retention, between, other_half)


def _kept_together(
    rows: Sequence[Halves], sketches: Sequence[Halves], indices: Sequence[int], rank: int
) -> list[float]:
    """Per layer of `indices`: held-out energy kept by the basis shared by all of them, the mean of fitting on either
    half."""
    kept = [0.0] * len(indices)
    for fit, held_out in ((0, 1), (1, 0)):
        shared = shared_basis([rows[i][fit] for i in indices], rank)
        for position, i in enumerate(indices):
            kept[position] += energy_kept(shared, sketches[i][held_out]) / 2
    return kept


@dataclass(frozen=True)
class _Found:
    """A group, its members' indices, the held-out energy that its basis keeps of each, and its start."""

    indices: list[int]
    group: Group
    kept: list[float]
    start: Tensor


def _group_kind(
    label: str, members: Sequence[MatrixNumbers], measured: _KindMeasures | None, settings: PlanSettings
) -> tuple[KindNumbers, list[_Found]]:
    """The kind's common numbers, and its groups of two or more."""
    if measured is None or len(members) < 2:
        return KindNumbers(label, len(members), None), []
    pairs = list(combinations(range(len(members)), 2))
    mean: dict[Side, float] = {
        side: float(np.mean([table[pair] for pair in pairs])) for side, table in measured.retention.items()
    }
    by_all: dict[Side, float] = {
        side: float(np.mean([k / max(o, 1e-12) for k, o in zip(kept, measured.own[side], strict=True)]))
        for side, kept in measured.together.items()
    }
    numbers = KindNumbers(
        kind=label,
        num_layers=len(members),
        side=_choose_side(settings.side, by_all),
        retention_input=mean["input"],
        retention_output=mean["output"],
        retention_all_input=by_all["input"],
        retention_all_output=by_all["output"],
        cosine_mean=float(np.mean([measured.cosines[pair] for pair in pairs])),
        cosine_max=float(np.max([measured.cosines[pair] for pair in pairs])),
        cosine_other_half=float(np.mean(measured.other_half)),
    )
    side = numbers.side
    if side is None:
        return numbers, []
    snr_db = [0.0 if matrix.snr_db is None else matrix.snr_db for matrix in members]
    threshold, tolerance = settings.threshold, settings.snr_tolerance_db
    match settings.criterion:
        case "subspace":
            similarity = measured.retention[side]
        case "cosine":
            similarity = measured.cosines
        case "snr":
            similarity, threshold = np.ones_like(measured.cosines), 1.0
            tolerance = SNR_TOLERANCE_DB if tolerance is None else tolerance
    rank = settings.rank
    sketches, rows = measured.sketches[side], measured.rows[side]

    def kept_together(indices: Sequence[int]) -> list[float]:
        return _kept_together(rows, sketches, indices, rank)

    def retention_together(indices: Sequence[int], kept: Sequence[float]) -> float:
        return min(k / max(measured.own[side][i], 1e-12) for k, i in zip(kept, indices, strict=True))

    def accept(indices: list[int]) -> bool:
        return settings.criterion != "subspace" or (
            retention_together(indices, kept_together(indices)) >= settings.threshold
        )

    found = []
    for indices in group_layers(similarity, threshold, snr_db, tolerance, settings.max_group_size, accept):
        if len(indices) > 1:
            levels, kept = [snr_db[i] for i in indices], kept_together(indices)
            group = Group(
                name=f"{label}/{side}/{len(found)}",
                kind=label,
                side=side,
                members=tuple(members[i].name for i in indices),
                similarity=min(float(similarity[pair]) for pair in combinations(indices, 2)),
                joint_retention=retention_together(indices, kept),
                snr_spread_db=max(levels) - min(levels),
            )
            start = shared_basis([half for i in indices for half in rows[i]], rank)
            found.append(_Found(indices, group, kept, start))
    return numbers, found


def _choose_side(side: str, retention_by_all: Mapping[Side, float]) -> Side | None:
    """auto: the side on which one basis for all of the kind's layers loses least (eq. 14b)."""
    match side:
        case "none":
            return None
        case "input" | "output":
            return side
        case _:
            return max(SIDES, key=lambda candidate: retention_by_all[candidate])


def _planned_kind(
    members: Sequence[MatrixNumbers], measured: _KindMeasures | None, found: Sequence[_Found]
) -> dict[str, PlannedMatrix]:
    planned = {}
    for i, matrix in enumerate(members):
        numbers = {}
        if measured is not None:
            numbers = {
                "gradient_energy": sum(squared_norm(half) for half in _halves(matrix)) / 2,
                "cosine_other_half": measured.other_half[i],
                "kept_own": Energy(measured.own["input"][i], measured.own["output"][i]),
            }
        planned[matrix.name] = _described(matrix, selected=True, **numbers)
    for one in found:
        for name, share in zip(one.group.members, one.kept, strict=True):
            planned[name] = replace(planned[name], group=one.group.name, kept_shared=share)
    return planned


def _described(matrix: MatrixNumbers, selected: bool, **numbers) -> PlannedMatrix:
    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    return PlannedMatrix(
        name=matrix.name,
        kind=matrix.kind,
        layer=matrix.layer,
        shape=matrix.shape,
        selected=selected,
        snr=finite(matrix.snr),
        snr_db=None if matrix.snr == 0 else finite(matrix.snr_db),
        signal_rank=matrix.signal_rank,
        **numbers,
    )
