"""The batches that the probe measures, and the pieces in which it computes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sgm_finetune.base.config import Config
from sgm_finetune.base.processes import processes
from sgm_finetune.data.batches import divide_batch, num_predictions
from sgm_finetune.data.prepared import PreparedData


def probe_batches(config: Config, prepared: PreparedData) -> list[dict[str, torch.Tensor]]:
    """The first batches of a seeded permutation of the training data."""
    dataset = prepared.train.dataset
    wanted = config.probe.num_batches * config.probe.batch_size
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.probe.seed)).tolist()[:wanted]
    size = max(1, min(config.probe.batch_size, len(order) // 2))  # two batches at least
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    return [prepared.collate([dataset[i] for i in batch]) for batch in batches]


def probe_pieces(config: Config, batch: Mapping[str, torch.Tensor]) -> list[tuple[dict[str, torch.Tensor], float]]:
    """A probe batch in pieces that hold less than a step does, half of its micro-batch or, where that is checkpointed,
    single examples; and each one's share of the predictions that the batch's loss is a mean of."""
    micro, _ = divide_batch(config, processes().num_processes)
    size = 1 if config.training.checkpointing else max(1, micro // 2)
    pieces = [{k: x[at : at + size] for k, x in batch.items()} for at in range(0, len(batch["labels"]), size)]
    counts = [num_predictions(piece["labels"], config.model.task) for piece in pieces]
    return [(piece, count / sum(counts)) for piece, count in zip(pieces, counts, strict=True) if count]
