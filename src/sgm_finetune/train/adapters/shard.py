"""Shards the frozen base over the processes of a run (FSDP2); the trained factors are replicated (docs/scale.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sgm_finetune.base.errors import UserError
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.model.names import block_of


@dataclass(frozen=True)
class Sharded:
    """The number of sharded blocks, and bytes of parameters."""

    num_blocks: int
    whole: int
    """Bytes of all parameters."""
    here: int
    """Bytes that this process holds."""


def shard_base(model: PreTrainedModel, device: torch.device, new_modules: Sequence[str] = ()) -> Sharded:
    """Cuts the base into one piece a process and moves each piece to its process's `device`.

    Cuts the parameters of every numbered block, and of embeddings and head unless they are tied; a block is whole only
    while it computes. `new_modules` and modules added later (adapters, so every shared factor) stay whole on every
    process. 4-bit weights are cut too, but their scales stay whole. Freezes all parameters.

    Every process must call it, with the process group initialised and the model on the CPU. The model is cut block by
    block, so `device` never holds more than its pieces and one block. Raises UserError for stacks of experts and for
    8-bit weights.
    """
    matrices = adaptable(model)
    if any(matrix.num_experts is not None for matrix in matrices.values()):
        raise UserError("training.shard=true is not possible with a model of experts; set training.shard=false")
    if any(p.dtype == torch.int8 for p in model.parameters()):
        raise UserError("training.shard=true is not possible with 8-bit weights; set model.quantization=nf4 or none")
    model.requires_grad_(False)
    whole = _num_bytes(model)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    blocks = list(dict.fromkeys(block for name in matrices if (block := block_of(name)) is not None))
    ends, tied = _ends(model)
    apart = {p for name in new_modules for p in model.get_submodule(name).parameters()} | tied
    packed = {module: module.weight for module in model.modules() if hasattr(module, "quant_state")}
    for module in (*map(model.get_submodule, blocks), *ends, *_around(model, blocks)):
        if not all(p in apart for p in module.parameters()):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=apart)
    model.to(device)  # type: ignore[arg-type]  # moves what was not cut
    for module, weight in packed.items():  # bitsandbytes' 4-bit layers: PEFT reads these attributes of the weights
        module.quant_state.to(device)  # type: ignore[operator, union-attr]
        for name in ("compress_statistics", "quant_type"):
            setattr(module.weight, name, getattr(weight, name))
    return Sharded(len(blocks), whole, _num_bytes(model))


def reduce_factors_only(model: PeftModel) -> None:
    """Makes data parallelism ignore the frozen base: it would send it from one process to the others, which have it
    already, and its pieces differ between processes, or it is not in the device's memory."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    model._ddp_params_and_buffers_to_ignore = sorted(frozen)  # type: ignore[assignment]


def _num_bytes(model: nn.Module) -> int:
    parameters = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in parameters)


def _ends(model: PreTrainedModel) -> tuple[list[nn.Module], set[nn.Parameter]]:
    """The embeddings and the output layer that hold their own weights, and the weights that several modules share."""
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    tied = {parameter for parameter, count in owners.items() if count > 1}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [e for e in ends if isinstance(e, nn.Embedding | nn.Linear) and e.weight not in tied], tied


def _around(model: nn.Module, blocks: Sequence[str]) -> list[nn.Module]:
    """The modules that call the blocks one after another, inner ones first. Sharding them lets the next block be
    gathered while one computes. The model itself is not among them: PEFT calls it without its hooks."""
    names = dict.fromkeys(block.rpartition(".")[0].rpartition(".")[0] for block in blocks)
    return [model.get_submodule(name) for name in sorted(names, key=lambda n: -n.count(".")) if name]
