"""The methods that benchmarks/quality.py compares ours with: those of PEFT, and three written from their papers.

RaSA (arXiv 2503.12576) shares a pool of directions and keeps a part of its own. LoRA-RITE (arXiv 2410.20625) and
LoRA-Muon (arXiv 2606.12921) are optimizers of plain LoRA's factors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from peft import (
    HiraConfig,
    IA3Config,
    LilyConfig,
    LoKrConfig,
    LoraGAConfig,
    MissConfig,
    PeftConfig,
    PsoftConfig,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora.loraga import preprocess_loraga
from quality_adapt import ADAMW, LORA, Adapted, Base, Method, Rates, adamw, fitted_rank, lora, peft_method
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sgm_finetune.measure.probe_batches import probe_batches
from sgm_finetune.method.descent import descent_directions, inverse_root
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.train.adapters.apply import lora_layers, task_type
from sgm_finetune.train.adapters.optimizer import Pair, factor_pairs
from sgm_finetune.train.adapters.pool import ADAPTER

LOW: Rates = (1e-4, 3e-4, 1e-3)


def feeds_the_mlp(name: str) -> bool:
    """Whether IA3 scales the input of a layer instead of its output: the layer that ends an MLP."""
    return bool(re.search(r"(down_proj|output\.dense|fc2|c_proj|wo)$", name)) and "attention" not in name


def lora_ga_gradient(base: Base, settings: PeftConfig) -> None:
    """Prepares LoRA-GA with the gradients of the batches that the probe reads."""

    def backward() -> None:
        for batch in probe_batches(base.config, base.prepared):
            base.model(**batch).loss.backward()

    preprocess_loraga(base.model, settings, backward)  # type: ignore[arg-type]


def plus(method: Method, name: str, rates: Rates, ratio: float = 16.0) -> Method:
    """LoRA+: the learning rate of lora_B is `ratio` times that of lora_A (2⁴ in its paper)."""

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


def all_weights(base: Base) -> Adapted:
    base.model.requires_grad_(True)
    return Adapted(base.model, adamw(base.model), None)


def untouched(base: Base) -> Adapted:
    base.model.requires_grad_(False)
    return Adapted(base.model, lambda rate: [], None)


# RaSA


class Joined(nn.Module):
    """A factor of a layer: its own rows (or columns, `dim=1`), then the shared ones; B's columns have weights."""

    def __init__(self, shared: nn.Parameter, dim: int, weights: nn.Parameter | None = None):
        super().__init__()
        self.shared, self.dim, self.weights = shared, dim, weights

    def forward(self, own: Tensor) -> Tensor:
        joined = torch.cat([own, self.shared], self.dim)
        return joined if self.weights is None else joined * self.weights


def rasa(base: Base) -> Adapted:
    """RaSA: of rank r, an eighth of every layer's directions goes into a pool that all layers of its kind share.

    ΔW_l = [B_l B]·diag(d_l)·[A_l; A]. The own part has 7/8 of plain LoRA's rank, rounded down; the pool takes the rest
    of the budget. Half of the scaling is spread over either part at the start, and both B begin at 0.
    """
    own = 7 * base.config.adapter.rank // 8
    kinds = layers_by_kind(base.model)
    shared = fitted_rank(lambda rank: rasa_parameters(kinds, own, rank), base.budget)
    settings = lora(max(own, 1), list(adaptable(base.model)))
    settings.task_type = task_type(base.model)
    model = get_peft_model(base.model, settings)  # type: ignore[arg-type]
    layers = lora_layers(model)
    for (_, (d_out, d_in)), names in kinds.items():
        pool_a, pool_b = nn.Parameter(torch.empty(shared, d_in)), nn.Parameter(torch.zeros(d_out, shared))
        nn.init.kaiming_uniform_(pool_a, a=math.sqrt(5))
        for name in names:
            layer = layers[name]
            a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            a.weight, b.weight = nn.Parameter(a.weight[:own].detach()), nn.Parameter(b.weight[:, :own].detach())
            part = base.config.adapter.alpha / (2 if own else 1)
            weights = torch.full((own + shared,), part / shared)
            weights[:own] = part / max(own, 1)
            layer.scaling[ADAPTER] = 1.0
            parametrize.register_parametrization(a, "weight", Joined(pool_a, 0), unsafe=True)
            parametrize.register_parametrization(b, "weight", Joined(pool_b, 1, nn.Parameter(weights)), unsafe=True)
    return Adapted(model, adamw(model), own + shared)


Kinds = dict[tuple[str, tuple[int, int]], list[str]]


def layers_by_kind(model: nn.Module) -> Kinds:
    """(name without the block's number, shape) -> the names of the layers."""
    kinds: Kinds = {}
    for name, matrix in adaptable(model).items():
        kinds.setdefault((re.sub(r"\.\d+\.", ".", name), matrix.shape), []).append(name)
    return kinds


def rasa_parameters(kinds: Kinds, own: int, shared: int) -> int:
    return sum(
        len(names) * (own * sum(shape) + own + shared) + shared * sum(shape) for (_, shape), names in kinds.items()
    )


# Optimizers of plain LoRA's factors


def stepped_by(method: Method, name: str, rates: Rates, optimizer: Callable[..., torch.optim.Optimizer]) -> Method:
    """The same adapter with `optimizer(pairs, lr)`."""

    def adapt(base: Base) -> Adapted:
        made = method.adapt(base)
        pairs = factor_pairs(made.model)  # type: ignore[arg-type]
        return replace(made, optimizers=lambda rate: [optimizer(pairs, rate)])

    return Method(name, rates, adapt)


class LoraMuon(torch.optim.Optimizer):
    """LoRA-Muon: the polar factor of the momentum in the partner's metric; each factor takes half of the step.

    `lr` is the norm from RMS to RMS of a step of ΔW. A factor whose partner is 0 waits.
    """

    def __init__(self, pairs: Sequence[Pair], lr: float, momentum: float = 0.95):
        super().__init__([f for pair in pairs for f in (pair.a, pair.b)], {"lr": lr, "momentum": momentum})
        self.pairs = pairs

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        for pair in self.pairs:
            a, b = self._momentum(pair.a, group["momentum"]), self._momentum(pair.b, group["momentum"]).mT
            parts = [
                (a, inverse_root(pair.b.mT @ pair.b), torch.ones_like(a[0])),
                (b, inverse_root(pair.a @ pair.a.mT), torch.ones_like(b[0])),
            ]
            step_a, step_b = descent_directions(parts)
            pair.a.sub_(step_a, alpha=group["lr"] * pair.unit / 2)
            pair.b.sub_(step_b.mT, alpha=group["lr"] * pair.unit / 2)

    def _momentum(self, factor: nn.Parameter, decay: float) -> Tensor:
        assert factor.grad is not None
        state = self.state[factor]
        if not state:
            state["momentum"] = torch.zeros_like(factor)
        return state["momentum"].lerp_(factor.grad, 1 - decay)


class LoraRite(torch.optim.Optimizer):
    """LoRA-RITE: Adam with a matrix of second moments, in coordinates that do not depend on how B·A is split.

    With the partner's QR decomposition Q·R, a factor's gradient times R⁻¹ is unmagnified. Both moments are carried from
    the last step's Q to this one's; what the second moment loses on the way is added to its eigenvalues.
    """

    def __init__(
        self, pairs: Sequence[Pair], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        largest: float = 1.0,
    ):  # fmt: skip
        super().__init__([f for pair in pairs for f in (pair.a, pair.b)], {"lr": lr, "betas": betas, "eps": eps})
        self.pairs, self.largest, self.steps = pairs, largest, 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        self.steps += 1
        parts = [part for pair in self.pairs for part in self._parts(pair)]
        norm = float(torch.stack([gradient.square().sum() for _, _, gradient, _, _ in parts]).sum().sqrt())
        clip = min(1.0, self.largest / max(norm, 1e-30))
        for factor, side, gradient, basis, back in parts:
            update = self._update(factor, gradient * clip, basis, group) @ back.mT
            factor.sub_(update if side == "b" else update.mT, alpha=group["lr"])

    def _parts(self, pair: Pair) -> list[tuple[nn.Parameter, str, Tensor, Tensor, Tensor]]:
        """Both factors: (factor, side, unmagnified gradient (d x r), the partner's Q, R⁻¹)."""
        parts = []
        for side, factor, partner in (("a", pair.a, pair.b), ("b", pair.b, pair.a.mT)):
            assert factor.grad is not None
            basis, triangle = torch.linalg.qr(partner)
            back = torch.linalg.pinv(triangle)
            gradient = (factor.grad.mT if side == "a" else factor.grad) @ back
            if gradient.square().mean().sqrt() > self.largest:
                gradient = torch.zeros_like(gradient)
            parts.append((factor, side, gradient, basis, back))
        return parts

    def _update(self, factor: nn.Parameter, gradient: Tensor, basis: Tensor, group: dict) -> Tensor:
        state, rank = self.state[factor], gradient.shape[1]
        if not state:
            state |= {"first": torch.zeros_like(gradient), "second": gradient.new_zeros(rank, rank), "lost": 0.0,
                      "basis": torch.zeros_like(basis)}  # fmt: skip
        first_decay, second_decay = (beta * (1 - beta ** (self.steps - 1)) / (1 - beta**self.steps)
                                     for beta in group["betas"])  # fmt: skip
        turn = basis.mT @ state["basis"]
        carried = turn @ state["second"] @ turn.mT
        lost = state["lost"] + escaped(state["second"], carried)
        state["lost"] = second_decay * lost
        state["second"] = carried.lerp(gradient.mT @ gradient / len(gradient), 1 - second_decay)
        values, vectors = torch.linalg.eigh(state["second"])
        roots = 1 / ((values + state["lost"]).clamp_min(0).sqrt() + group["eps"])
        whitened = gradient @ (vectors * roots) @ vectors.mT
        state["first"] = (state["first"] @ turn.mT).lerp(whitened, 1 - first_decay)
        state["basis"] = basis
        return state["first"]


def escaped(before: Tensor, after: Tensor) -> float:
    """What a matrix of second moments loses in a change of basis: the smaller of two bounds, and at least 0."""
    eigenvalues = (torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)).max()
    return float(torch.minimum(eigenvalues, torch.trace(before) - torch.trace(after)).clamp_min(0))


RIVALS = (
    Method("untouched", (0.0,), untouched),
    Method("all weights", (1e-5, 3e-5, 1e-4), all_weights),
    LORA,
    peft_method("rsLoRA", (2e-4, 6e-4, 1.5e-3), lambda r, t: lora(r, t, use_rslora=True, lora_alpha=16)),
    plus(LORA, "LoRA+", (5e-5, 1.5e-4, 5e-4)),
    peft_method("DoRA", ADAMW, lambda r, t: lora(r, t, use_dora=True)),
    peft_method("PiSSA", LOW, lambda r, t: lora(r, t, lora_alpha=r, init_lora_weights="pissa_niter_16")),
    peft_method(
        "LoRA-GA", LOW, lambda r, t: lora(r, t, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()),
        prepare=lora_ga_gradient,
    ),
    peft_method("VeRA", (5e-3, 1.5e-2, 4e-2, 0.1), lambda r, t: VeraConfig(r=r, target_modules=t), fixed=256),
    peft_method(
        "Lily", (5e-4, 1.5e-3, 4e-3),
        lambda r, t: LilyConfig(r=r, target_modules=t, stride_A=3, num_B=3, scaling=2.0),
    ),
    peft_method(
        "RandLoRA", (5e-4, 1.5e-3, 4e-3),
        lambda r, t: RandLoraConfig(r=r, randlora_alpha=20 * r, target_modules=t), falling=True,
    ),
    peft_method("MiSS", (1e-4, 3e-4, 6e-4, 1.2e-3), lambda r, t: MissConfig(r=r, target_modules=t)),
    peft_method("HiRA", (1.5e-3, 5e-3, 1.5e-2), lambda r, t: HiraConfig(r=r, target_modules=t)),
    peft_method("PSOFT", (5e-4, 1.5e-3, 5e-3), lambda r, t: PsoftConfig(r=r, psoft_alpha=r, target_modules=t)),
    peft_method(
        "VB-LoRA", (1.5e-3, 5e-3, 1.5e-2),
        lambda r, t: VBLoRAConfig(r=r, num_vectors=256, vector_length=192, target_modules=t),
    ),
    peft_method(
        "LoKr", (1e-3, 3e-3, 1e-2),
        lambda r, t: LoKrConfig(r=r, alpha=2 * r, decompose_factor=4, target_modules=t), capped=True,
    ),
    peft_method(
        "IA3", (3e-3, 1e-2, 3e-2),
        lambda r, t: IA3Config(target_modules=t, feedforward_modules=[name for name in t if feeds_the_mlp(name)]),
        fixed=1,
    ),
    Method("RaSA", ADAMW, rasa),
    stepped_by(LORA, "LoRA-RITE", LOW, LoraRite),
    stepped_by(LORA, "LoRA-Muon", (1.25e-2, 2.5e-2, 5e-2), LoraMuon),
)  # fmt: skip
"""In the order of the tables."""
