"""Writes a merged model as a folder that Transformers loads: safetensors files, config, tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from sgm_finetune.base.config import HEAD_TASKS
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import write_json
from sgm_finetune.results.answers import generates_text, is_chat_model
from sgm_finetune.results.export.merge import MergedTensor
from sgm_finetune.results.load import Result
from sgm_finetune.results.stops import GENERATION_CONFIG, save_tokenizer, stored_generation

SHARD_BYTES = 2**29
"""Largest size of one file in bytes. One file is in memory at a time."""
_COPIED = (GENERATION_CONFIG, "*.model", "vocab.json", "vocab.txt", "merges.txt", "LICENSE*")
"""Files that are copied from the base's folder."""
_REACH_EXPORT = ("*.json", "*.txt", "*.jinja", "*.model", "*.py", "LICENSE*", "additional_chat_templates")
"""Files of the base's folder that are copied, or read and written again."""


def check_own_files(folder: Path) -> None:
    """Raises UserError if a file of a model's folder that an export copies is a link to somewhere else.

    Tokenizer, templates, configuration and licence reach the export, which may be published. The hub's cache consists
    of links to files of its own.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    inside = [folder.resolve(), Path(HF_HUB_CACHE).resolve()]
    if folder.parent.name == "snapshots":
        inside.append(folder.parent.parent.resolve())
    for path in sorted(path for pattern in _REACH_EXPORT for path in folder.rglob(pattern)):
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in inside):
            raise UserError(
                f"{path} is a link to {target}, outside of the model's folder, and the export would hold what is "
                "there; put a copy of the file in its place if it belongs to the model"
            )


def write_shards(
    tensors: Sequence[MergedTensor], folder: Path, limit: int, progress: Callable[..., None] = lambda *_: None
) -> None:
    """Writes model.safetensors, or shards of at most `limit` bytes (or of one larger tensor) and their index."""
    named = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        named,  # type: ignore[arg-type]  # the factory only calls the functions below
        get_storage_size=lambda tensor: tensor.num_bytes,  # type: ignore[attr-defined]
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    done = 0
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            shard[name] = named[name].read_rounded().contiguous()
            progress(done := done + 1, len(named))
        try:
            save_file(shard, folder / file, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from None
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def write_config_files(result: Result, skeleton: PreTrainedModel, folder: Path) -> None:
    """Writes config.json, the tokenizer with its chat template, generation_config.json, and the other useful files of
    the base's folder."""
    write_json(folder / "config.json", merged_config(result, skeleton))
    for pattern in (*_COPIED, *(["*.py"] if result.config.model.trust_remote_code else [])):
        for file in result.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)  # without its mode: Windows replaces no read-only file
    save_result_tokenizer(result, skeleton, folder)


def save_result_tokenizer(result: Result, skeleton: PreTrainedModel, folder: Path) -> None:
    """Writes the tokenizer, and for a model that generates generation_config.json."""
    generates = generates_text(result.config.model.task)
    generation = stored_generation(result.folder, skeleton.config) if generates else None
    save_tokenizer(result.tokenizer, folder, generation, is_chat_model(result))


def merged_config(result: Result, skeleton: PreTrainedModel) -> dict[str, Any]:
    """Returns the base's config.json with the keys that the task changes."""
    config = {**result.base_config, "architectures": [type(skeleton).__name__]}
    if result.config.model.task in HEAD_TASKS:
        task_config = skeleton.config.to_dict()
        names = ("id2label", "label2id", "problem_type", "pad_token_id")
        config |= {name: task_config[name] for name in names if task_config.get(name) is not None}
    return config
