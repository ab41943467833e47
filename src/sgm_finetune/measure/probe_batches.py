"""The batches of the probe, and the pieces that it computes one at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sgm_finetune.base.config import PAIR_TASKS, Config
from sgm_finetune.base.processes import processes
from sgm_finetune.data.batches import divide_batch, draw_of, num_predictions, some_pairs
from sgm_finetune.data.prepared import PreparedData


def probe_batches(config: Config, prepared: PreparedData) -> list[dict[str, torch.Tensor]]:
    """The first batches of a permutation of the training data, seeded by `probe.seed`. Sources of a mixture have their
    shares in them."""
    dataset, seed = prepared.train.dataset, config.probe.seed
    wanted = min(config.probe.num_batches * config.probe.batch_size, len(dataset))
    draw = draw_of(config, dataset, seed)
    among = draw.indices(0, wanted) if draw is not None else range(len(dataset))
    order = torch.randperm(len(among), generator=torch.Generator().manual_seed(seed)).tolist()[:wanted]
    order = [among[i] for i in order]
    size = max(1, min(config.probe.batch_size, len(order) // 2))  # the probe needs two batches
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    return [prepared.collate([dataset[i] for i in batch]) for batch in batches]


def probe_pieces(config: Config, batch: Mapping[str, torch.Tensor]) -> list[tuple[dict[str, torch.Tensor], float]]:
    """(piece, weight) pairs of a probe batch, small enough to need less memory than a training step.

    A piece has half of the step's micro-batch; with checkpointing, a single example. Its weight is its fraction of the
    batch's predictions, since the batch's loss is their mean. Pieces without predictions are left out.
    """
    micro, _ = divide_batch(config, processes().num_processes)
    size = 1 if config.training.checkpointing else max(1, micro // 2)
    if config.model.task in PAIR_TASKS:
        pieces = [some_pairs(batch, at, size) for at in range(0, len(batch["labels"]) // 2, size)]
    else:
        pieces = [{k: x[at : at + size] for k, x in batch.items()} for at in range(0, len(batch["labels"]), size)]
    counts = [num_predictions(piece["labels"], config.model.task) for piece in pieces]
    return [(piece, count / sum(counts)) for piece, count in zip(pieces, counts, strict=True) if count]
