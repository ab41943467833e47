"""Applies a plan: builds a plain PEFT LoRA model, then makes one parameter per group (docs/method.md section 4)."""

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
from sgm_finetune.method.pools import first_codes
from sgm_finetune.method.sides import Side, sides_of, width
from sgm_finetune.model.four_bit import ready_for_backward
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.train.adapters.pool import ADAPTER, make_pool


def apply_plan(model: PreTrainedModel, plan: Plan, new_modules: Sequence[str] = ()) -> PeftModel:
    """Returns a PeftModel that trains what `plan` selects; the members of a group hold the same shared factor.

    `new_modules` are trained and saved whole, as PEFT's `modules_to_save`. Where the plan says so, a shared factor, or
    lora_A of a matrix without a group, starts at its spectral basis (eq. 15) and the other factor at zero, so the
    model's output does not change. All other factors start as in PEFT: a plan without groups and without spectral
    starts *is* plain PEFT LoRA, bit for bit. Any trainer that trains PEFT models trains this one. Raises UserError when
    the plan does not fit the model or lacks a start.
    """
    check_plan(model, plan)
    check_starts(plan)
    ready_for_backward(model)
    stacks = [matrix.name for matrix in plan.selected if matrix.num_experts is not None]
    layers = [matrix.name for matrix in plan.selected if matrix.num_experts is None]
    matrices = adaptable(model)
    config = LoraConfig(
        r=plan.settings.rank,
        lora_alpha=plan.settings.alpha,  # type: ignore[arg-type]  # PEFT accepts any number
        lora_dropout=plan.settings.dropout,
        target_modules=layers,
        target_parameters=stacks or None,
        task_type=task_type(model),
        modules_to_save=list(new_modules) or None,
        # PEFT would set it too, with a warning
        fan_in_fan_out=any(isinstance(matrices[name].module, Conv1D) for name in layers),
    )
    adapted = get_peft_model(model, config)
    # PEFT makes it a set, whose order differs between processes
    config.target_modules = sorted(config.target_modules or ())
    unplanned = set(lora_layers(adapted)) ^ {matrix.name for matrix in plan.selected}
    if unplanned:
        raise AssertionError(f"PEFT adapted other layers than planned: {sorted(unplanned)[:3]}")
    _set_starts(adapted, plan)
    tie(adapted, plan)
    layers_by_name = lora_layers(adapted)
    for pool in (group for group in plan.groups if group.side == "both"):
        make_pool([layers_by_name[name] for name in pool.members], first_codes(len(pool.members), plan.settings.rank))
    return adapted  # type: ignore[return-value]


def tie(model: PeftModel, plan: Plan) -> None:
    """Makes the factor that a group shares on one side one parameter, the first member's. Call it again after loading a
    checkpoint into a model that was built from the files alone. A pool is made once, by `apply_plan`."""
    layers = lora_layers(model)
    for group in plan.groups:
        if group.side == "both":
            continue
        owner, *others = (_factors(layers[name], group.side)[0] for name in group.members)
        for other in others:
            other.weight = owner.weight


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raises UserError unless every planned matrix exists in `model` with its shape and every group can be built."""
    matrices = adaptable(model)
    if not plan.selected:
        raise UserError("The plan selects no matrix; lower selection.snr_threshold or raise selection.top_fraction")
    for matrix in plan.matrices:
        if matrix.name not in matrices:
            raise UserError(
                f"The plan was made for another model ({plan.model}): this {type(model).__name__} has no "
                f"`{matrix.name}`; make a new plan with `sgm plan`"
            )
        found = matrices[matrix.name]
        if (found.shape, found.num_experts) != (tuple(matrix.shape), matrix.num_experts):
            raise UserError(
                f"The plan was made for another model ({plan.model}): `{matrix.name}` is "
                f"{_describe_shape(matrix.shape, matrix.num_experts)} in the plan and "
                f"{_describe_shape(found.shape, found.num_experts)} in this model; "
                "make a new plan with `sgm plan`"
            )
        if matrix.selected and matrix.num_experts is not None and plan.settings.dropout > 0:
            raise UserError(
                f"adapter.dropout={plan.settings.dropout} is not possible with experts (`{matrix.name}`), because PEFT "
                "does not see their inputs; set adapter.dropout=0"
            )
    if (wrong := inconsistency(plan)) is not None:
        raise UserError(f"The plan cannot be applied: {wrong}")


def _describe_shape(shape: tuple[int, int], num_experts: int | None) -> str:
    return "x".join(map(str, shape if num_experts is None else (num_experts, *shape)))


def check_starts(plan: Plan) -> None:
    """Raises UserError unless every group and matrix with a spectral start has a basis of the right shape."""
    for group in plan.groups:
        if group.start == "spectral":
            expected = width(plan.shape_of(group.members[0]), sides_of(group.side)[0])
            _check_start(plan, f"group `{group.name}`", group.name, expected)
    for matrix in plan.selected:
        if matrix.group is None and matrix.start == "spectral":
            _check_start(plan, f"`{matrix.name}`", matrix.name, matrix.shape[1])


def _check_start(plan: Plan, what: str, name: str, length: int) -> None:
    start, expected = plan.starts.get(name), (length, plan.settings.rank)
    if start is None:
        raise UserError(
            f'The plan\'s tensors hold no spectral start for {what}; set its "start" to "random" '
            "or make a new plan with `sgm plan`"
        )
    if tuple(start.shape) != expected:
        raise UserError(
            f"The start of {what} is {'x'.join(map(str, start.shape))}, but its factor is "
            f"{'x'.join(map(str, expected))} (d x adapter.rank); make a new plan with `sgm plan`"
        )


@torch.no_grad()
def _set_starts(model: PeftModel, plan: Plan) -> None:
    """Sets the start of every factor that does not start as in PEFT.

    Eq. 15: a group's shared factor, or lora_A of a matrix without a group, starts at its spectral basis. Each of the r
    directions is scaled to length 1/√3, which PEFT's own start gives a row of lora_A on average. The other factor
    starts at zero.
    """
    layers = lora_layers(model)
    for group in plan.groups:
        for name in group.members:
            if group.start == "spectral":
                _set_start(plan.starts[group.name], layers[name], sides_of(group.side)[0])
            elif group.side == "output":
                # PEFT starts lora_B at zero; a shared random lora_B needs the mirrored start
                shared, own = _factors(layers[name], group.side)
                nn.init.kaiming_uniform_(shared.weight.T, a=math.sqrt(5))
                own.weight.zero_()
    for matrix in plan.selected:
        if matrix.group is None and matrix.start == "spectral":
            _set_start(plan.starts[matrix.name], layers[matrix.name], "input")


def _set_start(basis: Tensor, layer: nn.Module, side: Side) -> None:
    factor, other = _factors(layer, side)
    scaled = basis.to(factor.weight) / math.sqrt(3)
    # the lora_A of a stack holds its experts' factors one below another
    factor.weight.copy_(scaled.T.repeat(num_experts(layer), 1) if side == "input" else scaled)
    other.weight.zero_()


def lora_layers(model: PeftModel) -> dict[str, nn.Module]:
    """Name in the base model -> LoRA layer, in named_modules() order. The layer of a stack of experts has the name of
    the stack's parameter; when a module has several stacks, PEFT nests one wrapper in another."""
    return {
        _base_name(name, module): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def _base_name(name: str, layer: nn.Module) -> str:
    """The name of what `layer` adapts, without PEFT's prefixes.

    >>> _base_name("base_model.model.layers.0.mlp.fc", nn.Module())
    'layers.0.mlp.fc'
    """
    plain = ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer")
    return f"{plain}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else plain


def num_experts(layer: nn.Module) -> int:
    """The number of pairs of factors that a LoRA layer holds. In a stack, lora_A is (experts·r) x d_in, expert by
    expert; lora_B is d_out x (r·experts), direction by direction."""
    return layer.num_experts if isinstance(layer, ParamWrapper) else 1


def _factors(layer: nn.Module, side: Side) -> tuple[nn.Linear, nn.Linear]:
    """The factor on `side` and the other one."""
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]  # type: ignore[index]
    return (a, b) if side == "input" else (b, a)  # type: ignore[return-value]


def task_type(model: nn.Module) -> TaskType | None:
    """PEFT's task type, which makes PEFT train and save a classification head whole.

    None for a model that does not accept `inputs_embeds`, which PEFT passes to models with a task type; then only the
    `new_modules` of `apply_plan` are trained and saved whole.
    """
    accepted = inspect.signature(model.forward).parameters
    if "inputs_embeds" not in accepted and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
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
