"""Quantised checkpoints: which tensors of the files are one weight matrix, and the float32 values they stand for.

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
    """Name of the tensor that holds the packed values -> parameter, for every quantised matrix of a model.

    `tensors` are all that the files hold, `config` is config.json. Raises UserError for companions that are missing or
    do not fit, and for whatever is stored in a quantised format that is not known here.
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
                "cannot be read here; take the unquantised model"
            )
    return found


def quantisation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config` of config.json, which multimodal models keep inside `text_config`; {} without one."""
    for described in (config, config.get("text_config")):
        if isinstance(described, Mapping):
            for key in ("quantization_config", "compression_config"):
                if isinstance(described.get(key), Mapping):
                    return described[key]
    return {}


def _is_packed(tensor: StoredTensor, quantised_model: bool) -> bool:
    """Values that only a quantised format's reader understands; index buffers and masks are not."""
    if tensor.is_float or len(tensor.shape) < 2 or tensor.dtype in ("int64", "bool", "complex64"):
        return False
    if quantised_model and not tensor.name.endswith((".bias", "mask")):
        return True
    return tensor.name.endswith((".weight", ".qweight", ".weight_packed", "_blocks"))
