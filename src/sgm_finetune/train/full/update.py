"""The update in the backward pass: a matrix steps as soon as its gradient exists, and the gradient is freed.

Letters and equations: docs/method.md section 9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sgm_finetune.base.errors import NotFiniteError
from sgm_finetune.base.memory import release_memory
from sgm_finetune.method.rounding import rounding_seed, stochastic_round
from sgm_finetune.method.running_norm import clip_factor, running_norm

Make = Callable[[Mapping[str, nn.Parameter]], Sequence[torch.optim.Optimizer]]
"""Makes ordinary optimizers over float32 shadows of the trained parameters, by their names. `step()` of one is called
when one of its shadows has a gradient and all others have none; it must skip those."""


class BackwardUpdates(torch.optim.Optimizer):
    """Optimizers whose steps are taken inside the backward pass, within `attached()`.

    For a learning rate scheduler and for checkpoints it is one optimizer; its `step` only ends the step. The gradient
    of a parameter is clipped by the running norm (eq. 21), handed to the parameter's optimizer, and freed. A float32
    parameter changes in place. A bfloat16 one is copied to float32 for its step, and the result is rounded
    stochastically (eq. 22), so that changes below half a unit of bfloat16 are not lost.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        make: Make,
        lr: float,
        max_norm: float = math.inf,
        seed: int = 0,
        is_last: Callable[[], bool] = lambda: True,
        rates: Mapping[str, float] = MappingProxyType({}),
        average: Callable[[Tensor], None] = lambda gradient: None,
    ):
        """`named` are the trained parameters. `is_last` says whether a backward pass completes the gradients; until
        then they accumulate. `seed` is that of the rounding. `rates` has other learning rates than `lr`, by name.
        `average` replaces a complete gradient by its mean over the processes of the run. All of them compute the same
        graph, so they call it in the same order, and their parameters stay equal."""
        super().__init__([{"params": [p], "lr": rates.get(name, lr)} for name, p in named.items()], {"lr": lr})
        self.group_of = dict(zip(named, self.param_groups, strict=True))
        self.named, self.max_norm, self.seed, self.is_last = dict(named), max_norm, seed, is_last
        self.shadows = {name: nn.Parameter(_no_numbers(parameter)) for name, parameter in named.items()}
        self.optimizers = list(make(self.shadows))
        of = {id(p): optimizer for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]}
        self.optimizer_of = {name: of[id(shadow)] for name, shadow in self.shadows.items()}
        self.average, self.num_steps = average, 0
        device = next(iter(named.values())).device
        self.places = {name: place for place, name in enumerate(named)}
        self.newest = torch.zeros(len(named), dtype=torch.float64, device=device)
        """Squared norms of the gradients: of this step for the parameters in `seen`, of the last one for others."""
        self.seen: set[str] = set()

    @property
    def norm(self) -> float:
        """The norm of this step's whole gradient, before it is clipped."""
        return math.sqrt(self._this_step().sum())

    def _this_step(self) -> Tensor:
        """The squared norms of this step's gradients, on the CPU; 0 for parameters without one."""
        mask = torch.tensor([name in self.seen for name in self.places])
        return torch.where(mask, self.newest.cpu(), 0.0)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """A context in which every backward pass updates the parameters."""
        handles = []
        for name, parameter in self.named.items():

            def update(parameter: Tensor, name: str = name) -> None:
                if self.is_last():
                    self._update(name, parameter)

            handles.append(parameter.register_post_accumulate_grad_hook(update))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Ends a step, whose updates the backward pass has made. Raises NotFiniteError if a gradient was not finite."""
        if self.seen:
            squares = self._this_step()
            for name, place in self.places.items():
                if not math.isfinite(squares[place]):
                    raise self._not_finite(name)
            self.newest.copy_(squares)
            self.seen.clear()
        self.num_steps += 1
        if self.num_steps == 1:
            release_memory()  # the states were made among activations, whose places stay empty

    @torch.no_grad()
    def _update(self, name: str, parameter: Tensor) -> None:
        """Steps one parameter, unless its gradient is not finite. Then this raises NotFiniteError; but a bfloat16
        parameter on a GPU stays as it is, and `step` raises the error, so that the GPU need not wait for the norm."""
        gradient = parameter.grad
        assert gradient is not None
        self.average(gradient)
        square = torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()
        is_first = self.num_steps == 0
        self.newest[self.places[name]] = square
        self.seen.add(name)
        waits = parameter.dtype == torch.float32 or parameter.device.type == "cpu"
        if waits and not bool(torch.isfinite(square)):
            raise self._not_finite(name)
        norm = running_norm(self.newest, len(self.seen), is_first)
        shadow, optimizer = self.shadows[name], self.optimizer_of[name]
        for group in optimizer.param_groups:
            group["lr"] = self.group_of[name]["lr"]
        shadow.data, shadow.grad = parameter.data.float(), gradient.float()
        parameter.grad = gradient = None
        shadow.grad.mul_(clip_factor(norm, self.max_norm))
        optimizer.step()
        shadow.grad = None
        if parameter.dtype == torch.float32:
            torch.autograd.graph.increment_version(parameter)  # the step was made through the shadow
        else:
            generator = torch.Generator(parameter.device)
            generator.manual_seed(rounding_seed(self.seed, self.num_steps + 1, name))
            rounded = stochastic_round(shadow.data, generator)
            # after a gradient that is not finite the norm stays so for this step, and later parameters stay as they are
            torch.where(torch.isfinite(norm), rounded, parameter, out=parameter)
        shadow.data = _no_numbers(parameter)

    def _not_finite(self, name: str) -> NotFiniteError:
        return NotFiniteError(
            f"The gradient of `{name}` is not finite at step {self.num_steps + 1}; its weights are those of the step "
            "before, and earlier checkpoints are whole. Try a smaller training.learning_rate or model.dtype=float32"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to take the same steps, as tensors and plain data."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "param_groups": groups,
            "num_steps": self.num_steps,
            "last": dict(zip(self.places, self.newest.tolist(), strict=True)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for group, stored in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(stored)
        self.num_steps = int(state_dict["num_steps"])
        self.newest.copy_(
            torch.tensor([state_dict["last"].get(name, 0.0) for name in self.places], dtype=torch.float64)
        )
        self.seen.clear()


def _no_numbers(parameter: Tensor) -> Tensor:
    """A float32 tensor with the shape and device of `parameter`, which takes four bytes."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device).expand(parameter.shape)
