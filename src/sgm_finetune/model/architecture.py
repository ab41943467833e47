"""What config.json says about a base model: which tasks it fits, how long its sequences may be."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, get_args

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from sgm_finetune.base.config import ModelConfig, Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import first_line
from sgm_finetune.base.untrusted import MAX_LAYERS, check_shards, read_json_object

_AUTO: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
}


def auto_class(task: Task) -> Any:
    """Transformers' loader of models for the task."""
    return _AUTO[task]


def check_model(config: ModelConfig, folder: Path, max_length: int = 0) -> None:
    """What can be known before the weights are loaded: a readable config, an architecture that fits the task,
    positions for `max_length` tokens, bitsandbytes where quantisation is asked for. Raises UserError."""
    described = read_model_config(config, folder)
    check_shards(folder)
    known = _AUTO[config.task]._model_mapping  # type: ignore[attr-defined]
    remote = _AUTO[config.task].__name__ in (getattr(described, "auto_map", None) or {})
    if type(described) not in known and not remote:
        raise UserError(
            f"model.task={config.task} does not fit model.name={config.name}, a {described.model_type}; "
            f"choose another task or model"
        )
    positions = num_positions(described)
    if positions is not None and max_length > positions:
        raise UserError(
            f"data.max_length={max_length} is more than the {positions} positions of model.name={config.name}; "
            f"take data.max_length={positions} or less"
        )
    if config.quantization != "none":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                f"model.quantization={config.quantization} needs bitsandbytes; pip install bitsandbytes, "
                "or take model.quantization=none"
            )
        existing = getattr(described, "quantization_config", None)
        if existing is not None:
            raise UserError(f"{config.name} is quantised already; take model.quantization=none")


def fitting_tasks(name: str) -> tuple[Task, ...]:
    """Tasks that Transformers has a model for, by the config.json of a folder; all of them for a model that is not
    here."""
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        return get_args(Task)
    described = read_model_config(ModelConfig(name=name), folder)
    return tuple(task for task in get_args(Task) if type(described) in _AUTO[task]._model_mapping) or get_args(Task)


def read_model_config(config: ModelConfig, folder: Path) -> PreTrainedConfig:
    """config.json; UserError where it cannot be read, or needs code that `model.trust_remote_code` does not allow."""
    try:
        values = read_json_object(folder / "config.json")
        if "auto_map" in values and not config.trust_remote_code and values.get("model_type") not in CONFIG_MAPPING:
            raise UserError(
                f"model.name={config.name} brings Python code of its own, which is not run unless you say "
                "model.trust_remote_code=true; read it first"
            )
        described = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        layers = getattr(described.get_text_config(), "num_hidden_layers", None)
        if isinstance(layers, int) and layers > MAX_LAYERS:
            raise ValueError(f"{layers:,} layers")
        return described
    except UserError:
        raise
    except Exception as error:  # Transformers raises many types here
        raise UserError(
            f"{folder / 'config.json'} cannot be used: {first_line(error)}; get the model's files again"
        ) from None


def num_positions(described: PreTrainedConfig) -> int | None:
    """The longest sequence that the model was made for, where its config says so."""
    text = described.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and any(family in text.model_type for family in ("roberta", "camembert")):
        positions -= text.pad_token_id + 1  # these count positions from behind the padding token's
    return positions
