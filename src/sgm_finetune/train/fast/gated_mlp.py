"""Gated MLPs that keep two tensors for the backward pass instead of four (docs/method.md section 8).

down(act(gate(x)) ∘ up(x)) keeps gate(x), act(gate(x)), up(x) and the product, each as wide as the MLP. Here the
backward passes of `down` and of the product compute the product and the activation again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from sgm_finetune.model.names import layer_of
from sgm_finetune.train.fast.same_output import ROUNDING, output_change

_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_Activation = Callable[[Tensor], Tensor]


class _Product(torch.autograd.Function):
    """act(gate) ∘ up, of equal shapes; keeps gate and up for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: _Activation) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (delta,) = gradients
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.act(gate)
        for_up = delta * activated
        (for_gate,) = torch.autograd.grad(activated, gate, delta * up)
        return for_gate, for_up, None


def _forward(module: Any, x: Tensor) -> Tensor:
    """The forward of a gated MLP, of whose product the backward pass keeps only the shape."""
    gate, up, act = module.gate_proj(x), module.up_proj(x), module.act_fn
    if not torch.is_grad_enabled():
        return module.down_proj(act(gate).mul_(up))
    product = _Product.apply(gate, up, act)
    product_storage = product.untyped_storage()._cdata  # type: ignore[union-attr]
    gate, up = gate.detach(), up.detach()

    def pack(kept: Tensor) -> Tensor | torch.Size:
        same = kept.untyped_storage()._cdata == product_storage and kept.numel() == gate.numel()
        return kept.shape if same and kept.is_contiguous() else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else act(gate).mul_(up).view(kept)

    with saved_tensors_hooks(pack, unpack):
        return module.down_proj(product)


def recompute_mlps(model: PreTrainedModel, batch: dict[str, Tensor]) -> bool:
    """Makes the gated MLPs of `model` keep two tensors instead of four, if its output for `batch` stays the same.

    Returns whether it did. Do not use it with checkpointed blocks, which would keep more.
    """
    found = [m for m in model.modules() if {name for name, _ in m.named_children()} == _PARTS]

    def replace() -> None:
        for module in found:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]

    if not found:
        return False
    if output_change(model, batch, replace) <= ROUNDING:
        return True
    for module in found:
        del module.forward
    return False


def recomputed_width(model: nn.Module, lowest: int = 0) -> int:
    """Entries a token of all the products that `recompute_mlps` makes the model compute again, from block `lowest` on.
    Below the lowest trained block there is no backward pass, and nothing is kept."""
    changed = (
        module
        for name, module in model.named_modules()
        if getattr(vars(module).get("forward"), "func", None) is _forward and (layer_of(name) or 0) >= lowest
    )
    return sum(module.gate_proj.out_features for module in changed)  # type: ignore[union-attr, misc]
