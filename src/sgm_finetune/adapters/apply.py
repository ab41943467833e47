"""Applying a plan: a plain PEFT LoRA model, then one parameter per group (docs/method.md section 4)."""

from __future__ import annotations

import math

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from sgm_finetune.errors import UserError
from sgm_finetune.method.plan import Group, Plan
from sgm_finetune.models import linear_layers, matrix_shape, ready_for_backward

ADAPTER = "default"
_FACTORS = {"input": "lora_A", "output": "lora_B"}


def apply_plan(model: PreTrainedModel, plan: Plan) -> PeftModel:
    """A PeftModel that trains what `plan` selects; the members of a group hold one and the same shared factor.

    Layers outside groups start as PEFT starts them (a plan without groups *is* plain PEFT LoRA, bit for bit). In a
    group the shared factor starts at the group's spectral basis (eq. 15), the members' own factors at zero on the
    output side and likewise on the input side, so that the model's output does not change. Any trainer that trains
    PEFT models trains this one. Raises UserError when the plan does not fit the model, or lacks a group's start.
    """
    check_plan(model, plan)
    ready_for_backward(model)
    names = [matrix.name for matrix in plan.selected]
    config = LoraConfig(
        r=plan.settings.rank,
        lora_alpha=plan.settings.alpha,  # type: ignore[arg-type]  # PEFT scales by any number
        lora_dropout=plan.settings.dropout,
        target_modules=names,
        task_type=task_type(model),
        fan_in_fan_out=False,
    )
    adapted = get_peft_model(model, config)
    reached = {name.removeprefix("base_model.model.") for name in lora_layers(adapted)}
    if reached != set(names):
        raise AssertionError(f"PEFT adapted other layers than planned: {sorted(reached ^ set(names))[:3]}")
    for group in plan.groups:
        _start(adapted, group, plan)
    tie(adapted, plan)
    return adapted  # type: ignore[return-value]


def tie(model: PeftModel, plan: Plan) -> None:
    """Makes every group's shared factor one parameter: its first member's. To be called again where a checkpoint was
    loaded into a model built from the files alone."""
    layers = lora_layers(model)
    for group in plan.groups:
        owner, *others = (_factor(layers, name, group) for name in group.members)
        for other in others:
            other.weight = owner.weight


def shared_factors(model: PeftModel, plan: Plan) -> dict[str, list[nn.Parameter]]:
    """Group name -> the members' shared factor, as each member holds it (equal objects when tied)."""
    layers = lora_layers(model)
    return {g.name: [_factor(layers, name, g).weight for name in g.members] for g in plan.groups}  # type: ignore


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raises UserError unless every planned matrix exists in `model` with its shape and every group can be built."""
    layers = linear_layers(model)
    what = type(model).__name__
    if not plan.selected:
        raise UserError("The plan selects no matrix; lower selection.snr_threshold or raise selection.top_fraction")
    for matrix in plan.matrices:
        if matrix.name not in layers:
            raise UserError(
                f"The plan was made for another model ({plan.model}): this {what} has no `{matrix.name}`; "
                "make a new one with `sgm plan`"
            )
        shape = matrix_shape(layers[matrix.name])
        if shape != tuple(matrix.shape):
            raise UserError(
                f"The plan was made for another model ({plan.model}): `{matrix.name}` is {matrix.shape[0]}x"
                f"{matrix.shape[1]} there and {shape[0]}x{shape[1]} here; make a new one with `sgm plan`"
            )
    selected = {matrix.name: matrix for matrix in plan.selected}
    seen: dict[str, str] = {}
    for group in plan.groups:
        for name in group.members:
            if name not in selected:
                raise UserError(f"Group `{group.name}` of the plan holds `{name}`, which the plan does not select")
            if name in seen:
                raise UserError(f"`{name}` is in two groups of the plan: `{seen[name]}` and `{group.name}`")
            seen[name] = group.name
        shapes = {selected[name].shape for name in group.members}
        if len(shapes) > 1:
            raise UserError(
                f"Group `{group.name}` of the plan mixes the shapes {sorted(shapes)}; only equal ones share"
            )
        if group.start == "spectral":
            _check_start(plan, group, selected[group.members[0]].shape)


def _check_start(plan: Plan, group: Group, shape: tuple[int, int]) -> None:
    rows, cols = shape
    expected = (cols if group.side == "input" else rows, plan.settings.rank)
    start = plan.starts.get(group.name)
    if start is None:
        raise UserError(
            f'Group `{group.name}` has no spectral start in the plan\'s tensors; write "start": "random" for it, '
            "or make a new plan with `sgm plan`"
        )
    if tuple(start.shape) != expected:
        raise UserError(
            f"The start of group `{group.name}` is {'x'.join(map(str, start.shape))}, its factor "
            f"{'x'.join(map(str, expected))} (d x adapter.rank); make a new plan with `sgm plan`"
        )


def _start(model: PeftModel, group: Group, plan: Plan) -> None:
    """Eq. 15: the shared factor's r directions are the group's basis, each scaled to 1/√3, the length that PEFT's
    own start gives a row of lora_A on average; the other factor is zero."""
    layers = lora_layers(model)
    own_name = _FACTORS["output" if group.side == "input" else "input"]
    for name in group.members:
        shared, own = _factor(layers, name, group), getattr(layers[name], own_name)[ADAPTER]
        with torch.no_grad():
            if group.start == "spectral":
                basis = plan.starts[group.name].to(shared.weight) / math.sqrt(3)
                shared.weight.copy_(basis.T if group.side == "input" else basis)
                own.weight.zero_()
            elif group.side == "output":
                # PEFT starts lora_B at zero: a shared random lora_B needs the mirrored start
                nn.init.kaiming_uniform_(shared.weight.T, a=math.sqrt(5))
                own.weight.zero_()


def lora_layers(model: PeftModel) -> dict[str, nn.Module]:
    """Name in the base model -> LoRA layer, in named_modules() order."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def _factor(layers: dict[str, nn.Module], name: str, group: Group) -> nn.Linear:
    return getattr(layers[name], _FACTORS[group.side])[ADAPTER]


def task_type(model: nn.Module) -> TaskType | None:
    """PEFT's task type, which decides that a new classification head is trained and saved whole."""
    endings = {
        "ForCausalLM": TaskType.CAUSAL_LM,
        "LMHeadModel": TaskType.CAUSAL_LM,
        "ForSequenceClassification": TaskType.SEQ_CLS,
    }
    return next((task for ending, task in endings.items() if type(model).__name__.endswith(ending)), None)
