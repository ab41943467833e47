"""GGUF files of every architecture that SGM writes: llama.cpp computes what Transformers does, or it is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from conftest import WORDS
from test_exporting import LLAMA_3_ROPE, bpe_tokenizer, data, exported, needs_llama_cpp, read, train  # noqa: F401

from sgm_finetune.base.errors import UserError
from sgm_finetune.results.export import ask_llama_cpp
from sgm_finetune.results.export.check import compute_logits
from sgm_finetune.results.export.gguf_architecture import (
    ARCHITECTURES,
    architecture_of,
    check_architecture,
    computed_as,
    ignored_window,
)
from sgm_finetune.results.export.gguf_file import check_exportable, write_gguf
from sgm_finetune.results.export.gguf_tensors import gguf_tensors
from sgm_finetune.results.export.merge import merged_tensors
from sgm_finetune.results.load import attach_adapter, base_skeleton, load_unquantised

SIZES = {
    "vocab_size": 448, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
GEMMA = {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
"""The window is shorter than the sequences of the check."""
FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(16)], "long_factor": [1.0 + i for i in range(16)]}
LONG = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 512, **FACTORS}
MODELS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "gemma2": lambda: hf.Gemma2Config(**GEMMA),
    "gemma2, windows in other layers": lambda: hf.Gemma2Config(
        **GEMMA, layer_types=["full_attention", "sliding_attention"]
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 7}),
    "gemma3, no windows, stretched": lambda: hf.Gemma3TextConfig(
        **GEMMA,
        layer_types=["full_attention"] * 2, final_logit_softcapping=20.0, tie_word_embeddings=False,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gpt2": lambda: hf.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, n_positions=512, vocab_size=448, bos_token_id=1, eos_token_id=2
    ),
    "gpt2, an output matrix of its own, narrow": lambda: hf.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, n_positions=512, n_inner=96, vocab_size=448, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    ),
    "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=64),
    "mixtral": lambda: hf.MixtralConfig(**SIZES, num_local_experts=6),
    "phi3": lambda: hf.Phi3Config(**SIZES),
    "phi3, long": lambda: hf.Phi3Config(
        **{**SIZES, "max_position_embeddings": 2048}, original_max_position_embeddings=512, rope_parameters=LONG,
        sliding_window=1024,
    ),
    "phi3, half of each head rotated": lambda: hf.Phi3Config(
        **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=96),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=32, norm_topk_prob=True),
}  # fmt: skip
SILU = ("mistral", "mixtral", "phi3", "qwen2_moe", "qwen3_moe")
SENTENCEPIECE = ("gemma", "mistral", "mixtral", "phi3")
"""Architectures whose published tokenizers are of SentencePiece's kind."""


def save_model(name: str, folder: Path, shallow: bool = False) -> Path:
    """Saves a model; a shallow one has one layer, which asks every expert: rounding chooses no other."""
    config = MODELS[name]()
    if shallow:
        config.num_hidden_layers = 1
        for key, value in (("layer_types", getattr(config, "layer_types", [])[:1]), ("num_experts_per_tok", 6)):
            if hasattr(config, key):
                setattr(config, key, value)
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # makes biases non-zero and norms unequal
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    bpe_tokenizer(name.startswith(SENTENCEPIECE), adds_space=not name.startswith("gemma")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(MODELS))
def decoder(request, tmp_path_factory, data) -> list[str]:  # noqa: F811
    folder = tmp_path_factory.mktemp("decoder")
    return train(save_model(request.param, folder / "m"), "causal-lm", data["causal-lm"], folder / "out")


def exactness(where: list[str]) -> float:
    """Returns the largest difference that float32 leaves, or llama.cpp's table of GELU in half precision."""
    return 2e-5 if base_skeleton(read(where)).config.model_type in SILU else 1e-3


@needs_llama_cpp
def test_llama_cpp_computes_every_architecture_as_it_was_trained(decoder, tmp_path):
    report = exported(decoder, "gguf", gguf_type="f32", output=tmp_path / "g")
    assert report["by"] == "llama.cpp"
    assert report["difference"] < exactness(decoder)
    assert report["arrived"] == pytest.approx(1, abs=1e-3)


@needs_llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_rounds_within_its_tolerance(name, tmp_path, data):  # noqa: F811
    where = train(save_model(name, tmp_path / "m", shallow=True), "causal-lm", data["causal-lm"], tmp_path / "out")
    for kind in ("f16", "q8_0"):
        report = exported(where, "gguf", gguf_type=kind, output=tmp_path / kind)
        assert 0 < report["difference"] < report["tolerance"]
        assert report["arrived"] == pytest.approx(1, abs=0.1)


@needs_llama_cpp
def test_llama_cpp_adds_an_adapter_to_every_architecture(decoder, tmp_path):
    report = exported(decoder, "gguf-adapter", output=tmp_path / "g")
    assert report["difference"] < exactness(decoder)
    assert report["arrived"] == pytest.approx(1, abs=1e-3)


class HalfTable(torch.nn.Module):
    """GELU as llama.cpp computes it: of numbers between -10 and 10, rounded to half precision before and after."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        looked_up = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x >= 10, x, torch.where(x <= -10, 0.0, looked_up))


@torch.no_grad()
def computed(where: list[str], length: int, folder: Path, half: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits of Transformers and of llama.cpp for one sequence, of the merged model in f32; with `half`,
    Transformers computes GELU as llama.cpp does."""
    result = read(where)
    tensors, skeleton = merged_tensors(result)
    words = check_exportable(result, skeleton.config, "gguf")
    write_gguf(gguf_tensors(tensors, skeleton.config), skeleton.config, words, "f32", folder / "m.gguf")
    ids = torch.randint(3, 400, (1, length))
    asked = {"model": str(folder / "m.gguf"), "ids": ids.tolist(), "texts": [], "threads": 1}
    (folder / "asked.json").write_text(json.dumps(asked))
    ask_llama_cpp.main(folder / "asked.json", folder / "found.npz")
    model = attach_adapter(load_unquantised(result, "float32"), result.content, result.path)
    for layer in [m for m in model.modules() if half and type(m).__name__.endswith("MLP")]:
        setattr(layer, "act_fn" if hasattr(layer, "act_fn") else "act", HalfTable())
    return compute_logits(model, ids)[0], torch.from_numpy(np.load(folder / "found.npz")["logits"])[0]


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def named(request, tmp_path, data) -> list[str]:  # noqa: F811
    return train(save_model(request.param, tmp_path / "m"), "causal-lm", data["causal-lm"], tmp_path / "out")


@needs_llama_cpp
@pytest.mark.parametrize(
    ("named", "length"), [("gemma2", 300), ("gemma3", 300), ("phi3, long", 600)], indirect=["named"]
)
def test_long_texts_are_computed_as_in_training(named, length, tmp_path):
    """Of many windows; and longer than the length before Phi-3's positions were stretched."""
    assert difference(*computed(named, length, tmp_path)) < exactness(named)


@needs_llama_cpp
@pytest.mark.parametrize("named", ["gemma2", "gpt2"], indirect=True)
def test_what_gelu_leaves_is_llama_cpp_s_table(named, tmp_path):
    """What remains are numbers that lie on the border between two entries."""
    exact, by_table = (difference(*computed(named, 40, tmp_path, half=half)) for half in (False, True))
    assert by_table < exact / 5


@needs_llama_cpp
@pytest.mark.parametrize("named", ["mistral"], indirect=True)
def test_llama_cpp_computes_a_mistral_up_to_its_window_only(named, tmp_path):
    expected, found = computed(named, 160, tmp_path)
    window = gguf.GGUFReader(tmp_path / "m.gguf").get_field("llama.context_length").contents()
    assert window == 64
    assert difference(expected[:window], found[:window]) < exactness(named)
    assert difference(expected[window:], found[window:]) > 1e-2


REFUSED: dict[str, tuple[Callable[[], hf.PreTrainedConfig], str]] = {
    "another activation": (lambda: hf.LlamaConfig(hidden_act="gelu"), r"no activation gelu there, but silu"),
    "positions that it computes otherwise": (
        lambda: hf.Qwen2Config(rope_parameters=LLAMA_3_ROPE),
        r"no positions of rope_type llama3 there",
    ),
    "wide heads": (lambda: hf.Phi3Config(**SIZES, head_dim=64), r"no 4 heads of 64 numbers in a model of width 128"),
    "the scale of Gemma's attention": (
        lambda: hf.Gemma2Config(**{**GEMMA, "query_pre_attn_scalar": 256}),
        r"no query_pre_attn_scalar=256 there, but 32",
    ),
    "the scale of the largest Gemma": (
        lambda: hf.Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 62, "num_attention_heads": 2}),
        r"no query_pre_attn_scalar=32 there, but 64",
    ),
    "an uncapped Gemma 2": (
        lambda: hf.Gemma2Config(**GEMMA, attn_logit_softcapping=None),
        r"no way to leave its soft-capping out",
    ),
    "an untied Gemma 2": (lambda: hf.Gemma2Config(**GEMMA, tie_word_embeddings=False), r"no output matrix of its own"),
    "a Gemma that reads both ways": (
        lambda: hf.Gemma3TextConfig(**GEMMA, use_bidirectional_attention=True),
        r"no attention in both directions",
    ),
    "a scale for each layer": (
        lambda: hf.GPT2Config(scale_attn_by_inverse_layer_idx=True),
        r"no attention whose scale differs from layer to layer",
    ),
    "experts whose shares do not add up to one": (
        lambda: hf.Qwen3MoeConfig(**SIZES, **EXPERTS),
        r"no norm_topk_prob=false there",
    ),
    "a BERT that reads one way": (lambda: hf.BertConfig(is_decoder=True), r"no attention to earlier tokens alone"),
    "experts in some layers": (
        lambda: hf.Qwen2MoeConfig(**SIZES, **EXPERTS, decoder_sparse_step=2),
        r"no layers without experts there",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    config, words = REFUSED[name]
    with pytest.raises(UserError, match=rf"this \w+, because llama\.cpp has {words}.*; take --to merged"):
        check_architecture(config(), "gguf", "--to merged", is_classifier=config().model_type == "bert")


def test_a_window_that_llama_cpp_lacks_bounds_the_context():
    windows = {name: ignored_window(config()) for name, config in MODELS.items()}
    assert {name: window for name, window in windows.items() if window} == {"mistral": 64, "phi3, long": 1024}
    assert ignored_window(hf.MistralConfig(sliding_window=4096, max_position_embeddings=4096)) is None


def test_a_tolerance_is_that_of_what_llama_cpp_rounds():
    gemma, bert, mistral = hf.Gemma2Config(**GEMMA), hf.BertConfig(), hf.MistralConfig()
    for config, stored, expected in (
        (gemma, "float32", "float16"),
        (gemma, "float16", "float16"),
        (gemma, "q8_0", "q6_k"),
        (bert, "float32", "float16"),
        (bert, "q8_0", "q8_0"),
        (mistral, "float32", "float32"),
    ):
        assert computed_as(config, stored) == expected


def test_the_refusal_of_an_architecture_names_those_that_work():
    with pytest.raises(UserError) as refused:
        check_architecture(hf.OlmoConfig(), "gguf", "--to merged")
    words = str(refused.value)
    assert "this base is a olmo" in words
    assert all(name in words for name in ARCHITECTURES)


def test_an_architecture_that_llama_cpp_alone_can_check_needs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    check_architecture(hf.MistralConfig(), "gguf", "--to merged")
    with pytest.raises(UserError, match=r"--to gguf needs llama\.cpp for a gemma2, .*install.*, or take --to merged"):
        check_architecture(hf.Gemma2Config(**GEMMA), "gguf", "--to merged")


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mixtral", "qwen2_moe"])
def test_every_tensor_of_an_architecture_has_a_place_in_its_file(name, tmp_path, data):  # noqa: F811
    """Without llama.cpp: names, shapes and numbers are those of the stacks and matrices that training left."""
    where = train(save_model(name, tmp_path / "m"), "causal-lm", data["causal-lm"], tmp_path / "out")
    tensors, skeleton = merged_tensors(read(where))
    found = gguf_tensors(tensors, skeleton.config)
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[architecture_of(skeleton.config)]}
    left_out = [t for t in tensors if t.model_name == "lm_head.weight" and skeleton.config.tie_word_embeddings]
    assert len({t.name for t in found}) == len(found)
    assert sum(math.prod(t.shape) for t in found) == sum(math.prod(t.shape) for t in tensors if t not in left_out)
    for tensor in found:
        name = re.sub(r"blk\.\d+\.", "blk.{bid}.", tensor.name)
        assert name.rpartition(".")[0] in known
        assert tuple(tensor.read().shape) == tensor.shape


# classifiers


def word_pieces(lowercase: bool):
    """Returns a pico tokenizer as BERT's: words of the data, and characters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted({*"abcdefghijklmnopqrstuvwxyzéABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'():*=?"})
    tokens = [*special, *WORDS, *(letter for letter in letters if letter not in WORDS), *(f"##{x}" for x in letters)]
    raw = Tokenizer(models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, **{f"{key}_token": name for key, name in names.items()})


@pytest.fixture(scope="module", params=[True, False], ids=["lowercased", "cased"])
def classifier(request, tmp_path_factory, data) -> list[str]:  # noqa: F811
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = word_pieces(request.param)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(vocab_size=256, max_position_embeddings=128, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    return train(folder / "m", "sequence-classification", data["sequence-classification"], folder / "out")


@needs_llama_cpp
def test_llama_cpp_classifies_as_was_trained(classifier, tmp_path):
    for kind in ("f32", "f16", "q8_0"):
        report = exported(classifier, "gguf", gguf_type=kind, output=tmp_path / kind)
        assert report["by"] == "llama.cpp"
        assert report["difference"] < report["tolerance"]
        assert report["arrived"] == pytest.approx(1, abs=0.05)
        assert report["validation"]["loss"] == pytest.approx(report["validation"]["loss_trained"], abs=0.02)
        assert {path.name for path in (tmp_path / kind).iterdir()} == {f"model-{kind}.gguf", "README.md", "export.json"}
    assert "llama-embedding -m model-q8_0.gguf --pooling rank" in (tmp_path / "q8_0/README.md").read_text()
    reader = gguf.GGUFReader(tmp_path / "f16/model-f16.gguf")
    assert reader.get_field("bert.classifier.output_labels").contents() == ["bad", "good"]
