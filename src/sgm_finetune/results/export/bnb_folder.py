"""Writes a merged model as a folder in bitsandbytes' 4 bits, which Transformers loads by itself."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import write_json
from sgm_finetune.model.as_trained import quantised_layers
from sgm_finetune.model.load import load_model
from sgm_finetune.results.export.merge import MergedTensor
from sgm_finetune.results.export.shards import SHARD_BYTES, merged_config, write_config_files
from sgm_finetune.results.load import Result

_BLOCK = 64
"""Numbers that share a scale in NF4, as in training."""


def quantised_share(tensors: Sequence[MergedTensor], skeleton: PreTrainedModel) -> float:
    """The share of a model's numbers that bitsandbytes stores in 4 bits. Raises UserError if there are none.

    These are the matrices of the linear layers in blocks, as in training. Embeddings, norms, heads and stacks of
    experts keep their type.
    """
    layers = {f"{name}.weight" for name in quantised_layers(skeleton)}
    sizes = [tensor.num_bytes // tensor.dtype.itemsize for tensor in tensors]
    share = sum(size for size, t in zip(sizes, tensors, strict=True) if t.model_name in layers) / sum(sizes)
    if not share:
        raise UserError(
            f"--to bnb-4bit quantises linear layers in blocks, and {type(skeleton).__name__} has none; take --to merged"
        )
    return share


def num_bytes(tensors: Sequence[MergedTensor], share: float) -> int:
    """The approximate size of the folder while it is written: the merged model beside the quantised one."""
    whole, numbers = sum(t.num_bytes for t in tensors), sum(t.num_bytes // t.dtype.itemsize for t in tensors)
    return round(whole * (2 - share) + numbers * share * (0.5 + 4 / _BLOCK))


def quantise_bnb(result: Result, merged: Path, skeleton: PreTrainedModel, dtype: str, folder: Path) -> None:
    """Writes the model in the folder `merged` into `folder` in NF4, and deletes `merged`.

    bitsandbytes quantises it as a base is quantised for training. Its layers compute in `dtype`, and what is not
    quantised is stored in it.
    """
    changes = {"quantization": "nf4", "residence": "device", "dtype": dtype}
    model, _ = load_model(result.config.model.model_copy(update=changes), merged)
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    settings = model.config.quantization_config
    del model
    shutil.rmtree(merged)
    write_config_files(result, skeleton, folder)
    write_json(folder / "config.json", {**merged_config(result, skeleton), "quantization_config": settings.to_dict()})
