"""The plan that follows from a scan, a probe and the configuration, and what it says in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from sgm_finetune.base.config import Config
from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.probe import Probe
from sgm_finetune.measure.scan_result import MatrixScan, Scan, by_parameter
from sgm_finetune.method.build_plan import build_plan
from sgm_finetune.method.parameter_count import adapter_parameters
from sgm_finetune.method.plan import MatrixNumbers, Plan, PlanSettings
from sgm_finetune.method.subspace import SIDES
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.model.names import stored_to_model_names


def check_rank(config: Config, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises UserError where subspaces would need more directions than a side of (d_out, d_in) has."""
    if config.merge.side == "none":
        return
    for name, (rows, cols) in shapes.items():
        if config.adapter.rank > (dimension := min(rows, cols)):
            raise UserError(
                f"adapter.rank={config.adapter.rank} is more than the {dimension} directions of `{name}` "
                f"({rows}x{cols}); take adapter.rank={dimension} or less, or merge.side=none"
            )


def make_plan(scanned: Scan, probed: Probe | None, config: Config, model: nn.Module | None = None) -> Plan:
    """The plan that follows from a scan and a probe (None: nothing is merged). Data: print it, edit it, save it.

    Planned are the matrices that both measured; without a probe those of `model`'s linear layers that were scanned.
    """
    experts: Mapping[str, int | None] = {}
    named: Callable[[str], str] = str
    if probed is not None:
        shapes, experts, named = dict(probed.shapes), probed.num_experts, probed.model_name
    elif model is not None:
        there = adaptable(model)
        shapes = {name: matrix.shape for name, matrix in there.items()}
        experts = {name: matrix.num_experts for name, matrix in there.items()}
        named = stored_to_model_names(model)
    else:
        shapes = {matrix.name: matrix.shape for matrix in by_parameter(scanned) if matrix.layer is not None}
    by_name = _match_names(by_parameter(scanned, named), shapes)
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
    merge, selection, adapter = config.merge, config.selection, config.adapter
    settings = PlanSettings(
        rank=adapter.rank,
        alpha=float(adapter.alpha),  # as a file gives it back
        dropout=adapter.dropout,
        scope=merge.scope,
        criterion=merge.criterion,
        side=merge.side if probed is not None else "none",
        threshold=merge.threshold,
        snr_tolerance_db=merge.snr_tolerance_db,
        max_group_size=merge.max_group_size,
        top_fraction=selection.top_fraction,
        snr_threshold=selection.snr_threshold,
        prefer_depth=selection.prefer_depth,
    )
    return build_plan(config.model.name, numbers, settings, scanned.estimator)


def _match_names(modules: Sequence[MatrixScan], names: Iterable[str]) -> dict[str, MatrixScan]:
    """Module name -> scanned matrix. Files of a bare encoder lack the task model's prefix (`bert.`), and the other
    way round: names are matched whole, else by the longest common ending that is unique."""
    by_name = {matrix.name: matrix for matrix in modules}
    matched = {}
    for name in names:
        if name in by_name:
            matched[name] = by_name[name]
            continue
        endings = [m for m in modules if name.endswith(f".{m.name}") or m.name.endswith(f".{name}")]
        if len(endings) == 1:
            matched[name] = endings[0]
    return matched


def describe_plan(plan: Plan) -> str:
    merged = sum(len(group.members) for group in plan.groups)
    parts = [f"{len(plan.selected)} of {len(plan.matrices)} matrices"]
    if plan.groups:
        counts = Counter(group.side for group in plan.groups)
        sides = ", ".join(f"{counts[side]} share their {side} side" for side in SIDES if counts[side])
        parts.append(f"{merged} of them in {len(plan.groups)} groups ({sides})")
    else:
        spectral = any(matrix.start == "spectral" for matrix in plan.selected)
        parts.append("no groups: " + ("LoRA started at its gradients' spectra" if spectral else "plain LoRA"))
    trainable, plain = adapter_parameters(plan)
    parts.append(f"{trainable / 1e6:.2f} M adapter parameters instead of {plain / 1e6:.2f} M")
    return " · ".join(parts)


def remarks(plan: Plan) -> list[str]:
    """What a person should know about the plan: a criterion that found nothing says so, with its numbers."""
    settings = plan.settings
    kinds = [kind for kind in plan.kinds if kind.side is not None]
    if plan.groups or settings.side == "none":
        return []
    if not kinds:
        return ["no two of them read the same activations"] * (settings.scope == "activation")
    match settings.criterion:
        case "cosine":
            best = max(kinds, key=lambda kind: kind.cosine_max or -1.0)
            ceiling = sum(kind.cosine_other_half or 0.0 for kind in kinds) / len(kinds)
            return [
                f"merge.criterion=cosine found nothing: no two layers reach {settings.threshold}; the closest pair, in "
                f"{best.kind}, has {best.cosine_max:.2f} (a layer with itself on other data: {ceiling:.2f} on average)"
            ]
        case "subspace":
            best = max(kinds, key=lambda k: max(k.retention_input or 0.0, k.retention_output or 0.0))
            return [
                f"merge.criterion=subspace found nothing at merge.threshold={settings.threshold}; {best.kind} keeps "
                f"{max(best.retention_input or 0.0, best.retention_output or 0.0):.2f} on average of all pairs"
            ]
        case "snr":
            who = "layers of a kind" if settings.scope == "layers" else "readers of the same activations"
            return [f"merge.criterion=snr found nothing: no two {who} are within the tolerance"]
