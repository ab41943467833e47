"""`training.learning_rate=auto`: short trials from the same start choose the learning rate (docs/method.md 6.1)."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sgm_finetune.base.errors import NotFiniteError, UserError
from sgm_finetune.base.memory import release_memory
from sgm_finetune.base.processes import processes
from sgm_finetune.method.rate_search import lowest_point, next_rate, rate_for
from sgm_finetune.train.arguments import trial_arguments
from sgm_finetune.train.budget.reuse import replaced
from sgm_finetune.train.trainer import TrainingJob, make_trainer
from sgm_finetune.train.trial_size import FEWEST, MOST, TrialSize, trial_size

FACTOR = 2.0
"""Between neighbouring rates."""


@dataclass(frozen=True)
class RateTrials:
    """The trials of a run, and the learning rate that follows from them."""

    losses: dict[float, float]
    """Learning rate -> mean loss of the examples left out; infinite where the trial failed."""
    size: TrialSize
    steps: int
    """Steps of the training that the rate is for."""
    seconds: float

    @property
    def chosen(self) -> float:
        """The learning rate of the training, with three digits: that of the lowest point, for more steps."""
        return float(f"{rate_for(lowest_point(self.losses), self.size.steps, self.steps):.3g}")

    def to_dict(self) -> dict[str, Any]:
        """The entry of metrics.json; a trial that failed has no loss."""
        return {
            "rates": list(self.losses),
            "losses": [loss if math.isfinite(loss) else None for loss in self.losses.values()],
            "best": float(f"{lowest_point(self.losses):.3g}"),
            "steps": self.size.steps,
            "num_held_out": self.size.num_held_out,
            "seconds": round(self.seconds, 3),
            "chosen": self.chosen,
        }


def try_rates(job: TrainingJob, progress: Callable[[int, int], None]) -> RateTrials:
    """Trains from the model's present state at several learning rates, and restores it after each.

    The rates are the optimizer's default for so few steps, half of it and twice it, and more beyond the best one as
    long as that is the smallest or the largest. A trial whose loss or gradient is not finite counts as infinite.
    `progress` takes the steps done and those planned. Raises UserError where all trials fail.
    """
    started = time.perf_counter()
    size = trial_size(job.config, len(job.train))
    job = _without(job, size.num_held_out)
    losses: dict[float, float] = {}

    def moved(step: int) -> None:
        progress(len(losses) * size.steps + step, max(FEWEST, len(losses) + 1) * size.steps)

    steps = job.arguments.max_steps
    default = float(f"{rate_for(job.arguments.learning_rate, steps, size.steps):.3g}")
    for rate in _rates(default, losses):
        losses[rate] = _loss_after_trial(job, rate, size.steps, moved)
    if not any(map(math.isfinite, losses.values())):
        raise UserError(
            f"No trial of training.learning_rate=auto had a finite loss, from {min(losses):g} to {max(losses):g}; "
            "try model.dtype=float32, or give a number"
        )
    return RateTrials(losses, size, steps, time.perf_counter() - started)


def _rates(default: float, losses: Mapping[float, float]) -> Iterator[float]:
    """The rates to try; each one depends on the losses of those before."""
    yield from (default, default * FACTOR, default / FACTOR)
    while (beyond := next_rate(losses, MOST)) is not None:
        yield beyond


def _without(job: TrainingJob, num_held_out: int) -> TrainingJob:
    """`job` with some of its training examples as validation data, drawn by its seed."""
    generator = torch.Generator().manual_seed(job.config.training.seed)
    order = torch.randperm(len(job.train), generator=generator).tolist()
    held_out, rest = job.train.select(sorted(order[:num_held_out])), job.train.select(sorted(order[num_held_out:]))
    return replace(job, train=rest, validation=held_out, resume_from=None, pace=None)


def _loss_after_trial(job: TrainingJob, rate: float, steps: int, moved: Callable[[int], None]) -> float:
    """Trains `steps` steps at a peak of `rate`, restores the model, and returns the mean loss on the examples left out;
    infinite if it is not finite."""
    config = replaced(job.config, "training", learning_rate=rate, early_stopping_patience=0)
    with tempfile.TemporaryDirectory() as folder, _restored(job.model):
        arguments = trial_arguments(config, Path(folder), steps, processes().num_processes)
        trainer = make_trainer(replace(job, config=config, arguments=arguments), [_Moved(moved)])
        try:
            trainer.train()
            loss = trainer.evaluate()["eval_loss"]
        except NotFiniteError:
            loss = math.inf
        del trainer
    release_memory()
    return loss if math.isfinite(loss) else math.inf


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Gives the trained parameters their values back at the end."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    kept = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in trained]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
                parameter.grad = None


class _Moved(TrainerCallback):
    """Tells a function after each step how many there were."""

    def __init__(self, moved: Callable[[int], None]):
        self.moved = moved

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.moved(state.global_step)
