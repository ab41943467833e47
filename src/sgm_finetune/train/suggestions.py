"""What a sweep tries next, and when it gives a try up, by Optuna's samplers and pruners (docs/tutorials/sweeps.md).

The tries themselves are all that Optuna has to know. So its study is made anew from them for each try: a sweep that was
interrupted goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sgm_finetune.base.search_space import Choices, Range, SearchSpace
from sgm_finetune.train.tries import Try, Validation

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

FIRST = 4
"""Tries that are drawn at random, and complete tries before one is given up."""
PATIENCE = 50
"""Percent of its steps that each try may take: before that, a large learning rate looks worse than it will be."""
_DRAWS = 20
"""Draws until one differs from all tries before."""


def suggest(space: SearchSpace, tries: Sequence[Try], seed: int) -> tuple[Trial, dict[str, str]]:
    """The next try: Optuna's trial, to report its losses to, and its settings.

    They depend on the space, on the tries before and on `seed` alone. No settings come twice as long as there are
    others.
    """
    from optuna import create_study, logging
    from optuna.pruners import MedianPruner
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    logging.set_verbosity(logging.WARNING)
    distributions = {part.key: _distribution(part) for part in space.ranges}
    study = create_study(pruner=MedianPruner(n_startup_trials=FIRST, n_warmup_steps=PATIENCE))
    _add(study, space, tries, distributions)
    known = [one.settings for one in tries]
    for draw in range(_DRAWS):
        drawn = int(np.random.SeedSequence((seed, len(tries), draw)).generate_state(1)[0])
        study.sampler = TPESampler(seed=drawn, n_startup_trials=FIRST)
        trial = study.ask(distributions)
        settings = _settings(space, trial.params)
        if settings not in known:
            return trial, settings
        study.tell(trial, state=TrialState.FAIL)
    if len(known) < space.size < float("inf"):
        settings = next(found for found in space.every() if found not in known)
        study.enqueue_trial(_params(space, settings))
    trial = study.ask(distributions)
    return trial, _settings(space, trial.params)


def _add(study: Study, space: SearchSpace, tries: Sequence[Try], distributions: dict[str, BaseDistribution]) -> None:
    """Tells the study of the tries before."""
    from optuna.trial import TrialState, create_trial

    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    for one in tries:
        study.add_trial(
            create_trial(
                state=states[one.state],
                value=one.loss if one.state == "complete" else None,
                params=_params(space, one.settings),
                distributions=distributions,
                intermediate_values={found.percent: found.loss for found in one.validations},
            )
        )


def _distribution(part: Choices | Range) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(part, Choices):
        return CategoricalDistribution(part.values)
    if part.whole:
        return IntDistribution(int(part.low), int(part.high), log=part.log)
    return FloatDistribution(part.low, part.high, log=part.log)


def _settings(space: SearchSpace, params: dict[str, Any]) -> dict[str, str]:
    """Optuna's parameters as texts."""
    return {
        part.key: params[part.key] if isinstance(part, Choices) else part.write(params[part.key])
        for part in space.ranges
    }


def _params(space: SearchSpace, settings: dict[str, str]) -> dict[str, Any]:
    """Texts as Optuna's parameters."""
    return {part.key: _param(part, settings[part.key]) for part in space.ranges}


def _param(part: Choices | Range, text: str) -> Any:
    if isinstance(part, Choices):
        return text
    return int(text) if part.whole else float(text)


class Pruning(TrainerCallback):
    """Reports each validation loss to Optuna, and stops the training where its pruner gives the try up.

    The losses are compared at the same share of the steps, since tries may have different numbers of steps.
    """

    def __init__(self, trial: Trial):
        self.trial = trial
        self.validations: list[Validation] = []
        self.pruned = False

    @property
    def reason(self) -> str | None:
        """Why the training was stopped; None if it was not."""
        if not self.pruned:
            return None
        return f"above the median of the tries before it at {self.validations[-1].percent} % of the steps"

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        found = Validation(
            step=state.global_step,
            percent=round(100 * state.global_step / state.max_steps),
            loss=(metrics or {})["eval_loss"],
        )
        self.validations.append(found)
        self.trial.report(found.loss, found.percent)
        if state.global_step < state.max_steps and self.trial.should_prune():
            self.pruned = control.should_training_stop = True
