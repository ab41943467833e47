"""Applies a plan that trains whole matrices: says which parameters of the base take gradients (docs/full.md)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.processes import processes
from sgm_finetune.method.plan import Plan
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.model.names import block_of, layer_of
from sgm_finetune.train.adapters.apply import check_plan

CLASSIFICATION_HEADS = ("classifier", "score")
"""Names of the heads that Transformers gives a classifier; they are trained whole, as PEFT does it."""
_EXPERT = re.compile(r"\bexperts\.\d+\.")


def train_whole(model: PreTrainedModel, plan: Plan, new_modules: Sequence[str] = ()) -> PreTrainedModel:
    """Returns `model`, in which exactly what `plan` selects takes gradients, and the `new_modules`.

    Raises UserError when the plan does not fit the model, a parameter has a type that cannot be trained, or several
    processes would train experts that are layers of their own.
    """
    check_plan(model, plan)
    named = dict(model.named_parameters())
    trained = list(trained_names(model, plan, new_modules))
    for name in trained:
        dtype = named[name].dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise UserError(
                f"`{name}` is stored as {str(dtype).removeprefix('torch.')}, which adapter.kind=full cannot train; "
                "give model.dtype=bfloat16 or model.dtype=float32"
            )
        if _EXPERT.search(name) and processes().num_processes > 1:
            raise UserError(
                f"`{name}` belongs to one expert, which a step may reach in one process and not in another, so several "
                "processes cannot train it whole; start sgm finetune without a launcher, or take adapter.kind=lora"
            )
    model.requires_grad_(False)
    for name in trained:
        named[name].requires_grad_(True)
    return model


def trained_names(model: PreTrainedModel, plan: Plan, new_modules: Sequence[str] = ()) -> Iterator[str]:
    """Names of the parameters that `plan` trains, in the model's order: those of the selected layers, weight and bias;
    what `also` names; the classification head and the `new_modules`. A tied parameter has its first name."""
    matrices = adaptable(model, [matrix.name for matrix in plan.selected])
    stacks = {name for name, matrix in matrices.items() if matrix.num_experts is not None}
    modules = [name for name in matrices if name not in stacks]
    modules += [*new_modules, *(name for name, _ in model.named_children() if name in CLASSIFICATION_HEADS)]
    chosen = {id(p) for p in _parameters(model, modules)} | {id(model.get_parameter(name)) for name in stacks}
    lowest = min((layer_of(matrix.name) or 0 for matrix in plan.selected), default=0)
    for kind in plan.settings.also:
        match kind:
            case "norms":
                chosen |= {id(parameter) for parameter in _norms(model, lowest)}
            case "embeddings":
                found = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
                chosen |= {id(parameter) for parameter in _parameters(model, found)}
            case "head":
                chosen |= {id(parameter) for parameter in _parameters(model, _outside_blocks(model))}
    return (name for name, parameter in model.named_parameters() if id(parameter) in chosen)


def _parameters(model: nn.Module, modules: Iterable[str]) -> Iterator[nn.Parameter]:
    for name in modules:
        yield from model.get_submodule(name).parameters()


def _outside_blocks(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and block_of(n) is None]


def _norms(model: nn.Module, lowest: int) -> Iterator[nn.Parameter]:
    """The vectors of norms in block `lowest` and above, and after the blocks. Those before the blocks would need every
    activation."""
    began = False
    for name, module in model.named_modules():
        in_block = block_of(name) is not None
        began |= in_block
        if "norm" in type(module).__name__.lower() and began and (not in_block or (layer_of(name) or 0) >= lowest):
            yield from module.parameters(recurse=False)
