"""Spectral descent: a torch optimizer for LoRA factors, shared ones included (docs/method.md section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sgm_finetune.base.config import Optimizer
from sgm_finetune.base.device import check_has_float64
from sgm_finetune.base.errors import NotFiniteError
from sgm_finetune.method.descent import (
    channel_profile,
    code_steps,
    descent_directions,
    inverse_roots,
    largest_change,
    partner_floor,
    partner_metric,
    pool_metric,
)
from sgm_finetune.train.adapters.apply import ADAPTER, lora_layers, num_experts
from sgm_finetune.train.adapters.pool import codes_of, shared_b

_CHANNEL_MEMORY = 0.95
"""Weight of the past in the running mean of a factor's channels."""
HEAD_RATE = 1e-3
"""AdamW's learning rate for trained parameters that are not factors, such as a new classification head."""


@dataclass(frozen=True)
class Pair:
    """The two factors and the scaling of one layer's update; the layers of a group hold the same shared parameter.

    `a` is r x d_in and `b` is d_out x r. For a stack of experts, `a` is (experts·r) x d_in, expert by expert, and `b`
    is d_out x (r·experts), direction by direction, as PEFT stores them.
    """

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    num_experts: int = 1
    codes: nn.Parameter | None = None
    """c (1 x r) of a member of a pool, whose update is B·diag(c)·A."""

    @property
    def unit(self) -> float:
        """The spectral norm of B·D (or D·A) at which ΔW changes by 1 in the norm from RMS to RMS (eq. 17b)."""
        return math.sqrt(self.b.shape[0] / self.a.shape[1]) / self.scaling


def factor_pairs(model: PeftModel) -> list[Pair]:
    """The factors of every LoRA layer, in the model's order."""
    found = []
    for layer in lora_layers(model).values():
        a, b, scaling = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER], layer.scaling[ADAPTER]  # type: ignore
        found.append(Pair(a, shared_b(b), scaling, num_experts(layer), codes_of(b)))  # type: ignore[arg-type]
    return found


def create_optimizer(
    model: PeftModel, lr: float, head_lr: float = HEAD_RATE, weight_decay: float = 0.0
) -> FactorDescent:
    """Returns the optimizer of all parameters that `model` trains, for any trainer: `Trainer(optimizers=(it, None))`.

    LoRA factors take steps of `lr`, the norm from RMS to RMS of the change of ΔW. Other trained parameters, such as a
    new head, take AdamW's steps at `head_lr`. Schedules scale both rates. Build the optimizer after `apply_plan` and
    before a checkpoint is loaded.
    """
    pairs = factor_pairs(model)
    factors = {id(factor) for pair in pairs for factor in (pair.a, pair.b, pair.codes)}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in factors]
    return FactorDescent(pairs, lr, others=others, others_lr=head_lr, weight_decay=weight_decay)


class FactorDescent(torch.optim.Optimizer):
    """Momentum, then spectral descent on every factor (eq. 17).

    The step `lr` is the norm from RMS to RMS by which ΔW changes. The metric of a shared factor is the mean over its
    members; in a pool no member's ΔW changes by more than the step, and the codes take steps of their own (eq. 17d). No
    factor changes by more than about 1/`trust` of itself (eq. 18). The state of an r x d factor is its momentum and d
    running means (AdamW's: twice the factor). Factors of equal shape step together, in float32; each expert of a stack
    has its own step. AdamW steps the `others` at `others_lr`. Weight decay is decoupled, as in AdamW.
    `step` raises NotFiniteError, before any factor changes, when a gradient is not finite.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        lr: float,
        momentum: float = 0.9,
        trust: float = 10.0,
        others: Sequence[nn.Parameter] = (),
        others_lr: float = HEAD_RATE,
        weight_decay: float = 0.0,
    ):
        self.members: dict[nn.Parameter, tuple[str, list[Pair]]] = {}
        for pair in pairs:
            self.members.setdefault(pair.a, ("a", []))[1].append(pair)
            self.members.setdefault(pair.b, ("b", []))[1].append(pair)
        self.pooled = {pair.codes: pair for pair in pairs if pair.codes is not None}
        groups: list[dict[str, Any]] = [{"params": [*self.members, *self.pooled], "lr": lr}]
        if others:
            groups.append({"params": list(others), "lr": others_lr})
        super().__init__(groups, {"momentum": momentum, "weight_decay": weight_decay})
        self.trust = trust
        self._member_weight_cache: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factors, *others = self.param_groups
        for factor in factors["params"][:1]:
            check_has_float64(factor.device)
        self._step_factors(factors)
        for group in others:
            self._step_others(group)
        return loss

    def _step_factors(self, group: dict[str, Any]) -> None:
        buckets: dict[_Bucket, list[nn.Parameter]] = {}
        for factor in group["params"]:
            if factor.grad is not None and factor in self.members:
                buckets.setdefault(self._bucket(factor), []).append(factor)
        # checked before anything changes, and only once: on a GPU each check waits for all the work queued before it
        norm = nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
        if not torch.isfinite(norm):
            raise NotFiniteError(
                "A gradient is not finite; try a smaller training.learning_rate or model.dtype=float32"
            )
        grams = self._gram_matrices()
        metrics, pools = [], {}
        for bucket, factors in buckets.items():
            own = torch.stack([grams[f] for f in factors])
            floor = partner_floor(_mean_square(own), group["lr"] * bucket.unit, self.trust)
            if bucket.pooled:
                pools[bucket] = self._partner_and_codes(factors, grams)
                gram = pool_metric(*pools[bucket])
            else:
                gram = self._partner_gram(factors, grams)
            metrics.append(partner_metric(gram, floor))
        roots = inverse_roots(metrics)
        peaks = {b: largest_change(root, *pools[b]) for b, root in zip(buckets, roots, strict=True) if b.pooled}
        codes = self._code_steps(group, grams)
        directions = descent_directions(self._step_inputs(buckets, roots, group["momentum"]))
        # all directions are computed before any factor changes, so A and B step from the same point
        for (bucket, factors), steps in zip(buckets.items(), directions, strict=True):
            steps *= group["lr"] * bucket.unit
            if bucket.pooled:
                steps /= peaks[bucket]
            if group["weight_decay"]:
                torch._foreach_mul_(factors, 1 - group["lr"] * group["weight_decay"])  # type: ignore
            torch._foreach_sub_(factors, [pack_factor(bucket.side, step) for step in steps.unbind()])  # type: ignore
        if codes:
            torch._foreach_sub_(list(codes), list(codes.values()))  # type: ignore

    def _code_steps(self, group: dict[str, Any], grams: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The step of each pool member's codes (eq. 17d)."""
        steps = {}
        for codes, pair in self.pooled.items():
            if codes.grad is None:
                continue
            moved = self._update_means("momentum", [codes], codes.grad.float()[None], group["momentum"])[0]
            moved = moved.lerp(codes.grad.float(), 1 - group["momentum"])
            loudness = grams[pair.a].diagonal(dim1=-2, dim2=-1)[0] * grams[pair.b].diagonal(dim1=-2, dim2=-1)[0]
            size = group["lr"] * pair.unit
            floor = partner_floor(codes.float().square().mean(), size, self.trust)
            steps[codes] = code_steps(moved, loudness, floor, size)
        return steps

    def _step_inputs(
        self, buckets: dict[_Bucket, list[nn.Parameter]], roots: Sequence[Tensor], momentum: float
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Updates the running means and yields (Nesterov's look-ahead, S⁻¹, channels) for each bucket."""
        for (bucket, factors), root in zip(buckets.items(), roots, strict=True):
            gradients = torch.stack([unpack_factor(bucket.side, f.grad.float(), bucket.experts) for f in factors])  # type: ignore[union-attr]
            moved = self._update_means("momentum", factors, gradients, momentum)
            channels = self._update_means("channels", factors, channel_profile(root @ gradients), _CHANNEL_MEMORY)
            yield moved.lerp_(gradients, 1 - momentum), root, channels

    def _update_means(self, name: str, factors: list[nn.Parameter], values: Tensor, memory: float) -> Tensor:
        """Updates the factors' running means called `name` by `values`, (n, ...), and returns a copy of them."""
        means = []
        for factor, value in zip(factors, values, strict=True):
            state = self.state[factor]
            if name not in state:
                state[name] = torch.zeros_like(value)
            means.append(state[name])
        torch._foreach_lerp_(means, list(values.unbind()), 1 - memory)  # type: ignore
        return torch.stack(means)

    def _step_others(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],  # type: ignore[misc]  # not None
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )

    def _bucket(self, factor: nn.Parameter) -> _Bucket:
        side, pairs = self.members[factor]
        pooled = pairs[0].codes is not None
        return _Bucket(side, pairs[0].num_experts, factor.shape, self._unit(factor), len(pairs), pooled)

    def _unit(self, factor: nn.Parameter) -> float:
        """The first member's unit; `_partner_gram` converts the other members to it."""
        return self.members[factor][1][0].unit

    def _gram_matrices(self) -> dict[nn.Parameter, Tensor]:
        """Factor -> its Gram matrix A·Aᵀ or Bᵀ·B, experts x r x r."""
        alike: dict[tuple[str, int, torch.Size], list[nn.Parameter]] = {}
        for factor, (side, pairs) in self.members.items():
            alike.setdefault((side, pairs[0].num_experts, factor.shape), []).append(factor)
        grams: dict[nn.Parameter, Tensor] = {}
        for (side, experts, _), factors in alike.items():
            rows = torch.stack([unpack_factor(side, f.float(), experts) for f in factors])
            grams.update(zip(factors, (rows @ rows.mT).unbind(), strict=True))
        return grams

    def _partner_and_codes(
        self, factors: list[nn.Parameter], grams: dict[nn.Parameter, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Of pools: the Gram matrix of the other factor (n x 1 x r x r), and the codes (n x 1 x members x r)."""
        members = [self.members[f] for f in factors]
        others = [grams[pairs[0].b if side == "a" else pairs[0].a] for side, pairs in members]
        codes = [torch.cat([pair.codes for pair in pairs]) for _, pairs in members]  # type: ignore[misc]  # in pools
        return torch.stack(others), torch.stack(codes).float().unsqueeze(1)

    def _partner_gram(self, factors: list[nn.Parameter], grams: dict[nn.Parameter, Tensor]) -> Tensor:
        """Mean Gram matrix of each factor's partners (n x experts x r x r), each partner in its own layer's unit."""
        members = [self.members[f] for f in factors]
        partners = [grams[pair.b if side == "a" else pair.a] for side, pairs in members for pair in pairs]
        gram = torch.stack(partners).unflatten(0, (len(factors), -1))
        if gram.shape[1] > 1:
            gram = gram * self._member_weights(factors, gram.device)
        return gram.mean(1)

    def _member_weights(self, factors: list[nn.Parameter], device: torch.device) -> Tensor:
        """How much the change of each member counts, (n, members, 1, 1, 1). Cached, because making it blocks a GPU."""
        key = tuple(map(id, factors))
        if key not in self._member_weight_cache:
            weights = [[(self._unit(f) / pair.unit) ** 2 for pair in self.members[f][1]] for f in factors]
            self._member_weight_cache[key] = torch.tensor(weights, dtype=torch.float32, device=device)[
                ..., None, None, None
            ]
        return self._member_weight_cache[key]


def state_bytes(trained: Iterable[nn.Parameter], optimizer: Optimizer) -> int:
    """Bytes of the state that `optimizer` holds for the `trained` parameters after its first step.

    Spectral descent holds 4 bytes for each number of a factor and for each of its channels (`FactorDescent`). AdamW
    holds 8 bytes a number. AdamW in 8 bits holds 2 bytes a number, plus scales that are not counted here, and 8 bytes a
    number for tensors of less than 4,096 numbers, which bitsandbytes keeps in 32 bits. Does not cover stacks of
    experts; counts a matrix that is not a factor (a new head's) as if it were one.
    """
    match optimizer:
        case "adamw":
            return sum(8 * p.numel() for p in trained)
        case "adamw_8bit" | "paged_adamw_8bit":
            return sum(2 * p.numel() if p.numel() >= 4096 else 8 * p.numel() for p in trained)
        case "spectral":
            return sum(4 * (p.numel() + max(p.shape)) if p.dim() == 2 else 8 * p.numel() for p in trained)
        case _:
            raise AssertionError(f"{optimizer} trains no factors")


def workspace_bytes(trained: Iterable[nn.Parameter]) -> int:
    """Bytes that a step of `FactorDescent` needs beside its state: the directions of all factors, and about five
    tensors as large as the factors of one shape, which step together."""
    buckets: dict[torch.Size, int] = {}
    for parameter in trained:
        buckets[parameter.shape] = buckets.get(parameter.shape, 0) + 4 * parameter.numel()
    return sum(buckets.values()) + 5 * max(buckets.values(), default=0)


class _Bucket(NamedTuple):
    """What the factors that step together have in common."""

    side: str
    experts: int
    shape: torch.Size
    unit: float
    num_members: int
    pooled: bool


def unpack_factor(side: str, factor: Tensor, experts: int = 1) -> Tensor:
    """A factor as experts x r x d, unpacked from PEFT's layout.

    >>> unpack_factor("b", torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), experts=2).tolist()
    [[[1, 5], [3, 7]], [[2, 6], [4, 8]]]
    """
    if side == "a":
        return factor.unflatten(0, (experts, -1))
    return factor.unflatten(1, (-1, experts)).permute(2, 1, 0)


def pack_factor(side: str, factors: Tensor) -> Tensor:
    """A factor in PEFT's layout: the inverse of `unpack_factor`."""
    return factors.flatten(0, 1) if side == "a" else factors.permute(2, 1, 0).flatten(1, 2)


def _mean_square(gram: Tensor) -> Tensor:
    """Mean squared singular value, (..., 1, 1)."""
    return gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
