"""Base models: how they are loaded and quantised, which layers can be adapted."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from sgm_finetune.config import ModelConfig
from sgm_finetune.errors import UserError

HEADS = ("score", "classifier", "lm_head")
"""Output layers: never quantised; a new classification head is trained whole."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device_for(local_rank: int = 0) -> torch.device:
    """The GPU of this process where there is one, else the CPU."""
    return torch.device("cuda", local_rank) if has_gpu() else torch.device("cpu")


def check_model(config: ModelConfig, folder: Path, max_length: int = 0) -> None:
    """What can be known before the weights are loaded: a readable config, an architecture that fits the task,
    positions for `max_length` tokens, bitsandbytes where quantisation is asked for. Raises UserError."""
    try:
        described = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be used: {_first_line(error)}") from None
    known = _AUTO[config.task]._model_mapping  # type: ignore[attr-defined]
    if type(described) not in known:
        raise UserError(
            f"model.task={config.task} does not fit model.name={config.name}, a {described.model_type}; "
            f"choose another task or model"
        )
    positions = _num_positions(described)
    if positions is not None and max_length > positions:
        raise UserError(
            f"data.max_length={max_length} is more than the {positions} positions of model.name={config.name}; "
            f"take data.max_length={positions} or less"
        )
    if config.quantization != "none":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                f"model.quantization={config.quantization} needs bitsandbytes; pip install 'sgm-finetune[bnb]', "
                "or take model.quantization=none"
            )
        existing = getattr(described, "quantization_config", None)
        if existing is not None:
            raise UserError(f"{config.name} is quantised already; take model.quantization=none")


def _num_positions(described: PreTrainedConfig) -> int | None:
    """The longest sequence that the model was made for, where its config says so."""
    text = described.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and any(family in text.model_type for family in ("roberta", "camembert")):
        positions -= text.pad_token_id + 1  # these count positions from behind the padding token's
    return positions


_AUTO: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right, with a padding token (its end-of-text token where it has none)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} has no usable tokenizer; put tokenizer.json and tokenizer_config.json there "
            f"({_first_line(error).rstrip(':')})"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(
    config: ModelConfig,
    folder: Path,
    labels: tuple[str, ...] = (),
    pad_token_id: int | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The base model, in eval mode, quantised as asked, ready for backward passes; a new head for `labels`.

    dtype "auto": bfloat16 under quantisation (the fastest 4-bit path on CPUs too), else the stored type. A new
    head starts from torch's global random state. Raises UserError for weights that cannot be read.
    """
    device = device or device_for()
    settings: dict[str, Any] = {"device_map": {"": device}}
    if device.type == "cpu":  # torch's fused attention is the slower one in bfloat16 backward passes (docs/LOG.md)
        settings["attn_implementation"] = "eager"
    quantised = config.quantization != "none"
    chosen = _DTYPES.get(config.dtype)
    dtype = chosen or (torch.bfloat16 if quantised else "auto")
    described = AutoConfig.from_pretrained(folder)
    if labels:
        described.num_labels = len(labels)
        described.id2label = dict(enumerate(labels))
        described.label2id = {label: i for i, label in enumerate(labels)}
        described.problem_type = "single_label_classification"
    if pad_token_id is not None:
        described.pad_token_id = pad_token_id
    if quantised:
        settings["quantization_config"] = _quantization(config, chosen or torch.bfloat16)
    try:
        model = _AUTO[config.task].from_pretrained(folder, config=described, dtype=dtype, **settings)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"model.name={config.name} cannot be loaded: {_first_line(error)}") from None
    ready_for_backward(model)
    return model.eval()


def _quantization(config: ModelConfig, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(HEADS))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(HEADS),
    )


def ready_for_backward(model: nn.Module) -> None:
    """Keeps bitsandbytes' 4-bit CPU layers right for training, whatever was evaluated before or will be.

    On CPUs with AVX512-BF16 an evaluation repacks a `Linear4bit` for inference, after which every backward pass gives
    wrong gradients (docs/method.md section 5). Packing is switched off, and what was packed is unpacked (by
    `state_dict`, the public way; bitsandbytes 0.50.2 leaves the blocks' scales transposed then, which is put right).
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()
                state: Any = module.weight.quant_state  # type: ignore[union-attr]
                if state.absmax.dim() == 2:  # (blocks of a row x rows) in bfloat16; one row after another in float32
                    state.absmax = state.absmax.T.reshape(-1).float()


def linear_layers(model: nn.Module, names: Collection[str] | None = None) -> dict[str, nn.Module]:
    """Name -> linear layer, in `named_modules()` order: `names`, or all inside numbered layers (no heads, no
    embeddings). Raises UserError for a name that is no linear layer of the model."""
    found: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and name
    }
    if names is None:
        inside = {n: m for n, m in found.items() if any(p.isdigit() for p in n.split("."))}
        if not inside:
            raise UserError(
                f"{type(model).__name__} has no linear layers inside numbered blocks; nothing can be adapted"
            )
        return inside
    missing = [name for name in names if name not in found]
    if missing:
        kinds = sorted({name.rpartition(".")[2] for name in found})
        raise UserError(f"No linear layer is called `{missing[0]}`; this {type(model).__name__} has {', '.join(kinds)}")
    wanted = set(names)
    return {name: module for name, module in found.items() if name in wanted}


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(d_out, d_in), also of Transformers' Conv1D, whose weight is stored transposed, and of packed 4-bit weights."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
