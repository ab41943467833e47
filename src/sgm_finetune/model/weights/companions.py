"""The companions of a packed tensor in a quantised checkpoint: its scales, zero points and group numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sgm_finetune.base.errors import UserError
from sgm_finetune.model.weights.tensors import StoredTensor


class Companions:
    """Finds the companions of one packed tensor, checks their shapes, and records which ones were used."""

    def __init__(self, tensor: StoredTensor, tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]):
        self.tensor, self.tensors, self.settings = tensor, tensors, settings
        self.used: set[str] = set()

    def find(self, name: str, *shapes: tuple[int, ...]) -> StoredTensor | None:
        """The tensor `name`; None without one. Raises UserError when its shape is none of `shapes`."""
        found = self.tensors.get(name)
        if found is not None:
            self.used.add(name)
            if shapes and found.shape not in shapes:
                raise self.misfit(f"{name} has shape {list(found.shape)}, expected {list(shapes[0])}")
        return found

    def need(self, name: str, *shapes: tuple[int, ...]) -> StoredTensor:
        """The tensor `name`. Raises UserError when it is missing or its shape is none of `shapes`."""
        found = self.find(name, *shapes)
        if found is None:
            raise self.misfit(f"{name} is missing")
        return found

    def misfit(self, what: str) -> UserError:
        """The error for a packed tensor whose companions do not fit; `what` says why."""
        return UserError(
            f"{self.tensor.name} in {self.tensor.file} cannot be dequantised: {what}; copy or download it again"
        )


def float_scales(scale: Tensor) -> Tensor:
    """The scales in float32; a scale stored as a byte is the exponent of 2^(byte - 127)."""
    return torch.ldexp(torch.ones(scale.shape), scale.int() - 127) if scale.dtype == torch.uint8 else scale.float()


def num_bytes(tensor: StoredTensor) -> int:
    """Bytes that the tensor takes."""
    return torch.Size(tensor.shape).numel() * getattr(torch, tensor.dtype).itemsize
