"""The base model of a run, loaded whole or sharded over the processes."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgm_finetune.base.config import Config, LabelKind
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.device import device_for, multiplies_bfloat16
from sgm_finetune.base.memory import release_memory
from sgm_finetune.base.processes import processes
from sgm_finetune.base.text import gib
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.model.load import Head, load_model
from sgm_finetune.train.adapters.shard import Sharded, shard_base


def _describe_sharding(sharded: Sharded) -> str:
    here, whole = sharded.here / 2**20, sharded.whole / 2**20
    return (
        f"{sharded.num_blocks} blocks over {processes().num_processes} processes: {here:,.1f} MiB in each instead of "
        f"{whole:,.1f}"
    )


def load_base(
    config: Config, prepared: PreparedData, log: StepLog | None = None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The base model, in pieces over the processes where that is asked for, and its modules that are new."""
    splits = prepared.splits
    return _load_base(config, prepared.folder, prepared.tokenizer, splits.labels, splits.label_kind, log)


def _load_base(
    config: Config,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    labels: tuple[str, ...],
    label_kind: LabelKind | None,
    log: StepLog | None,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    device = device_for(processes().local_process_index)
    shard = config.training.shard and processes().num_processes > 1
    set_seed(config.training.seed)  # a new classification head is random
    model, new_modules = load_model(
        config.model,
        folder,
        Head(labels, label_kind, tokenizer.pad_token_id),  # type: ignore[arg-type]  # one token's id
        torch.device("cpu") if shard else device,
    )
    if shard:
        sharded = shard_base(model, device, new_modules)
        if log is not None:
            log.line("shard", _describe_sharding(sharded))
    if log is not None and model.dtype == torch.bfloat16 and not multiplies_bfloat16():
        more = sum(p.numel() * p.element_size() for p in model.parameters() if p.dtype == torch.bfloat16)
        log.line("", f"no instructions for bfloat16 here: model.dtype=float32 is faster, and takes {gib(more)} more")
    release_memory()
    return model, new_modules
