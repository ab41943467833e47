"""Adam whose moments live in one basis for every group of layers (merged_state.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from merged_state import (
    OVERSAMPLING,
    Moments,
    adam_direction,
    carried,
    covariance_sketch,
    missed,
    probes_beside,
    turned,
    turned_basis,
    updated,
    whole_step,
)
from torch import Tensor, nn

from sgm_finetune.method.sides import Side


@dataclass(frozen=True)
class BasisGroup:
    """Weights (each d_out x d_in) whose moments share one basis on `side`."""

    members: Sequence[nn.Parameter]
    side: Side
    start: Tensor | None = None
    """The first basis, orthonormal, d x `rank` or wider, leading direction first; None: the first gradients give it,
    and the step that brings them moves nothing."""


class MergedAdam(torch.optim.Optimizer):
    """Adam on projected gradients; the members of a group share the projection, and each has its own moments.

    With the group's basis P, a member's gradient T (its shared side in the rows) gives R = PᵀT, and Adam's moments of R
    take 2·r numbers for each channel of the other side. The weights move along P·N, Adam's direction in the basis, and
    along what it misses (equation 3). The step has the size of AdamW's for every r, so `lr` means what it means for
    AdamW: with r = d the step is AdamW's in turned coordinates, and AdamW's own for P = I.

    The basis follows the gradients: it turns every `refresh` steps (0: never), and after 1, 2, 4, ... steps at the
    beginning, to where the gradients since its last turn lie (equation 1). The moments turn with it (equation 2).

    Gradients may come one at a time. `update(p)` steps one parameter, `step()` all that have a gradient, in order; both
    give the same bits. `accumulate(p)` keeps the projection of a micro-batch's gradient, so that the gradient can go.
    States are float32 whatever the weights' type, also under autocast; `first_moment` may be torch.bfloat16. A caller
    with bfloat16 weights hands a float32 copy of one matrix to `update`, and rounds it back as it likes. Weight decay
    is decoupled. The result depends on the arguments and the gradients alone. Nothing is checked for finiteness.
    """

    def __init__(
        self,
        groups: Sequence[BasisGroup],
        lr: float,
        rank: int,
        refresh: int = 20,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        first_moment: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        super().__init__(
            [_param_group(group, rank) for group in groups],
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "refresh": refresh},
        )
        self.first_moment, self.seed = first_moment, seed
        self._places = {
            p: (number, place)
            for number, group in enumerate(self.param_groups)
            for place, p in enumerate(group["params"])
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps every parameter that has a gradient; the others keep their weights and their states."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter in self._places:
            if parameter.grad is not None:
                self.update(parameter)
        return loss

    @torch.no_grad()
    def accumulate(self, parameter: nn.Parameter) -> None:
        """Adds the projection of `parameter.grad` to what the next `update` of the parameter takes.

        It is linear: the moments are those of the summed gradients. What the basis misses is taken from the last
        micro-batch alone, the one that `update` sees.
        """
        with torch.autocast(parameter.device.type, enabled=False):
            group, _, gradient = self._begin(parameter)
            projected = self._project(group, gradient)
            if projected is not None:
                state = self.state[parameter]
                state["waiting"] = state["waiting"] + projected if "waiting" in state else projected

    @torch.no_grad()
    def update(self, parameter: nn.Parameter, weight: Tensor | None = None) -> None:
        """Moves `weight` (default: the parameter itself) by `parameter.grad` and what was accumulated."""
        with torch.autocast(parameter.device.type, enabled=False):
            group, place, gradient = self._begin(parameter)
            projected = self._project(group, gradient)
            if projected is not None:
                self._move(group, parameter, gradient, projected, parameter if weight is None else weight)
            group["passed"].append(place)
            if len(group["passed"]) == len(group["params"]):
                self._end_pass(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores bases, counts and moments bit for bit: torch alone would cast them to the type of the weights."""
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for saved_id, parameter in zip(saved_ids, self._places, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)
        for group in self.param_groups:
            for name in ("basis", "sketch"):
                if group[name] is not None:
                    group[name] = group[name].to(group["params"][0].device)

    def _begin(self, parameter: nn.Parameter) -> tuple[dict[str, Any], int, Tensor]:
        """The parameter's group, its place in it and its gradient, turned, in float32.

        A member that has passed and comes again begins the next step: the others had no gradient in this one.
        """
        number, place = self._places[parameter]
        group = self.param_groups[number]
        if place in group["passed"]:
            self._end_pass(group)
        assert parameter.grad is not None
        return group, place, turned(parameter.grad.float(), group["side"])

    def _project(self, group: dict[str, Any], gradient: Tensor) -> Tensor | None:
        """R (r x c), None before there is a basis; the gradient's part in the next basis is taken on the way."""
        basis = group["basis"]
        projected = None if basis is None else basis.mT @ gradient
        if basis is None or group["refresh"] > 0:
            known = gradient[:0] if projected is None else projected
            dim, num = len(gradient), group["rank"] + OVERSAMPLING - len(known)
            beside = probes_beside(dim, num, self.seed + group["passes"]).to(gradient.device)
            part = covariance_sketch(gradient, known, beside)
            group["sketch"] = part if group["sketch"] is None else group["sketch"].add_(part)
        return projected

    def _move(
        self, group: dict[str, Any], parameter: nn.Parameter, gradient: Tensor, own: Tensor, weight: Tensor
    ) -> None:
        basis, state, (beta, _) = group["basis"], self.state[parameter], group["betas"]
        projected = own + state.pop("waiting") if "waiting" in state else own
        if "step" not in state:
            state["step"] = 0
            moments = Moments(
                torch.zeros_like(own, dtype=self.first_moment), torch.zeros_like(own), own.new_zeros(len(own))
            )
            state.update(moments._asdict())
        state["step"] += 1
        moments = updated(_moments(state), projected, group["betas"])
        direction = adam_direction(moments, state["step"], beta, group["eps"])
        step = whole_step(direction, basis, missed(gradient, basis, own, direction))
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        turned(weight, group["side"]).sub_(step, alpha=group["lr"])

    def _end_pass(self, group: dict[str, Any]) -> None:
        """Ends a step of the group: the basis turns if that is due, and the moments turn with it."""
        group["passes"] += 1
        group["passed"] = []
        if group["basis"] is None or turns_after(group["passes"], group["refresh"]):
            old, new = group["basis"], turned_basis(group["sketch"], group["rank"])
            if old is not None:
                self._turn(group, new.mT @ old)
            group["basis"], group["sketch"] = new, None

    def _turn(self, group: dict[str, Any], turn: Tensor) -> None:
        for parameter in group["params"]:
            state = self.state.get(parameter, {})
            if "step" in state:
                state.update(carried(_moments(state), turn, state["step"], group["betas"][0])._asdict())
            if "waiting" in state:
                state["waiting"] = turn @ state["waiting"]


def turns_after(passes: int, refresh: int) -> bool:
    """Whether the basis turns after this number of steps: every `refresh` steps, and at powers of two before that.

    >>> [passes for passes in range(1, 21) if turns_after(passes, 10)]
    [1, 2, 4, 8, 10, 20]
    """
    return refresh > 0 and (passes % refresh == 0 or (passes < refresh and passes & (passes - 1) == 0))


def _moments(state: dict[str, Any]) -> Moments:
    return Moments(state["first"], state["second"], state["evidence"])


def _param_group(group: BasisGroup, rank: int) -> dict[str, Any]:
    """The group as torch keeps it: its basis and its counts travel in the state_dict with its learning rate.

    `passes` counts the steps of the group, and `passed` lists the members that have come in the present one.
    """
    dim = turned(group.members[0], group.side).shape[0]
    rank = min(rank, dim)
    start = None
    if group.start is not None:
        start = group.start[:, :rank].to(group.members[0].device, torch.float32, copy=True)
        if start.shape != (dim, rank):
            raise ValueError(f"A first basis is {tuple(group.start.shape)}; {dim} x {rank} is needed")
    return {
        "params": list(group.members),
        "side": group.side,
        "rank": rank,
        "basis": start,
        "sketch": None,
        "passes": 0,
        "passed": [],
    }
