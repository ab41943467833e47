"""Writes a result as a standard PEFT folder, from the .pth file alone."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from sgm_finetune.results.export.shards import save_result_tokenizer
from sgm_finetune.results.load import Result
from sgm_finetune.results.pth import lora_config
from sgm_finetune.train.adapters.pool import plain_factors


def write_adapter(result: Result, skeleton: PreTrainedModel, base: str, folder: Path) -> None:
    """Writes adapter_config.json, which names the base model `base`, adapter_model.safetensors, the tokenizer
    and generation_config.json.

    A shared factor is written once for each member of its group, as PEFT does.
    """
    tensors = {name: tensor.contiguous().clone() for name, tensor in plain_factors(result.content["adapter"]).items()}
    try:
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    settings: LoraConfig = lora_config(result.content)
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    made_for = {"base_model_class": type(skeleton).__name__, "parent_library": type(skeleton).__module__}
    settings.save_pretrained(str(folder), auto_mapping_dict=made_for if settings.task_type is None else None)
    save_result_tokenizer(result, skeleton, folder)
