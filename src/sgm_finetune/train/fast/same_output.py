"""Checks that a changed model still computes the same output, as the fast step requires (docs/method.md 8)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ROUNDING = 0.02
"""The largest `output_change` that another order of the same operations makes in bfloat16."""


@torch.no_grad()
def output_change(
    model: nn.Module,
    batch: dict[str, Tensor],
    change: Callable[[], Any],
    refusals: tuple[type[Exception], ...] = (),
) -> float:
    """The relative change ‖z' − z‖/‖z‖ of the model's logits for `batch` that `change()` causes, in eval mode.

    Infinite if the changed model raises one of `refusals`; 0 on device "meta", where there are no numbers.
    """
    was_training = model.training
    model.eval()
    try:
        before = _logits(model, batch)
        try:
            change()
            after = _logits(model, batch)
        except refusals:
            return math.inf
    finally:
        model.train(was_training)
    if after.is_meta:
        return 0.0
    difference, size = float((after - before).norm()), float(before.norm())
    if size:
        return difference / size
    return math.inf if difference else 0.0


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits in float32, without those of padding tokens if the model has logits for each token."""
    logits: Tensor = model(**batch).logits.float()
    mask = batch.get("attention_mask")
    return logits[mask.bool()] if mask is not None and logits.shape[:2] == mask.shape else logits
