"""The footprint of a computation without numbers equals that of the computation with them."""

from __future__ import annotations

import copy

import torch
from conftest import make_batches, make_model
from torch import nn
from torch.nn.functional import cross_entropy

from sgm_finetune.model.stand_ins import FUSED_ATTENTION
from sgm_finetune.train.budget.footprint import Footprint


def test_freed_tensors_do_not_count_and_known_ones_never_do() -> None:
    known = torch.empty(1000, device="meta")
    with Footprint([known]) as footprint:
        kept = known * 2
        for _ in range(5):
            known + 1
        view = kept[10:]
    assert (footprint.now, footprint.peak) == (4000, 8000)
    del kept
    assert footprint.now == 4000  # the view holds it
    del view
    assert footprint.now == 0


def test_a_step_needs_without_numbers_what_it_needs_with_them() -> None:
    """The same operations on meta tensors and on real ones have equal peaks, bytes left and operations."""
    real, batch = make_model("causal-lm"), make_batches(1, task="causal-lm")[0]
    real.set_attn_implementation("eager")  # the fused one does not run without numbers
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    hollow = copy.deepcopy(real).to("meta")
    hollow.tie_weights()
    found = []
    for model, device in ((real, "cpu"), (hollow, "meta")):
        model.train()
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with Footprint([*model.parameters(), *model.buffers(), *inputs.values()]) as footprint:
            model(**inputs).loss.backward()
        found.append((footprint.peak, footprint.now, footprint.flops))
    assert found[0] == found[1]
    assert found[0][1] >= sum(p.numel() * 4 for p in real.parameters())  # the gradients


def test_a_linear_layers_step_is_counted_by_hand() -> None:
    layer, x = nn.Linear(32, 64, bias=False, device="meta"), torch.empty(8, 32, device="meta")
    with Footprint([*layer.parameters(), x], width=64) as footprint:
        loss = cross_entropy(layer(x), torch.zeros(8, dtype=torch.long, device="meta"))
        loss.backward()
    assert footprint.flops == 2 * (2 * 8 * 32 * 64)  # forward, and the weight's gradient
    assert footprint.wide_at_peak >= 8 * 64 * 4  # logits, or their gradient
    assert layer.weight.grad is not None


def test_fused_attention_keeps_no_probabilities() -> None:
    """Torch's fused kernel keeps its inputs, its output and one number a row."""
    hollow = make_model("causal-lm").to("meta")
    batch = {"input_ids": torch.zeros(2, 500, dtype=torch.long, device="meta")}
    kept = {}
    for name in ("eager", FUSED_ATTENTION):
        hollow.set_attn_implementation(name)
        with Footprint([*hollow.parameters(), *hollow.buffers()]) as footprint:
            logits = hollow(**batch).logits
            kept[name] = footprint.now
            logits.sum().backward()
            del logits
    heads, layers = hollow.config.num_attention_heads, hollow.config.num_hidden_layers
    assert kept["eager"] - kept[FUSED_ATTENTION] > 0.99 * layers * 4 * 2 * heads * 500 * 500


def test_masks_select_as_many_rows_as_given() -> None:
    rows, mask = torch.empty(4, 5, 7, device="meta"), torch.ones(4, 5, dtype=torch.bool, device="meta")
    with Footprint(num_selected=3):
        assert rows[mask].shape == (3, 7)
        assert bool(mask.all())
