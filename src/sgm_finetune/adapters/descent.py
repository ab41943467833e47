"""A torch optimizer for LoRA factors, shared ones included: spectral descent (docs/method.md section 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn

from sgm_finetune.adapters.apply import ADAPTER, lora_layers
from sgm_finetune.method.descent import descent_direction, partner_floor, polar_factor

Metric = Literal["partners", "none"]


@dataclass(frozen=True)
class Pair:
    """The two factors of one layer's update and its scaling; layers of a group hold the same parameter."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float


def factor_pairs(model: PeftModel) -> list[Pair]:
    """Every LoRA layer's factors, in the model's order."""
    return [
        Pair(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER])  # type: ignore
        for layer in lora_layers(model).values()
    ]


class FactorDescent(torch.optim.Optimizer):
    """Momentum, then spectral descent on every factor; one state tensor a factor (AdamW: two).

    `metric="partners"`: the step `lr` is the spectral norm of the change of ΔW (eq. 17), the metric of a shared factor
    the mean over its members; no factor changes by more than about 1/`trust` of itself (eq. 18). `metric="none"`: each
    factor moves by `lr` in spectral norm (eq. 16). Factors of equal shape step together, in float32. ValueError for
    another metric.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        lr: float,
        momentum: float = 0.95,
        metric: Metric = "partners",
        trust: float = 10.0,
    ):
        if metric not in get_args(Metric):
            raise ValueError(f"the metric is {metric!r}; it is one of {', '.join(get_args(Metric))}")
        self.members: dict[nn.Parameter, tuple[str, list[Pair]]] = {}
        for pair in pairs:
            self.members.setdefault(pair.a, ("a", []))[1].append(pair)
            self.members.setdefault(pair.b, ("b", []))[1].append(pair)
        super().__init__(list(self.members), {"lr": lr, "momentum": momentum})
        self.metric, self.trust = metric, trust

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grams: dict[nn.Parameter, Tensor] = {}
        planned: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            buckets: dict[tuple[str, torch.Size, float], list[nn.Parameter]] = {}
            for factor in group["params"]:
                if factor.grad is not None:
                    side, pairs = self.members[factor]
                    buckets.setdefault((side, factor.shape, pairs[0].scaling), []).append(factor)
            for (side, _, scaling), factors in buckets.items():
                moved = torch.stack([_laid(side, self._momentum(f, group["momentum"])) for f in factors])
                if self.metric == "none":
                    steps = group["lr"] * polar_factor(moved)
                else:
                    step = group["lr"] / scaling
                    metric = torch.stack([self._metric(f, grams) for f in factors])
                    own = torch.stack([_gram(side, f, grams) for f in factors])
                    steps = step * descent_direction(moved, metric, partner_floor(_mean_square(own), step, self.trust))
                planned += [(f, s if side == "a" else s.mT) for f, s in zip(factors, steps, strict=True)]
        for factor, change in planned:  # both factors step from where both were
            factor.sub_(change.to(factor.dtype))
        return loss

    def _momentum(self, factor: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's look ahead of the running mean of the gradients."""
        assert factor.grad is not None
        state, gradient = self.state[factor], factor.grad.float()
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return state["momentum"].lerp(gradient, 1 - momentum)

    def _metric(self, factor: nn.Parameter, grams: dict[nn.Parameter, Tensor]) -> Tensor:
        """Mean Gram matrix (r x r) of the factor's partners."""
        side, pairs = self.members[factor]
        partners = [_gram("b", pair.b, grams) if side == "a" else _gram("a", pair.a, grams) for pair in pairs]
        return torch.stack(partners).mean(0)


def _laid(side: str, factor: Tensor) -> Tensor:
    """r rows first."""
    return factor if side == "a" else factor.mT


def _gram(side: str, factor: nn.Parameter, grams: dict[nn.Parameter, Tensor]) -> Tensor:
    """A·Aᵀ or Bᵀ·B, computed once a step."""
    if factor not in grams:
        laid = _laid(side, factor.float())
        grams[factor] = laid @ laid.mT
    return grams[factor]


def _mean_square(gram: Tensor) -> Tensor:
    """Mean squared singular value, (..., 1, 1)."""
    return gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
