"""What a plan looks like in one line, and why it merges nothing."""

from __future__ import annotations

from collections import Counter

from sgm_finetune.method.parameter_count import adapter_parameters
from sgm_finetune.method.plan import Plan, PlanSettings
from sgm_finetune.method.sides import SIDES


def describe_plan(plan: Plan) -> str:
    """The plan in one line: its matrices, its groups, its number of adapter parameters."""
    parts = [f"{len(plan.selected)} of {len(plan.matrices)} matrices"]
    if plan.settings.kind == "full":
        also = f" and {', '.join(plan.settings.also)}" if plan.settings.also else ""
        return f"{parts[0]}{also}, trained whole · {describe_selection(plan.settings)}"
    if plan.groups:
        merged = sum(len(group.members) for group in plan.groups)
        parts.append(f"{merged} of them in {_describe_groups(plan)}")
    else:
        spectral = any(matrix.start == "spectral" for matrix in plan.selected)
        parts.append("no groups: " + ("LoRA that starts at its gradients' spectra" if spectral else "plain LoRA"))
    return " · ".join([*parts, _describe_parameters(*adapter_parameters(plan))])


def describe_selection(settings: PlanSettings) -> str:
    """What selected the matrices.

    >>> describe_selection(PlanSettings(top_fraction=0.25, by="depth")), describe_selection(PlanSettings())
    ('the top 25 % of each kind by depth', 'all matrices')
    """
    if settings.top_fraction is not None:
        names = {"snr": "SNR", "depth": "depth", "random": "chance", "gradient": "gradient"}
        return f"the top {100 * settings.top_fraction:.3g} % of each kind by {names[settings.by]}"
    return "all matrices" if settings.snr_threshold is None else f"SNR at least {settings.snr_threshold:g}"


def _describe_groups(plan: Plan) -> str:
    """'60 groups (60 share their input side)', or '7 pools of 30 directions'."""
    counts = Counter(group.side for group in plan.groups)
    shared = [f"{counts[side]} share their {side} side" for side in SIDES if counts[side]]
    pools = f"{counts['both']} pool{'s' if counts['both'] > 1 else ''} of {plan.settings.rank} directions"
    if not shared:
        return pools
    return f"{len(plan.groups)} groups ({', '.join([*shared, pools] if counts['both'] else shared)})"


def _describe_parameters(trainable: int, plain: int) -> str:
    """The number of adapter parameters, beside the number without sharing where the two look different.

    >>> _describe_parameters(4_055_040, 4_884_480)
    '4.06 M adapter parameters instead of 4.88 M'
    >>> _describe_parameters(31_232, 33_280), _describe_parameters(33_280, 33_280)
    ('31.2 thousand adapter parameters instead of 33.3 thousand', '33.3 thousand adapter parameters')
    >>> _describe_parameters(1_040_001, 1_040_009)
    '1.04 M adapter parameters'
    """
    scale, digits, unit = (1e6, 2, "M") if plain >= 1e6 else (1e3, 1, "thousand")
    texts = [f"{number / scale:,.{digits}f} {unit}" for number in (trainable, plain)]
    return f"{texts[0]} adapter parameters" + (f" instead of {texts[1]}" if texts[0] != texts[1] else "")


def plan_remarks(plan: Plan) -> list[str]:
    """Why the plan has no groups, with the criterion's numbers; [] when it has some, or when `merge.side` is none."""
    settings = plan.settings
    kinds = [kind for kind in plan.kinds if kind.side is not None]
    if plan.groups or settings.side == "none" or settings.kind == "full":
        return []
    if not kinds:
        return ["no two of them read the same activations"] if settings.scope == "activation" else []
    match settings.criterion:
        case "cosine":
            best = max(kinds, key=lambda kind: kind.cosine_max or -1.0)
            ceiling = sum(kind.cosine_other_half or 0.0 for kind in kinds) / len(kinds)
            return [
                f"merge.criterion=cosine found nothing: no two layers reach {settings.threshold}; the closest pair, in "
                f"{best.kind}, has {best.cosine_max:.2f} (a layer with itself on other data: {ceiling:.2f} on average)"
            ]
        case "subspace":
            pick, side = (min, ", on its worse side") if settings.scope == "pool" else (max, "")
            kept = {kind.kind: pick(kind.retention_input or 0.0, kind.retention_output or 0.0) for kind in kinds}
            best = max(kept, key=lambda kind: kept[kind])
            return [
                f"merge.criterion=subspace found nothing at merge.threshold={settings.threshold}; {best} keeps "
                f"{kept[best]:.2f} on average over all pairs{side}"
            ]
        case "snr":
            who = "layers of a kind" if settings.scope != "activation" else "readers of the same activations"
            return [f"merge.criterion=snr found nothing: no two {who} are within the tolerance"]
