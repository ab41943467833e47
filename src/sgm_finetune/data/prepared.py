"""What a run knows before its model is loaded: the data, encoded, and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sgm_finetune.base.config import PAIR_TASKS, Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.batches import collator
from sgm_finetune.data.encoding import Encoded, join_sources, largest_id
from sgm_finetune.data.encoding_cache import encode_or_recall
from sgm_finetune.data.mixture import SOURCE, Share, in_entry, shares
from sgm_finetune.data.rows import Origin
from sgm_finetune.data.sources import Split, is_on_hub
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
    mixture: Sequence[Share] = ()
    """What each source of a mixture contributes to an epoch; () without a mixture."""


def prepare_data(config: Config, log: StepLog, trained: Head | None = None) -> PreparedData:
    """Reads, splits and encodes the data, and prints what it found.

    The classes of the data become those of the head: of the `trained` one if it has all of them, else of the model's
    own (`model/classes.py`). Checks everything that needs no weights: files, columns, labels, lengths, the tokenizer.
    Raises UserError.
    """
    for source in filter(is_on_hub, config.data.sources):
        log.line("data", f"looking for {source.name} on the hub")
    splits = load_splits(config.data, config.model.task)
    if config.model.task == "preference":
        _check_loss(splits, config)
    files = find_model_files(config.model, log, config.data.max_length)
    splits, head, about_head = _choose_head(splits, config, files, trained)
    encoded = {name: _encode_split(splits, name, files.tokenizer, config) for name in SPLITS}
    _check_ids(encoded, files, config)
    log.line("data", " · ".join([splits.description, *_encoding_notes(encoded, config.data.max_length)]))
    mixture = _mixture(config, splits, encoded["train"])
    for share in mixture:
        log.line("", share.describe())
    if about_head is not None:
        log.line("head", about_head)
    if unread := not_read(splits, encoded["train"]):
        log.line("data", f"not read: {', '.join(unread)}")
    for token, count in encoded["train"].doubled.items():
        log.line("data", f"{token} stands twice in a row in {count:,} training sequences; remove it from the texts")
    collate = collator(files.tokenizer, config.model.task, 8)
    return PreparedData(files.folder, files.tokenizer, splits, **encoded, collate=collate, head=head, mixture=mixture)


def _encode_split(splits: DataSplits, name: Split, tokenizer: PreTrainedTokenizerBase, config: Config) -> Encoded:
    """A split as token sequences, and as packed ones if the training data are to be packed. Each source of a mixture is
    encoded on its own, and a column SOURCE has its index."""
    dataset, origins = getattr(splits, name), splits.origins.get(name)
    if not splits.sources:
        return _encode_source(dataset, name, tokenizer, config, origins)
    parts, end = {}, 0
    for source, count in enumerate(splits.counts[name]):
        begin, end = end, end + count
        if count:
            here = origins[begin:end] if origins is not None else None
            with in_entry(source + 1):
                parts[source] = _encode_source(dataset.select(range(begin, end)), name, tokenizer, config, here)
    return join_sources(parts)


def _encode_source(
    dataset: Dataset,
    name: Split,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    origins: Sequence[Origin] | None,
) -> Encoded:
    task, packs = config.model.task, config.data.packing and name == "train"
    if packs and (task != "causal-lm" or "text" in dataset.column_names):
        raise UserError("data.packing=true is for completion and chat data; running text is packed without it")
    return encode_or_recall(dataset, tokenizer, task, config.data.max_length, origins, packs)


def _mixture(config: Config, splits: DataSplits, train: Encoded) -> list[Share]:
    if not splits.sources:
        return []
    return shares(splits.sources, train.dataset[SOURCE][:], config.data.weights, config.training.batch_size)


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
    if any(part.is_recalled for part in encoded.values()):
        notes.append("token sequences from the cache")
    return notes
