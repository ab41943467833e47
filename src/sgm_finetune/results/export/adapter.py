"""A result as a standard PEFT folder, out of the .pth file alone."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from sgm_finetune.results.load import Result
from sgm_finetune.results.pth import lora_config


def write_adapter(result: Result, skeleton: PreTrainedModel, base: str, folder: Path) -> None:
    """adapter_config.json, adapter_model.safetensors and the tokenizer; `base` is what the base model is called there.

    A shared factor is written once per member, as PEFT does.
    """
    tensors = {name: tensor.contiguous().clone() for name, tensor in result.content["adapter"].items()}
    try:
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    settings: LoraConfig = lora_config(result.content)
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    made_for = {"base_model_class": type(skeleton).__name__, "parent_library": type(skeleton).__module__}
    settings.save_pretrained(str(folder), auto_mapping_dict=made_for if settings.task_type is None else None)
    result.tokenizer.save_pretrained(folder)
