"""The methods of the quality benchmark that are written from their papers do what these say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import make_bert
from torch import nn

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.train.adapters.apply import lora_layers
from sgm_finetune.train.adapters.optimizer import Pair

ROOT = Path(__file__).parent.parent


@pytest.fixture
def rivals(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quality_rivals

    yield quality_rivals
    for name in [n for n in sys.modules if n.startswith("quality")]:
        monkeypatch.delitem(sys.modules, name)


def test_rasa_shares_a_pool_and_keeps_a_part_of_its_own(rivals):
    """ΔW_l = [B_l B]·diag(d_l)·[A_l; A], within the budget of plain LoRA, and 0 at the start."""
    import quality_adapt

    model = make_bert()
    budget = quality_adapt.budget_of(model, 8)
    config = Config.model_validate({"adapter": {"rank": 8, "alpha": 16}})
    made = rivals.rasa(quality_adapt.Base("t", config, None, model, StepLog(None), budget, 0))
    assert 0.95 * budget < sum(p.numel() for p in quality_adapt.adapter_only(made.model)) <= budget
    layers = lora_layers(made.model)
    assert all(not layer.get_delta_weight("default").any() for layer in layers.values())

    first, last = (layers[f"encoder.layer.{i}.intermediate.dense"] for i in (0, 2))
    (own, pool), (other_own, other_pool) = (
        (layer.lora_B["default"].parametrizations.weight.original, layer.lora_B["default"].parametrizations.weight[0])
        for layer in (first, last)
    )
    assert pool.shared is other_pool.shared
    assert own is not other_own
    with torch.no_grad():
        pool.shared.normal_()
    a = first.lora_A["default"].weight
    expected = torch.cat([own, pool.shared], 1) * pool.weights @ a
    torch.testing.assert_close(first.get_delta_weight("default"), expected)


@pytest.mark.parametrize("name", ["LoraRite", "LoraMuon", "AdamW"])
def test_an_invariant_step_does_not_depend_on_how_the_update_is_split(rivals, name):
    """(A, B) and (T·A, B·T⁻¹) are the same update, and take the same way to a target; under AdamW they do not."""
    torch.manual_seed(0)
    a, b, turn = torch.randn(3, 9), torch.randn(7, 3), torch.eye(3) + 0.3 * torch.randn(3, 3)
    target = torch.randn(7, 9, generator=torch.Generator().manual_seed(1))
    ways = [way(rivals, name, *factors, target) for factors in ((a, b), (turn @ a, b @ turn.inverse()))]
    difference = (ways[0] - ways[1]).abs().max() / (ways[0] - b @ a).abs().max()
    assert difference < 1e-3 if name != "AdamW" else difference > 0.05
    assert (ways[0] - target).norm() < (b @ a - target).norm()


def way(rivals, name: str, a: torch.Tensor, b: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """B·A after five steps towards the target."""
    pair = Pair(nn.Parameter(a.clone()), nn.Parameter(b.clone()), scaling=1.0)
    optimizer = (
        torch.optim.AdamW([pair.a, pair.b], lr=0.02) if name == "AdamW" else getattr(rivals, name)([pair], lr=0.02)
    )
    for _ in range(5):
        optimizer.zero_grad()
        (0.01 * (pair.b @ pair.a - target).square().mean()).backward()
        optimizer.step()
    return (pair.b @ pair.a).detach()
