"""The number of parameters that a plan trains (docs/method.md section 4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from sgm_finetune.method.plan import MatrixNumbers, Plan, PlanSettings
from sgm_finetune.method.selection import select_matrices
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


def most_per_direction(matrices: Sequence[MatrixNumbers], settings: PlanSettings, makes_pools: bool) -> int:
    """The most adapter parameters that rank 1 can take, whatever is measured; rank r takes r times as many.

    `settings` says how many matrices of each kind are trained, and these may be the largest. With `makes_pools` those
    of one kind and shape make one pool; else the parameters are those of plain LoRA, since sharing only saves some.
    """
    kind_of = {matrix.name: matrix.kind for matrix in matrices}
    num_trained = Counter(kind_of[name] for name in select_matrices(matrices, settings))
    total = 0
    for kind, num in num_trained.items():
        members = [matrix for matrix in matrices if matrix.kind == kind]
        if makes_pools and all(matrix.num_experts is None for matrix in members):
            total += _most_in_pools([matrix.shape for matrix in members], num)
        else:
            total += _sum_of_largest((sum(matrix.shape) * (matrix.num_experts or 1) for matrix in members), num)
    return total


def _most_in_pools(shapes: Sequence[tuple[int, int]], num: int) -> int:
    """The most that one direction takes in the pools of `num` layers, of those that have these shapes: both sides of
    each shape, and a code for each layer that has another one of its shape beside it.

    >>> _most_in_pools([(4, 3), (4, 3), (4, 3), (5, 5)], 4)
    20
    """
    sizes = {shape: min(num, size) for shape, size in Counter(shapes).items()}
    return _sum_of_largest(map(sum, sizes), num) + min(num, sum(size for size in sizes.values() if size > 1))


def _sum_of_largest(sizes: Iterable[int], num: int) -> int:
    return sum(sorted(sizes, reverse=True)[:num])
