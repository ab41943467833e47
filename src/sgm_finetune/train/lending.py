"""Lends a base model to an adapter for a while: afterwards it is as it was before, or it says that it is not."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn


def condition(model: nn.Module) -> list[tuple[Any, ...]]:
    """What shows every change of a model: the names of its parameters and buffers, the tensors themselves, how often
    each was written to, and which of them take gradients."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, id(tensor), tensor._version, tensor.requires_grad) for name, tensor in tensors]


def take_back(adapted: PeftModel, before: list[tuple[Any, ...]]) -> bool:
    """Removes the adapters from a base whose `condition` was `before`; returns whether it is now as it was.

    Modules that were trained whole beside the adapters, such as a head, are replaced by those of before.
    """
    base: nn.Module = adapted.base_model.model  # type: ignore[assignment]
    kept = {name: m.original_module for name, m in base.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    adapted.unload()  # type: ignore[operator]
    for name, module in kept.items():
        base.set_submodule(name, module)
    base.eval()
    named = dict(base.named_parameters(remove_duplicate=False))
    for name, _, _, takes_gradients in before:
        if name in named:
            named[name].requires_grad_(takes_gradients)
    return condition(base) == before
