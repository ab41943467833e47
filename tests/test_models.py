"""Base models: the layers that can be adapted, the mistakes that are refused, the conversion of an embedded model."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from conftest import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.exit_status import run_and_exit
from sgm_finetune.model.architecture import check_model
from sgm_finetune.model.folder import local_folder
from sgm_finetune.model.load import Head, load_model, skeleton
from sgm_finetune.model.matrices import adaptable, matrix_shape
from sgm_finetune.model.tokenizer import load_tokenizer


def test_linear_layers_come_in_the_models_order_without_heads_and_embeddings():
    model = make_model()
    found = list(adaptable(model))
    order = [name for name, _ in model.named_modules()]
    assert found == sorted(found, key=order.index)
    assert len(found) == 4 * 7
    assert "score" not in found
    names = ["model.layers.3.mlp.up_proj", "model.layers.0.self_attn.q_proj"]
    assert list(adaptable(model, names)) == names[::-1]


def test_an_unknown_layer_is_named_beside_the_known_ones():
    with pytest.raises(UserError, match=r"`q_prj`; this LlamaForSequenceClassification has .*q_proj"):
        adaptable(make_model(), ["q_prj"])


def test_a_model_without_numbered_blocks_cannot_be_adapted():
    with pytest.raises(UserError, match="Bilinear has no linear layers"):
        adaptable(torch.nn.Bilinear(2, 2, 2))


def test_a_shape_is_outputs_and_inputs_also_for_gpt2s_transposed_layers():
    from transformers.pytorch_utils import Conv1D

    assert matrix_shape(torch.nn.Linear(3, 5)) == (5, 3)
    assert matrix_shape(Conv1D(5, 3)) == (5, 3)


def test_the_layers_of_a_gpt2_are_found():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=10, n_positions=16))
    kinds = [name.partition(".h.0.")[2] for name in adaptable(model) if ".h.0." in name]
    assert kinds == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def test_a_new_head_follows_the_seed_and_the_labels(llama_folder):
    heads = []
    for _ in range(2):
        torch.manual_seed(7)
        config = ModelConfig(name=str(llama_folder), dtype="float32")
        model, new = load_model(config, llama_folder, Head(("bad", "fair", "good"), pad_token_id=0))
        assert new == ("score",)
        heads.append(model.score.weight)
        assert not model.training
    assert torch.equal(*heads)
    assert heads[0].shape == (3, 64)
    assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert model.config.pad_token_id == 0


@pytest.mark.parametrize(
    ("has", "quantization", "asked", "expected"),
    [
        ("avx512_bf16", "nf4", "auto", torch.bfloat16),
        ("avx2", "nf4", "auto", torch.float32),
        ("avx2", "nf4", "bfloat16", torch.bfloat16),
        ("avx2", "none", "auto", torch.float32),  # as stored
        ("avx512_bf16", "none", "auto", torch.float32),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies bfloat16")
def test_a_4_bit_model_computes_in_the_dtype_that_the_processor_multiplies(
    llama_folder, monkeypatch, has, quantization, asked, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False, has: True})
    config = ModelConfig(name=str(llama_folder), task="causal-lm", quantization=quantization, dtype=asked)
    for model in (load_model(config, llama_folder)[0], skeleton(config, llama_folder)):
        assert model.dtype == expected
        assert model.model.norm.weight.dtype == expected


@pytest.mark.parametrize(
    "numbers",
    [
        {"num_key_value_heads": 0},
        {"num_attention_heads": 0},
        {"num_key_value_heads": -2},
        {"head_dim": -8},
        {"hidden_size": -64},
        {"intermediate_size": "wide"},
        {"vocab_size": -1},
        {"hidden_act": "none such"},
        {"rope_parameters": {"rope_type": "none such", "rope_theta": 1.0}},
    ],
    ids=str,
)
def test_numbers_that_no_model_has_are_one_line(numbers, llama_folder, tmp_path):
    shutil.copytree(llama_folder, tmp_path / "model")
    values = json.loads((llama_folder / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(values | numbers))
    config = ModelConfig(name=str(tmp_path / "model"), task="causal-lm")
    for act in (load_model, skeleton):
        with pytest.raises(UserError) as caught:
            act(config, tmp_path / "model")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), ImportError("a.so: failed to map segment")],
    ids=repr,
)
def test_too_little_memory_is_not_blamed_on_the_model(error, llama_folder, monkeypatch, capfd):
    def fail(*given, **options):
        raise RuntimeError("Failed to import transformers.models.llama") from error

    config = ModelConfig(name=str(llama_folder), task="causal-lm")
    for part, act in ((AutoConfig, "from_pretrained"), (AutoModelForCausalLM, "from_config")):
        monkeypatch.setattr(part, act, fail)
        with pytest.raises(SystemExit) as caught:
            run_and_exit(lambda: skeleton(config, llama_folder))
        said = capfd.readouterr().err
        assert caught.value.code == 2
        assert said.startswith("The memory is not enough")
        assert "config.json" not in said
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("family", "changes", "positions"),
    [
        ("bert", {"max_position_embeddings": 64}, 64),
        ("gpt2", {"n_positions": 48}, 48),
        ("roberta", {"max_position_embeddings": 66, "pad_token_id": 1}, 64),
    ],
)
def test_more_tokens_than_positions_are_refused(family, changes, positions, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **changes}))
    config = ModelConfig(name="x")
    check_model(config, tmp_path, positions)
    with pytest.raises(UserError, match=f"use data.max_length={positions} or less"):
        check_model(config, tmp_path, positions + 1)


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_of_text_token(llama_folder, tmp_path):
    import shutil

    folder = shutil.copytree(llama_folder, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"
    assert tokenizer.padding_side == "right"


@pytest.mark.slow
def test_the_embedded_gguf_file_becomes_a_plain_folder_that_knows_france(tmp_path, monkeypatch):
    monkeypatch.setenv("SGM_CACHE", str(tmp_path))
    lines = []
    folder = local_folder("smollm2-135m-instruct", announce=lines.append)
    assert len(lines) == 1
    assert folder.is_relative_to(tmp_path)
    assert [path for path in folder.parent.iterdir() if path != folder] == []
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert local_folder("smollm2-135m-instruct", announce=lines.append) == folder
    assert len(lines) == 1

    config = ModelConfig(name="smollm2-135m-instruct", task="causal-lm")
    check_model(config, folder, 2048)
    (model, new), tokenizer = load_model(config, folder), load_tokenizer(folder)
    assert new == ()
    assert model.dtype == torch.bfloat16
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    assert bool(logits.isfinite().all())
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
