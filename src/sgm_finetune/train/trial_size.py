"""How many trials `training.learning_rate=auto` takes, and how large each is."""

from __future__ import annotations

from dataclasses import dataclass

from sgm_finetune.base.config import Config
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.batches import num_steps

FEWEST, MOST = 3, 6
"""Trials of a run."""
_SHARE_OF_STEPS = 4
_SMALLEST = 8
"""Fewest steps of a trial, and fewest examples that it leaves out."""


@dataclass(frozen=True)
class TrialSize:
    """The size of each trial."""

    steps: int
    num_held_out: int
    """Training examples that the trials leave out, and whose loss decides."""


def trial_size(config: Config, num_train: int) -> TrialSize:
    """A quarter of the run's steps, and a tenth of the training examples, up to 256.

    Raises UserError for fewer than 32 training examples, of which too few could be left out.
    """
    if num_train < 4 * _SMALLEST:
        raise UserError(
            f"training.learning_rate=auto needs at least {4 * _SMALLEST} training examples for its trials, and there "
            f"are {num_train}; give a number"
        )
    steps = num_steps(config, num_train)
    return TrialSize(
        steps=min(steps, max(_SMALLEST, steps // _SHARE_OF_STEPS)),
        num_held_out=min(256, max(_SMALLEST, num_train // 10)),
    )
