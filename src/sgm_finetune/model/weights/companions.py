"""What belongs to one packed tensor of a quantised checkpoint: its scales, zero points and group numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sgm_finetune.base.errors import UserError
from sgm_finetune.model.weights.tensors import StoredTensor


class Companions:
    """Looks up what belongs to one packed tensor, checks its shape, and keeps the names that were used."""

    def __init__(self, tensor: StoredTensor, tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]):
        self.tensor, self.tensors, self.settings = tensor, tensors, settings
        self.used: set[str] = set()

    def find(self, name: str, *shapes: tuple[int, ...]) -> StoredTensor | None:
        found = self.tensors.get(name)
        if found is not None:
            self.used.add(name)
            if shapes and found.shape not in shapes:
                raise self.misfit(f"{name} has shape {list(found.shape)}, expected {list(shapes[0])}")
        return found

    def need(self, name: str, *shapes: tuple[int, ...]) -> StoredTensor:
        found = self.find(name, *shapes)
        if found is None:
            raise self.misfit(f"{name} is missing")
        return found

    def misfit(self, what: str) -> UserError:
        return UserError(
            f"{self.tensor.name} in {self.tensor.file} cannot be dequantised: {what}; copy or download it again"
        )


def float_scales(scale: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents: 2^(byte - 127)."""
    return torch.ldexp(torch.ones(scale.shape), scale.int() - 127) if scale.dtype == torch.uint8 else scale.float()


def num_bytes(tensor: StoredTensor) -> int:
    return torch.Size(tensor.shape).numel() * getattr(torch, tensor.dtype).itemsize
