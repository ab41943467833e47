"""The training data of a finished run, on which an export is calibrated."""

from __future__ import annotations

import dataclasses

from datasets import Dataset
from rich.console import Console

from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.session import prepare_trained
from sgm_finetune.results.load import Result
from sgm_finetune.train.budget.reuse import replaced


def calibration_data(result: Result) -> Dataset:
    """Returns the training examples of the run, as token sequences. Raises UserError where the data cannot be read any
    more."""
    config = replaced(result.config, "evaluation", harness=[])  # its tasks may be code, and are not run here
    try:
        session = prepare_trained(dataclasses.replace(result, config=config), StepLog(Console(quiet=True)))
    except UserError as error:
        raise UserError(
            f"--to compressed-tensors is calibrated on the run's training data, and they cannot be read: {error}; or "
            "take --to bnb-4bit"
        ) from None
    return session.prepared.train.dataset
