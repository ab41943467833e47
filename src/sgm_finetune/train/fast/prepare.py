"""Applies training.step=fast to a model before it is measured, trained and evaluated (docs/method.md section 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from sgm_finetune.base.config import DECODER_TASKS, Config
from sgm_finetune.base.device import has_gpu
from sgm_finetune.data.batches import PAIR_COLUMNS
from sgm_finetune.train.fast.adapter_forward import use_fast_step
from sgm_finetune.train.fast.attention import recompute_attention
from sgm_finetune.train.fast.gated_mlp import recompute_mlps
from sgm_finetune.train.fast.head_loss import HeadLoss, find_head_loss
from sgm_finetune.train.fast.liger import use_liger
from sgm_finetune.train.launch import zero_stage

_COLUMNS = 64
"""Number of tokens of each example on which a changed model is compared with the unchanged one."""


class FastBase(NamedTuple):
    """What `prepare_base` gives beside the model that it changes."""

    head_loss: HeadLoss | None
    """The loss computed in parts, or None where the model's own loss is used."""
    remarks: list[str]
    """One line for each part of the fast step that this model does without, and why."""


def prepare_base(
    config: Config, model: PreTrainedModel, new_modules: Sequence[str], batch: dict[str, Tensor]
) -> FastBase:
    """Makes `model` compute the fast step. Returns its loss and remarks.

    On a CPU attention keeps no probabilities, and gated MLPs keep less unless blocks are checkpointed. On a GPU Liger's
    kernels compute. A causal language model gets its loss in parts. Each change is made only if the model's output for
    the beginning of `batch` stays the same. With training.step=peft the model stays as it is.
    """
    if config.training.step == "peft":
        return FastBase(None, [])
    remarks = []
    batch = {name: x for name, x in batch.items() if name not in PAIR_COLUMNS}
    beginning = {name: x[:, :_COLUMNS] if x.dim() == 2 else x for name, x in batch.items()}
    beginning = {name: x.to(model.device) for name, x in beginning.items()}
    if has_gpu() and model.device.type != "cpu":
        reason = use_liger(model, beginning)
        if reason is not None:
            remarks.append(f"Transformers' own code computes norms, rotary embeddings and MLPs: {reason}")
    elif not has_gpu() and not recompute_attention(model, beginning):
        remarks.append("Transformers' own code computes attention: this model's has dropout, or more than a mask")
    if not has_gpu() and not config.training.checkpointing:
        recompute_mlps(model, beginning)
    if config.model.task not in DECODER_TASKS:
        return FastBase(None, remarks)
    found, also = None, set(config.adapter.also)
    tied = model.get_input_embeddings().weight is getattr(model.get_output_embeddings(), "weight", None)
    trains_head = "head" in also or (tied and "embeddings" in also)
    if (
        not new_modules and not trains_head and zero_stage() < 3
    ):  # a new output layer is trained; ZeRO-3 cuts it into pieces
        found = find_head_loss(model, {"input_ids": beginning["input_ids"]})
    if found is None:
        why = "the output layer is trained" if trains_head else "this model's cannot be computed in parts"
        remarks.append(f"the loss takes all logits of a batch: {why}")
    return FastBase(found, remarks)


def prepare_adapters(config: Config, adapted: PeftModel) -> list[str]:
    """Makes the LoRA layers add their updates in place. Returns the names of the layers that cannot and keep PEFT's own
    forward. Does nothing and returns no names with training.step=peft."""
    return use_fast_step(adapted) if config.training.step == "fast" else []
