"""Cuts a result's adapter to a smaller rank: of each layer's update, the directions of its largest singular values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor

from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.plan_file import parse_plan, plan_document
from sgm_finetune.method.low_rank import cut_update
from sgm_finetune.results.export.merge import layer_factors
from sgm_finetune.results.load import Result, attach_untrained, base_skeleton
from sgm_finetune.results.pth import lora_config
from sgm_finetune.train.adapters.apply import ADAPTER, num_experts
from sgm_finetune.train.adapters.optimizer import pack_factor, unpack_factor
from sgm_finetune.train.adapters.pool import plain_factors


@dataclass(frozen=True)
class Cut:
    """A result whose adapter was cut."""

    result: Result
    """With the cut adapter, in which every layer has two factors of its own."""
    rank: int
    rank_before: int
    kept: float
    """Share of the squared norm of all updates that the cut keeps, from 0 to 1."""


def cut_result(result: Result, rank: int) -> Cut:
    """Cuts each layer's update, and that of each expert in a stack, to its best approximation of `rank`.

    The scale alpha / r is in the factors then, and alpha is the rank: every program that reads the adapter computes
    the scale 1. Raises UserError when the adapter has a smaller rank.
    """
    before = lora_config(result.content).r
    if rank > before:
        raise UserError(f"--rank {rank} is more than the rank {before} of this adapter; give --rank {before} or less")
    model = attach_untrained(base_skeleton(result), result.content, result.path)
    tensors, kept = _cut_factors(model, plain_factors(result.content["adapter"]), result, rank)
    plan = parse_plan(result.content["plan"], str(result.path))
    plan = dataclasses.replace(
        plan,
        settings=dataclasses.replace(plan.settings, rank=rank, alpha=float(rank)),
        groups=(),  # what layers shared is cut differently for each
        matrices=tuple(dataclasses.replace(matrix, group=None) for matrix in plan.matrices),
    )
    content = {
        **result.content,
        "adapter": tensors,
        "peft_config": {**result.content["peft_config"], "r": rank, "lora_alpha": rank},
        "plan": plan_document(plan),
    }
    return Cut(dataclasses.replace(result, content=content), rank, before, kept)


def _cut_factors(
    model: PeftModel, state: dict[str, Tensor], result: Result, rank: int
) -> tuple[dict[str, Tensor], float]:
    """The state with cut factors, and the share of their squared norm that is kept."""
    tensors, kept, whole = dict(state), 0.0, 0.0
    for layer, (name_a, name_b) in layer_factors(model, state, result.path).values():
        experts, scale = num_experts(layer), float(layer.scaling[ADAPTER])  # type: ignore[index]
        A = unpack_factor("a", state[name_a], experts)
        B = unpack_factor("b", state[name_b], experts).mT
        if not bool(A.isfinite().all() and B.isfinite().all()):
            raise UserError(f"`{name_a}` or `{name_b}` in {result.path} is not finite; train again")
        A_cut, B_cut, values = cut_update(A, B, scale, rank)
        tensors[name_a] = pack_factor("a", A_cut).to(state[name_a].dtype)
        tensors[name_b] = pack_factor("b", B_cut.mT).to(state[name_b].dtype)
        kept += float(values[..., :rank].square().sum())
        whole += float(values.square().sum())
    return tensors, kept / whole if whole else 1.0
