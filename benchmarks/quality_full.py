"""The methods of benchmarks/full_weights.py: all matrices inside the blocks train whole, each with another optimizer.

GaLore and APOLLO are their authors' packages (`pip install --no-deps galore-torch==1.0 apollo-torch==1.0.3`). Ranks are
the largest whose states take no more bytes than the merged state of the rank in the name, so that methods of one size
are compared at equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from merged_adam import BasisGroup, MergedAdam
from merged_state import GroupShape, missed, state_bytes, turned
from quality_adapt import Adapted, Base, Method, Rates, head_parameters
from quality_methods import (
    METHODS,
    at_random,
    evenly_spaced,
    feeds_the_residual_stream,
    highest_snr,
    layers_by_kind,
    nearest_to_the_output,
    scan_and_probe,
    some_layers,
)
from torch import Tensor, nn
from transformers.optimization import Adafactor

from sgm_finetune.measure.make_plan import make_plan
from sgm_finetune.method.sides import Side, width
from sgm_finetune.method.subspace import leading_rows, shared_basis
from sgm_finetune.model.matrices import adaptable

REFRESH = 10
"""Steps between two turns of a basis, for all methods that turn one."""
Members = list[tuple[list[str], Side]]
MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


Choose = Callable[[Base], Collection[str]]


def all_matrices(base: Base) -> Collection[str]:
    return adaptable(base.model)


def whole_matrices(base: Base, choose: Choose = all_matrices) -> dict[str, nn.Parameter]:
    """Makes the chosen matrices trainable, and nothing else but a new head; their names and weights."""
    heads, chosen = {id(p) for p in head_parameters(base.model)}, choose(base)
    found = {name: matrix.module.weight for name, matrix in adaptable(base.model).items() if name in chosen}
    wanted = heads | {id(weight) for weight in found.values()}
    for parameter in base.model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    return found  # type: ignore[return-value]


def full(
    name: str, rates: Rates, optimizer: MakeOptimizer, rank: int | None = None, choose: Choose = all_matrices
) -> Method:
    def adapt(base: Base) -> Adapted:
        weights = list(whole_matrices(base, choose).values())
        return Adapted(base.model, lambda rate: [optimizer(weights, rate)], rank)

    return Method(name, rates, adapt)


def adamw(weights: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)


def adafactor(weights: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return Adafactor(weights, lr=rate, scale_parameter=False, relative_step=False)


def projected(package: str, **settings) -> MakeOptimizer:
    """GaLore's or APOLLO's AdamW, with the settings of their READMEs."""

    def optimizer(weights: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        group = {"params": weights, "update_proj_gap": REFRESH, "proj_type": "std", **settings}
        if package == "galore":
            from galore_torch import GaLoreAdamW as Made
        else:
            from apollo_torch import APOLLOAdamW as Made
        return Made([group], lr=rate, no_deprecation_warning=True)

    return optimizer


# Ours


def by_kind(base: Base) -> Members:
    """All layers of a kind, on the side of the residual stream."""
    return [(names, residual_side(names[0])) for names in layers_by_kind(base.model).values()]


def residual_side(name: str) -> Side:
    """The side that the probe finds for every kind of these models (docs/method.md 3.4)."""
    return "output" if feeds_the_residual_stream(name) else "input"


def each_alone(base: Base) -> Members:
    return [([name], side) for names, side in by_kind(base) for name in names]


def as_probed(base: Base) -> Members:
    """The groups of `merge.scope=layers`; a matrix without a group has its own basis."""
    plan = make_plan(*scan_and_probe(base, 48)[0], base.with_overrides("probe.sketch_size=48", "merge.scope=layers"))
    alone = [([name], residual_side(name)) for name in (m.name for m in plan.selected if m.group is None)]
    return [*((list(group.members), group.side) for group in plan.groups), *alone]  # type: ignore[list-item]


def shapes_of(base: Base, groups: Members) -> list[GroupShape]:
    found = adaptable(base.model)
    return [
        GroupShape(
            width(found[names[0]].shape, side), tuple(sum(found[n].shape) - width(found[n].shape, side) for n in names)
        )
        for names, side in groups
    ]


def merged(
    name: str,
    rates: Rates,
    rank: int,
    groups: Callable[[Base], Members] = by_kind,
    start: Callable[[Base, Sequence[str], Side, int], Tensor | None] = lambda *_: None,
    fitted: bool = False,
    refresh: int = REFRESH,
    optimizer: type[MergedAdam] = MergedAdam,
) -> Method:
    """`fitted`: the rank is the largest whose states take no more bytes than those of `rank` shared by each kind."""

    def adapt(base: Base) -> Adapted:
        weights, members, chosen = whole_matrices(base), groups(base), rank
        if fitted:
            most = state_bytes(shapes_of(base, by_kind(base)), rank, REFRESH)
            chosen = max(r for r in range(1, 4 * rank) if state_bytes(shapes_of(base, members), r, refresh) <= most)
        made = [
            BasisGroup([weights[n] for n in names], side, start(base, names, side, chosen)) for names, side in members
        ]
        return Adapted(base.model, lambda rate: [optimizer(made, rate, chosen, refresh)], chosen)

    return Method(name, rates, adapt)


def from_probe(base: Base, names: Sequence[str], side: Side, rank: int) -> Tensor:
    probed = scan_and_probe(base, 48)[0][1]
    return shared_basis([leading_rows(half.side(side), rank) for name in names for half in probed.halves[name]], rank)


def random_basis(base: Base, names: Sequence[str], side: Side, rank: int) -> Tensor:
    dim = width(adaptable(base.model)[names[0]].shape, side)
    seed = torch.Generator().manual_seed(len(names[0]) + 1000 * base.seed)
    return torch.linalg.qr(torch.randn(dim, rank, generator=seed)).Q


class FactoredAdam(MergedAdam):
    """A trial: Adafactor's second moments of the whole gradient (d + c numbers), a first moment in the shared basis.

    The basis follows the gradients that the second moments have scaled. Half the bytes of `MergedAdam`.
    """

    def _begin(self, parameter: nn.Parameter) -> tuple[dict[str, Any], int, Tensor]:
        group, place, gradient = super()._begin(parameter)
        state, squares = self.state[parameter], gradient.square() + 1e-30
        state["count"] = state.get("count", 0) + 1
        for name, means in (("rows", squares.mean(1)), ("columns", squares.mean(0))):
            state[name] = means.lerp(state[name], 1 - state["count"] ** -0.8) if name in state else means
        rows, columns = state["rows"] / state["rows"].mean(), state["columns"]
        scaled = gradient * rows.rsqrt()[:, None] * columns.rsqrt()
        return group, place, scaled / scaled.square().mean().sqrt().clamp_min(1.0)

    def _move(
        self, group: dict[str, Any], parameter: nn.Parameter, gradient: Tensor, own: Tensor, weight: Tensor
    ) -> None:
        state, basis, beta = self.state[parameter], group["basis"], group["betas"][0]
        state["step"] = state.get("step", 0) + 1
        state["first"] = own.lerp(state.get("first", torch.zeros_like(own)), beta)
        direction = state["first"] / (1 - beta ** state["step"])
        step = torch.addmm(missed(gradient, basis, own, direction), basis, direction)
        turned(weight, group["side"]).sub_(step, alpha=group["lr"])

    def _turn(self, group: dict[str, Any], turn: Tensor) -> None:
        for parameter in group["params"]:
            if "first" in self.state[parameter]:
                self.state[parameter]["first"] = turn @ self.state[parameter]["first"]


AS_ADAMW: Rates = (2e-4, 4e-4, 8e-4)
"""For steps whose entries are as large as AdamW's; those of GaLore are √(d/r) times smaller."""
GALORE: Rates = (8e-4, 1.6e-3, 3.2e-3)
SIZES = {32: (28, 35), 8: (7, 9)}
"""Rank of the merged state -> the ranks of GaLore and APOLLO at equal bytes on MiniLM; `--list` shows the bytes."""


def of_size(rank: int) -> list[Method]:
    """All methods whose states take the bytes of the merged state of `rank`."""
    galore, apollo = SIZES[rank]
    return [
        merged(f"merged r={rank}", AS_ADAMW, rank),
        merged(f"own bases, bytes of r={rank}", AS_ADAMW, rank, each_alone, fitted=True),
        merged(f"probed groups, bytes of r={rank}", AS_ADAMW, rank, as_probed, fitted=True),
        merged(f"merged from the probe r={rank}", AS_ADAMW, rank, start=from_probe),
        merged(f"factored r={rank}", AS_ADAMW, rank, optimizer=FactoredAdam),
        merged(f"random bases r={rank}", AS_ADAMW, rank, start=random_basis, refresh=0),
        full(f"GaLore, bytes of r={rank}", GALORE, projected("galore", rank=galore, scale=1.0), galore),
        full(
            f"APOLLO, bytes of r={rank}", AS_ADAMW,
            projected("apollo", rank=apollo, scale=1.0, proj="random", scale_type="channel"), apollo,
        ),
    ]  # fmt: skip


def by_gradient(fraction: float) -> Choose:
    """The layers of every kind whose gradient has the most energy (`selection.by=gradient`)."""

    def choose(base: Base) -> Collection[str]:
        config = base.with_overrides(
            "probe.sketch_size=48", "merge.side=none", "selection.by=gradient", f"selection.top_fraction={fraction}"
        )
        return [matrix.name for matrix in make_plan(*scan_and_probe(base, 48)[0], config).selected]

    return choose


def selected(fraction: float) -> list[Method]:
    """AdamW on a fraction of the layers of each kind, chosen as published, as it is right, and by placebos."""
    ways: dict[str, Choose] = {
        "SNR": some_layers(highest_snr, fraction),
        "published SNR": some_layers(highest_snr, fraction, "snr.estimator=spectrum"),
        "random": some_layers(at_random, fraction),
        "depth": some_layers(nearest_to_the_output, fraction),
        "gradient": by_gradient(fraction),
        "even spacing": some_layers(evenly_spaced, fraction),
    }
    return [full(f"AdamW, {fraction:.0%} by {way}", AS_ADAMW, adamw, choose=choose) for way, choose in ways.items()]


FULL = {
    method.name: method
    for method in (
        full("AdamW", AS_ADAMW, adamw),
        *selected(0.5),
        *selected(0.25),
        *(replace(METHODS[name], name=f"adapter: {name}") for name in ("LoRA", "LoRA, our step", "pool")),
        full("Adafactor", AS_ADAMW, adafactor),
        *of_size(32),
        *of_size(8),
    )
}
