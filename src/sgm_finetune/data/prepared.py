"""What a run knows before its model is loaded: the data, encoded, and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sgm_finetune.base.config import PAIR_TASKS, Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.batches import collator
from sgm_finetune.data.encoding import Encoded, encode, largest_id, pack
from sgm_finetune.data.questions import has_answers
from sgm_finetune.data.sources import is_on_hub
from sgm_finetune.data.splits import SPLITS, DataSplits, load_splits, with_classes
from sgm_finetune.model.classes import Head, choose_head, matching_rows
from sgm_finetune.model.files import ModelFiles, find_model_files


@dataclass(frozen=True)
class PreparedData:
    """What a command knows before the model's weights are loaded."""

    folder: Path
    """The base model's."""
    tokenizer: PreTrainedTokenizerBase
    splits: DataSplits
    train: Encoded
    validation: Encoded
    test: Encoded
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    head: Head
    """What the data ask of the model's head."""


def prepare_data(config: Config, log: StepLog, trained: Head | None = None) -> PreparedData:
    """Reads, splits and encodes the data, and prints what it found.

    The classes of the data become those of the head: of the `trained` one if it has all of them, else of the model's
    own (`model/classes.py`). Checks everything that needs no weights: files, columns, labels, lengths, the tokenizer.
    Raises UserError.
    """
    if is_on_hub(config.data):
        log.line("data", f"looking for {config.data.name} on the hub")
    splits = load_splits(config.data, config.model.task)
    if config.model.task == "preference":
        _check_loss(splits, config)
    files = find_model_files(config.model, log, config.data.max_length)
    splits, head, about_head = _choose_head(splits, config, files, trained)
    encoded = {
        name: encode(
            getattr(splits, name), files.tokenizer, config.model.task, config.data.max_length, splits.origins.get(name)
        )
        for name in SPLITS
    }
    _check_ids(encoded, files, config)
    if config.data.packing:
        if not has_answers(encoded["train"].dataset, config.model.task) or config.model.task != "causal-lm":
            raise UserError("data.packing=true is for completion and chat data; running text is packed without it")
        encoded["train"] = pack(encoded["train"], config.data.max_length)
    log.line("data", " · ".join([splits.description, *_encoding_notes(encoded, config.data.max_length)]))
    if about_head is not None:
        log.line("head", about_head)
    if unread := not_read(splits, encoded["train"]):
        log.line("data", f"not read: {', '.join(unread)}")
    for token, count in encoded["train"].doubled.items():
        log.line("data", f"{token} stands twice in a row in {count:,} training sequences; remove it from the texts")
    collate = collator(files.tokenizer, config.model.task, 8)
    return PreparedData(files.folder, files.tokenizer, splits, **encoded, collate=collate, head=head)


def _check_loss(splits: DataSplits, config: Config) -> None:
    """Raises UserError where the loss needs pairs and the data have labels, or the reverse."""
    loss, has_pairs = config.preference.loss, "rejected" in splits.train.column_names
    if has_pairs and not config.preference.has_pairs:
        raise UserError(
            f"preference.loss={loss} learns from single answers (prompt, completion, label), and the data have pairs "
            "(chosen, rejected); take preference.loss=dpo, or divide the pairs"
        )
    if not has_pairs and config.preference.has_pairs:
        raise UserError(
            f"preference.loss={loss} learns from pairs (chosen, rejected), and the data have single answers with a "
            "label; take preference.loss=kto"
        )


def _choose_head(
    splits: DataSplits, config: Config, files: ModelFiles, trained: Head | None
) -> tuple[DataSplits, Head, str | None]:
    """The splits with the classes of the head, the head, and a line about it."""
    padding: Any = files.tokenizer.pad_token_id  # one token's id
    if trained is not None:
        is_other = bool(splits.labels) != bool(trained.labels)
        rows = None if is_other else matching_rows(splits.labels, trained.labels)
        splits = splits if rows is None else with_classes(splits, trained.labels, rows)
        return splits, replace(trained, pad_token_id=padding), None
    chosen = choose_head(splits.labels, files.described, config.model.task)
    splits = with_classes(splits, chosen.labels, chosen.rows)
    kind = "number" if config.model.task == "reward" else splits.label_kind
    return splits, Head(chosen.labels, kind, padding, chosen.is_new), chosen.line


def _check_ids(encoded: Mapping[str, Encoded], files: ModelFiles, config: Config) -> None:
    """Raises UserError for a token id beyond the model's embeddings."""
    limits: dict[str, int | None] = {"input_ids": files.num_embeddings}
    if config.model.task == "seq2seq-lm":
        limits["labels"] = getattr(files.described, "decoder_vocab_size", None) or files.num_embeddings
    if config.model.task in PAIR_TASKS:
        limits["other_ids"] = files.num_embeddings
    for column, limit in limits.items():
        largest = max(largest_id(part.dataset, column) for part in encoded.values())
        files.check_ids(largest, "The data", limit)


def not_read(splits: DataSplits, train: Encoded) -> list[str]:
    """The columns, and the fields of messages, that the model does not see."""
    return [name or "a column without a name" for name in dict.fromkeys([*splits.unread, *train.unread])]


def _encoding_notes(encoded: Mapping[str, Encoded], max_length: int) -> list[str]:
    """What the encoding truncated, dropped, packed and divided, a note each."""
    truncated = sum(part.num_truncated for part in encoded.values())
    dropped = sum(part.num_dropped for part in encoded.values())
    divided = sum(part.num_divided for part in encoded.values())
    notes = []
    if truncated:
        notes.append(f"{truncated:,} cut to {max_length} tokens")
    if dropped:
        notes.append(f"{dropped:,} dropped that have nothing to learn within {max_length}")
    if packed := encoded["train"].num_packed:
        notes.append(f"{packed:,} examples packed into {len(encoded['train'].dataset):,} sequences")
    if divided:
        notes.append(f"{divided:,} conversations divided into one example an answer")
    return notes
