"""The files of a base model that a command reads before its weights: config.json and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.processes import processes
from sgm_finetune.model.architecture import check_model
from sgm_finetune.model.folder import announce_own_code, local_folder
from sgm_finetune.model.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ModelFiles:
    """A base model on this machine, its weights not yet read."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase


def find_model_files(config: ModelConfig, log: StepLog, max_length: int = 0) -> ModelFiles:
    """Returns the model's folder and its tokenizer; converts or downloads the model first where that is needed.

    Raises UserError where the model is not available, does not fit the task, or has fewer positions than `max_length`
    tokens need.
    """
    with processes().main_process_first():  # one process converts or downloads, the others find it done
        folder = local_folder(config.name, config.revision, lambda line: log.line("model", line))
    announce_own_code(config, folder, log)
    check_model(config, folder, max_length)
    return ModelFiles(folder, load_tokenizer(folder, config))
