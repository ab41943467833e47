"""Applying a plan: a plain PEFT LoRA model, then one parameter per group (docs/method.md section 4)."""

from __future__ import annotations

import math

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from sgm_finetune.errors import UserError
from sgm_finetune.method.plan import Plan
from sgm_finetune.method.subspace import Side, width
from sgm_finetune.models import linear_layers, matrix_shape, ready_for_backward

ADAPTER = "default"


def apply_plan(model: PreTrainedModel, plan: Plan) -> PeftModel:
    """A PeftModel that trains what `plan` selects; the members of a group hold one and the same shared factor.

    A shared factor, and lora_A of a matrix without a group, starts at its spectral basis (eq. 15) where the plan says
    so, the other factors at zero, so that the model's output does not change; the rest starts as in PEFT (a plan
    without groups and spectral starts *is* plain PEFT LoRA, bit for bit). Any trainer that trains PEFT models trains
    this one. Raises UserError when the plan does not fit the model, or lacks a start.
    """
    check_plan(model, plan)
    check_starts(plan)
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
    _start(adapted, plan)
    tie(adapted, plan)
    return adapted  # type: ignore[return-value]


def tie(model: PeftModel, plan: Plan) -> None:
    """Makes every group's shared factor one parameter: its first member's. To be called again where a checkpoint was
    loaded into a model built from the files alone."""
    layers = lora_layers(model)
    for group in plan.groups:
        owner, *others = (_factors(layers[name], group.side)[0] for name in group.members)
        for other in others:
            other.weight = owner.weight


def shared_factors(model: PeftModel, plan: Plan) -> dict[str, list[nn.Parameter]]:
    """Group name -> the members' shared factor, as each member holds it (equal objects when tied)."""
    layers = lora_layers(model)
    return {
        group.name: [_factors(layers[name], group.side)[0].weight for name in group.members]  # type: ignore[misc]
        for group in plan.groups
    }


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
        widths = {width(selected[name].shape, group.side) for name in group.members}
        if len(widths) > 1:
            raise UserError(
                f"Group `{group.name}` of the plan mixes {group.side} widths {sorted(widths)}; only equal ones share"
            )


def check_starts(plan: Plan) -> None:
    """Raises UserError unless every group and matrix that starts at a spectrum has one of the right shape."""
    for group in plan.groups:
        if group.start == "spectral":
            expected = width(plan.shape_of(group.members[0]), group.side)
            _check_start(plan, f"group `{group.name}`", group.name, expected)
    for matrix in plan.selected:
        if matrix.group is None and matrix.start == "spectral":
            _check_start(plan, f"`{matrix.name}`", matrix.name, matrix.shape[1])


def _check_start(plan: Plan, what: str, name: str, length: int) -> None:
    start, expected = plan.starts.get(name), (length, plan.settings.rank)
    if start is None:
        raise UserError(
            f'The plan\'s tensors hold no spectral start for {what}; write "start": "random" for it, '
            "or make a new plan with `sgm plan`"
        )
    if tuple(start.shape) != expected:
        raise UserError(
            f"The start of {what} is {'x'.join(map(str, start.shape))}, its factor {'x'.join(map(str, expected))} "
            "(d x adapter.rank); make a new plan with `sgm plan`"
        )


@torch.no_grad()
def _start(model: PeftModel, plan: Plan) -> None:
    """Eq. 15: the r directions of a group's shared factor, or of a lone matrix's lora_A, are its spectral basis, each
    scaled to 1/√3, the length that PEFT's own start gives a row of lora_A on average; the other factor is zero."""
    layers = lora_layers(model)
    for group in plan.groups:
        for name in group.members:
            if group.start == "spectral":
                _start_at(plan.starts[group.name], layers[name], group.side)
            elif group.side == "output":
                # PEFT starts lora_B at zero: a shared random lora_B needs the mirrored start
                shared, own = _factors(layers[name], group.side)
                nn.init.kaiming_uniform_(shared.weight.T, a=math.sqrt(5))
                own.weight.zero_()
    for matrix in plan.selected:
        if matrix.group is None and matrix.start == "spectral":
            _start_at(plan.starts[matrix.name], layers[matrix.name], "input")


def _start_at(basis: Tensor, layer: nn.Module, side: Side) -> None:
    factor, other = _factors(layer, side)
    scaled = basis.to(factor.weight) / math.sqrt(3)
    factor.weight.copy_(scaled.T if side == "input" else scaled)
    other.weight.zero_()


def lora_layers(model: PeftModel) -> dict[str, nn.Module]:
    """Name in the base model -> LoRA layer, in named_modules() order."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def _factors(layer: nn.Module, side: Side) -> tuple[nn.Linear, nn.Linear]:
    """The factor on `side`, and the other one."""
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]  # type: ignore[index]
    return (a, b) if side == "input" else (b, a)  # type: ignore[return-value]


def task_type(model: nn.Module) -> TaskType | None:
    """PEFT's task type, which decides that a new classification head is trained and saved whole."""
    endings = {
        "ForCausalLM": TaskType.CAUSAL_LM,
        "LMHeadModel": TaskType.CAUSAL_LM,
        "ForSequenceClassification": TaskType.SEQ_CLS,
    }
    return next((task for ending, task in endings.items() if type(model).__name__.endswith(ending)), None)
