"""The tensors of a merged model under their names in GGUF, in the form that llama.cpp computes with."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from sgm_finetune.base.errors import UserError
from sgm_finetune.results.export.gguf_architecture import architecture_of, gguf_name
from sgm_finetune.results.export.merge import MergedTensor

_BERT = (
    (re.compile(r"^bert\.pooler\.dense\."), "classifier.dense."),
    (re.compile(r"^classifier\."), "classifier.out_proj."),
    (re.compile(r"^bert\."), ""),
)
"""Names in a BERT classifier -> those of the same layers in models whose names the gguf package lists."""
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def gguf_tensors(tensors: Sequence[MergedTensor], config: PreTrainedConfig) -> list[MergedTensor]:
    """Returns the tensors of the GGUF file, with their names and shapes there. Reads nothing.

    A tied output matrix is left out: GGUF reads the embedding in its place. The matrices of a layer's experts become
    one stack. Raises UserError for a tensor that GGUF has no name for.
    """
    name_of = tensor_names(config)
    found: list[MergedTensor] = []
    stacks: dict[str, dict[int, MergedTensor]] = {}
    for tensor in tensors:
        if tensor.model_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if (expert := _EXPERT.search(tensor.name)) is not None:
            name = name_of(_EXPERT.sub(".experts.", tensor.name))
            stacks.setdefault(name, {})[int(expert[1])] = tensor
        else:
            found.append(_in_its_form(replace(tensor, name=name_of(tensor.model_name)), config))
    return found + [_stack(name, [experts[at] for at in sorted(experts)]) for name, experts in stacks.items()]


def _in_its_form(tensor: MergedTensor, config: PreTrainedConfig) -> MergedTensor:
    match gguf_name(config):
        case "GPT2" if tensor.name.startswith("blk.") and len(tensor.shape) == 2:  # Conv1D
            return replace(tensor, shape=tensor.shape[::-1], read=partial(_transposed, tensor.read))
        case "GEMMA2" | "GEMMA3" if tensor.name.endswith("norm.weight"):
            return replace(tensor, read=partial(_plus_one, tensor.read))
        case _:
            return replace(tensor, read=partial(_reordered, tensor.read, reordering(tensor.model_name, config)))


def _transposed(read: Callable[[], Tensor]) -> Tensor:
    return read().T


def _plus_one(read: Callable[[], Tensor]) -> Tensor:
    return read().to(torch.float32) + 1.0


def _reordered(read: Callable[[], Tensor], reorder: Callable[[Tensor], Tensor]) -> Tensor:
    return reorder(read())


def _stack(name: str, experts: Sequence[MergedTensor]) -> MergedTensor:
    first = experts[0]
    reads = [expert.read for expert in experts]
    return replace(first, name=name, shape=(len(experts), *first.shape), read=partial(_stacked, reads))


def _stacked(reads: Sequence[Callable[[], Tensor]]) -> Tensor:
    return torch.stack([read().to(torch.float32) for read in reads])


def tensor_names(config: PreTrainedConfig) -> Callable[[str], str]:
    """Returns a function from a parameter's name in the model to its name in GGUF, which raises UserError where there
    is none."""
    import gguf

    names = gguf.get_tensor_name_map(architecture_of(config), config.num_hidden_layers)

    def name_of(parameter: str) -> str:
        known = parameter
        for pattern, other in _BERT if gguf_name(config) == "BERT" else ():
            if pattern.match(known):
                known = pattern.sub(other, known)
                break
        name = names.get_name(known, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"GGUF has no name for `{parameter}`; take --to merged")
        return name

    return name_of


def reordering(parameter: str, config: PreTrainedConfig) -> Callable[[Tensor], Tensor]:
    """Returns the function that puts the rows of a parameter into llama.cpp's order."""
    if gguf_name(config) != "LLAMA":  # llama.cpp rotates the others as Transformers does
        return _unchanged
    if ".q_proj." in parameter:
        return partial(rope_order, num_heads=config.num_attention_heads)
    if ".k_proj." in parameter:
        return partial(rope_order, num_heads=config.num_key_value_heads)
    return _unchanged


def rope_order(weight: Tensor, num_heads: int) -> Tensor:
    """Returns the rows of a query or key matrix (or bias) in llama.cpp's order for rotary positions.

    llama.cpp has the two rows of a rotated pair side by side. Transformers has the first rows of all pairs of a head
    before their second rows.

    >>> rope_order(torch.arange(8.0), num_heads=2).tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _unchanged(values: Tensor) -> Tensor:
    return values
