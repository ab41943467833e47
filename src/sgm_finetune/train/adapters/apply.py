"""Applying a plan: a plain PEFT LoRA model, then one parameter per group (docs/method.md section 4)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sgm_finetune.base.errors import UserError
from sgm_finetune.method.plan import Plan
from sgm_finetune.method.plan_rules import inconsistency
from sgm_finetune.method.subspace import Side, width
from sgm_finetune.model.four_bit import ready_for_backward
from sgm_finetune.model.matrices import adaptable

ADAPTER = "default"


def apply_plan(model: PreTrainedModel, plan: Plan, new_modules: Sequence[str] = ()) -> PeftModel:
    """A PeftModel that trains what `plan` selects; the members of a group hold one and the same shared factor.
    `new_modules` are trained and saved whole, as PEFT's `modules_to_save`.

    A shared factor, and lora_A of a matrix without a group, starts at its spectral basis (eq. 15) where the plan says
    so, the other factors at zero, so that the model's output does not change; the rest starts as in PEFT (a plan
    without groups and spectral starts *is* plain PEFT LoRA, bit for bit). Any trainer that trains PEFT models trains
    this one. Raises UserError when the plan does not fit the model, or lacks a start.
    """
    check_plan(model, plan)
    check_starts(plan)
    ready_for_backward(model)
    stacks = [matrix.name for matrix in plan.selected if matrix.num_experts is not None]
    layers = [matrix.name for matrix in plan.selected if matrix.num_experts is None]
    there = adaptable(model)
    config = LoraConfig(
        r=plan.settings.rank,
        lora_alpha=plan.settings.alpha,  # type: ignore[arg-type]  # PEFT scales by any number
        lora_dropout=plan.settings.dropout,
        target_modules=layers,
        target_parameters=stacks or None,
        task_type=task_type(model),
        modules_to_save=list(new_modules) or None,
        fan_in_fan_out=any(isinstance(there[name].module, Conv1D) for name in layers),  # else PEFT warns, and does it
    )
    adapted = get_peft_model(model, config)
    config.target_modules = sorted(config.target_modules or ())  # PEFT's set has another order in each process
    reached = set(lora_layers(adapted)) ^ {matrix.name for matrix in plan.selected}
    if reached:
        raise AssertionError(f"PEFT adapted other layers than planned: {sorted(reached)[:3]}")
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
    there = adaptable(model)
    what = type(model).__name__
    if not plan.selected:
        raise UserError("The plan selects no matrix; lower selection.snr_threshold or raise selection.top_fraction")
    for matrix in plan.matrices:
        if matrix.name not in there:
            raise UserError(
                f"The plan was made for another model ({plan.model}): this {what} has no `{matrix.name}`; "
                "make a new one with `sgm plan`"
            )
        found = there[matrix.name]
        if (found.shape, found.num_experts) != (tuple(matrix.shape), matrix.num_experts):
            raise UserError(
                f"The plan was made for another model ({plan.model}): `{matrix.name}` is "
                f"{_size(matrix.shape, matrix.num_experts)} there and {_size(found.shape, found.num_experts)} here; "
                "make a new one with `sgm plan`"
            )
        if matrix.selected and matrix.num_experts is not None and plan.settings.dropout > 0:
            raise UserError(
                f"adapter.dropout={plan.settings.dropout} is not possible with experts (`{matrix.name}`), whose inputs "
                "PEFT does not see; take adapter.dropout=0"
            )
    if (wrong := inconsistency(plan)) is not None:
        raise UserError(f"The plan cannot be followed: {wrong}")


def _size(shape: tuple[int, int], num_experts: int | None) -> str:
    return "x".join(map(str, shape if num_experts is None else (num_experts, *shape)))


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
    # a stack's lora_A is its experts' one below another
    factor.weight.copy_(scaled.T.repeat(num_experts(layer), 1) if side == "input" else scaled)
    other.weight.zero_()


def lora_layers(model: PeftModel) -> dict[str, nn.Module]:
    """Name in the base model -> LoRA layer, in named_modules() order. A stack's is named like its parameter; where a
    module has several, PEFT's wrappers lie one in another."""
    return {
        _base_name(name, module): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def _base_name(name: str, layer: nn.Module) -> str:
    """
    >>> _base_name("base_model.model.layers.0.mlp.fc", nn.Module())
    'layers.0.mlp.fc'
    """
    plain = ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer")
    return f"{plain}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else plain


def num_experts(layer: nn.Module) -> int:
    """How many pairs of factors a LoRA layer holds: lora_A is (experts·r) x d_in, expert by expert; lora_B is
    d_out x (r·experts), direction by direction."""
    return layer.num_experts if isinstance(layer, ParamWrapper) else 1


def _factors(layer: nn.Module, side: Side) -> tuple[nn.Linear, nn.Linear]:
    """The factor on `side`, and the other one."""
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]  # type: ignore[index]
    return (a, b) if side == "input" else (b, a)  # type: ignore[return-value]


def task_type(model: nn.Module) -> TaskType | None:
    """PEFT's task type, which decides that a classification head is trained and saved whole. None where the model does
    not take `inputs_embeds`, which PEFT passes on for a task: then new modules alone are."""
    taken = inspect.signature(model.forward).parameters
    if "inputs_embeds" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return None
    endings = {
        "ForCausalLM": TaskType.CAUSAL_LM,
        "LMHeadModel": TaskType.CAUSAL_LM,
        "ForSequenceClassification": TaskType.SEQ_CLS,
        "ForTokenClassification": TaskType.TOKEN_CLS,
    }
    found = next((task for ending, task in endings.items() if type(model).__name__.endswith(ending)), None)
    if found is None and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return TaskType.SEQ_2_SEQ_LM
    return found
