"""The files of a base model that a command reads before its weights: config.json and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.processes import processes
from sgm_finetune.base.text import short_repr
from sgm_finetune.model.architecture import check_model, read_model_config
from sgm_finetune.model.folder import announce_own_code, local_folder
from sgm_finetune.model.tokenizer import load_tokenizer
from sgm_finetune.model.weights.stored import embedding_rows


@dataclass(frozen=True)
class ModelFiles:
    """A base model on this machine, its weights not yet read."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    described: PreTrainedConfig
    """What config.json says."""
    num_embeddings: int | None
    """The rows of the input embedding; None where neither config.json nor the weights tell."""

    def check_ids(self, largest: int, what: str, num_embeddings: int | None = None) -> None:
        """Raises UserError when the largest token id of `what` is beyond the embeddings (those of the input)."""
        number = num_embeddings or self.num_embeddings
        if number is None or largest < number:
            return
        token = self.tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{what} has token ids up to {largest:,} ({short_repr(token)}), but the model has {number:,} embeddings; "
            "use the tokenizer that the model was trained with, or resize the model first with Transformers "
            f"(model.resize_token_embeddings({largest + 1}), model.save_pretrained)"
        )


def find_model_files(config: ModelConfig, log: StepLog, max_length: int = 0) -> ModelFiles:
    """Returns the model's folder and its tokenizer; converts or downloads the model first where that is needed.

    Raises UserError where the model is not available, does not fit the task, or has fewer positions than `max_length`
    tokens need.
    """
    with processes().main_process_first():  # one process converts or downloads, the others find it done
        folder = local_folder(config.name, config.revision, lambda line: log.line("model", line))
    announce_own_code(config, folder, log)
    check_model(config, folder, max_length)
    described = read_model_config(config, folder)
    files = ModelFiles(folder, load_tokenizer(folder, config), described, _num_embeddings(described, folder))
    _pad_with_an_embedding(files, log)
    return files


def _num_embeddings(described: PreTrainedConfig, folder: Path) -> int | None:
    said = getattr(described.get_text_config(), "vocab_size", None)
    known = [number for number in (said, embedding_rows(folder)) if isinstance(number, int)]
    return min(known, default=None)


def _pad_with_an_embedding(files: ModelFiles, log: StepLog) -> None:
    """Pads with another token where the padding token was added to the tokenizer and not to the model."""
    tokenizer, number = files.tokenizer, files.num_embeddings
    padding: Any = tokenizer.pad_token_id  # one token's id
    if number is None or padding is None or padding < number:
        return
    for token, other in ((tokenizer.eos_token, tokenizer.eos_token_id), (tokenizer.unk_token, tokenizer.unk_token_id)):
        if isinstance(other, int) and other < number:
            log.line("model", f"has no embedding for the padding token {tokenizer.pad_token!r}, so {token!r} pads")
            tokenizer.pad_token = token
            return
    files.check_ids(padding, f"The padding token of {files.folder}")
