"""Quantised checkpoints: which tensors of the files make up a weight matrix, and their values in float32.

A format is recognised by the companions of a tensor (`x.weight.absmax`, `x.scales` ...). Their shapes are checked
before anything large is read. Each format has one function `<format>(tensor, companions) -> Parameter | None`, in
`bnb.py`, `scaled.py` or `packed.py`. Its inner `prepare` reads the companions and returns `rows(start, stop)`: rows of
the matrix in float32. `assemble` asks for a few rows at a time, so that memory never holds a second copy of a matrix.
In these files `o` is the number of outputs, `i` of inputs, and `g` of groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgm_finetune.base.errors import UserError
from sgm_finetune.model.weights.bnb import bnb_4bit, bnb_int8
from sgm_finetune.model.weights.companions import Companions
from sgm_finetune.model.weights.packed import awq, compressed, gptq
from sgm_finetune.model.weights.scaled import mxfp4, scaled
from sgm_finetune.model.weights.tensors import Parameter, StoredTensor

_FORMATS = (bnb_4bit, bnb_int8, scaled, gptq, awq, compressed, mxfp4)


def read_quantised(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, Parameter]:
    """Name of the tensor with the packed values -> parameter, for every quantised matrix of a model.

    `tensors` are all tensors of the files, `config` is config.json. Raises UserError when companions are missing or do
    not fit, and for a tensor in an unknown quantised format.
    """
    settings = quantisation(config)
    found: dict[str, Parameter] = {}
    claimed: set[str] = set()
    for name, tensor in tensors.items():
        for recognise in _FORMATS:
            companions = Companions(tensor, tensors, settings)
            if (parameter := recognise(tensor, companions)) is not None:
                found[name] = parameter
                claimed |= {name, *companions.used}
                break
    for name, tensor in tensors.items():
        if name not in claimed and _is_packed(tensor, bool(settings)):
            method = settings.get("quant_method") or "none named in config.json"
            raise UserError(
                f"{name} in {tensor.file} is stored as {tensor.dtype} (quantization method: {method}), a format that "
                "SGM cannot read; use the unquantised model"
            )
    return found


def quantisation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config` of config.json; multimodal models keep it in `text_config`. {} without one."""
    for described in (config, config.get("text_config")):
        if isinstance(described, Mapping):
            for key in ("quantization_config", "compression_config"):
                if isinstance(described.get(key), Mapping):
                    return described[key]
    return {}


def _is_packed(tensor: StoredTensor, quantised_model: bool) -> bool:
    """Whether the tensor holds quantised values, which need a format's reader. Index buffers and masks do not."""
    if tensor.is_float or len(tensor.shape) < 2 or tensor.dtype in ("int64", "bool", "complex64"):
        return False
    if quantised_model and not tensor.name.endswith((".bias", "mask")):
        return True
    return tensor.name.endswith((".weight", ".qweight", ".weight_packed", "_blocks"))
