"""Cuts a result to a smaller rank: of each layer's update, the directions of its largest singular values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.plan_file import parse_plan, plan_document
from sgm_finetune.method.low_rank import cut_update, extract_update
from sgm_finetune.method.plan import PlanSettings
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.results.export.merge import layer_factors
from sgm_finetune.results.load import Result, attach_untrained, base_skeleton, check_whole, load_unquantised
from sgm_finetune.results.pth import lora_config, plain_settings
from sgm_finetune.train.adapters.apply import ADAPTER, num_experts, task_type
from sgm_finetune.train.adapters.optimizer import pack_factor, unpack_factor
from sgm_finetune.train.adapters.pool import plain_factors
from sgm_finetune.train.full.apply import CLASSIFICATION_HEADS


@dataclass(frozen=True)
class Cut:
    """A result whose updates were cut."""

    result: Result
    """With the cut adapter, in which every layer has two factors of its own."""
    rank: int
    rank_before: int
    """Of the adapter; of whole matrices the largest rank that one of them can have."""
    kept: float
    """Share of the squared norm of all updates that the cut keeps, from 0 to 1."""
    left_out: tuple[str, ...] = ()
    """Parameters that were trained whole and that no low-rank update holds: norms, embeddings, biases."""


def cut_result(result: Result, rank: int) -> Cut:
    """Cuts each layer's update, and that of each expert in a stack, to its best approximation of `rank`.

    The scale alpha / r is in the factors then, and alpha is the rank: every program that reads the adapter computes
    the scale 1. Where matrices were trained whole, their change is the update. Raises UserError when the adapter has a
    smaller rank.
    """
    if result.is_full:
        return _extract(result, rank)
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


def _extract(result: Result, rank: int) -> Cut:
    """The result of matrices trained whole as an adapter of `rank`. A classification head stays whole."""
    tensors: dict[str, Tensor] = result.content["tensors"]
    base = load_unquantised(result, "auto")
    check_whole(base, result.content, result.path)
    plan = parse_plan(result.content["plan"], str(result.path))
    matrices = adaptable(base, [matrix.name for matrix in plan.selected])
    largest = max(min(matrix.shape) for matrix in matrices.values())
    if stack := next((name for name, matrix in matrices.items() if matrix.num_experts is not None), None):
        raise UserError(f"`{stack}` is a stack of experts, of which SGM makes no adapter; take --to merged")
    if rank > largest:
        raise UserError(f"--rank {rank} is more than the rank {largest} of these matrices; give --rank {largest}")
    state, kept, whole = {}, 0.0, 0.0
    for name, matrix in matrices.items():
        old, new = base.get_parameter(f"{name}.weight").detach(), tensors[f"{name}.weight"]
        if not bool(new.isfinite().all()):
            raise UserError(f"`{name}.weight` in {result.path} is not finite; train again")
        change = new.to(old.device).float() - old.float()
        A, B, values = extract_update(change.mT if isinstance(matrix.module, Conv1D) else change, rank)
        state[f"base_model.model.{name}.lora_A.weight"] = A.float().cpu()
        state[f"base_model.model.{name}.lora_B.weight"] = B.float().cpu()
        kept += float(values[:rank].square().sum())
        whole += float(values.square().sum())
    rest = [name for name in tensors if name.removesuffix(".weight") not in matrices]
    heads = [name for name in rest if name.partition(".")[0] in CLASSIFICATION_HEADS]
    settings = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(matrices),
        modules_to_save=sorted({name.partition(".")[0] for name in heads}) or None,
        task_type=task_type(base),
        fan_in_fan_out=any(isinstance(matrix.module, Conv1D) for matrix in matrices.values()),
    )
    plan = dataclasses.replace(plan, settings=PlanSettings(rank=rank, alpha=float(rank), side="none"))
    content = {
        **{key: value for key, value in result.content.items() if key != "tensors"},
        "adapter": state | {f"base_model.model.{name}": tensors[name] for name in heads},
        "peft_config": plain_settings(settings),
        "plan": plan_document(plan),
    }
    cut = dataclasses.replace(result, content=content)
    return Cut(cut, rank, largest, kept / whole if whole else 1.0, tuple(name for name in rest if name not in heads))
