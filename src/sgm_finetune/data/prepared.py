"""What a run knows before its model is loaded: the data, encoded, and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.processes import processes
from sgm_finetune.data.encoding import Encoded, collator, encode, pack
from sgm_finetune.data.questions import has_answers
from sgm_finetune.data.splits import DataSplits, load_splits
from sgm_finetune.model.architecture import check_model
from sgm_finetune.model.folder import announce_own_code, local_folder
from sgm_finetune.model.tokenizer import load_tokenizer


@dataclass(frozen=True)
class PreparedData:
    """What is known before the model is loaded."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    splits: DataSplits
    train: Encoded
    validation: Encoded
    test: Encoded
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


def prepare_data(config: Config, log: StepLog) -> PreparedData:
    """Everything that can be checked without the model's weights: files, columns, labels, lengths, the tokenizer."""
    splits = load_splits(config.data, config.model.task)
    with processes().main_process_first():  # one process converts or downloads, the others find it done
        folder = local_folder(config.model.name, config.model.revision, lambda line: log.line("model", line))
    announce_own_code(config.model, folder, log)
    check_model(config.model, folder, config.data.max_length)
    tokenizer = load_tokenizer(folder, config.model)
    encoded = {
        name: encode(getattr(splits, name), tokenizer, config.model.task, config.data.max_length)
        for name in ("train", "validation", "test")
    }
    if config.data.packing:
        if not has_answers(encoded["train"].dataset, config.model.task) or config.model.task != "causal-lm":
            raise UserError("data.packing=true is for completion and chat data; running text is packed without it")
        encoded["train"] = pack(encoded["train"], config.data.max_length)
    cut = sum(part.num_truncated for part in encoded.values())
    dropped = sum(part.num_dropped for part in encoded.values())
    divided = sum(part.num_divided for part in encoded.values())
    notes = [f"{cut:,} cut to {config.data.max_length} tokens"] * bool(cut)
    notes += [f"{dropped:,} dropped that have nothing to learn within {config.data.max_length}"] * bool(dropped)
    if packed := encoded["train"].num_packed:
        notes.append(f"{packed:,} examples packed into {len(encoded['train'].dataset):,} sequences")
    notes += [f"{divided:,} conversations divided into one example an answer"] * bool(divided)
    log.line("data", " · ".join([splits.description, *notes]))
    return PreparedData(folder, tokenizer, splits, **encoded, collate=collator(tokenizer, config.model.task, 8))
