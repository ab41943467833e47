"""The probe: its sketches agree with autograd, and it leaves the model unchanged."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import make_batches, make_model

from sgm_finetune.base.config import Config
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.encoding import IGNORED
from sgm_finetune.measure.probe import probe, readers_of_same_activations
from sgm_finetune.measure.probe_batches import probe_pieces
from sgm_finetune.method.subspace import test_matrix
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.train.budget.footprint import Footprint


def true_gradients(model, batches):
    """The weight gradients, summed over the batches, by autograd in float64."""
    model = model.double()
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    return {name: matrix.module.weight.grad.clone() for name, matrix in adaptable(model).items()}


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_sketches_agree_with_the_gradients_that_autograd_forms(task):
    """S = ΩᵀG and (GΩ')ᵀ for both halves, G from autograd in float64."""
    model, batches = make_model(task), make_batches(task=task)
    probed = probe(model, batches, sketch_size=6, seed=4)
    for half in (0, 1):
        truth = true_gradients(make_model(task), batches[half::2])
        assert list(truth) == list(probed.halves)
        for name, gradient in truth.items():
            sketch, (rows, cols) = probed.halves[name][half], gradient.shape
            assert sketch.seed == 8 + half
            expected = test_matrix(rows, 6, sketch.seed).double().T @ gradient
            torch.testing.assert_close(sketch.input.double(), expected, rtol=1e-3, atol=1e-5)
            expected = (gradient @ test_matrix(cols, 6, sketch.seed).double()).T
            torch.testing.assert_close(sketch.output.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
@pytest.mark.parametrize("training", [{"micro_batch_size": 2}, {"checkpointing": True}], ids=str)
def test_a_batch_in_pieces_is_the_same_batch(task, training):
    """The sketches are the same also when pieces have different numbers of predictions, or none."""
    batches = make_batches(task=task)
    if task == "causal-lm":
        for batch in batches:
            batch["labels"] = batch["labels"].clone()
            batch["labels"][0, 3:], batch["labels"][1] = IGNORED, IGNORED
    config = Config.model_validate({"model": {"task": task}, "training": {"batch_size": 4, **training}})
    whole = probe(make_model(task), batches, sketch_size=6)
    divided = probe(make_model(task), batches, sketch_size=6, pieces=partial(probe_pieces, config))
    assert divided.loss == pytest.approx(whole.loss, rel=1e-5)
    assert divided.activations == whole.activations
    assert (divided.num_batches, divided.num_tokens) == (whole.num_batches, whole.num_tokens)
    assert divided.activation_bytes < 0.5 * whole.activation_bytes
    for name, halves in whole.halves.items():
        for found, expected in zip(divided.halves[name], halves, strict=True):
            torch.testing.assert_close(found.input, expected.input, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(found.output, expected.output, rtol=1e-3, atol=1e-6)


def test_readers_of_the_same_activations_are_found():
    probed = probe(make_model(), make_batches())
    readers: dict[str, list[str]] = {}
    for name, first in probed.activations.items():
        readers.setdefault(first.removeprefix("model.layers."), []).append(name.split(".")[-1])
    expected = {
        "self_attn.q_proj": ["q_proj", "k_proj", "v_proj"], "self_attn.o_proj": ["o_proj"],
        "mlp.gate_proj": ["gate_proj", "up_proj"], "mlp.down_proj": ["down_proj"],
    }  # fmt: skip
    assert readers == {f"{layer}.{first}": kinds for layer in range(4) for first, kinds in expected.items()}


def grouped(first_readers: dict[str, str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name, first in first_readers.items():
        groups.setdefault(first, []).append(name)
    return list(groups.values())


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_readers_are_the_same_without_numbers_and_without_gradients(task):
    batch = make_batches(2, task=task)[0]
    expected = grouped(dict(probe(make_model(task), make_batches(2, task=task)).activations))
    assert sum(map(len, expected)) == 4 * 7
    hollow = make_model(task).to("meta")
    inputs = {name: tensor.to("meta") for name, tensor in batch.items() if name != "labels"}
    hooks = footprint(hollow)["hooks"]
    with Footprint(num_selected=1), torch.no_grad():
        assert readers_of_same_activations(hollow, lambda: hollow(**inputs)) == expected
    assert footprint(hollow)["hooks"] == hooks
    real = make_model(task)
    assert readers_of_same_activations(real, lambda: real(**batch)) == expected


@pytest.mark.parametrize(("copies", "together"), [(set(), True), ({0}, False)])
def test_an_equal_copy_is_another_activation_also_without_numbers(copies, together):
    hollow = Branching(copies).to("meta")
    inputs = {name: tensor.to("meta") for name, tensor in make_batches(1)[0].items()}
    with torch.no_grad():
        found = readers_of_same_activations(hollow, lambda: hollow(**inputs))
    names = ["layers.0.left", "layers.0.right"]
    assert found == ([names] if together else [[name] for name in names])


class Branching(torch.nn.Module):
    """A model whose two branches read one tensor in some batches and equal copies in others."""

    def __init__(self, copies: set[int]):
        super().__init__()
        self.embed = torch.nn.Embedding(32, 8)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({k: torch.nn.Linear(8, 8) for k in ("left", "right")})])
        self.copies, self.calls = copies, 0

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask, labels):
        x = self.embed(input_ids)
        other = x.clone() if self.calls in self.copies else x
        self.calls += 1
        loss = (self.layers[0]["left"](x) * self.layers[0]["right"](other)).square().mean()
        return SimpleNamespace(loss=loss)


@pytest.mark.parametrize(("copies", "together"), [(set(), True), ({0, 1, 2, 3}, False), ({3}, False)])
def test_readers_of_the_same_activations_read_them_in_every_batch(copies, together):
    probed = probe(Branching(copies), make_batches(4))  # type: ignore[arg-type]
    assert (probed.activations["layers.0.right"] == "layers.0.left") is together


def footprint(model):
    return {
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "required": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
        "weights": [p.detach().clone() for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def assert_same(before, after):
    for key in ("hooks", "modes", "required", "gradients"):
        assert before[key] == after[key], key
    assert all(torch.equal(a, b) for a, b in zip(before["weights"], after["weights"], strict=True))
    assert torch.equal(before["random"], after["random"])


@pytest.fixture
def mixed_model():
    """A model with some parts in training mode, some parts frozen, and dropout."""
    model = make_model(attention_dropout=0.3)
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    return model


def test_the_probe_leaves_the_model_unchanged(mixed_model):
    before = footprint(mixed_model)
    probe(mixed_model, make_batches())
    assert_same(before, footprint(mixed_model))


@pytest.mark.parametrize("where", ["forward", "backward", "loss"])
def test_the_probe_leaves_the_model_unchanged_also_after_an_exception(mixed_model, where):
    before = footprint(mixed_model)
    batches = make_batches()
    layer, handle = mixed_model.model.layers[2].mlp.up_proj, None

    def fail(*_):
        raise RuntimeError("on purpose")

    if where == "forward":
        handle = layer.register_forward_hook(fail)
    elif where == "backward":
        handle = layer.register_forward_hook(lambda module, args, output: output.register_hook(fail) and None)
    else:
        del batches[2]["labels"]
    with pytest.raises((RuntimeError, UserError)):
        probe(mixed_model, batches)
    if handle is not None:
        handle.remove()
    assert_same(before, footprint(mixed_model))


def test_no_weight_gradient_is_ever_formed(monkeypatch):
    """Every parameter is frozen while the batches run, so autograd forms none."""
    model = make_model()
    seen = []
    model.model.layers[0].register_forward_hook(
        lambda *_: seen.append(any(p.requires_grad for p in model.parameters()))
    )
    probe(model, make_batches())
    assert seen == [False] * 4
    assert all(p.grad is None for p in model.parameters())


def test_two_probes_are_equal():
    model = make_model(attention_dropout=0.3)
    model.train()
    first, second = probe(model, make_batches()), probe(model, make_batches())
    for name in first.halves:
        for a, b in zip(first.halves[name], second.halves[name], strict=True):
            assert torch.equal(a.input, b.input)
            assert torch.equal(a.output, b.output)


def test_the_cost_is_reported_in_seconds_and_bytes():
    probed = probe(make_model(), make_batches(), sketch_size=6)
    sketches = sum(t.numel() * 4 for pair in probed.halves.values() for s in pair for t in (s.input, s.output))
    assert probed.sketch_bytes > sketches
    assert probed.activation_bytes > 0
    assert probed.seconds > 0
    assert probed.num_tokens == 4 * 4 * 7


def test_gpt2_layers_are_sketched_in_the_same_orientation():
    """Conv1D stores its weight transposed, but its gradient is d_out x d_in."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    def build():
        torch.manual_seed(3)
        config = GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2, num_labels=2, pad_token_id=0, n_positions=32)
        return GPT2ForSequenceClassification(config).eval()

    probed = probe(build(), make_batches(2), sketch_size=5)
    model = build().double()
    batch = make_batches(2)[0]
    model(**batch).loss.backward()
    layer = model.transformer.h[1].attn.c_attn
    assert probed.shapes["transformer.h.1.attn.c_attn"] == (96, 32)
    sketch = probed.halves["transformer.h.1.attn.c_attn"][0]
    expected = test_matrix(96, 5, 0).double().T @ layer.weight.grad.T
    torch.testing.assert_close(sketch.input.double(), expected, rtol=1e-3, atol=1e-6)


def test_one_batch_is_refused():
    with pytest.raises(UserError, match="two batches"):
        probe(make_model(), make_batches(1))


class Detour(torch.nn.Module):
    """A layer beside a spare one, whose output the loss does not use."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.spare = torch.nn.Linear(64, 8)

    def forward(self, x):
        self.spare(x)
        return self.layer(x)


def test_a_layer_that_the_loss_does_not_use_is_left_out_and_listed():
    model = make_model()
    model.model.layers[3].mlp.up_proj = Detour(model.model.layers[3].mlp.up_proj)
    probed = probe(model, make_batches())
    assert probed.unused == ("model.layers.3.mlp.up_proj.spare",)
    assert "model.layers.3.mlp.up_proj.layer" in probed.shapes
    assert not {*probed.unused} & {*probed.shapes, *probed.halves, *probed.activations}
    with pytest.raises(UserError, match=r"model\.layers\.3\.mlp\.up_proj\.spare.* no gradient"):
        probe(model, make_batches(), names=list(probed.unused))


def test_a_layer_that_reads_a_table_of_positions_is_measured():
    """DeBERTa projects a table of relative positions; the input of that layer requires no gradient."""
    from transformers import DebertaConfig, DebertaForSequenceClassification

    config = DebertaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=32,
        relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0, position_biased_input=False,
    )  # fmt: skip
    torch.manual_seed(3)
    model, batches = DebertaForSequenceClassification(config).eval(), make_batches()
    probed = probe(model, batches, sketch_size=6)
    assert probed.unused == ()
    name = "deberta.encoder.layer.1.attention.self.pos_proj"
    truth = true_gradients(model, batches[::2])[name]
    expected = test_matrix(32, 6, probed.halves[name][0].seed).double().T @ truth
    torch.testing.assert_close(probed.halves[name][0].input.double(), expected, rtol=1e-3, atol=1e-6)


def test_an_unknown_layer_is_refused_by_name():
    with pytest.raises(UserError, match="q_prj"):
        probe(make_model(), make_batches(), names=["model.layers.0.self_attn.q_prj"])
