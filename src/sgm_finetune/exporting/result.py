"""What a run left in its output folder, with the base model that it belongs to; nothing large is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgm_finetune.config import Config, LabelKind, ModelConfig
from sgm_finetune.export import PTH, load_pth, stored_config
from sgm_finetune.materials import tell_own_code
from sgm_finetune.model_folder import local_folder
from sgm_finetune.models import check_model, device_for, load_model, load_tokenizer, skeleton
from sgm_finetune.reading import read_object
from sgm_finetune.voice import Voice


@dataclass(frozen=True)
class Result:
    """A trained adapter, and where its base model is."""

    path: Path
    """The .pth file."""
    content: dict[str, Any]
    config: Config
    """As trained, with what the command line changes."""
    folder: Path
    """The base model's."""
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    label_kind: LabelKind | None

    @property
    def base_config(self) -> dict[str, Any]:
        """The base model's config.json."""
        return read_object(self.folder / "config.json")

    @property
    def metrics(self) -> dict[str, Any]:
        """metrics.json beside the result; {} where it is gone."""
        path = self.path.parent / "metrics.json"
        return read_object(path) if path.is_file() else {}


def read_result(config: Config, overrides: Sequence[str], voice: Voice) -> Result:
    """The result in `config.output.dir`; `overrides` (key=value) change the configuration that it was trained with.

    Raises UserError where there is none, and where its base model is not to be had.
    """
    path = Path(config.output.dir) / PTH
    content = load_pth(path)
    trained = stored_config(content, path, config, overrides)
    model = trained.model
    folder = local_folder(model.name, model.revision, lambda line: voice.say("model", line))
    tell_own_code(model, folder, voice)
    check_model(unquantised(model), folder)
    labels, kind = tuple(content["labels"]), content.get("label_kind")
    if kind is None and model.task == "sequence-classification" and not labels:
        kind = "number"  # nothing else is without names
    return Result(path, content, trained, folder, load_tokenizer(folder, model), labels, kind)


def unquantised(model: ModelConfig, dtype: str = "auto") -> ModelConfig:
    return model.model_copy(update={"quantization": "none", "dtype": dtype})


def base_skeleton(result: Result) -> PreTrainedModel:
    """The unquantised base model on device "meta", with the head of the task."""
    return skeleton(
        unquantised(result.config.model), result.folder, result.labels, _pad(result), result.label_kind
    )  # fmt: skip


def load_unquantised(result: Result, dtype: str) -> PreTrainedModel:
    """The base model as its files have it, computing in `dtype`."""
    set_seed(result.config.training.seed)  # a new head is random, until the adapter brings its own
    model, _ = load_model(
        unquantised(result.config.model, dtype), result.folder, result.labels, _pad(result), device_for(),
        result.label_kind,
    )  # fmt: skip
    return model


def _pad(result: Result) -> int | None:
    return result.tokenizer.pad_token_id  # type: ignore[return-value]  # one token's id


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
