"""The parts of a base that need not be on the device: blocks, embeddings and output layer; a base is loaded by them.

Transformers loads a model in one call, which converts all its tensors. `loading_by_parts` makes it convert them part
by part, so that one part is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_utils

from sgm_finetune.model.names import block_of, stored_to_model_names

Convert = Callable[..., tuple[Any, Any]]
"""The function of Transformers that converts a model's tensors and puts them into it."""


@contextmanager
def loading_by_parts(load: Callable[..., tuple[Any, Any]]) -> Iterator[None]:
    """Makes Transformers' `from_pretrained` call `load(convert, model, state_dict, load_config)`, inside the context,
    where it would call `convert`, the function of type `Convert`."""
    loader: Any = modeling_utils
    convert = loader.convert_and_load_state_dict_in_model

    def instead(
        model: PreTrainedModel, state_dict: Mapping[str, Any], load_config: Any, disk_offload_index: Any = None
    ) -> tuple[Any, Any]:
        assert not disk_offload_index
        return load(convert, model, without_tied_copies(model, state_dict), load_config)

    loader.convert_and_load_state_dict_in_model = instead
    try:
        yield
    finally:
        loader.convert_and_load_state_dict_in_model = convert


def without_tied_copies(model: PreTrainedModel, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a model's files, without those that equal the one to which the model ties them.

    Transformers ties what the files lack. It compares what they hold twice, which is impossible once the numbers are
    elsewhere.
    """
    name_of = stored_to_model_names(model)
    stored = {name_of(key): key for key in state_dict}
    tied = [(stored.get(copy), stored.get(source)) for copy, source in model.all_tied_weights_keys.items()]
    copies = {
        copy
        for copy, source in tied
        if copy is not None and source is not None and torch.equal(state_dict[copy][...], state_dict[source][...])
    }
    return {key: tensor for key, tensor in state_dict.items() if key not in copies}


def divide(model: nn.Module, state_dict: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The tensors of a model's files by part, and those of no part, which are small."""
    name_of, ends = stored_to_model_names(model), ends_of(model)
    kept = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    parts: dict[str, dict[str, Any]] = {name: {} for name, _ in model.named_modules()}
    rest: dict[str, Any] = {}
    for stored, tensor in state_dict.items():
        name = name_of(stored)
        owner = name.rpartition(".")[0]
        part = owner if owner in ends else movable_block(model, name)
        (parts[part] if part in parts and name in kept else rest)[stored] = tensor
    return {part: tensors for part, tensors in parts.items() if tensors}, rest


def movable_block(model: nn.Module, name: str) -> str | None:
    """The block of a parameter that can be elsewhere. A numbered layer outside of blocks stays in memory: hooks on it
    would make an adapter's layer compute another way."""
    block = block_of(name)
    return None if block is None or not any(model.get_submodule(block).children()) else block


def ends_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module: the embeddings, and the output layer of a language model."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding) or m is output}
    return {name: module for name, module in found.items() if block_of(name) is None}


def tables_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module: those of `ends_of` that hold the input embeddings or the output layer of a language model. Their
    weights are read by the modules themselves, which some models do not do with tables of positions."""
    if not isinstance(model, PreTrainedModel):
        return {}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(module.weight) for module in ends if module is not None}
    return {name: module for name, module in ends_of(model).items() if id(module.weight) in weights}


def loaded(model: nn.Module, part: str) -> dict[str, Tensor]:
    """The parameters of a part that have numbers, with the scales of 4-bit weights, by their names in the model."""
    module = model.get_submodule(part)
    buffers = {f"{part}.{buffer}" for buffer, _ in module.named_buffers()}
    tensors: dict[str, Tensor] = module.state_dict(prefix=f"{part}.")
    return {name: tensor for name, tensor in tensors.items() if name not in buffers and not tensor.is_meta}


def add_account(info: Any, found: Any) -> None:
    """Adds to Transformers' account of what was loaded that of one part."""
    info.missing_keys &= found.missing_keys
    info.unexpected_keys |= found.unexpected_keys
    info.mismatched_keys |= found.mismatched_keys
    info.conversion_errors |= found.conversion_errors
    info.error_msgs += found.error_msgs
