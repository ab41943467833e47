"""The plan that follows from the numbers: select, choose sides, group, start (docs/method.md section 3)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from sgm_finetune.method.agreement import (
    _halves,
    _KindMeasures,
    _mean_of_pairs,
    _measure_kind,
    _measure_side,
    _pairs,
    _SideMeasures,
)
from sgm_finetune.method.grouping import group_layers
from sgm_finetune.method.plan import (
    Energy,
    Group,
    KindNumbers,
    MatrixNumbers,
    Plan,
    PlannedMatrix,
    PlanSettings,
    Similarity,
)
from sgm_finetune.method.selection import select_matrices
from sgm_finetune.method.subspace import (
    SIDES,
    Side,
    spectral_basis,
    squared_norm,
)

SNR_TOLERANCE_DB = 3.0  # of criterion "snr" where none is given: a factor of two in energy


def build_plan(
    model: str, matrices: Sequence[MatrixNumbers], settings: PlanSettings, estimator: str | None = None
) -> Plan:
    """The plan that follows from the numbers (docs/method.md section 3): select, choose sides, group, start.

    Scope "activation": those that read the same activations may share their input side. Scope "layers": those of one
    kind and shape may share the side that its layers have in common. Stacks of experts share nothing. What has no group
    starts lora_A at its own basis.
    Without probe numbers (`halves` None) or with side "none" there are neither groups nor starts: a plain LoRA plan.
    """
    chosen = set(select_matrices(matrices, settings))
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
