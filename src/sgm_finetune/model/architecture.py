"""What config.json says about a base model: which tasks it supports and how long its sequences may be."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from sgm_finetune.base.config import ModelConfig, Task
from sgm_finetune.base.errors import UserError, is_out_of_memory
from sgm_finetune.base.text import first_line, mib
from sgm_finetune.base.untrusted import MAX_LAYERS, check_shards, read_json_object
from sgm_finetune.model.weights.stored import num_tensors, weight_files

if TYPE_CHECKING:  # it takes seconds to load, and `sgm data` needs no model
    from transformers import PreTrainedModel

_AUTO: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "preference": AutoModelForCausalLM,
    "reward": AutoModelForSequenceClassification,
}
_MODELS: dict[str, Any] = {
    "causal-lm": MODEL_FOR_CAUSAL_LM_MAPPING,
    "sequence-classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "token-classification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "seq2seq-lm": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "preference": MODEL_FOR_CAUSAL_LM_MAPPING,
    "reward": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}
"""Task -> class of a configuration -> class of its model."""


def auto_class(task: Task) -> Any:
    """Transformers' auto class for the task."""
    return _AUTO[task]


def check_model(config: ModelConfig, folder: Path, max_length: int = 0) -> None:
    """Checks a model before its weights are loaded; raises UserError for what cannot work.

    It checks that config.json is readable, that the architecture supports the task, that it has positions for
    `max_length` tokens, that bitsandbytes is installed when `config` asks for quantisation, and that the base can be
    where `config` says.
    """
    described = read_model_config(config, folder)
    place = config.residence
    if place in ("host", "disk") and (reason := why_not_at(place, config, described)) is not None:
        raise UserError(f"model.residence={place} {reason}; set model.residence=device")
    check_shards(folder)
    remote = _AUTO[config.task].__name__ in (getattr(described, "auto_map", None) or {})
    if not (_fits(config.task, described) or remote):
        raise UserError(
            f"model.task={config.task} does not fit model.name={config.name}, a {described.model_type}; "
            f"choose another task or model"
        )
    positions = num_positions(described)
    if positions is not None and max_length > positions:
        raise UserError(
            f"data.max_length={max_length} is more than the {positions} positions of model.name={config.name}; "
            f"use data.max_length={positions} or less"
        )
    if config.quantization != "none":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                f"model.quantization={config.quantization} needs bitsandbytes; pip install bitsandbytes, "
                "or use model.quantization=none"
            )
        existing = getattr(described, "quantization_config", None)
        if existing is not None:
            raise UserError(f"{config.name} is already quantised; use model.quantization=none")


def why_not_at(
    place: Literal["host", "disk"], config: ModelConfig, described: PreTrainedConfig | None = None
) -> str | None:
    """Why the base cannot stay in the host's memory or on disk, as the end of a sentence; None where it can.
    `described` is its config.json."""
    from sgm_finetune.base.device import has_gpu
    from sgm_finetune.base.memory import can_map_files

    if place == "host" and not has_gpu():
        return "is for machines with a GPU, and this one has none"
    if place == "disk" and has_gpu():
        return "is for machines without a GPU, and this one has one"
    if config.quantization == "int8":
        return "takes model.quantization=none or nf4, not int8"
    if getattr(described, "quantization_config", None) is not None:
        return "takes files with plain numbers, and those of this model are quantised"
    if place == "disk" and not can_map_files():
        return "needs Linux, which says which pages of a file are in memory"
    return None


def can_recompute_blocks(config: ModelConfig, described: PreTrainedConfig) -> bool:
    """Whether Transformers can recompute the activations of a model's blocks (checkpointing). `described` is its
    config.json; a model with code of its own may still decline when it is built."""
    classes = _MODELS[config.task].get(type(described), ())
    classes = classes if isinstance(classes, tuple) else (classes,)
    return all(model.supports_gradient_checkpointing for model in classes)


def _fits(task: Task, described: PreTrainedConfig) -> bool:
    """Whether Transformers has a model of this architecture for the task. It has language models of encoders too, which
    predict no answers."""
    is_encoder = type(described) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(described, "is_decoder", False)
    return type(described) in _MODELS[task] and not (task == "preference" and is_encoder)


def fitting_tasks(name: str) -> tuple[Task, ...]:
    """The tasks that Transformers supports for the model in the folder `name`, by its config.json.

    All tasks when the folder has no config.json, and when Transformers knows none for this model.
    """
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        return get_args(Task)
    described = read_model_config(ModelConfig(name=name), folder)
    return tuple(task for task in get_args(Task) if _fits(task, described)) or get_args(Task)


def read_model_config(config: ModelConfig, folder: Path) -> PreTrainedConfig:
    """The model's configuration from config.json.

    Raises UserError when it cannot be read, or needs Python code that `model.trust_remote_code` does not allow.
    """
    try:
        values = read_json_object(folder / "config.json")
        if "auto_map" in values and not config.trust_remote_code and values.get("model_type") not in CONFIG_MAPPING:
            raise UserError(
                f"model.name={config.name} needs its own Python code, which does not run without "
                "model.trust_remote_code=true; read the code first"
            )
        described = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        _check_counts(described.to_dict(), folder)
        return described
    except Exception as error:  # Transformers raises many types here
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(
            f"{folder / 'config.json'} cannot be used: {first_line(error)}; download the model again"
        ) from None


def _check_counts(values: Any, folder: Path) -> None:
    """Raises ValueError for more layers or experts than the model's files have tensors.

    Every layer takes time and memory to build, also without weights. Layers may share tensors (ALBERT), so that as many
    as MANY are always accepted.
    """
    for key, value in values.items():
        if isinstance(value, dict):
            _check_counts(value, folder)
        elif _COUNT.search(str(key)) and isinstance(value, int) and value > MANY:
            if value > MAX_LAYERS:
                raise ValueError(f"{key} is {value:,}")
            if value > (stored := num_tensors(folder)):
                raise ValueError(f"{key} is {value:,}, and the model's files have {stored:,} tensors")


_COUNT = re.compile(r"layers?$|experts$|blocks$|depth$")
MANY = 256


def check_size(model: PreTrainedModel, folder: Path) -> None:
    """Raises UserError when a model on device "meta" has many more numbers than its files can hold.

    What the files lack or have in another shape, Transformers creates. That is right for a head, whose classes are
    those of the data, and for no other part.
    """
    try:
        held = sum(file.stat().st_size for file in weight_files(folder))
    except UserError:  # no weights: whoever reads them will say so
        return
    claimed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if claimed > held * _NUMBERS_PER_BYTE + _NEW_HEAD + getattr(model.config, "num_labels", 0) * _WIDEST:
        raise UserError(
            f"{folder / 'config.json'} describes a model of {claimed:,} numbers, but its weights have {mib(held)}; "
            "download the model again"
        )


_NUMBERS_PER_BYTE = 4  # 2-bit weights
_NEW_HEAD, _WIDEST = 2**25, 2**15
"""Numbers that a new head may have: its own layers, and a row of the widest model for each class."""


def num_positions(described: PreTrainedConfig) -> int | None:
    """Longest sequence that the model supports, in tokens; None when its config does not say."""
    text = described.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and any(family in text.model_type for family in ("roberta", "camembert")):
        positions -= text.pad_token_id + 1  # the first position comes after the padding token's id
    return positions
