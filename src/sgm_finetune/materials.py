"""What a run knows before its model is loaded: the data, encoded, and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sgm_finetune.config import Config, ModelConfig
from sgm_finetune.data import DataSplits, Encoded, collator, encode, load_splits, pack
from sgm_finetune.errors import UserError
from sgm_finetune.evaluation import num_predictions
from sgm_finetune.generation import has_answers
from sgm_finetune.harness import check_harness
from sgm_finetune.launch import processes
from sgm_finetune.model_folder import local_folder
from sgm_finetune.models import check_model, load_tokenizer
from sgm_finetune.reading import read_object
from sgm_finetune.trainer import divided_batch
from sgm_finetune.voice import Voice


@dataclass(frozen=True)
class Materials:
    """What is known before the model is loaded."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    splits: DataSplits
    train: Encoded
    validation: Encoded
    test: Encoded
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


def prepare(config: Config, voice: Voice) -> Materials:
    """Everything that can be checked without the model's weights: files, columns, labels, lengths, the tokenizer."""
    check_harness(config.evaluation.harness, config.model.task)
    splits = load_splits(config.data, config.model.task)
    with processes().main_process_first():  # one process converts or downloads, the others find it done
        folder = local_folder(config.model.name, config.model.revision, lambda line: voice.say("model", line))
    tell_own_code(config.model, folder, voice)
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
    voice.say("data", " · ".join([splits.description, *notes]))
    return Materials(folder, tokenizer, splits, **encoded, collate=collator(tokenizer, config.model.task, 8))


def tell_own_code(config: ModelConfig, folder: Path, voice: Voice) -> None:
    """Says aloud, before it does, that Python code of a model's folder runs."""
    if config.trust_remote_code and "auto_map" in read_object(folder / "config.json"):
        voice.say("model", f"runs the Python code in {folder}, as model.trust_remote_code=true allows")


def probe_batches(config: Config, materials: Materials) -> list[dict[str, torch.Tensor]]:
    """The first batches of a seeded permutation of the training data."""
    dataset = materials.train.dataset
    wanted = config.probe.num_batches * config.probe.batch_size
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.probe.seed)).tolist()[:wanted]
    size = max(1, min(config.probe.batch_size, len(order) // 2))  # two batches at least
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    return [materials.collate([dataset[i] for i in batch]) for batch in batches]


def probe_pieces(config: Config, batch: Mapping[str, torch.Tensor]) -> list[tuple[dict[str, torch.Tensor], float]]:
    """A probe batch in pieces that hold less than a step does, half of its micro-batch or, where that is checkpointed,
    single examples; and each one's share of the predictions that the batch's loss is a mean of."""
    micro, _ = divided_batch(config, processes().num_processes)
    size = 1 if config.training.checkpointing else max(1, micro // 2)
    pieces = [{k: x[at : at + size] for k, x in batch.items()} for at in range(0, len(batch["labels"]), size)]
    counts = [num_predictions(piece["labels"], config.model.task) for piece in pieces]
    return [(piece, count / sum(counts)) for piece, count in zip(pieces, counts, strict=True) if count]
