"""Measures how much the layers of each pool of a trained model use its directions, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgm_finetune.method.plan import Plan
from sgm_finetune.results.report.pictures import MAX_DIRECTIONS, MAX_KINDS, MAX_LAYERS, PoolTable
from sgm_finetune.train.adapters.apply import lora_layers
from sgm_finetune.train.adapters.pool import ADAPTER, codes_of, direction_strengths, layers_per_direction, shared_b

if TYPE_CHECKING:
    from peft import PeftModel


@torch.no_grad()
def pool_tables(model: PeftModel, plan: Plan) -> tuple[PoolTable, ...]:
    """Returns a table of each pool of `plan`, which `model` was built from: the first `MAX_KINDS` that have at most
    `MAX_LAYERS` members."""
    layers = lora_layers(model)
    pools = [one for one in plan.groups if one.side == "both" and len(one.members) <= MAX_LAYERS][:MAX_KINDS]
    return tuple(pool_table(one.name, one.members, _strengths([layers[name] for name in one.members])) for one in pools)


def _strengths(members: Sequence[Any]) -> Tensor:
    """Returns the `direction_strengths` of the LoRA layers of one pool."""
    factors = [layer.lora_B[ADAPTER] for layer in members]
    codes = torch.cat([codes_of(b) for b in factors])  # type: ignore[arg-type]
    return direction_strengths(members[0].lora_A[ADAPTER].weight, shared_b(factors[0]), codes)


def pool_table(pool: str, members: Sequence[str], strengths: Tensor) -> PoolTable:
    """Returns the table of one pool from `strengths` (members x r)."""
    order = strengths.sum(0).argsort(descending=True, stable=True)[:MAX_DIRECTIONS]
    largest = float(strengths.max()) or 1.0
    return PoolTable(
        pool=pool,
        members=tuple(members),
        layers_per_direction=round(layers_per_direction(strengths), 2),
        num_left_out=strengths.shape[1] - len(order),
        strengths=tuple(tuple(round(one / largest, 2) for one in row) for row in strengths[:, order].tolist()),
    )
