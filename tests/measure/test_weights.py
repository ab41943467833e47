"""The weight matrices in a model's files: each one is listed once and loads as stored."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import save_file

from sgm_finetune.base.errors import UserError
from sgm_finetune.model.weights.stored import StoredMatrix, stored_matrices, weight_files


def listed(path: Path) -> list[str]:
    return [matrix.name for matrix in stored_matrices(path)]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (50, 16),
        "model.layers.0.self_attn.q_proj.weight": (16, 16),
        "model.layers.0.mlp.up_proj.weight": (40, 16),
        "model.layers.0.input_layernorm.weight": (16,),
        "model.layers.0.mlp.up_proj.bias": (40,),
        "model.layers.0.mlp.experts.up_proj": (3, 8, 16),
        "model.layers.0.mlp.experts.up_proj_bias": (3, 8),
        "model.layers.0.conv.weight": (16, 1, 4),
        "model.patch_embed.proj.weight": (16, 3, 2, 2),
        "model.rotary.table": (10, 4),
        "lm_head.weight": (50, 16),
    }
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


MATRICES = [
    "lm_head",
    "model.embed_tokens",
    "model.layers.0.mlp.experts.up_proj[0]",
    "model.layers.0.mlp.experts.up_proj[1]",
    "model.layers.0.mlp.experts.up_proj[2]",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.self_attn.q_proj",
]


def write(folder: Path, tensors: dict[str, torch.Tensor], kind: str) -> Path:
    """Saves the tensors in one of the ways in which models are published; returns the path to read."""
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "old bin":
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif kind == "shards":
        files = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
        placed = {name: files[i % 3] for i, name in enumerate(tensors)}
        for file in files:
            save_file({name: tensors[name] for name in placed if placed[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors" if kind == "file" else folder


@pytest.mark.parametrize("kind", ["folder", "file", "shards", "bin", "old bin"])
def test_matrices_are_two_dimensional_weights_and_experts_and_load_as_stored(tensors, tmp_path, kind):
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    found = stored_matrices(write(tmp_path, tensors, kind))
    assert sorted(m.name for m in found) == MATRICES
    for matrix in found:
        whole = tensors[matrix.parameter]
        expected = whole[int(matrix.part)] if matrix.part else whole
        loaded = matrix.load()
        assert torch.equal(loaded, expected)
        assert (loaded.dtype, tuple(loaded.shape), loaded.device.type) == (torch.bfloat16, matrix.shape, "cpu")
        assert (matrix.dtype, matrix.is_float) == ("bfloat16", True)


def test_a_matrix_is_named_after_its_parameter_and_part():
    matrix = StoredMatrix("h.0.attn.c_attn.weight", "q", (4, 4), Path("x"), "float32", lambda: torch.ones(4, 4))
    assert matrix.name == "h.0.attn.c_attn[q]"
    whole = StoredMatrix("lm_head.weight", None, (4, 4), Path("x"), "float32", lambda: torch.ones(4, 4))
    assert whole.name == "lm_head"


def test_loading_does_not_check_for_finite_values(tmp_path):
    """The scan checks them, in a pass that it makes anyway."""
    save_file({"a.weight": torch.full((2, 2), torch.nan)}, tmp_path / "model.safetensors")
    assert stored_matrices(tmp_path)[0].load().isnan().all()


# Tied embeddings are one matrix.


@pytest.mark.parametrize(
    "config",
    [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}],
)
def test_a_stored_head_that_the_config_ties_is_not_listed(tensors, tmp_path, config):
    write(tmp_path, tensors, "folder")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert sorted(listed(tmp_path)) == MATRICES[1:]
    assert sorted(listed(tmp_path / "model.safetensors")) == MATRICES[1:]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}},
    ],
)
def test_a_head_that_the_config_does_not_tie_is_listed(tensors, tmp_path, config):
    write(tmp_path, tensors, "folder")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert sorted(listed(tmp_path)) == MATRICES


def test_a_tied_head_of_another_shape_is_listed(tensors, tmp_path):
    tensors["lm_head.weight"] = torch.ones(7, 16)
    write(tmp_path, tensors, "folder")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert sorted(listed(tmp_path)) == MATRICES


@pytest.mark.parametrize("kind", ["bin", "old bin"])
def test_tensors_of_a_checkpoint_that_share_memory_are_one_matrix(tensors, tmp_path, kind):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write(tmp_path, tensors, kind)
    assert sorted(listed(tmp_path)) == MATRICES[1:]


def test_a_tied_model_saved_by_transformers_has_one_embedding(tmp_path):
    make_model("causal-lm", num_hidden_layers=1).save_pretrained(tmp_path)
    assert [name for name in listed(tmp_path) if "layers" not in name] == ["model.embed_tokens"]


# A mistake that a person can fix gives one line that names it.


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        stored_matrices(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_of_another_kind_and_a_missing_one_are_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "model.onnx is no .safetensors file" in refusal(tmp_path / "model.onnx")
    assert "nowhere" in refusal(tmp_path / "nowhere")
    assert "holds no weights" in refusal(tmp_path)


def test_a_damaged_config_is_refused(tensors, tmp_path):
    write(tmp_path, tensors, "folder")
    (tmp_path / "config.json").write_text("{")
    assert "config.json is damaged" in refusal(tmp_path)


@pytest.mark.parametrize("config", [[], {"text_config": 3, "quantization_config": [], "model_type": None}])
def test_a_config_of_odd_content_changes_nothing(tensors, tmp_path, config):
    write(tmp_path, tensors, "folder")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert sorted(listed(tmp_path)) == MATRICES


def test_safetensors_come_before_other_formats_in_a_folder(tensors, tmp_path):
    write(tmp_path, tensors, "folder")
    write(tmp_path, tensors, "bin")
    (tmp_path / "model.gguf").write_bytes(b"")
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]


def test_a_file_that_is_cut_short_after_its_header_was_read_is_refused_when_it_is_loaded(tensors, tmp_path):
    write(tmp_path, tensors, "folder")
    (matrix, *_) = stored_matrices(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut short"):
        matrix.load()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is measured as Linux tells it")
def test_reading_an_expert_does_not_read_the_others(tmp_path):
    """The test reads one of 8 experts of 4 MB; the rest of the file does not become resident."""
    save_file({"mlp.experts.up_proj": torch.ones(8, 1024, 1024)}, tmp_path / "model.safetensors")
    (matrix,) = [m for m in stored_matrices(tmp_path) if m.part == "3"]
    before = resident_bytes()
    loaded = matrix.load()
    assert loaded.sum() == 2**20
    assert resident_bytes() - before < 2 * loaded.nbytes
