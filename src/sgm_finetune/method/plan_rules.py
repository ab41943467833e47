"""The rules that every plan keeps, whatever its model (docs/method.md section 3)."""

from __future__ import annotations

import math
from collections import Counter

from sgm_finetune.method.plan import Plan
from sgm_finetune.method.sides import sides_of, width

MAX_RANK = 2**16


def inconsistency(plan: Plan) -> str | None:
    """Returns what is wrong with a plan, whatever its model; None for a valid plan."""
    settings = plan.settings
    if settings.kind == "full":
        if plan.groups:
            return "it trains whole matrices, and has groups, which share factors"
    elif not (1 <= settings.rank <= MAX_RANK and 0 < settings.alpha < math.inf and 0 <= settings.dropout < 1):
        return (
            f"rank {settings.rank}, alpha {settings.alpha:g} and dropout {settings.dropout:g} are not valid for LoRA; "
            f"rank must be 1 to {MAX_RANK}, alpha above 0 and dropout from 0 to below 1"
        )
    names = Counter(matrix.name for matrix in plan.matrices)
    if twice := next((name for name, times in names.items() if times > 1), None):
        return f"it holds `{twice}` twice"
    for matrix in plan.matrices:
        num_experts = 1 if matrix.num_experts is None else matrix.num_experts
        if min(*matrix.shape, num_experts) < 1:
            return f"`{matrix.name}` has no entries"
    selected = {matrix.name: matrix for matrix in plan.selected}
    seen: dict[str, str] = {}
    for group in plan.groups:
        if not group.members:
            return f"group `{group.name}` has no members"
        for name in group.members:
            if name not in selected:
                return f"group `{group.name}` holds `{name}`, which the plan does not select"
            if name in seen:
                return f"`{name}` is in two groups of the plan: `{seen[name]}` and `{group.name}`"
            if selected[name].num_experts is not None:
                return f"group `{group.name}` holds the experts `{name}`; experts share nothing"
            seen[name] = group.name
        for side in sides_of(group.side):
            widths = {width(selected[name].shape, side) for name in group.members}
            if len(widths) > 1:
                return f"group `{group.name}` mixes {side} widths {sorted(widths)}; only equal widths can share"
    return None
