"""Writes an adapter as one GGUF file, which llama.cpp adds to a base's GGUF file (`llama-cli --lora`)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sgm_finetune.base.errors import UserError
from sgm_finetune.results.export.gguf_architecture import architecture_of
from sgm_finetune.results.export.gguf_file import quiet
from sgm_finetune.results.export.gguf_tensors import reordering, tensor_names
from sgm_finetune.results.export.merge import checked_finite, expert_factors, layer_factors
from sgm_finetune.results.export.target import GgufType
from sgm_finetune.results.load import Result, attach_untrained, base_skeleton
from sgm_finetune.results.pth import lora_config
from sgm_finetune.train.adapters.apply import ADAPTER, num_experts
from sgm_finetune.train.adapters.pool import plain_factors


def gguf_factors(result: Result, skeleton: PreTrainedModel) -> dict[str, Tensor]:
    """Returns name in GGUF -> factor, in float32: `NAME.lora_a` (r x d_in) and `NAME.lora_b` (d_out x r), in pairs, or
    a stack of these for experts. A shared factor stands there for each member of its group.

    llama.cpp scales an update by alpha / r; what a layer's own scale differs from that is in its B. The rows of B are
    in llama.cpp's order. Raises UserError where more than low-rank updates was trained.
    """
    state = plain_factors(result.content["adapter"])
    settings, name_of = lora_config(result.content), tensor_names(skeleton.config)
    model = attach_untrained(base_skeleton(result), result.content, result.path)
    found: dict[str, Tensor] = {}
    for name, (layer, (a, b)) in layer_factors(model, state, result.path).items():
        A, B = state.pop(a).float(), state.pop(b).float()
        if ".experts." in name:
            A, B = expert_factors(A, B, num_experts(layer))
        scale = float(layer.scaling[ADAPTER])  # type: ignore[index]
        B = B * (scale * B.shape[-1] / settings.lora_alpha)
        for parameter, rows in _matrices(name, B):
            found[f"{name_of(parameter)}.lora_a"] = A
            found[f"{name_of(parameter)}.lora_b"] = reordering(parameter, skeleton.config)(rows)
    if state:
        raise UserError(
            f"An adapter in GGUF holds low-rank updates alone, and this run trained `{next(iter(state))}` whole; take "
            "--to gguf"
        )
    return found


def _matrices(name: str, B: Tensor) -> list[tuple[str, Tensor]]:
    """Returns the weights that a layer's B (or stack of B) writes to, and its rows for each: GGUF has two stacks for
    the two halves of the experts' gate_up_proj."""
    if B.dim() == 3 and name.endswith(".gate_up_proj"):
        kinds = ("gate_proj", "up_proj")
        return [
            (f"{name.removesuffix('gate_up_proj')}{kind}.weight", rows)
            for kind, rows in zip(kinds, B.chunk(2, dim=1), strict=True)
        ]
    return [(f"{name}.weight", B)]


def write_gguf_adapter(result: Result, skeleton: PreTrainedModel, kind: GgufType, file: Path) -> None:
    """Writes the adapter's factors in f32 or f16. Raises UserError when a number is not finite in that type."""
    import gguf

    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture_of(skeleton.config)])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(file.stem)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora_config(result.content).lora_alpha))
    dtype = {"f32": torch.float32, "f16": torch.float16}[kind]
    with quiet():
        for name, factor in gguf_factors(result, skeleton).items():
            writer.add_tensor(name, checked_finite(factor.to(dtype), name).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
