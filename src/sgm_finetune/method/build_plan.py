"""The plan that follows from the numbers (docs/method.md section 3): select, choose sides, group, start."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from sgm_finetune.method.agreement import (
    KindAgreement,
    SideAgreement,
    kind_agreement,
    mean_of_pairs,
    pair_values,
    probed_halves,
    side_agreement,
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
from sgm_finetune.method.sides import SIDES, Sharing, Side, sides_of
from sgm_finetune.method.subspace import spectral_basis, squared_norm

SNR_TOLERANCE_DB = 3.0  # for criterion "snr" without a given tolerance: a factor of two in energy


def build_plan(
    model: str, matrices: Sequence[MatrixNumbers], settings: PlanSettings, estimator: str | None = None
) -> Plan:
    """Returns the plan that follows from the numbers (docs/method.md section 3).

    With scope "activation", matrices that read the same activations may share their input side. With scope "layers",
    matrices of one kind and shape may share the side that the kind has in common; with scope "pool", both sides. Stacks
    of experts share nothing. A matrix without a group starts its lora_A at its own basis.
    Without probe numbers (`halves` is None), or with side "none", there are no groups and no starts: a plain LoRA plan.
    With kind "full" the selection is the plan.
    """
    if settings.by == "gradient":
        matrices = [replace(matrix, gradient_energy=gradient_energy(matrix)) for matrix in matrices]
    chosen = set(select_matrices(matrices, settings))
    selected = [matrix for matrix in matrices if matrix.name in chosen]
    if settings.kind == "full":
        planned = tuple(plan_matrix(matrix, matrix.name in chosen) for matrix in matrices)
        return Plan(model, settings, planned, estimator=estimator)

    merged = [merge_layers(label, members, settings) for label, members in sort_by_kind(selected).items()]
    if settings.scope == "activation" and settings.side != "none":
        merged += [merge_readers(label, sets, settings) for label, sets in sort_by_activation(selected).items()]
    groups = [group for kind in merged for group in kind.groups]
    starts = {found.group.name: found.start for found in groups}

    planned = {matrix.name: matrix for kind in merged for matrix in kind.planned}
    for found in groups:
        for name, kept in zip(found.group.members, found.kept, strict=True):
            planned[name] = replace(planned[name], group=found.group.name, kept_shared=kept)
    for matrix in selected:
        if settings.side != "none" and matrix.halves is not None and planned[matrix.name].group is None:
            starts[matrix.name] = spectral_basis([half.input for half in matrix.halves], settings.rank)
            planned[matrix.name] = replace(planned[matrix.name], start="spectral")

    return Plan(
        model=model,
        settings=settings,
        matrices=tuple(planned.get(matrix.name) or plan_matrix(matrix, selected=False) for matrix in matrices),
        groups=tuple(found.group for found in groups),
        kinds=tuple(kind.numbers for kind in merged),
        estimator=estimator,
        starts=starts,
        similarities=tuple(similarity for kind in merged for similarity in kind.similarities),
    )


@dataclass(frozen=True)
class FoundGroup:
    """A group, the share of held-out energy that its basis keeps of each member, and its start (d x rank)."""

    group: Group
    kept: list[float]
    start: Tensor


@dataclass(frozen=True)
class MergedKind:
    """The result for one kind: its numbers, the tables that grouping reads, its groups, and its matrices."""

    numbers: KindNumbers
    similarities: list[Similarity]
    groups: list[FoundGroup]
    planned: list[PlannedMatrix] = field(default_factory=list)
    """Without groups yet. Empty for readers of the same activations, whose matrices belong to kinds of their own."""


def merge_layers(label: str, members: Sequence[MatrixNumbers], settings: PlanSettings) -> MergedKind:
    """Returns what the layers of one kind have in common and, with scope "layers", their groups."""
    agreement = kind_agreement(members, settings.rank)
    planned = plan_kind(members, agreement)
    if agreement is None or len(members) < 2:
        return MergedKind(KindNumbers(label, len(members), None), [], [], planned)

    numbers = kind_numbers(label, members, agreement, settings)
    names = tuple(matrix.name for matrix in members)
    similarities = [
        Similarity(label, side, names, torch.from_numpy(one.retention)) for side, one in agreement.sides.items()
    ]
    if settings.criterion == "cosine" and agreement.cosines is not None:
        similarities.append(Similarity(label, None, names, torch.from_numpy(agreement.cosines)))
    if numbers.side is None:
        return MergedKind(numbers, similarities, [], planned)

    candidates = Candidates(label, members, numbers.side, [agreement.sides[side] for side in sides_of(numbers.side)])
    similarity = np.min([one.retention for one in candidates.agreements], axis=0)
    if settings.criterion == "cosine":
        assert agreement.cosines is not None
        similarity = agreement.cosines
    return MergedKind(numbers, similarities, find_groups(candidates, similarity, settings), planned)


def merge_readers(label: str, sets: Sequence[Sequence[MatrixNumbers]], settings: PlanSettings) -> MergedKind:
    """Returns what the readers of the same activations have in common on their input side, and their groups."""
    agreements = [side_agreement(members, "input", settings.rank) for members in sets]
    numbers = KindNumbers(
        kind=label,
        num_layers=len(sets),
        side="input",
        retention_input=mean_of_pairs([agreement.retention for agreement in agreements]),
        retention_all_input=float(np.mean([agreement.retention_of_all() for agreement in agreements])),
    )
    groups: list[FoundGroup] = []
    similarities = []
    for members, agreement in zip(sets, agreements, strict=True):
        candidates = Candidates(label, members, "input", [agreement])
        groups += find_groups(candidates, agreement.retention, settings, first=len(groups))
        names = tuple(matrix.name for matrix in members)
        similarities.append(Similarity(label, "input", names, torch.from_numpy(agreement.retention)))
    return MergedKind(numbers, similarities, groups)


def sort_by_kind(matrices: Sequence[MatrixNumbers]) -> dict[str, list[MatrixNumbers]]:
    """Label -> the matrices of one kind and shape; only equal shapes compare.

    The label is the kind's name. It includes the shape if the kind has several.
    """
    found: dict[tuple[str, tuple[int, int]], list[MatrixNumbers]] = {}
    for matrix in matrices:
        found.setdefault((matrix.kind, matrix.shape), []).append(matrix)
    num_shapes = Counter(kind for kind, _ in found)
    return {
        kind if num_shapes[kind] == 1 else f"{kind}[{shape[0]}x{shape[1]}]": members
        for (kind, shape), members in found.items()
    }


def sort_by_activation(matrices: Sequence[MatrixNumbers]) -> dict[str, list[list[MatrixNumbers]]]:
    """Label of joined kinds -> its sets of two or more matrices that read the same activations."""
    sets: dict[str, list[MatrixNumbers]] = {}
    for matrix in matrices:
        if matrix.activation is not None and matrix.halves is not None:
            sets.setdefault(matrix.activation, []).append(matrix)
    found: dict[str, list[list[MatrixNumbers]]] = {}
    for members in sets.values():
        if len(members) > 1:
            found.setdefault(join_kinds([matrix.kind for matrix in members]), []).append(members)
    return found


def join_kinds(kinds: Sequence[str]) -> str:
    """One label for several kinds: the first name, then the others without the parent that they share with it.

    >>> join_kinds(["layers.*.attention.query", "layers.*.attention.key"])
    'layers.*.attention.query+key'
    """
    first, *others = kinds
    parent = first.rpartition(".")[0] + "."
    return "+".join([first, *(other.removeprefix(parent) for other in others)])


def kind_numbers(
    label: str, members: Sequence[MatrixNumbers], agreement: KindAgreement, settings: PlanSettings
) -> KindNumbers:
    """Returns the numbers of a kind with at least two layers, and the side on which they may merge."""
    of_all: dict[Side, float] = {side: float(np.mean(one.retention_of_all())) for side, one in agreement.sides.items()}
    may_merge = settings.scope != "activation" and members[0].num_experts is None
    cosines, other_half = agreement.cosines, agreement.cosines_other_half
    return KindNumbers(
        kind=label,
        num_layers=len(members),
        side=choose_sharing(settings, of_all) if may_merge else None,
        retention_input=mean_of_pairs([agreement.sides["input"].retention]),
        retention_output=mean_of_pairs([agreement.sides["output"].retention]),
        retention_all_input=of_all["input"],
        retention_all_output=of_all["output"],
        cosine_mean=None if cosines is None else mean_of_pairs([cosines]),
        cosine_max=None if cosines is None else float(np.max(pair_values(cosines))),
        cosine_other_half=None if other_half is None else float(np.mean(other_half)),
    )


def choose_sharing(settings: PlanSettings, retention_of_all: Mapping[Side, float]) -> Sharing | None:
    """Returns what the layers of a kind may share: both sides with scope "pool", else the side of `choose_side`."""
    if settings.scope == "pool" and settings.side != "none":
        return "both"
    return choose_side(settings.side, retention_of_all)


def choose_side(side: str, retention_of_all: Mapping[Side, float]) -> Side | None:
    """Returns the side on which a kind's layers may merge, None for "none".

    "auto" takes the side on which one basis for all layers keeps more of what their own bases keep (eq. 14b).
    """
    match side:
        case "none":
            return None
        case "input" | "output":
            return side
        case _:
            return max(SIDES, key=lambda candidate: retention_of_all[candidate])


@dataclass(frozen=True)
class Candidates:
    """Matrices that may share one side or both, and how well they agree there."""

    label: str
    members: Sequence[MatrixNumbers]
    side: Sharing
    agreements: Sequence[SideAgreement]
    """Of each of these sides, the input side first."""

    def kept_shared(self, indices: Sequence[int]) -> list[list[float]]:
        """For each side: what one basis for all of `indices` keeps of each (`SideAgreement.kept_shared`)."""
        return [one.kept_shared(indices) for one in self.agreements]

    def joint_retention(self, kept: Sequence[Sequence[float]], indices: Sequence[int]) -> float:
        """The smallest share in `kept`, of `kept_shared`, over what the member's own basis keeps."""
        relative = [one.relative_to_own(k, indices) for one, k in zip(self.agreements, kept, strict=True)]
        return min(map(min, relative))


def find_groups(
    candidates: Candidates, similarity: np.ndarray, settings: PlanSettings, first: int = 0
) -> list[FoundGroup]:
    """Returns the groups of two or more (docs/method.md section 3.3), numbered from `first`.

    `similarity` (n x n) is what the criterion compares, in the order of the candidates' members.
    """
    members = candidates.members
    snr_db = [0.0 if matrix.snr_db is None else matrix.snr_db for matrix in members]
    threshold, tolerance = settings.threshold, settings.snr_tolerance_db
    if settings.criterion == "snr":
        similarity, threshold = np.ones_like(similarity), 1.0
        tolerance = SNR_TOLERANCE_DB if tolerance is None else tolerance

    def accept(indices: list[int]) -> bool:
        if settings.criterion != "subspace":
            return True
        return candidates.joint_retention(candidates.kept_shared(indices), indices) >= settings.threshold

    found = []
    for indices in group_layers(similarity, threshold, snr_db, tolerance, settings.max_group_size, accept):
        if len(indices) > 1:
            levels, kept = [snr_db[i] for i in indices], candidates.kept_shared(indices)
            group = Group(
                name=f"{candidates.label}/{candidates.side}/{first + len(found)}",
                kind=candidates.label,
                side=candidates.side,
                members=tuple(members[i].name for i in indices),
                similarity=min(float(similarity[pair]) for pair in combinations(indices, 2)),
                joint_retention=candidates.joint_retention(kept, indices),
                snr_spread_db=max(levels) - min(levels),
            )
            on_input = candidates.agreements[0]
            start = on_input.pool_start(indices) if candidates.side == "both" else on_input.start(indices)
            found.append(FoundGroup(group, np.min(kept, axis=0).tolist(), start))
    return found


def plan_kind(members: Sequence[MatrixNumbers], agreement: KindAgreement | None) -> list[PlannedMatrix]:
    """Returns the selected matrices of one kind, with the probe's numbers if there are any."""
    planned = [plan_matrix(matrix, selected=True) for matrix in members]
    if agreement is None:
        return planned
    return [
        replace(
            one,
            gradient_energy=gradient_energy(matrix),
            cosine_other_half=None if agreement.cosines_other_half is None else agreement.cosines_other_half[i],
            kept_own=Energy(agreement.sides["input"].kept_own[i], agreement.sides["output"].kept_own[i]),
        )
        for i, (one, matrix) in enumerate(zip(planned, members, strict=True))
    ]


def gradient_energy(matrix: MatrixNumbers) -> float | None:
    """Returns the mean of the squared norms of the gradient's two halves (eq. 10); None without a probe."""
    if matrix.halves is None:
        return None
    return sum(squared_norm(half) for half in probed_halves(matrix)) / 2


def plan_matrix(matrix: MatrixNumbers, selected: bool) -> PlannedMatrix:
    """Returns the matrix with the scan's numbers. A number that is not finite, and the decibels of SNR 0, are None."""

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
        gradient_energy=matrix.gradient_energy,
    )
