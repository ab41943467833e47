"""The weights that a quantised base computes with in training: its files' weights, quantised and dequantised again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.model.load import loading_dtype
from sgm_finetune.model.names import block_of


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of an unquantised `model`, by name, that `load_model` quantises where it is asked to.

    These are the linear layers in numbered blocks, GPT-2's transposed ones included.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and block_of(name) is not None
    }


def weight_as_trained(weight: Tensor, layer: nn.Module, config: ModelConfig) -> Tensor:
    """Returns the `weight` of a `layer` in float32 as a base that `config` quantises computes with it.

    bitsandbytes rounds it as `load_model` makes it: first to the type that the base is loaded in, then to NF4 in blocks
    of 64 numbers, or to int8 row by row.
    """
    from bitsandbytes import functional

    turned = isinstance(layer, Conv1D)  # stored transposed, and quantised as a linear layer's weight
    loaded = weight.detach().to(loading_dtype(config))
    loaded = (loaded.T if turned else loaded).contiguous()
    if config.quantization == "int8":
        values, scales, _ = functional.int8_vectorwise_quant(loaded.to(torch.float16))
        found = functional.int8_vectorwise_dequant(values, scales)
    else:
        found = functional.dequantize_4bit(*functional.quantize_4bit(loaded, quant_type="nf4"))
    return (found.T if turned else found).float()


@torch.no_grad()
def round_as_trained(model: nn.Module, config: ModelConfig) -> None:
    """Puts the weights that a base computes with which `config` quantises into an unquantised `model`."""
    for layer in quantised_layers(model).values():
        weight = layer.get_parameter("weight")
        weight.copy_(weight_as_trained(weight, layer, config))
