"""The plan that an estimate assumes when a run has none yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sgm_finetune.base.config import Config
from sgm_finetune.method.build_plan import sort_by_kind
from sgm_finetune.method.plan import Group, MatrixNumbers, Plan, PlannedMatrix, PlanSettings
from sgm_finetune.method.selection import select_matrices
from sgm_finetune.model.matrices import Matrix
from sgm_finetune.model.names import kind_of, layer_of


def assume_plan(config: Config, matrices: Mapping[str, Matrix], find_readers: Callable[[], list[list[str]]]) -> Plan:
    """A plan for `matrices` as large as the one that the run will make.

    All matrices count as equally good, since nothing is scanned: of each kind the first are selected, which lie as low
    in the model as any choice by SNR. With `merge.scope=activation`, selected matrices that read the same activations
    share `lora_A`; `find_readers` gives the names of all matrices, those that read the same together. With
    `merge.scope=pool`, those of one kind and shape make one pool.
    """
    settings = assumed_settings(config)
    alike = unmeasured(matrices)
    selected = set(select_matrices(alike, settings))
    planned = tuple(
        PlannedMatrix(n, kind_of(n), layer_of(n), m.shape, n in selected, num_experts=m.num_experts)
        for n, m in matrices.items()
    )
    groups: list[Group] = []
    if config.is_full:
        return Plan(config.model.name, settings, planned)
    if config.merge.side != "none" and config.merge.scope == "pool":
        poolable = [one for one in alike if one.name in selected and one.num_experts is None]
        for kind, members in sort_by_kind(poolable).items():
            if len(members) > 1:
                groups.append(Group(members[0].name, kind, "both", tuple(one.name for one in members), "random"))
    if config.merge.side != "none" and config.merge.scope == "activation":
        shareable = {name for name in selected if matrices[name].num_experts is None}
        for readers in find_readers():
            members = tuple(name for name in readers if name in shareable)
            if len(members) > 1:
                groups.append(Group(members[0], kind_of(members[0]), "input", members, "random"))
    return Plan(config.model.name, settings, planned, tuple(groups))


def assumed_settings(config: Config) -> PlanSettings:
    """The settings that decide the plan's size. With `selection.snr_threshold` every matrix may be trained."""
    selection = config.selection
    # what the run measures, or draws by chance, may lie as low as the first matrices
    by = "depth" if selection.by == "depth" else "snr"
    if config.is_full:
        return PlanSettings(top_fraction=selection.top_fraction, by=by, kind="full", also=tuple(config.adapter.also))
    return PlanSettings(
        config.adapter.rank, config.adapter.alpha, config.adapter.dropout, top_fraction=selection.top_fraction, by=by
    )


def unmeasured(matrices: Mapping[str, Matrix]) -> list[MatrixNumbers]:
    """The numbers of matrices before a scan and a probe: all are equally good."""
    return [
        MatrixNumbers(name, kind_of(name), layer_of(name), m.shape, 1.0, 0.0, None, num_experts=m.num_experts)
        for name, m in matrices.items()
    ]
