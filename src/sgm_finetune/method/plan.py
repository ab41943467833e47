"""The plan: what is trained and what is shared, with every number that led there. Plain data, and how it is made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from sgm_finetune.method.grouping import group_layers
from sgm_finetune.method.selection import above_threshold, top_fraction_per_kind
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
    spectral_basis,
    squared_norm,
    width,
)

Halves = tuple[Tensor, Tensor]  # of one layer and side, from the two halves of the batches
MAX_RANK = 2**16
SNR_TOLERANCE_DB = 3.0  # of criterion "snr" where none is given: a factor of two in energy


@dataclass(frozen=True)
class PlanSettings:
    """The choices a plan follows; meanings and ranges as the configuration keys of the same names."""

    rank: int
    alpha: float
    dropout: float = 0.0
    scope: Literal["activation", "layers"] = "activation"
    criterion: Literal["subspace", "cosine", "snr"] = "subspace"
    side: Literal["auto", "input", "output", "none"] = "auto"
    threshold: float = 0.85
    snr_tolerance_db: float | None = None
    max_group_size: int | None = None
    top_fraction: float | None = None
    snr_threshold: float | None = None
    prefer_depth: bool = False


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
    activation: str | None = None
    """Name of the first matrix that reads the same activations."""
    num_experts: int | None = None
    """Of a stack of experts, whose `shape` is that of one; `halves` are sketches of the one matrix that they make."""


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
    start: Literal["spectral", "random"] = "random"
    """Where lora_A of a matrix without a group starts: its own gradient's spectrum (of a stack of experts: the one of
    all of them), or PEFT's default."""
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
    num_experts: int | None = None
    """Of a stack of experts, each with its own two factors; `shape` is that of one. null: a linear layer."""


@dataclass(frozen=True)
class Group:
    """Matrices that share one factor: lora_A on the input side, lora_B on the output side."""

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
    """What the selected layers of one kind have in common, or the matrices that read the same activations (of the kind
    `layers.*.attention.query+key`); means over all pairs of them."""

    kind: str
    num_layers: int
    side: Side | None
    """The side on which they may merge (None: they do not, in this scope)."""
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
class Similarity:
    """What the grouping saw: of every two matrices how well they agree."""

    __pydantic_config__: ClassVar = {"arbitrary_types_allowed": True}

    kind: str
    """As in `KindNumbers`."""
    side: Side | None
    """Of the gradients (eq. 14); None: cosines of the whole gradients (eq. 13b)."""
    members: tuple[str, ...]
    values: Tensor
    """(n x n), float64, symmetric; the diagonal is 1."""


@dataclass(frozen=True)
class Plan:
    """A whole plan. `starts` (name of a group, or of a matrix without one -> d x rank basis) travels beside the JSON
    in plan.safetensors; `similarities` are for pictures and no part of the file."""

    __pydantic_config__: ClassVar = {"arbitrary_types_allowed": True, "extra": "forbid"}

    model: str
    settings: PlanSettings
    matrices: tuple[PlannedMatrix, ...]
    groups: tuple[Group, ...] = ()
    kinds: tuple[KindNumbers, ...] = ()
    estimator: str | None = None
    format: Literal["sgm-plan/1"] = "sgm-plan/1"
    starts: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    similarities: tuple[Similarity, ...] = field(default=(), repr=False, compare=False)

    @property
    def selected(self) -> tuple[PlannedMatrix, ...]:
        return tuple(matrix for matrix in self.matrices if matrix.selected)

    def shape_of(self, name: str) -> tuple[int, int]:
        return next(matrix.shape for matrix in self.matrices if matrix.name == name)


def inconsistency(plan: Plan) -> str | None:
    """What is wrong with a plan in itself, whatever model it is for; None where nothing is."""
    settings = plan.settings
    if not (1 <= settings.rank <= MAX_RANK and 0 < settings.alpha < math.inf and 0 <= settings.dropout < 1):
        return (
            f"rank {settings.rank}, alpha {settings.alpha:g} and dropout {settings.dropout:g} are no settings of LoRA"
        )
    names = Counter(matrix.name for matrix in plan.matrices)
    if twice := next((name for name, times in names.items() if times > 1), None):
        return f"`{twice}` is in it twice"
    for matrix in plan.matrices:
        if min(*matrix.shape, 1 if matrix.num_experts is None else matrix.num_experts) < 1:
            return f"`{matrix.name}` has no entries"
    selected = {matrix.name: matrix for matrix in plan.selected}
    seen: dict[str, str] = {}
    for group in plan.groups:
        if not group.members:
            return f"group `{group.name}` holds nothing"
        for name in group.members:
            if name not in selected:
                return f"group `{group.name}` holds `{name}`, which the plan does not select"
            if name in seen:
                return f"`{name}` is in two groups of the plan: `{seen[name]}` and `{group.name}`"
            if selected[name].num_experts is not None:
                return f"group `{group.name}` holds the experts `{name}`; experts share nothing"
            seen[name] = group.name
        widths = {width(selected[name].shape, group.side) for name in group.members}
        if len(widths) > 1:
            return f"group `{group.name}` mixes {group.side} widths {sorted(widths)}; only equal ones share"
    return None


def adapter_parameters(plan: Plan) -> tuple[int, int]:
    """(trainable adapter parameters of the plan, the same without any sharing): r·(d_in + d_out) a matrix, less what
    groups share: r·d of the shared side for each member but the first."""
    rank = plan.settings.rank
    plain = sum(rank * sum(matrix.shape) * (matrix.num_experts or 1) for matrix in plan.selected)
    saved = 0
    for group in plan.groups:
        saved += rank * width(plan.shape_of(group.members[0]), group.side) * (len(group.members) - 1)
    return plain - saved, plain


def select(matrices: Sequence[MatrixNumbers], settings: PlanSettings) -> list[str]:
    """Names of the matrices that are trained, in order: the top fraction per kind by SNR or by depth, those above a
    threshold of SNR, else all."""
    if settings.top_fraction is None and settings.snr_threshold is None:
        return [matrix.name for matrix in matrices]
    if settings.prefer_depth and settings.top_fraction is not None:
        depths = {matrix.name: float(-1 if matrix.layer is None else matrix.layer) for matrix in matrices}
        return top_fraction_per_kind(depths, {m.name: m.kind for m in matrices}, settings.top_fraction)
    snrs = {matrix.name: math.inf if matrix.snr is None else matrix.snr for matrix in matrices}
    if settings.top_fraction is not None:
        return top_fraction_per_kind(snrs, {m.name: m.kind for m in matrices}, settings.top_fraction)
    assert settings.snr_threshold is not None
    return above_threshold(snrs, settings.snr_threshold)


def build_plan(
    model: str, matrices: Sequence[MatrixNumbers], settings: PlanSettings, estimator: str | None = None
) -> Plan:
    """The plan that follows from the numbers (docs/method.md section 3): select, choose sides, group, start.

    Scope "activation": those that read the same activations may share their input side. Scope "layers": those of one
    kind and shape may share the side that its layers have in common. Stacks of experts share nothing. What has no group
    starts lora_A at its own basis.
    Without probe numbers (`halves` None) or with side "none" there are neither groups nor starts: a plain LoRA plan.
    """
    chosen = set(select(matrices, settings))
    selected = [matrix for matrix in matrices if matrix.name in chosen]
    found: list[_Found] = []
    kinds: list[KindNumbers] = []
    similarities: list[Similarity] = []
    planned: dict[str, PlannedMatrix] = {}
    for label, members in _by_kind(selected).items():
        measured = _measure_kind(members, settings.rank)
        numbers = _kind_numbers(label, members, measured, settings)
        kinds.append(numbers)
        planned |= _planned_kind(members, measured)
        similarities += _similarities(label, members, measured, settings)
        if measured is not None and numbers.side is not None:
            side = measured.sides[numbers.side]
            similarity = side.retention
            if settings.criterion == "cosine":
                assert measured.cosines is not None
                similarity = measured.cosines
            found += _find_groups(label, members, numbers.side, side, similarity, settings)
    if settings.scope == "activation" and settings.side != "none":
        for label, sets in _by_activation(selected).items():
            numbers, groups, seen = _group_readers(label, sets, settings)
            kinds.append(numbers)
            found += groups
            similarities += seen
    for one in found:
        for name, share in zip(one.group.members, one.kept, strict=True):
            planned[name] = replace(planned[name], group=one.group.name, kept_shared=share)
    starts = {one.group.name: one.start for one in found}
    for matrix in selected:
        if settings.side != "none" and matrix.halves is not None and planned[matrix.name].group is None:
            starts[matrix.name] = spectral_basis([half.input for half in matrix.halves], settings.rank)
            planned[matrix.name] = replace(planned[matrix.name], start="spectral")
    everything = tuple(planned.get(m.name) or _described(m, selected=False) for m in matrices)
    groups = tuple(one.group for one in found)
    return Plan(
        model, settings, everything, groups, tuple(kinds), estimator, starts=starts, similarities=tuple(similarities)
    )


def _by_kind(matrices: Sequence[MatrixNumbers]) -> dict[str, list[MatrixNumbers]]:
    """Kinds with their shape, which the label names where a kind has several: only equal shapes compare."""
    found: dict[tuple[str, tuple[int, int]], list[MatrixNumbers]] = {}
    for matrix in matrices:
        found.setdefault((matrix.kind, matrix.shape), []).append(matrix)
    shapes = Counter(kind for kind, _ in found)
    return {
        kind if shapes[kind] == 1 else f"{kind}[{shape[0]}x{shape[1]}]": members
        for (kind, shape), members in found.items()
    }


def _by_activation(matrices: Sequence[MatrixNumbers]) -> dict[str, list[list[MatrixNumbers]]]:
    """Joined kinds -> the sets of two or more that read the same activations."""
    sets: dict[str, list[MatrixNumbers]] = {}
    for matrix in matrices:
        if matrix.activation is not None and matrix.halves is not None:
            sets.setdefault(matrix.activation, []).append(matrix)
    found: dict[str, list[list[MatrixNumbers]]] = {}
    for members in sets.values():
        if len(members) > 1:
            found.setdefault(_joined([matrix.kind for matrix in members]), []).append(members)
    return found


def _joined(kinds: Sequence[str]) -> str:
    """
    >>> _joined(["layers.*.attention.query", "layers.*.attention.key"])
    'layers.*.attention.query+key'
    """
    first, *others = kinds
    parent = first.rpartition(".")[0] + "."
    return "+".join([first, *(other.removeprefix(parent) for other in others)])


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


def _kind_numbers(
    label: str, members: Sequence[MatrixNumbers], measured: _KindMeasures | None, settings: PlanSettings
) -> KindNumbers:
    if measured is None or len(members) < 2:
        return KindNumbers(label, len(members), None)
    stacked = members[0].num_experts is not None
    mean = {side: _mean_of_pairs([one.retention]) for side, one in measured.sides.items()}
    by_all: dict[Side, float] = {side: float(np.mean(one.shares_of_all())) for side, one in measured.sides.items()}
    return KindNumbers(
        kind=label,
        num_layers=len(members),
        side=_choose_side(settings.side, by_all) if settings.scope == "layers" and not stacked else None,
        retention_input=mean["input"],
        retention_output=mean["output"],
        retention_all_input=by_all["input"],
        retention_all_output=by_all["output"],
        cosine_mean=None if measured.cosines is None else _mean_of_pairs([measured.cosines]),
        cosine_max=None if measured.cosines is None else float(np.max(_pairs(measured.cosines))),
        cosine_other_half=None if measured.other_half is None else float(np.mean(measured.other_half)),
    )


def _similarities(
    label: str, members: Sequence[MatrixNumbers], measured: _KindMeasures | None, settings: PlanSettings
) -> list[Similarity]:
    """Both sides of one kind's layers, and their cosines where those decide."""
    if measured is None or len(members) < 2:
        return []
    names = tuple(matrix.name for matrix in members)
    found = [Similarity(label, side, names, torch.from_numpy(one.retention)) for side, one in measured.sides.items()]
    if settings.criterion == "cosine" and measured.cosines is not None:
        found.append(Similarity(label, None, names, torch.from_numpy(measured.cosines)))
    return found


def _pairs(table: np.ndarray) -> np.ndarray:
    return table[np.triu_indices(len(table), 1)]


def _mean_of_pairs(tables: Sequence[np.ndarray]) -> float:
    return float(np.mean(np.concatenate([_pairs(table) for table in tables])))


def _group_readers(
    label: str, sets: Sequence[Sequence[MatrixNumbers]], settings: PlanSettings
) -> tuple[KindNumbers, list[_Found], list[Similarity]]:
    """What the readers of the same activations have in common, their groups, and what those were found by."""
    measured = [_measure_side(members, "input", settings.rank) for members in sets]
    numbers = KindNumbers(
        kind=label,
        num_layers=len(sets),
        side="input",
        retention_input=_mean_of_pairs([one.retention for one in measured]),
        retention_all_input=float(np.mean([one.shares_of_all() for one in measured])),
    )
    found: list[_Found] = []
    for members, one in zip(sets, measured, strict=True):
        found += _find_groups(label, members, "input", one, one.retention, settings, first=len(found))
    seen = [
        Similarity(label, "input", tuple(matrix.name for matrix in members), torch.from_numpy(one.retention))
        for members, one in zip(sets, measured, strict=True)
    ]
    return numbers, found, seen


@dataclass(frozen=True)
class _Found:
    """A group, the held-out energy that its basis keeps of each member, and its start."""

    group: Group
    kept: list[float]
    start: Tensor


def _find_groups(
    label: str,
    members: Sequence[MatrixNumbers],
    side: Side,
    measured: _SideMeasures,
    similarity: np.ndarray,
    settings: PlanSettings,
    first: int = 0,
) -> list[_Found]:
    """Groups of two or more, numbered from `first`."""
    snr_db = [0.0 if matrix.snr_db is None else matrix.snr_db for matrix in members]
    threshold, tolerance = settings.threshold, settings.snr_tolerance_db
    if settings.criterion == "snr":
        similarity, threshold = np.ones_like(similarity), 1.0
        tolerance = SNR_TOLERANCE_DB if tolerance is None else tolerance

    def joint_retention(kept: Sequence[float], indices: Sequence[int]) -> float:
        return min(measured.relative(kept, indices))

    def accept(indices: list[int]) -> bool:
        return settings.criterion != "subspace" or (
            joint_retention(measured.kept_together(indices), indices) >= settings.threshold
        )

    found = []
    for indices in group_layers(similarity, threshold, snr_db, tolerance, settings.max_group_size, accept):
        if len(indices) > 1:
            levels, kept = [snr_db[i] for i in indices], measured.kept_together(indices)
            group = Group(
                name=f"{label}/{side}/{first + len(found)}",
                kind=label,
                side=side,
                members=tuple(members[i].name for i in indices),
                similarity=min(float(similarity[pair]) for pair in combinations(indices, 2)),
                joint_retention=joint_retention(kept, indices),
                snr_spread_db=max(levels) - min(levels),
            )
            found.append(_Found(group, kept, measured.start(indices)))
    return found


def _choose_side(side: str, retention_by_all: Mapping[Side, float]) -> Side | None:
    """auto: the side on which one basis for all of the kind's layers loses least (eq. 14b)."""
    match side:
        case "none":
            return None
        case "input" | "output":
            return side
        case _:
            return max(SIDES, key=lambda candidate: retention_by_all[candidate])


def _planned_kind(members: Sequence[MatrixNumbers], measured: _KindMeasures | None) -> dict[str, PlannedMatrix]:
    planned = {}
    for i, matrix in enumerate(members):
        numbers = {}
        if measured is not None:
            numbers = {
                "gradient_energy": sum(squared_norm(half) for half in _halves(matrix)) / 2,
                "cosine_other_half": None if measured.other_half is None else measured.other_half[i],
                "kept_own": Energy(measured.sides["input"].own[i], measured.sides["output"].own[i]),
            }
        planned[matrix.name] = _described(matrix, selected=True, **numbers)
    return planned


def _described(matrix: MatrixNumbers, selected: bool, **numbers) -> PlannedMatrix:
    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    return PlannedMatrix(
        name=matrix.name,
        kind=matrix.kind,
        layer=matrix.layer,
        shape=matrix.shape,
        num_experts=matrix.num_experts,
        selected=selected,
        snr=finite(matrix.snr),
        snr_db=None if matrix.snr == 0 else finite(matrix.snr_db),
        signal_rank=matrix.signal_rank,
        **numbers,
    )
