"""The validation data of a finished run, on which its exports are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Console

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.session import prepare_trained
from sgm_finetune.data.batches import collator
from sgm_finetune.results.export.validation import MOST_EXAMPLES, Validation, choose_examples, most_tokens
from sgm_finetune.results.load import Result
from sgm_finetune.train.budget.reuse import replaced
from sgm_finetune.train.losses import TestSet


def validation_data(result: Result, overrides: Sequence[str], num_parameters: int, log: StepLog) -> Validation | None:
    """Returns validation examples of the run, as many as a model of `num_parameters` is scored on; None, said in one
    line, where its data cannot be read any more.

    Raises UserError for data that `overrides` (key=value) name: what was asked for happens.
    """
    try:
        config = _without_the_rest(result.config)
        s = prepare_trained(dataclasses.replace(result, config=config), StepLog(Console(quiet=True)))
    except UserError as error:
        if any(override.startswith("data.") for override in overrides):
            raise
        log.line("score", f"not scored, since the run's validation data cannot be read: {error}")
        return None
    encoded, task, collate = s.prepared.validation.dataset, config.model.task, s.prepared.collate
    chosen = choose_examples(encoded, most_tokens(num_parameters))
    if task == "preference":  # the chosen answers, as a language model predicts them
        task, chosen = "causal-lm", chosen.select_columns(["input_ids", "attention_mask", "labels"])
        collate = collator(s.prepared.tokenizer, task, 8)
    return Validation(TestSet(chosen, collate, task, config.training.eval_batch_size, result.labels), len(encoded))


def _without_the_rest(config: Config) -> Config:
    """`config` with the same validation data, and few training and test data, which nobody reads here.

    The validation data do not depend on how many of the others are taken, except in a stream. The tasks of the harness
    may be code, and are not run here.
    """
    config = replaced(config, "evaluation", harness=[])
    if config.data.streaming:
        return config
    few = {name: min(getattr(config.data, name) or MOST_EXAMPLES, MOST_EXAMPLES) for name in ("num_train", "num_test")}
    return replaced(config, "data", packing=False, **few)
