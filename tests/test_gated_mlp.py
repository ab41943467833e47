"""Gated MLPs that keep less compute the same outputs and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import adapted, make_batches, make_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from sgm_finetune.train.fast.adapter_forward import use_fast_step
from sgm_finetune.train.fast.gated_mlp import recompute_mlps, recomputed_width


def trained(model: nn.Module, fast: bool) -> nn.Module:
    torch.manual_seed(2)
    made = adapted(model)
    if fast:
        use_fast_step(made)
    return made


def gradients(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "PEFT"])
def test_outputs_and_gradients_stay(fast: bool, act: str) -> None:
    plain, batch = make_model(hidden_act=act), make_batches(1)[0]
    less = copy.deepcopy(plain)
    assert recompute_mlps(less, {"input_ids": batch["input_ids"]})
    plain, less = trained(plain, fast), trained(less, fast)
    with torch.no_grad():
        torch.testing.assert_close(less(**batch).logits, plain(**batch).logits)
    torch.testing.assert_close(gradients(less, batch), gradients(plain, batch), atol=1e-6, rtol=1e-4)


def test_two_tensors_as_wide_as_the_mlp_are_kept_instead_of_four() -> None:
    def wide(model: nn.Module) -> int:
        seen: dict[int, torch.Tensor] = {}

        def note(kept: torch.Tensor) -> torch.Tensor:
            if kept.numel() == 4 * 7 * 128 and kept.shape[-1] == 128:
                seen[kept.data_ptr()] = kept
            return kept

        with saved_tensors_hooks(note, lambda kept: kept):
            loss = model(**batch).loss
        loss.backward()
        return len(seen)

    batch = make_batches(1)[0]
    plain, less = make_model(), make_model()
    assert recompute_mlps(less, {"input_ids": batch["input_ids"]})
    assert (recomputed_width(plain), recomputed_width(less), recomputed_width(less, 3)) == (0, 4 * 128, 128)
    assert wide(trained(plain, True)) == 4 * 4
    assert wide(trained(less, True)) == 4 * 2


def test_a_model_without_gated_mlps_is_left_alone() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2))
    assert not recompute_mlps(model, {"input_ids": torch.ones(1, 4, dtype=torch.long)})


def test_mlps_that_do_more_keep_their_own_code() -> None:
    class Scaled(nn.Module):
        def __init__(self, mlp: nn.Module):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            self.act_fn = mlp.act_fn

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model, batch = make_model(), make_batches(1)[0]
    for layer in model.model.layers:
        layer.mlp = Scaled(layer.mlp)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        assert not recompute_mlps(model, {"input_ids": batch["input_ids"]})
        assert torch.equal(model(**batch).logits, expected)
