"""Exports in 4 bits for GPUs: what is rounded and how, what reads it again, and what is refused before."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from architectures import save_pico
from conftest import make_model, make_tokenizer
from datasets import Dataset
from safetensors.torch import load_file
from test_exporting import TEXT, exported, quiet, read, task_of, train
from torch import nn
from transformers.pytorch_utils import Conv1D

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands import calibration_data as calibration_room
from sgm_finetune.commands import finetune as pipeline
from sgm_finetune.commands import requests
from sgm_finetune.measure.scan import scan
from sgm_finetune.model.architecture import auto_class
from sgm_finetune.results.export import ask_auto_round
from sgm_finetune.results.export.bnb_folder import quantised_share
from sgm_finetune.results.export.compressed_folder import calibration_rows
from sgm_finetune.results.export.merge import merged_tensors
from sgm_finetune.results.export.target import check_packages

SMALL = "adapter.alpha=4"
"""An update that does not make the matrices of a pico model much larger, and so their rounding."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory, source, llama_folder) -> list[str]:
    folder = tmp_path_factory.mktemp("llama")
    return train(llama_folder, "causal-lm", source, folder / "out", SMALL)


@pytest.fixture
def with_packages(monkeypatch):
    """What AutoRound would need is installed, as far as the command looks."""
    monkeypatch.setattr(requests, "check_packages", lambda *asked: None)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_folder_of_bitsandbytes_holds_its_rounding_of_the_merged_weights(name, source, reviews, tmp_path):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    task = task_of(name)
    data = reviews if task == "sequence-classification" else source
    where = train(save_pico(name, tmp_path / "m"), task, data, tmp_path / "out", SMALL)
    report = exported(where, "bnb-4bit", output=tmp_path / "b")
    assert report["stored_in"] == "nf4"
    assert report["by"] == "Transformers"
    model = auto_class(task).from_pretrained(tmp_path / "b", dtype=torch.float32)
    packed = linear_layers(model)
    tensors, skeleton = merged_tensors(read(where))
    whole = {tensor.model_name: tensor.read_rounded() for tensor in tensors}
    assert packed
    for layer, module in packed.items():
        weight = whole[f"{layer}.weight"]
        turned = isinstance(skeleton.get_submodule(layer), Conv1D)
        expected = dequantize_4bit(*quantize_4bit((weight.T if turned else weight).contiguous(), quant_type="nf4"))
        assert torch.equal(dequantize_4bit(module.weight.data, module.weight.quant_state), expected)
    others = {name for name, _ in model.named_parameters()} - {f"{layer}.weight" for layer in packed}
    assert all(torch.equal(model.get_parameter(name), whole[name]) for name in others & whole.keys())
    assert not any("classifier" in layer or "pooler" in layer or "lm_head" in layer for layer in packed)
    assert 0 < quantised_share(tensors, skeleton) < 1


def test_a_base_in_half_precision_keeps_its_type_beside_four_bits_and_is_scanned_again(source, tmp_path):
    make_model("causal-lm").bfloat16().save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    where = train(tmp_path / "m", "causal-lm", source, tmp_path / "out", SMALL, "model.dtype=float32")
    report = exported(where, "bnb-4bit", output=tmp_path / "b")
    assert report["computed_in"] == "float32"
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "b/model.safetensors").values()} == {
        "torch.bfloat16", "torch.uint8", "torch.float32",
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "README.md", "config.json", "export.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert len(scan(tmp_path / "b").matrices) == len(scan(tmp_path / "m").matrices)
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert config.get("use_cache", True)


def test_a_model_without_linear_layers_in_blocks_is_not_quantised():
    with pytest.raises(UserError, match="linear layers in blocks, and ModuleDict has none; take --to merged"):
        quantised_share(merged_like(), nn.ModuleDict())  # type: ignore[arg-type]


def merged_like():
    from sgm_finetune.results.export.merge import MergedTensor

    return [MergedTensor("a", "a", (2, 2), torch.float32, False, lambda: torch.zeros(2, 2))]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "this run has model.task=sequence-classification; take --to bnb-4bit"),
        ("gpt2", "`transformer.h.0.attn.c_attn` of GPT2LMHeadModel is none; take --to bnb-4bit or --to merged"),
        ("mixtral", "`model.layers.0.mlp.experts.gate_up_proj` of MixtralForCausalLM is none"),
    ],
)
def test_what_autoround_or_vllm_cannot_do_is_refused(name, message, source, reviews, with_packages, tmp_path):
    task = task_of(name)
    data = reviews if task == "sequence-classification" else source
    where = train(save_pico(name, tmp_path / "m"), task, data, tmp_path / "out", SMALL)
    with pytest.raises(UserError, match=message):
        exported(where, "compressed-tensors", output=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_without_training_data_nothing_is_calibrated(llama, with_packages, tmp_path, monkeypatch):
    def gone(*asked):
        raise UserError("data.train=gone.txt does not exist")

    monkeypatch.setattr(calibration_room, "prepare_trained", gone)
    with pytest.raises(UserError, match=r"calibrated on the run's training data.* cannot be read: data\.train=gone"):
        exported(llama, "compressed-tensors", output=tmp_path / "c")


def test_a_rounding_that_fails_leaves_nothing(llama, with_packages, tmp_path, monkeypatch):
    monkeypatch.setattr(ask_auto_round, "__file__", str(tmp_path / "none.py"))
    with pytest.raises(UserError, match=r"AutoRound cannot quantise this model: .*; nothing was kept"):
        exported(llama, "compressed-tensors", output=tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_said_with_what_installs_it(monkeypatch):
    found = importlib.util.find_spec
    absent = ("auto_round", "bitsandbytes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in absent else found(name, *more))
    with pytest.raises(UserError, match=r'needs AutoRound.*pip install -e "\.\[compressed-tensors\]"'):
        check_packages("compressed-tensors")
    with pytest.raises(UserError, match="needs bitsandbytes; pip install bitsandbytes, or take --to merged"):
        check_packages("bnb-4bit")


@pytest.mark.parametrize(
    ("number", "max_length", "shape"), [(3, 8, (1, 8)), (3, 4, (2, 4)), (9, 4, (8, 4)), (1, 99, (1, 3))]
)
def test_calibration_joins_examples_from_all_over_the_data_without_padding(number, max_length, shape):
    encoded = Dataset.from_dict({"input_ids": [[i] * (3 + i % 3) for i in range(11)]})
    rows = calibration_rows(encoded, number, max_length)
    assert tuple(rows.shape) == shape
    flat = rows.flatten().tolist()
    assert flat == sorted(flat)
    assert flat[0] == 0


@pytest.mark.slow
def test_a_folder_for_vllm_is_rounded_on_the_training_data_and_read_by_transformers_and_the_scan(
    llama_folder, source, tmp_path
):
    pytest.importorskip("auto_round")
    pytest.importorskip("compressed_tensors")
    where = train(llama_folder, "causal-lm", source, tmp_path / "out", SMALL)
    report = exported(where, "compressed-tensors", output=tmp_path / "c", calibration=16)
    assert report["stored_in"] == "int4"
    assert report["difference"] < report["tolerance"]
    described = json.loads((tmp_path / "c/config.json").read_text())["quantization_config"]
    weights = described["config_groups"]["group_0"]["weights"]
    group = weights["group_size"]
    assert (weights["num_bits"], weights["symmetric"]) == (4, True)
    assert described["ignore"] == ["lm_head"]
    stored = load_file(tmp_path / "c/model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    whole = {tensor.name: tensor.read_rounded() for tensor in merged_tensors(read(where))[0]}
    scale = stored[f"{name}.weight_scale"]
    rounded = unpacked(stored[f"{name}.weight_packed"], whole[f"{name}.weight"].shape) * scale.repeat_interleave(
        group, 1
    )
    assert float((rounded - whole[f"{name}.weight"]).norm() / whole[f"{name}.weight"].norm()) < 0.25
    assert torch.equal(stored["model.embed_tokens.weight"], whole["model.embed_tokens.weight"])
    assert len(scan(tmp_path / "c").matrices) == len(scan(llama_folder).matrices)


def unpacked(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Eight numbers of 4 bits in each int32, the lowest bits first, with 8 added to each."""
    numbers = torch.stack([(packed >> (4 * slot)) & 15 for slot in range(8)], 2).flatten(1)
    return numbers[:, : shape[1]].float() - 8


@pytest.mark.slow
def test_a_real_model_goes_both_ways_within_what_its_type_is_allowed(tmp_path):
    rows = [
        {"prompt": f"How far is mill {i}?", "completion": f" It is {3 * i + 7} leagues, by the old river road."}
        for i in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        "model.task=causal-lm", "model.dtype=float32", f"data.train={tmp_path / 'rows.jsonl'}", "data.max_length=48",
        "probe.num_batches=2", "training.max_steps=5", "training.batch_size=8", "evaluation.num_generated=0",
        f"output.dir={tmp_path / 'out'}",
    ]  # fmt: skip
    pipeline.finetune(load_config(None, overrides), quiet())
    where = overrides[-1:]
    formats = ["bnb-4bit"]
    if importlib.util.find_spec("auto_round") and importlib.util.find_spec("compressed_tensors"):
        formats.append("compressed-tensors")
    for to in formats:
        report = exported(where, to)
        assert report["validation"]["rise"]["mean"] < report["validation"]["allowed_rise"]
        assert report["bytes"] < 0.6 * 2 * 135e6
