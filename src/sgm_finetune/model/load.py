"""Base models: loaded from their files and quantised, or built without weights on device "meta"."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from sgm_finetune.base.config import LabelKind, ModelConfig
from sgm_finetune.base.device import device_for, has_gpu, multiplies_bfloat16
from sgm_finetune.base.errors import UserError, is_out_of_memory
from sgm_finetune.base.memory import large_blocks_apart
from sgm_finetune.base.text import first_line
from sgm_finetune.model.architecture import auto_class, check_size, read_model_config
from sgm_finetune.model.classes import Head
from sgm_finetune.model.four_bit import ready_for_backward
from sgm_finetune.model.names import block_of
from sgm_finetune.model.residence.host import HostBase, keep_on_host, loading_to_host
from sgm_finetune.model.residence.store import keep_on_disk, loading_from_disk, open_store

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_PROBLEMS: dict[LabelKind, str] = {
    "class": "single_label_classification",
    "classes": "multi_label_classification",
    "number": "regression",
}
"""Transformers' `problem_type` for each kind of label."""


def load_model(
    config: ModelConfig,
    folder: Path,
    head: Head = Head(),
    device: torch.device | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The base model in eval mode, quantised as `config` says, and the names of its modules that its files lack.

    These modules are a new head: one that the files do not have, or have for other classes (`head.is_new`) or in
    another size. Its weights come from torch's global random state. The dtype "auto" is the stored one; with
    quantisation it is bfloat16 where the processor multiplies bfloat16, else float32. Only layers inside numbered
    blocks are quantised. Backward passes through the model are correct (`ready_for_backward`). With `residence: disk`
    the blocks are views of files; `announce` is called with a line before SGM writes such files. With `residence: host`
    they are in the host's memory, and the model must recompute each block in its backward pass (checkpointing) or run
    inside `residence.host.differentiable`. Raises UserError when the weights cannot be read or do not fit the model,
    and when such files cannot be written.
    """
    device = device or device_for()
    settings: dict[str, Any] = {"device_map": {"": device}, "attn_implementation": _attention()}
    quantised = config.quantization != "none"
    described = _config_for(config, folder, head)
    if head.fits_labels:
        settings["ignore_mismatched_sizes"] = True  # the stored head may be for other labels
    auto, trusted = auto_class(config.task), config.trust_remote_code
    store = base = None
    loading: AbstractContextManager[None] = nullcontext()
    if config.residence == "disk":
        how = f"{type(described).__name__} {config.task} {loading_dtype(config)} {config.quantization}"
        store = open_store(folder, how, announce)
        loading = loading_from_disk(store)
    elif config.residence == "host":
        base = HostBase(device)
        loading = loading_to_host(base)
    with _building(config), loading, large_blocks_apart():
        if quantised or not trusted:
            with torch.device("meta"):
                empty = auto.from_config(described, trust_remote_code=trusted)
            check_size(empty, folder)
        if quantised:
            settings["quantization_config"] = _quantization(config, _outside_blocks(empty))
        model, outcome = auto.from_pretrained(
            folder,
            config=described,
            dtype=loading_dtype(config) or "auto",
            trust_remote_code=trusted,
            output_loading_info=True,
            **settings,
        )
    ready_for_backward(model)
    if store is not None:
        keep_on_disk(model, store)
    elif base is not None:
        for remark in keep_on_host(model, base):
            announce(remark)
    elif quantised and device.type == "cpu":
        # embeddings and norms are views of the mapped file: without a copy, all of it stays in memory
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.clone()
    absent = {*outcome["missing_keys"], *(key for key, *_ in outcome["mismatched_keys"])}
    if head.is_new:
        stored = [name for name in _class_parameters(config, described) if name not in absent]
        for module in dict.fromkeys(name.rpartition(".")[0] for name in stored):
            model.get_submodule(module).reset_parameters()
        absent |= set(stored)
    return model.eval(), _new_modules(model, absent, config.name)


@contextmanager
def _building(config: ModelConfig) -> Iterator[None]:
    """Turns what Transformers raises for a model that it cannot build or load into a UserError.

    Numbers in config.json that no model has, such as 0 heads, raise any type: it divides, allocates and slices by them.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"model.name={config.name} cannot be loaded: {first_line(error)}") from None


def loading_dtype(config: ModelConfig) -> torch.dtype | None:
    """The dtype that `config` asks for; None means the stored one."""
    if config.dtype == "auto" and config.quantization != "none":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    return _DTYPES.get(config.dtype)


def _attention() -> str | None:
    """Transformers' attention implementation; None means its default."""
    # on a CPU, torch's fused attention is slower in bfloat16 backward passes (docs/LOG.md)
    return None if has_gpu() else "eager"


def _config_for(config: ModelConfig, folder: Path, head: Head) -> PreTrainedConfig:
    """config.json with the settings of `head`."""
    described = read_model_config(config, folder)
    if head.fits_labels:
        names = head.labels or ("number",)
        described.num_labels = len(names)
        described.id2label = dict(enumerate(names))
        described.label2id = {label: i for i, label in enumerate(names)}
        if head.label_kind is not None:
            described.problem_type = _PROBLEMS[head.label_kind]  # type: ignore[assignment]
    if head.pad_token_id is not None:
        described.pad_token_id = head.pad_token_id
    if hasattr(text := described.get_text_config(), "use_cache"):
        text.use_cache = False  # only generation uses the cache of keys and values
    return described


def skeleton(
    config: ModelConfig,
    folder: Path,
    head: Head = Head(),
) -> PreTrainedModel:
    """The model that `load_model` would load, on device "meta": shapes, dtypes and code without numbers.

    Quantised layers are stand-ins that need as much memory as bitsandbytes' layers (`stand_ins.py`).
    """
    from sgm_finetune.model.stand_ins import FUSED_ATTENTION, stand_in

    quantised = config.quantization != "none"
    described = _config_for(config, folder, head)
    stored = getattr(described, "dtype", None) or torch.float32
    dtype = loading_dtype(config) or stored
    with torch.device("meta"):
        with _building(config):
            model = auto_class(config.task).from_config(
                described, dtype=dtype, attn_implementation=_attention(), trust_remote_code=config.trust_remote_code
            )
        check_size(model, folder)
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


def check_checkpointing(model: PreTrainedModel, config: ModelConfig) -> None:
    """Raises UserError when Transformers cannot recompute the activations of the model's blocks."""
    if model.supports_gradient_checkpointing:
        return
    on_host = config.residence == "host"
    what = "training.checkpointing, which model.residence=host needs" if on_host else "training.checkpointing"
    remedy = "model.residence=device with training.checkpointing=false" if on_host else "training.checkpointing=false"
    raise UserError(f"{type(model).__name__} does not support {what}; use {remedy}")


def _class_parameters(config: ModelConfig, described: PreTrainedConfig) -> list[str]:
    """Names of the parameters with a row for each class: their shapes change with the number of classes."""
    shapes: list[dict[str, torch.Size]] = []
    for more in (0, 1):
        other = copy.deepcopy(described)
        other.num_labels = len(described.id2label or {}) + more
        with torch.device("meta"):
            model = auto_class(config.task).from_config(other, trust_remote_code=config.trust_remote_code)
        shapes.append({name: parameter.shape for name, parameter in model.named_parameters()})
    return [name for name, shape in shapes[0].items() if shape != shapes[1].get(name)]


def _outside_blocks(model: nn.Module) -> list[str]:
    """Names of the linear layers outside numbered blocks: heads, poolers."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and block_of(n) is None]


def _new_modules(model: nn.Module, absent: Collection[str], model_name: str) -> tuple[str, ...]:
    """The outermost modules whose parameters are all `absent` from the files.

    Raises UserError when one of these parameters lies in a numbered block or an embedding: a head does not.
    """
    parameters = [name for name, _ in model.named_parameters()]
    found: dict[str, None] = {}
    for name in parameters:
        if name not in absent:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if block_of(name) is not None or isinstance(owner, nn.Embedding):
            raise UserError(
                f"model.name={model_name}: its files lack `{name}`, or hold it in another shape; download them again"
            )
        parts = name.split(".")[:-1]
        modules = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        found[next(module for module in modules if _is_absent(module, parameters, absent))] = None
    return tuple(found)


def _is_absent(module: str, parameters: Collection[str], absent: Collection[str]) -> bool:
    """Whether all parameters of the module are `absent`."""
    return all(parameter in absent for parameter in parameters if parameter.startswith(f"{module}."))


def _quantization(config: ModelConfig, unquantised: list[str]) -> BitsAndBytesConfig:
    """bitsandbytes' settings; the modules `unquantised` stay as they are."""
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=unquantised)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=loading_dtype(config),
        llm_int8_skip_modules=unquantised,
    )
