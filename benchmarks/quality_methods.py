"""The methods of benchmarks/quality.py: how each adapts a base model, and what steps it takes.

All adapt every linear layer inside the model's blocks. Where a method has a rank it is the largest whose trained
adapter parameters stay within the task's budget, that of plain LoRA at the task's rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from peft import LilyConfig, LoraConfig, MissConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn

from sgm_finetune.adapters.apply import apply_plan
from sgm_finetune.adapters.descent import FactorDescent, factor_pairs
from sgm_finetune.config import Config, parse_config, set_overrides
from sgm_finetune.method.plan import adapter_parameters
from sgm_finetune.models import linear_layers, matrix_shape
from sgm_finetune.pipeline import Clock, Materials, measure, scan_model
from sgm_finetune.voice import Voice

Rates = tuple[float, float, float]


@dataclass(frozen=True)
class Base:
    """What every method starts from."""

    config: Config
    materials: Materials
    model: nn.Module
    voice: Voice
    budget: int
    """Trained adapter parameters, at most."""

    def with_overrides(self, *overrides: str) -> Config:
        values = self.config.model_dump(mode="json")
        return parse_config(values, "quality.py", set_overrides(values, list(overrides)))


@dataclass(frozen=True)
class Adapted:
    model: PeftModel
    optimizers: Callable[[float], list[torch.optim.Optimizer]]
    """Of the adapter's parameters, for a learning rate."""
    rank: int | None
    seconds: float = 0.0
    """Of measuring, before the first step."""


@dataclass(frozen=True)
class Method:
    """One method, and the learning rates that are tried on validation."""

    name: str
    rates: Rates
    adapt: Callable[[Base], Adapted]


def budget_of(model: nn.Module, rank: int) -> int:
    """Parameters of plain LoRA on every linear layer."""
    return sum(rank * sum(matrix_shape(layer)) for layer in linear_layers(model).values())


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A new classification head, which every method trains whole and which no budget counts."""
    return [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]


def adapter_only(model: nn.Module) -> list[nn.Parameter]:
    heads = {id(p) for p in head_parameters(model)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in heads]


def peft_method(name: str, rates: Rates, settings: Callable[[int, list[str]], PeftConfig], fixed: int | None = None):
    """A method of PEFT. `settings(rank, layers)`; a `fixed` rank is not fitted to the budget."""

    def adapt(base: Base) -> Adapted:
        layers = list(linear_layers(base.model))
        rank = fixed or fitted_rank(lambda r: shape_count(base.model, settings(r, layers)), base.budget)
        chosen = settings(rank, layers)
        chosen.task_type = task_type(base)
        model = get_peft_model(base.model, chosen)  # type: ignore[arg-type]
        return Adapted(model, adamw(model), rank)  # type: ignore[arg-type]

    return Method(name, rates, adapt)


def adamw(model: nn.Module) -> Callable[[float], list[torch.optim.Optimizer]]:
    return lambda rate: [torch.optim.AdamW(adapter_only(model), lr=rate, weight_decay=0.0)]


def descending(method: Method, name: str, rates: Rates, **settings) -> Method:
    """The same adapter, its factors moved by spectral descent."""

    def adapt(base: Base) -> Adapted:
        made = method.adapt(base)
        pairs = factor_pairs(made.model)
        return replace(made, optimizers=lambda rate: [FactorDescent(pairs, lr=rate, **settings)])

    return Method(name, rates, adapt)


def task_type(base: Base) -> str:
    return {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}[base.config.model.task]


def shape_count(model: nn.Module, settings: PeftConfig) -> int:
    """Adapter parameters that a configuration would train, on a copy of the layers without weights."""
    with torch.device("meta"):
        skeleton = nn.ModuleDict()
        for name, layer in linear_layers(model).items():
            rows, cols = matrix_shape(layer)
            place = skeleton
            *parents, leaf = name.split(".")
            for parent in parents:
                if parent not in place:
                    place[parent] = nn.ModuleDict()
                place = place[parent]  # type: ignore[assignment]
            place[leaf] = nn.Linear(cols, rows, bias=layer.bias is not None)
        adapted = get_peft_model(skeleton, settings)  # type: ignore[arg-type]
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def fitted_rank(count: Callable[[int], int], budget: int) -> int:
    """The largest rank within the budget; counts grow (about) linearly with the rank."""
    rank = max(1, int(8 * budget / count(8)))
    while rank > 1 and count(rank) > budget:
        rank -= 1
    while count(rank + 1) <= budget:
        rank += 1
    return rank


def plus(method: Method, name: str, rates: Rates, ratio: float = 16.0) -> Method:
    """LoRA+: lora_B learns `ratio` times as fast as lora_A (its paper's 2⁴)."""

    def adapt(base: Base) -> Adapted:
        made = method.adapt(base)
        named = [(n, p) for n, p in made.model.named_parameters() if p.requires_grad]
        first = [p for n, p in named if "lora_A" in n]
        second = [p for n, p in named if "lora_B" in n]

        def optimizers(rate: float) -> list[torch.optim.Optimizer]:
            groups = [{"params": first, "lr": rate}, {"params": second, "lr": ratio * rate}]
            return [torch.optim.AdamW(groups, weight_decay=0.0)]

        return replace(made, optimizers=optimizers)

    return Method(name, rates, adapt)


def merged(name: str, rates: Rates, *overrides: str) -> Method:
    """SGM: scan, probe, plan, apply; the rank is the largest whose plan is within the budget."""

    def adapt(base: Base) -> Adapted:
        clock = Clock()
        with clock.time("measure"):
            scanned = scan_model(base.config, base.materials.folder, base.voice, Clock())
            rank = base.config.adapter.rank
            plan = plan_at(base, scanned, rank, overrides)
            grown = max(rank, int(rank * base.budget / adapter_parameters(plan)[0]))
            while grown > rank:
                larger = plan_at(base, scanned, grown, overrides)
                if adapter_parameters(larger)[0] <= base.budget:
                    plan, rank = larger, grown
                    break
                grown -= 1
        model = apply_plan(base.model, plan)  # type: ignore[arg-type]
        return Adapted(model, adamw(model), rank, clock.seconds["measure"])

    return Method(name, rates, adapt)


def plan_at(base: Base, scanned, rank: int, overrides: Iterable[str]):
    sketch = max(base.config.probe.sketch_size, rank + 8)
    config = base.with_overrides(
        f"adapter.rank={rank}", f"adapter.alpha={2 * rank}", f"probe.sketch_size={sketch}", *overrides
    )
    return measure(config, base.model, scanned, base.materials, base.voice, Clock())[0]  # type: ignore[arg-type]


def lora(rank: int, layers: list[str], **changes) -> LoraConfig:
    return LoraConfig(**{"r": rank, "lora_alpha": 2 * rank, "target_modules": layers, **changes})


LORA = peft_method("LoRA", (5e-4, 1.5e-3, 4e-3), lora)
SGM = merged("SGM", (5e-4, 1.5e-3, 4e-3))
METHODS = {
    method.name: method
    for method in (
        LORA,
        peft_method("rsLoRA", (2e-4, 6e-4, 1.5e-3), lambda r, t: lora(r, t, use_rslora=True, lora_alpha=16)),
        plus(LORA, "LoRA+", (5e-5, 1.5e-4, 5e-4)),
        peft_method("VeRA", (5e-3, 1.5e-2, 4e-2), lambda r, t: VeraConfig(r=r, target_modules=t), fixed=256),
        peft_method(
            "Lily", (5e-4, 1.5e-3, 4e-3),
            lambda r, t: LilyConfig(r=r, target_modules=t, stride_A=3, num_B=3, scaling=2.0),
        ),
        peft_method("MiSS", (2e-4, 6e-4, 2e-3), lambda r, t: MissConfig(r=r, target_modules=t)),
        SGM,
        descending(LORA, "LoRA, factors", (5e-3, 1.5e-2, 4e-2), metric="none"),
        descending(LORA, "LoRA, partners", (5e-3, 1.5e-2, 4e-2), metric="partners"),
        descending(SGM, "SGM, factors", (5e-3, 1.5e-2, 4e-2), metric="none"),
        descending(SGM, "SGM, partners", (5e-3, 1.5e-2, 4e-2), metric="partners"),
    )
}  # fmt: skip
