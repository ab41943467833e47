"""The base model of a run: loaded whole or sharded over the processes, and made ready for the step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.device import device_for, multiplies_bfloat16
from sgm_finetune.base.memory import release_memory
from sgm_finetune.base.processes import processes
from sgm_finetune.base.text import gib
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.model.load import Head, check_checkpointing, load_model
from sgm_finetune.train.adapters.shard import Sharded, shard_base
from sgm_finetune.train.fast.head_loss import HeadLoss
from sgm_finetune.train.fast.prepare import prepare_base
from sgm_finetune.train.losses import check_packing


@dataclass(frozen=True)
class Base:
    """The frozen base model, ready for the step that the configuration asks for."""

    model: PreTrainedModel
    new_modules: tuple[str, ...]
    """Modules that the model's files lack, such as a new classification head; they are trained whole."""
    head_loss: HeadLoss | None
    """Computes a language model's loss in parts; None: by the model itself."""


def load_base(config: Config, prepared: PreparedData, log: StepLog, will_train: bool = False) -> Base:
    """Loads the base model and prepares the fast step on it.

    With `will_train`, raises UserError where packed examples would see each other, or where checkpointing is asked for
    and the architecture cannot do it.
    """
    model, new_modules = load_base_weights(config, prepared.folder, prepared.head, log)
    train = prepared.train.dataset
    if will_train:
        check_packing(model, train)
        if config.training.checkpointing:
            check_checkpointing(model, config.model)
    batch = prepared.collate([train[i] for i in range(min(2, len(train)))])
    head_loss, remarks = prepare_base(config, model, new_modules, batch)
    for remark in remarks:
        log.line("", remark)
    return Base(model, new_modules, head_loss)


def load_base_weights(
    config: Config, folder: Path, head: Head, log: StepLog
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Returns the base model, sharded over the processes if training.shard asks for it, and its new modules."""
    device = device_for(processes().local_process_index)
    shard = config.training.shard and processes().num_processes > 1
    set_seed(config.training.seed)  # a new classification head is random
    model, new_modules = load_model(
        config.model, folder, head, torch.device("cpu") if shard else device, lambda line: log.line("model", line)
    )
    if shard:
        log.line("shard", _describe_sharding(shard_base(model, device, new_modules)))
    if model.dtype == torch.bfloat16 and not multiplies_bfloat16():
        more = sum(p.numel() * p.element_size() for p in model.parameters() if p.dtype == torch.bfloat16)
        log.line("", f"no instructions for bfloat16 here: model.dtype=float32 is faster, and takes {gib(more)} more")
    release_memory()
    return model, new_modules


def _describe_sharding(sharded: Sharded) -> str:
    here, whole = sharded.here / 2**20, sharded.whole / 2**20
    return (
        f"{sharded.num_blocks} blocks over {processes().num_processes} processes: {here:,.1f} MiB in each instead of "
        f"{whole:,.1f}"
    )
