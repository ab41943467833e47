"""The fast step equals PEFT's step: the same outputs, gradients and files, in less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import adapted, make_batches, make_model
from peft import PeftModel
from torch import nn

from sgm_finetune.train.adapters.apply import lora_layers
from sgm_finetune.train.fast.adapter_forward import FastForward, use_fast_step
from sgm_finetune.train.fast.attention import RecomputedAttention, recompute_attention
from sgm_finetune.train.fast.head_loss import find_head_loss, linear_cross_entropy


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
def test_in_inference_mode_the_outputs_are_the_same(share: bool) -> None:
    model, batch = adapted(make_model(), share), make_batches(1)[0]
    use_fast_step(model)
    with torch.no_grad():
        expected = model(**batch).logits
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_near_to_float64s_as_pefts(dtype: torch.dtype, share: bool) -> None:
    base, batch = make_model(), make_batches(1)[0]
    slow = adapted(copy.deepcopy(base).to(dtype), share)
    fast = copy.deepcopy(slow)
    oracle = copy.deepcopy(slow).double()
    assert use_fast_step(fast) == []
    wanted, (_, theirs), (_, ours) = (gradients(m, batch) for m in (oracle, slow, fast))
    assert ours.keys() == theirs.keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        off, peft_off = ((found[name] - gradient).norm() / gradient.norm() for found in (ours, theirs))
        assert off < (1e-5 if dtype == torch.float32 else max(0.05, 2 * float(peft_off))), name


def test_what_readers_share_is_computed_once_and_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(make_model(), share=True)
    use_fast_step(model)
    computed: list[torch.Size] = []
    linear = nn.functional.linear

    def count(x, weight, bias=None):
        if weight.shape[0] == 4:
            computed.append(x.shape)
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", count)
    model(**make_batches(1)[0])
    assert len(computed) == 4 * 4  # one a layer for q, k, v; for gate, up; for o; for down
    projections = [layer.projection for layer in lora_layers(model).values()]
    assert all(projection.u is None and projection.read is None for projection in projections)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointed_layers_have_the_same_gradients() -> None:
    model = adapted(make_model(), share=True)
    use_fast_step(model)
    batch = make_batches(1)[0]
    _, plain = gradients(model.train(), batch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, again = gradients(model, batch)
    torch.testing.assert_close(again, plain)


def test_merging_saving_and_another_adapter_are_plain_lora(tmp_path) -> None:
    base, batch = make_model(), make_batches(1)[0]
    model = adapted(copy.deepcopy(base))
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        use_fast_step(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        with model.disable_adapter():
            torch.testing.assert_close(model(**batch).logits, base.eval()(**batch).logits)
        for safe in (False, True):
            model.merge_adapter(safe_merge=safe)
            torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-4)
            model.unmerge_adapter()
        torch.testing.assert_close(loaded(**batch).logits, expected)
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.merge_and_unload()(**batch).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_what_it_cannot_do_keeps_pefts_forward(config: dict) -> None:
    model = adapted(make_model(), **config)
    assert use_fast_step(model) == list(lora_layers(model))
    assert not any(isinstance(layer, FastForward) for layer in lora_layers(model).values())


def test_layers_that_are_stored_transposed_have_the_same_gradients() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = adapted(
        GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2)).eval(), fan_in_fan_out=True
    )
    fast = copy.deepcopy(model)
    assert use_fast_step(fast) == []
    batch = make_batches(1, task="causal-lm")[0]
    torch.testing.assert_close(gradients(fast, batch), gradients(model, batch), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_in_parts_is_the_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgm_finetune.train.fast.head_loss.NUM_LOGITS", {"cpu": 21})  # three rows at a time
    monkeypatch.setattr("sgm_finetune.train.fast.head_loss.SLICE", {"cpu": 7})  # the last of five slices is smaller
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 16, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(32, 16, generator=draw).to(dtype)
    labels = torch.randint(0, 32, (2, 9), generator=draw)
    labels[0, :4] = labels[1, 7:] = -100
    total, count = linear_cross_entropy(hidden, weight, labels)
    (found,) = torch.autograd.grad(3 * total, hidden)
    logits = (hidden.double() @ weight.double().T)[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    (wanted,) = torch.autograd.grad(3 * expected, hidden)
    assert count == int((labels[:, 1:] != -100).sum())
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(total.double(), expected, atol=0, rtol=tolerance)
    torch.testing.assert_close(
        found.double(), wanted.double(), atol=tolerance * float(wanted.abs().max()), rtol=tolerance
    )


def test_a_language_models_loss_needs_no_logits() -> None:
    model, batch = adapted(make_model("causal-lm")), make_batches(1, task="causal-lm")[0]
    labels = batch.pop("labels")
    found = find_head_loss(model, batch)
    assert found is not None
    total, count = found(model, batch, labels)
    assert float((total / count).detach()) == pytest.approx(
        float(model(**batch, labels=labels).loss.detach()), rel=1e-5
    )


def test_a_model_that_changes_its_logits_after_the_head_gets_no_loss_in_parts() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=30.0,
    )  # fmt: skip
    batch = make_batches(1, task="causal-lm")[0]
    batch.pop("labels")
    assert find_head_loss(Gemma2ForCausalLM(config).requires_grad_(False), batch) is None


def test_a_head_that_is_trained_gets_no_loss_in_parts() -> None:
    model, batch = make_model("causal-lm"), make_batches(1, task="causal-lm")[0]
    found = find_head_loss(model, batch)
    assert found is not None
    with pytest.raises(NotImplementedError, match="output layer"):
        found.mean(model, batch)
    with torch.no_grad():
        assert float(found.mean(model, batch)) == pytest.approx(float(model(**batch).loss), rel=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["every key", "masked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_recomputed_attention_is_attention(dtype: torch.dtype, masked: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 6, 5, 8), "k": (2, 3, 7, 8), "v": (2, 3, 7, 4)}
    q, k, v = (torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes.values())
    mask = torch.zeros(2, 1, 5, 7, dtype=dtype).masked_fill_(torch.rand(2, 1, 5, 7, generator=draw) < 0.3, -1e9)
    output = RecomputedAttention.apply(q, k, v, mask if masked else None, 0.3)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(2, dim=1) for x in exact[1:])
    scores = 0.3 * exact[0] @ keys.mT + (mask.double() if masked else 0)
    expected = scores.softmax(-1) @ values
    weights = torch.randn(expected.shape, generator=draw)
    (output * weights.to(dtype)).sum().backward()
    (expected * weights.to(dtype).double()).sum().backward()
    tolerance = 1e-6 if dtype == torch.float64 else 0.03  # the softmax is in float32
    for found, wanted in zip((output, q.grad, k.grad, v.grad), (expected, *(x.grad for x in exact)), strict=True):
        assert (found.double() - wanted).norm() < tolerance * wanted.norm()


def test_a_model_that_recomputes_its_attention_has_the_same_gradients() -> None:
    model, batch = adapted(make_model("causal-lm")), make_batches(1, task="causal-lm")[0]
    batch["attention_mask"][0, :3] = 0
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"].cumsum(-1) < 2, -100)
    expected = gradients(model, batch)
    assert recompute_attention(model.get_base_model(), batch)
    assert model.config._attn_implementation == "sgm_recomputed"
    torch.testing.assert_close(gradients(model, batch), expected, atol=1e-6, rtol=1e-4)


def test_attention_with_more_to_it_is_left_alone() -> None:
    from transformers import BertConfig, BertForSequenceClassification, Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    batch = make_batches(1)[0]
    capped = Gemma2Config(
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, attn_logit_softcapping=0.01, **sizes
    )
    dropped = BertConfig(num_attention_heads=2, attention_probs_dropout_prob=0.1, **sizes)
    del batch["labels"]
    for model in (Gemma2ForCausalLM(capped), BertForSequenceClassification(dropped)):
        model.set_attn_implementation("eager")
        assert not recompute_attention(model.train(), batch)
        assert model.config._attn_implementation == "eager"
        assert model.training
