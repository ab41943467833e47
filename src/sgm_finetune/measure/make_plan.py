"""The plan that follows from a scan, a probe and the configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from sgm_finetune.base.config import Config, MergeConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.probe import Probe
from sgm_finetune.measure.scan_result import MatrixScan, Scan, by_parameter
from sgm_finetune.method.build_plan import build_plan
from sgm_finetune.method.parameter_count import adapter_parameters
from sgm_finetune.method.plan import MatrixNumbers, Plan, PlanSettings
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.model.names import stored_to_model_names


def check_rank(config: Config, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises UserError when a group's subspace would need more directions than a side of a matrix has.

    `shapes`: name -> (d_out, d_in).
    """
    if config.merge.side == "none" or config.is_full:
        return
    for name, (rows, cols) in shapes.items():
        if config.adapter.rank > (dimension := min(rows, cols)):
            raise UserError(
                f"adapter.rank={config.adapter.rank} is more than the {dimension} directions of `{name}` "
                f"({rows}x{cols}); use adapter.rank={dimension} or less, or merge.side=none"
            )


def make_plan(scanned: Scan, probed: Probe | None, config: Config, model: nn.Module | None = None) -> Plan:
    """The plan that follows from a scan and a probe; without a probe nothing is merged. Print it, edit it, save it.

    The plan has the matrices that both measured; without a probe, the weights of `model` that were scanned; without a
    model, the scanned matrices inside numbered layers. The rank is `adapter.rank`, which a command has chosen if there
    is `adapter.parameters`. Raises UserError when scan and model have no matrix in common, when the plan would train
    more than `adapter.parameters`, and as `check_rank` does.
    """
    experts: Mapping[str, int | None] = {}
    model_name: Callable[[str], str] = str
    if probed is not None:
        shapes, experts, model_name = dict(probed.shapes), probed.num_experts, probed.model_name
    elif model is not None:
        matrices = adaptable(model)
        shapes = {name: matrix.shape for name, matrix in matrices.items()}
        experts = {name: matrix.num_experts for name, matrix in matrices.items()}
        model_name = stored_to_model_names(model)
    else:
        shapes = {matrix.name: matrix.shape for matrix in by_parameter(scanned) if matrix.layer is not None}
    by_name = _match_names(by_parameter(scanned, model_name), shapes)
    if probed is not None:
        check_rank(config, shapes)
    numbers = [
        MatrixNumbers(
            name=name,
            num_experts=experts.get(name),
            kind=found.kind,
            layer=found.layer,
            shape=shape,
            snr=found.snr,
            snr_db=found.snr_db,
            signal_rank=found.signal_rank,
            halves=probed.halves[name] if probed is not None else None,
            activation=probed.activations[name] if probed is not None else None,
        )
        for name, shape in shapes.items()
        if (found := by_name.get(name)) is not None
    ]
    if not numbers:
        raise UserError(
            f"The scan of {scanned.model} and the model have no matrix in common; scan the model's own files"
        )
    settings = _plan_settings(config, merges=probed is not None)
    if settings.by == "gradient" and probed is None:
        raise UserError("selection.by=gradient needs the probe of the gradients; call probe first, or choose another")
    plan = build_plan(config.model.name, numbers, settings, scanned.estimator)
    allowed = config.adapter.parameters
    if allowed is not None and (trained := adapter_parameters(plan)[0]) > allowed:
        raise UserError(
            f"adapter.rank={config.adapter.rank} trains {trained} parameters, more than adapter.parameters={allowed}; "
            "lower adapter.rank"
        )
    return plan


def threshold_of(merge: MergeConfig) -> float:
    """`merge.threshold`, or its default."""
    if merge.threshold is not None:
        return merge.threshold
    return -1.0 if merge.scope == "pool" else 0.85


def makes_whole_pools(merge: MergeConfig) -> bool:
    """Whether the layers of a kind and shape make one pool, whatever the probe measures: nothing can divide them."""
    divides = (merge.snr_tolerance_db is not None, merge.max_group_size is not None, threshold_of(merge) > -1)
    return merge.scope == "pool" and merge.side != "none" and merge.criterion == "subspace" and not any(divides)


def _plan_settings(config: Config, merges: bool) -> PlanSettings:
    merge, selection, adapter = config.merge, config.selection, config.adapter
    chosen: dict[str, Any] = {
        "top_fraction": selection.top_fraction,
        "snr_threshold": selection.snr_threshold,
        "by": selection.by,
        "seed": config.training.seed if selection.by == "random" else 0,
    }
    if config.is_full:
        return PlanSettings(kind="full", also=tuple(adapter.also), side="none", **chosen)
    return PlanSettings(
        rank=adapter.rank,
        alpha=float(adapter.alpha),  # a plan that is read from a file has a float
        dropout=adapter.dropout,
        scope=merge.scope,
        criterion=merge.criterion,
        side=merge.side if merges else "none",
        threshold=threshold_of(merge),
        snr_tolerance_db=merge.snr_tolerance_db,
        max_group_size=merge.max_group_size,
        **chosen,
    )


def _match_names(scanned: Sequence[MatrixScan], names: Iterable[str]) -> dict[str, MatrixScan]:
    """Module name -> scanned matrix.

    The files of an encoder lack the prefix of the task's model (`bert.`), or have one that the model lacks. So a name
    matches the equal one, else the only one of which it is the ending, or which is its ending.
    """
    by_name = {matrix.name: matrix for matrix in scanned}
    matched = {}
    for name in names:
        if name in by_name:
            matched[name] = by_name[name]
            continue
        endings = [m for m in scanned if name.endswith(f".{m.name}") or m.name.endswith(f".{name}")]
        if len(endings) == 1:
            matched[name] = endings[0]
    return matched
