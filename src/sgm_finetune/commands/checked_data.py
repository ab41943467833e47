"""The data of a command, prepared and checked, before any library that loads a model."""

from __future__ import annotations

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.data.prepared import PreparedData, prepare_data
from sgm_finetune.model.classes import Head
from sgm_finetune.results.harness import check_harness
from sgm_finetune.results.stops import reasoning_remark, turn_remark


def checked_data(config: Config, log: StepLog, trained: Head | None = None) -> PreparedData:
    """The prepared data; prints what it found. Raises UserError for what can be checked without the model's weights."""
    check_harness(config.evaluation.harness, config.model.task)
    prepared = prepare_data(config, log, trained)
    roles = prepared.splits.roles
    if "messages" in roles and (remark := turn_remark(prepared.tokenizer)):
        log.line("", remark)
    if "messages" in roles and "reasoning" not in roles and (remark := reasoning_remark(prepared.tokenizer)):
        log.line("", remark)
    return prepared
