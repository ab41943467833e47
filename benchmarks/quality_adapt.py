"""What every method of benchmarks/quality.py is made of: the base model, the adapted model, and its optimizers.

Every method adapts all linear layers inside the model's blocks unless its name says otherwise. A method's rank (or the
number that sets its size) is the largest one whose trained adapter parameters stay within the task's budget: plain
LoRA's at the task's rank. "Equal bytes" counts trained parameters and optimizer states together instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from sgm_finetune.base.config import Config
from sgm_finetune.base.config_file import parse_config, set_overrides
from sgm_finetune.base.console import StepLog
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.train.adapters.apply import task_type
from sgm_finetune.train.fast.head_loss import HeadLoss

Rates = tuple[float, ...]
Optimizers = Callable[[float], list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Base:
    """The base model and the data that every method starts from."""

    name: str
    """Name of the task."""
    config: Config
    prepared: PreparedData
    model: nn.Module
    log: StepLog
    budget: int
    """Largest number of trained adapter parameters."""
    seed: int

    def with_overrides(self, *overrides: str) -> Config:
        values = self.config.model_dump(mode="json")
        return parse_config(values, "quality.py", set_overrides(values, list(overrides), "quality.py"))


@dataclass(frozen=True)
class Adapted:
    model: nn.Module
    optimizers: Optimizers
    """Learning rate -> optimizers of the adapter's parameters."""
    rank: int | None
    seconds: float = 0.0
    """Time of the measurements before the first step."""
    energy_retained: float | None = None
    """`energy_retained` of the plan; None for a method without one."""
    head_loss: HeadLoss | None = None
    """Computes the loss in parts; None when the method uses the model's logits."""


@dataclass(frozen=True)
class Method:
    """One method, and the learning rates that validation chooses from."""

    name: str
    rates: Rates
    adapt: Callable[[Base], Adapted]
    default: Callable[[int, int], float] | None = None
    """Rank and steps -> the rate that users get without tuning; it is measured on test data, the best one or not."""


def budget_of(model: nn.Module, rank: int) -> int:
    """Number of parameters of plain LoRA on every linear layer."""
    return sum(rank * sum(matrix.shape) for matrix in adaptable(model).values())


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of a new classification head; every method trains it whole and no budget counts it."""
    mark = "modules_to_save" if hasattr(model, "peft_config") else "classifier."
    return [p for name, p in model.named_parameters() if p.requires_grad and mark in name]


def adapter_only(model: nn.Module) -> list[nn.Parameter]:
    heads = {id(p) for p in head_parameters(model)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in heads]


def peft_method(
    name: str,
    rates: Rates,
    settings: Callable[[int, list[str]], PeftConfig],
    fixed: int | None = None,
    falling: bool = False,
    capped: bool = False,
    prepare: Callable[[Base, PeftConfig], None] | None = None,
    choose: Callable[[Base], list[str]] = lambda base: list(adaptable(base.model)),
    share: float = 1.0,
) -> Method:
    """A method of PEFT, from its configuration `settings(rank, layers)`.

    The rank is fitted to `share` of the budget unless it is `fixed`; `falling`: a larger rank trains fewer parameters;
    `capped`: from some rank on the parameters stay as many, and a budget above them takes that rank.
    """

    def adapt(base: Base) -> Adapted:
        layers = choose(base)
        rank = fixed or fitted_rank(
            lambda r: shape_count(base.model, settings(r, layers)), share * base.budget, falling, capped
        )
        chosen = settings(rank, layers)
        chosen.task_type = task_type(base.model)
        if prepare is not None:
            prepare(base, chosen)
        model = get_peft_model(base.model, chosen)  # type: ignore[arg-type]
        return Adapted(model, adamw(model), rank)

    return Method(name, rates, adapt)


def adamw(model: nn.Module) -> Optimizers:
    return lambda rate: [torch.optim.AdamW(adapter_only(model), lr=rate, weight_decay=0.0)]


def shape_count(model: nn.Module, settings: PeftConfig) -> int:
    """Number of adapter parameters that a configuration trains, counted on a copy of the layers without weights."""
    with torch.device("meta"):
        skeleton = nn.ModuleDict()
        for name, matrix in adaptable(model).items():
            rows, cols = matrix.shape
            place = skeleton
            *parents, leaf = name.split(".")
            for parent in parents:
                if parent not in place:
                    place[parent] = nn.ModuleDict()
                place = place[parent]  # type: ignore[assignment]
            place[leaf] = nn.Linear(cols, rows, bias=matrix.module.bias is not None)
        adapted = get_peft_model(skeleton, settings)  # type: ignore[arg-type]
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


class OverBudgetError(ValueError):
    """The smallest size of a method trains more parameters than the budget allows."""


def fitted_rank(count: Callable[[int], int], budget: float, falling: bool = False, capped: bool = False) -> int:
    """The rank whose count is nearest to the budget from below; counts rise with the rank, or fall if `falling`.

    `capped`: a rank whose double counts the same is the largest one that is tried. Raises OverBudgetError where
    the smallest size is too large, and ValueError where no rank comes near the budget.
    """

    def fits(rank: int) -> bool:
        return (count(rank) <= budget) is not falling

    if not falling and not fits(1):
        raise OverBudgetError(f"{count(1):,} trained parameters at least, for a budget of {budget:,.0f}")
    low, high = 1, 2
    while fits(high):
        if capped and count(low) == count(high):
            return low
        low, high = high, 2 * high
        if high > 2**20:
            raise ValueError(f"no rank comes near the budget of {budget:,.0f}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return high if falling else low


def lora(rank: int, layers: list[str], **changes) -> LoraConfig:
    return LoraConfig(**{"r": rank, "lora_alpha": 2 * rank, "target_modules": layers, **changes})


ADAMW: Rates = (5e-4, 1.5e-3, 4e-3)
LORA = peft_method("LoRA", ADAMW, lora)
