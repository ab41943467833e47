"""Whether a model computes the same in another way, which the fast step asks before it does (docs/method.md 8)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ROUNDING = 0.02
"""`output_change` that another order of the same operations may make, in bfloat16."""


@torch.no_grad()
def output_change(
    model: nn.Module,
    batch: dict[str, Tensor],
    change: Callable[[], Any],
    refusals: tuple[type[Exception], ...] = (),
) -> float:
    """‖z' − z‖/‖z‖ of the model's logits for `batch` before and after `change`, in eval mode; infinite where the
    changed model raises one of `refusals`; 0 on device "meta", where there are no numbers."""
    was_training = model.training
    model.eval()
    try:
        expected = _logits(model, batch)
        try:
            change()
            found = _logits(model, batch)
        except refusals:
            return math.inf
    finally:
        model.train(was_training)
    if found.is_meta:
        return 0.0
    difference, size = float((found - expected).norm()), float(expected.norm())
    return difference / size if size else math.inf if difference else 0.0


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of tokens, not of padding, in float32; of a sequence where it has one for all."""
    logits: Tensor = model(**batch).logits.float()
    mask = batch.get("attention_mask")
    return logits[mask.bool()] if mask is not None and logits.shape[:2] == mask.shape else logits
