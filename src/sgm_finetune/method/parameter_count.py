"""The number of parameters that a plan trains (docs/method.md section 4)."""

from __future__ import annotations

from sgm_finetune.method.plan import Plan
from sgm_finetune.method.sides import sides_of, width


def adapter_parameters(plan: Plan) -> tuple[int, int]:
    """(number of adapter parameters that the plan trains, the same number without sharing).

    A matrix has r·(d_in + d_out) parameters, a stack of experts as many for each expert. A group saves r·d of each
    shared side for each member but the first; the members of a pool have r codes each.
    """
    rank = plan.settings.rank
    plain = sum(rank * sum(matrix.shape) * (matrix.num_experts or 1) for matrix in plan.selected)
    saved = 0
    for group in plan.groups:
        shape = plan.shape_of(group.members[0])
        saved += rank * sum(width(shape, side) for side in sides_of(group.side)) * (len(group.members) - 1)
        if group.side == "both":
            saved -= rank * len(group.members)
    return plain - saved, plain
