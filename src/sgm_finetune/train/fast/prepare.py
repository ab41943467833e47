"""What training.step=fast does to a model before it is measured, trained and evaluated (docs/method.md section 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from sgm_finetune.base.config import Config
from sgm_finetune.base.device import has_gpu
from sgm_finetune.train.fast.adapter_forward import use_fast_step
from sgm_finetune.train.fast.attention import recompute_attention
from sgm_finetune.train.fast.gated_mlp import recompute_mlps
from sgm_finetune.train.fast.head_loss import HeadLoss, find_head_loss
from sgm_finetune.train.fast.liger import use_liger
from sgm_finetune.train.launch import zero_stage

_COLUMNS = 64
"""As many tokens of a batch show whether a model computes the same in another way."""


class FastBase(NamedTuple):
    """What `prepare_base` gives beside the model that it changes."""

    head_loss: HeadLoss | None
    """The loss computed in parts, or None where the model's own loss is used."""
    remarks: list[str]
    """One line for each part of the fast step that this model does without, and why."""


def prepare_base(
    config: Config, model: PreTrainedModel, new_modules: Sequence[str], batch: dict[str, Tensor]
) -> FastBase:
    """Attention that keeps no probabilities (on a CPU), Liger's kernels (on a GPU) and the loss in parts (a causal
    language model's), where they give what the model itself gives for the beginning of `batch`; the remarks say where
    they do not."""
    if config.training.step == "peft":
        return FastBase(None, [])
    remarks = []
    beginning = {name: x[:, :_COLUMNS] if x.dim() == 2 else x for name, x in batch.items()}
    beginning = {name: x.to(model.device) for name, x in beginning.items()}
    if has_gpu() and model.device.type != "cpu":
        if (why := use_liger(model, beginning)) is not None:
            remarks.append(f"norms, rotary embeddings and MLPs by Transformers' own code: {why}")
    elif not has_gpu() and not recompute_attention(model, beginning):
        remarks.append("attention by Transformers' own code: this model's has dropout, or more to it than a mask")
    if not has_gpu() and not config.training.checkpointing:
        recompute_mlps(model, beginning)
    if config.model.task != "causal-lm":
        return FastBase(None, remarks)
    found = None
    if not new_modules and zero_stage() < 3:  # a new output layer is trained; ZeRO-3 has it in pieces
        found = find_head_loss(model, {"input_ids": beginning["input_ids"]})
    if found is None:
        remarks.append("the loss from all logits of a batch: this model's cannot be had in parts")
    return FastBase(found, remarks)


def prepare_adapters(config: Config, adapted: PeftModel) -> list[str]:
    """Updates added in place; returns the names of the layers whose update PEFT's own forward adds."""
    return use_fast_step(adapted) if config.training.step == "fast" else []
