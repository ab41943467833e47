"""Base models: how they are loaded and quantised, which layers can be adapted."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sgm_finetune.base.config import LabelKind, ModelConfig, Task
from sgm_finetune.base.device import device_for, has_gpu, multiplies_bfloat16
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import first_line
from sgm_finetune.base.untrusted import MAX_LAYERS, check_shards, read_json_object
from sgm_finetune.model.four_bit import ready_for_backward
from sgm_finetune.model.names import block_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_model(config: ModelConfig, folder: Path, max_length: int = 0) -> None:
    """What can be known before the weights are loaded: a readable config, an architecture that fits the task,
    positions for `max_length` tokens, bitsandbytes where quantisation is asked for. Raises UserError."""
    described = _described(config, folder)
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
    described = _described(ModelConfig(name=name), folder)
    return tuple(task for task in get_args(Task) if type(described) in _AUTO[task]._model_mapping) or get_args(Task)


def _described(config: ModelConfig, folder: Path) -> PreTrainedConfig:
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


_AUTO: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
}


def auto_class(task: Task) -> Any:
    """Transformers' loader of models for the task."""
    return _AUTO[task]


_PROBLEMS: dict[LabelKind, str] = {
    "class": "single_label_classification",
    "classes": "multi_label_classification",
    "number": "regression",
}
"""Transformers' names for what a label is."""


def load_tokenizer(folder: Path, config: ModelConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right, with a padding token (its end-of-text token where it has none)."""
    config = config or ModelConfig()
    # a word in a list of words is one inside a sentence
    words: dict[str, Any] = {"add_prefix_space": True} if config.task == "token-classification" else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code, **words)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        tokenizer(["a", "b"] if words else "a b", is_split_into_words=bool(words))  # what cannot be used is found now
    except Exception as error:  # tokenizers raises its own, and Transformers many
        raise UserError(
            f"{folder} has no usable tokenizer; put tokenizer.json and tokenizer_config.json there "
            f"({first_line(error).rstrip(':')})"
        ) from None
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(
    config: ModelConfig,
    folder: Path,
    labels: tuple[str, ...] = (),
    pad_token_id: int | None = None,
    device: torch.device | None = None,
    label_kind: LabelKind | None = None,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The base model, in eval mode, quantised as asked, ready for backward passes; and the names of its modules that
    are not in its files: a new head, for `labels`, or for a number (`label_kind`).

    dtype "auto": under quantisation what `multiplies_bfloat16` says, else the stored type. A new head
    starts from torch's global random state; one of another size than the stored one is new. What lies outside the
    numbered blocks is not quantised. Raises UserError for weights that cannot be read, or are not those of the model.
    """
    device = device or device_for()
    settings: dict[str, Any] = {"device_map": {"": device}, "attn_implementation": _attention()}
    quantised = config.quantization != "none"
    described = _settled(config, folder, labels, pad_token_id, label_kind)
    if labels or label_kind == "number":
        settings["ignore_mismatched_sizes"] = True  # of a head for other labels
    auto, trusted = _AUTO[config.task], config.trust_remote_code
    try:
        if quantised:
            with torch.device("meta"):
                skeleton = auto.from_config(described, trust_remote_code=trusted)
            settings["quantization_config"] = _quantization(config, _outside_blocks(skeleton))
        model, outcome = auto.from_pretrained(
            folder,
            config=described,
            dtype=_dtype(config) or "auto",
            trust_remote_code=trusted,
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise UserError(f"model.name={config.name} cannot be loaded: {first_line(error)}") from None
    ready_for_backward(model)
    if quantised and device.type == "cpu":  # embeddings and norms hold the whole file in memory, whose views they are
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.clone()
    absent = {*outcome["missing_keys"], *(key for key, *_ in outcome["mismatched_keys"])}
    return model.eval(), _new_modules(model, absent, config.name)


def _dtype(config: ModelConfig) -> torch.dtype | None:
    """None: as stored."""
    if config.dtype == "auto" and config.quantization != "none":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    return _DTYPES.get(config.dtype)


def _attention() -> str | None:
    """torch's fused attention is the slower one in bfloat16 backward passes on a CPU (docs/LOG.md)."""
    return None if has_gpu() else "eager"


def _settled(
    config: ModelConfig, folder: Path, labels: tuple[str, ...], pad_token_id: int | None, label_kind: LabelKind | None
) -> PreTrainedConfig:
    """The model's configuration for the task's labels."""
    described = _described(config, folder)
    if labels or label_kind == "number":
        names = labels or ("number",)
        described.num_labels = len(names)
        described.id2label = dict(enumerate(names))
        described.label2id = {label: i for i, label in enumerate(names)}
        if label_kind is not None:
            described.problem_type = _PROBLEMS[label_kind]  # type: ignore[assignment]
    if pad_token_id is not None:
        described.pad_token_id = pad_token_id
    if hasattr(text := described.get_text_config(), "use_cache"):
        text.use_cache = False  # of keys and values, which generation alone has use for
    return described


def skeleton(
    config: ModelConfig,
    folder: Path,
    labels: tuple[str, ...] = (),
    pad_token_id: int | None = None,
    label_kind: LabelKind | None = None,
) -> PreTrainedModel:
    """What `load_model` would load, on device "meta": shapes, types and code without numbers. Quantised layers are
    stand-ins that need what bitsandbytes' need (`stand_ins.py`)."""
    from sgm_finetune.model.stand_ins import FUSED_ATTENTION, stand_in

    quantised = config.quantization != "none"
    described = _settled(config, folder, labels, pad_token_id, label_kind)
    stored = getattr(described, "dtype", None) or torch.float32
    dtype = _dtype(config) or stored
    with torch.device("meta"):
        model = _AUTO[config.task].from_config(
            described, dtype=dtype, attn_implementation=_attention(), trust_remote_code=config.trust_remote_code
        )
        if getattr(model.config.get_text_config(), "_attn_implementation", None) == "sdpa":
            model.set_attn_implementation(FUSED_ATTENTION)
        if quantised:
            for name, module in list(model.named_modules()):
                if type(module) is nn.Linear and block_of(name) is not None:
                    parent, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(parent), leaf, stand_in(module, config.quantization))
    if quantised:
        setattr(model, "is_loaded_in_4bit" if config.quantization == "nf4" else "is_loaded_in_8bit", True)
    return model.eval().requires_grad_(False)


def check_checkpointing(model: PreTrainedModel) -> None:
    """Raises UserError where Transformers cannot compute the model's blocks again."""
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"training.checkpointing is not possible with a {type(model).__name__}; take training.checkpointing=false"
        )


def _outside_blocks(model: nn.Module) -> list[str]:
    """Linear layers outside numbered blocks: heads, poolers."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and block_of(n) is None]


def _new_modules(model: nn.Module, absent: Collection[str], what: str) -> tuple[str, ...]:
    """The outermost modules whose parameters are all `absent` from the files; what a head cannot be raises."""
    parameters = [name for name, _ in model.named_parameters()]
    found: dict[str, None] = {}
    for name in parameters:
        if name not in absent:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if block_of(name) is not None or isinstance(owner, nn.Embedding):
            raise UserError(f"model.name={what}: its files lack `{name}`, or hold it in another shape; get them again")
        parts = name.split(".")[:-1]
        outer = (".".join(parts[: n + 1]) for n in range(len(parts)))
        found[next(o for o in outer if all(p in absent for p in parameters if p.startswith(f"{o}.")))] = None
    return tuple(found)


def _quantization(config: ModelConfig, unquantised: list[str]) -> BitsAndBytesConfig:
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=unquantised)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=_dtype(config),
        llm_int8_skip_modules=unquantised,
    )
