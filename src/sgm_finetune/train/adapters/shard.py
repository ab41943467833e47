"""The frozen base sharded over the processes of a run (FSDP2), the trained factors replicated (docs/scale.md)."""

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
    """Bytes of parameters."""

    num_blocks: int
    whole: int
    """Of all of them."""
    here: int
    """Of what this process holds."""


def shard_base(model: PreTrainedModel, device: torch.device, new_modules: Sequence[str] = ()) -> Sharded:
    """Cuts the parameters of every numbered block, and of embeddings and head where they are not tied, into one piece a
    process, which goes to `device`; a block is whole only while it computes. `new_modules`, and what is added later,
    stay whole on every process: adapters, and so every shared factor.

    To be called on every process, with the process group initialised, for a model that lies on the CPU: it is cut block
    by block, so `device` never holds more than its pieces and one block. 4-bit weights are cut too; their scales stay
    whole. All parameters are frozen. Raises UserError for stacks of experts and for 8-bit weights.
    """
    matrices = adaptable(model)
    if any(matrix.num_experts is not None for matrix in matrices.values()):
        raise UserError("training.shard=true is not possible with a model of experts; take training.shard=false")
    if any(p.dtype == torch.int8 for p in model.parameters()):
        raise UserError("training.shard=true is not possible with 8-bit weights; take model.quantization=nf4 or none")
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
    model.to(device)  # type: ignore[arg-type]  # what was not cut
    for module, weight in packed.items():  # bitsandbytes' 4-bit layers; PEFT asks their weights for these
        module.quant_state.to(device)  # type: ignore[operator, union-attr]
        for name in ("compress_statistics", "quant_type"):
            setattr(module.weight, name, getattr(weight, name))
    return Sharded(len(blocks), whole, _num_bytes(model))


def reduce_factors_only(model: PeftModel) -> None:
    """Tells data parallelism to leave the pieces of the base alone, which are different on every process."""
    pieces = {name for name, p in model.named_parameters() if isinstance(p, DTensor)}
    model._ddp_params_and_buffers_to_ignore = sorted(pieces)  # type: ignore[assignment]


def _num_bytes(model: nn.Module) -> int:
    parameters = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in parameters)


def _ends(model: PreTrainedModel) -> tuple[list[nn.Module], set[nn.Parameter]]:
    """Embeddings and output layer that hold weights of their own; and the weights that modules share."""
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    tied = {parameter for parameter, count in owners.items() if count > 1}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [e for e in ends if isinstance(e, nn.Embedding | nn.Linear) and e.weight not in tied], tied


def _around(model: nn.Module, blocks: Sequence[str]) -> list[nn.Module]:
    """The modules that call the blocks one after another, inner ones first: within them the next block is gathered
    while one computes. (PEFT calls the model itself past its hooks, so it can be none of them.)"""
    names = dict.fromkeys(block.rpartition(".")[0].rpartition(".")[0] for block in blocks)
    return [model.get_submodule(name) for name in sorted(names, key=lambda n: -n.count(".")) if name]
