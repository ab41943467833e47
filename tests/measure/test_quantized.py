"""Quantised checkpoints load as the float32 values that their bits encode, a few rows at a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import llama_config
from safetensors.torch import load_file, save_file

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line
from sgm_finetune.model.folder import SMOLLM2, packaged_file
from sgm_finetune.model.weights import tensors as weight_tensors
from sgm_finetune.model.weights.stored import StoredMatrix, stored_matrices

CHUNKS = [1, 100, 2**22]
"""Number of elements at a time: single rows, ranges that end inside blocks, the whole matrix."""


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(params=CHUNKS)
def _chunk(request, monkeypatch):
    monkeypatch.setattr(weight_tensors, "CHUNK", request.param)


def write(folder: Path, tensors: dict[str, torch.Tensor], **config) -> dict[str, StoredMatrix]:
    """Name -> matrix, from a folder with these tensors and this config."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return {matrix.name: matrix for matrix in stored_matrices(folder)}


def integers(*shape: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def check(matrix: StoredMatrix, expected: torch.Tensor, dtype: str) -> None:
    """Asserts values to the last digits of float32, the shape and the format."""
    loaded = matrix.load()
    assert (matrix.dtype, matrix.is_float, matrix.shape) == (dtype, False, tuple(expected.shape))
    assert (loaded.dtype, tuple(loaded.shape)) == (torch.float32, matrix.shape)
    torch.testing.assert_close(loaded, expected.float(), rtol=1e-6, atol=1e-7)


# bitsandbytes


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A pico LLaMA whose k and v are 36 columns wide, so that blocks of 64 span rows."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "llama"
    settings = {"hidden_size": 36, "intermediate_size": 70, "num_hidden_layers": 1, "num_attention_heads": 3}
    LlamaForCausalLM(llama_config(**settings, num_key_value_heads=1, head_dim=12)).save_pretrained(folder)
    return folder


def quantise_and_save(folder: Path, target: Path, **settings):
    """The model quantised by bitsandbytes, saved by Transformers."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(llm_int8_skip_modules=["lm_head"], **settings),
        dtype=torch.float32,
        device_map={"": torch.device("cpu")},
    )
    model.save_pretrained(target)
    return model


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.usefixtures("_chunk")
def test_a_4_bit_matrix_is_the_modules_own_dequantised_weight(llama, tmp_path, kind, double, storage):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    model = quantise_and_save(
        llama, tmp_path, load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
    )  # fmt: skip
    found = {matrix.name: matrix for matrix in stored_matrices(tmp_path)}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    assert len(layers) == 7
    assert set(found) == {"model.embed_tokens", *layers}
    for name, layer in layers.items():
        state = layer.weight.quant_state
        state.dtype = torch.float32
        expected = dequantize_4bit(layer.weight.data.view(torch.uint8), state).reshape(layer.out_features, -1)
        check(found[name], expected, kind)


@pytest.mark.usefixtures("_chunk")
def test_an_8_bit_matrix_is_the_modules_own_dequantised_weight(llama, tmp_path):
    from bitsandbytes.functional import int8_vectorwise_dequant
    from bitsandbytes.nn import Linear8bitLt

    model = quantise_and_save(llama, tmp_path, load_in_8bit=True)
    found = {matrix.name: matrix for matrix in stored_matrices(tmp_path)}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear8bitLt)}
    assert set(found) == {"model.embed_tokens", *layers}
    for name, layer in layers.items():
        weight = layer.weight
        check(found[name], int8_vectorwise_dequant(weight.data, weight.SCB), "int8")


def test_a_4_bit_gpt2_is_split_along_the_outputs_of_its_transposed_matrix(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=64, n_layer=1, n_head=2)).save_pretrained(tmp_path / "plain")
    quantise_and_save(tmp_path / "plain", tmp_path / "nf4", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    split = {m.name: m.load() for m in stored_matrices(tmp_path / "nf4")}
    whole = {m.name: m.load() for m in stored_matrices(tmp_path / "nf4", split_fused=False)}
    name = "transformer.h.0.attn.c_attn"
    assert whole[name].shape == (192, 64)
    for part, expected in zip("qkv", whole[name].chunk(3), strict=True):
        assert torch.equal(split[f"{name}[{part}]"], expected)
    plain = {m.name: m.load() for m in stored_matrices(tmp_path / "plain")}
    assert torch.corrcoef(torch.stack((plain[f"{name}[v]"].T.flatten(), split[f"{name}[v]"].flatten())))[0, 1] > 0.99


def test_companions_may_lie_in_another_shard(llama, tmp_path):
    quantise_and_save(llama, tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    expected = {m.name: m.load() for m in stored_matrices(tmp_path)}
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for number in (1, 2):
        part = {n: t for i, (n, t) in enumerate(tensors.items()) if i % 2 == number - 1}
        save_file(part, tmp_path / f"model-0000{number}-of-00002.safetensors")
    found = {m.name: m.load() for m in stored_matrices(tmp_path)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


# fp8, compressed-tensors


@pytest.mark.parametrize(
    ("name", "scale", "block"),
    [
        ("weight_scale", (), (140, 130)),
        ("weight_scale", (1,), (140, 130)),
        ("weight_scale", (140, 1), (1, 130)),
        ("weight_scale", (140,), (1, 130)),
        ("weight_scale", (1, 130), (140, 1)),
        ("weight_scale_inv", (2, 2), (128, 128)),
        ("weight_scale_inv", (3, 3), (64, 64)),
    ],
)
@pytest.mark.usefixtures("_chunk")
def test_fp8_values_times_their_scale(tmp_path, name, scale, block):
    """One scale for all, per row or column, or per block: 128 x 128 (the last ones smaller), or as config.json says."""
    weight, scales = normal(140, 130).to(torch.float8_e4m3fn), normal(*scale).abs() + 0.1
    grid = scales.reshape(scale if len(scale) == 2 else (-1, 1))
    expected = torch.empty(140, 130)
    for r in range(140):
        for c in range(130):
            expected[r, c] = weight[r, c].float() * grid[r // block[0], c // block[1]]
    method = {"quant_method": "fp8", **({"weight_block_size": [64, 64]} if block == (64, 64) else {})}
    found = write(
        tmp_path, {"h.0.fc.weight": weight, f"h.0.fc.{name}": scales}, quantization_config=method, model_type="llama"
    )
    check(found["h.0.fc"], expected, "fp8")


def test_fp8_blocks_where_the_size_is_no_multiple_but_divides_evenly(tmp_path):
    """192 rows in 2 blocks are blocks of 128 and 64, not of 96 and 96."""
    weight, scales = torch.ones(192, 128).to(torch.float8_e4m3fn), torch.tensor([[1.0], [2.0]])
    found = write(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scales})
    assert found["a"].load()[:, 0].tolist() == [1.0] * 128 + [2.0] * 64


@pytest.mark.parametrize("as_bytes", [False, True])
def test_fp8_scales_that_are_powers_of_two(tmp_path, as_bytes):
    weight, exponents = normal(4, 64).to(torch.float8_e4m3fn), torch.tensor([[126, 129]] * 4, dtype=torch.uint8)
    scale = exponents if as_bytes else exponents.view(torch.float8_e8m0fnu)
    found = write(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale})
    expected = weight.float() * torch.tensor([0.5] * 32 + [4.0] * 32)
    check(found["a"], expected, "fp8")


def test_each_fp8_expert_has_its_scales(tmp_path):
    weight, scales = normal(3, 8, 4).to(torch.float8_e4m3fn), torch.tensor([1.0, 2.0, 3.0])
    for shaped in (scales, scales.view(3, 1, 1), (torch.ones(3, 8, 1) * scales.view(3, 1, 1))):
        found = write(tmp_path, {"mlp.experts.down_proj": weight, "mlp.experts.down_proj_scale_inv": shaped})
        for expert in range(3):
            check(found[f"mlp.experts.down_proj[{expert}]"], weight[expert].float() * (expert + 1), "fp8")


@pytest.mark.parametrize("num_groups", [1, 4])
def test_compressed_int8_is_scaled_by_row_and_group(tmp_path, num_groups):
    weight = (integers(6, 32, bits=8) - 128).to(torch.int8)
    scale = normal(6, num_groups)
    found = write(tmp_path, {"a.weight": weight, "a.weight_scale": scale}, quantization_config={"quant_method": "x"})
    check(found["a"], weight.float() * scale.repeat_interleave(32 // num_groups, 1), "int8")


def pack(values: torch.Tensor, bits: int, dim: int, order=None) -> torch.Tensor:
    """A naive packer: small integers along `dim`, 32/bits to a word, one by one."""
    values = values if dim == 1 else values.T
    per_word = 32 // bits
    order = order or list(range(per_word))
    words = torch.zeros(values.shape[0], -(-values.shape[1] // per_word), dtype=torch.int64)
    for row in range(values.shape[0]):
        for col in range(values.shape[1]):
            place = order.index(col % per_word)
            words[row, col // per_word] |= int(values[row, col]) << (bits * place)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words if dim == 1 else words.T


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.usefixtures("_chunk")
def test_compressed_packed_integers(tmp_path, bits, reordered, asymmetric):
    o, i, g = 12, 36, 3
    values, scale = integers(o, i, bits=bits), normal(o, g)
    zero = integers(o, g, bits=bits) if asymmetric else torch.full((o, g), 2 ** (bits - 1))
    group = torch.arange(i) // 12
    tensors = {
        "a.weight_packed": pack(values, bits, 1), "a.weight_scale": scale, "a.weight_shape": torch.tensor([o, i])
    }  # fmt: skip
    if reordered:
        group = group[torch.randperm(i)]
        tensors["a.weight_g_idx"] = group.int()
    if asymmetric:
        tensors["a.weight_zero_point"] = pack(zero, bits, 0)
    found = write(tmp_path, tensors, quantization_config={"quant_method": "compressed-tensors"})
    check(found["a"], (values - zero[:, group]) * scale[:, group], f"int{bits}")


# GPTQ, AWQ


@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.usefixtures("_chunk")
def test_gptq(tmp_path, bits, reordered, version):
    """w = (q - z) scale of the input's group; files in the format `gptq` hold z - 1, which wraps around at z = 0."""
    i, o, g = 64, 48, 4
    values, zero, scale = integers(i, o, bits=bits), integers(g, o, bits=bits), normal(g, o).half()
    group = torch.arange(i) // 16
    group = group[torch.randperm(i)] if reordered else group
    stored = zero if version == "gptq_v2" else (zero - 1) % 2**bits
    tensors = {"h.0.q.qweight": pack(values, bits, 0), "h.0.q.qzeros": pack(stored, bits, 1), "h.0.q.scales": scale}
    if reordered:
        tensors["h.0.q.g_idx"] = group.int()
    method = {"quant_method": "gptq", "bits": bits} | ({"checkpoint_format": version} if version else {})
    found = write(tmp_path, tensors, quantization_config=method)
    assert list(found) == ["h.0.q"]
    assert found["h.0.q"].parameter == "h.0.q.weight"
    check(found["h.0.q"], ((values - zero[group]) * scale[group].float()).T, f"gptq-{bits}bit")


@pytest.mark.usefixtures("_chunk")
def test_awq(tmp_path):
    """The eight columns of a word have the order 0 2 4 6 1 3 5 7."""
    i, o, g = 64, 48, 4
    values, zero, scale = integers(i, o, bits=4), integers(g, o, bits=4), normal(g, o).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        "h.0.q.qweight": pack(values, 4, 1, order), "h.0.q.qzeros": pack(zero, 4, 1, order), "h.0.q.scales": scale
    }  # fmt: skip
    found = write(tmp_path, tensors, quantization_config={"quant_method": "awq", "bits": 4, "version": "gemm"})
    group = torch.arange(i) // 16
    check(found["h.0.q"], ((values - zero[group]) * scale[group].float()).T, "awq-4bit")


@pytest.mark.usefixtures("_chunk")
def test_a_fused_gptq_matrix_is_split(tmp_path):
    i, o = 16, 32
    tensors = {
        "l.0.qkv_proj.qweight": integers(i // 8, o, bits=30).int(),
        "l.0.qkv_proj.qzeros": integers(1, o // 8, bits=30).int(),
        "l.0.qkv_proj.scales": normal(1, o),
    }
    config = {"model_type": "phi3", "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    found = write(tmp_path, tensors, **config)
    whole = stored_matrices(tmp_path, split_fused=False)[0].load()
    assert [m.part for m in found.values()] == ["q", "k", "v"]
    assert torch.equal(torch.cat([m.load() for m in found.values()]), whole)


# mxfp4


@pytest.mark.usefixtures("_chunk")
def test_mxfp4_experts_are_those_that_transformers_dequantises(tmp_path):
    """The model holds the transpose. Its gate and up alternate: each has every other row of the file."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = integers(3, 24, 2, 16, bits=8).to(torch.uint8)
    scales = (120 + integers(3, 24, 2, bits=3)).to(torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = write(
        tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": normal(3, 24)},
        model_type="gpt_oss", hidden_size=64, quantization_config={"quant_method": "mxfp4"},
    )  # fmt: skip
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert list(found) == [f"{name}[{expert}.{part}]" for expert in range(3) for part in ("gate", "up")]
    for expert in range(3):
        check(found[f"{name}[{expert}.gate]"], expected[expert][:, ::2].T, "mxfp4")
        check(found[f"{name}[{expert}.up]"], expected[expert][:, 1::2].T, "mxfp4")
    whole = stored_matrices(tmp_path, split_fused=False)
    check(whole[1], expected[1].T, "mxfp4")


# GGUF

gguf = pytest.importorskip("gguf")

QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]


def write_gguf(file: Path, matrices: dict[str, tuple[np.ndarray, str]]) -> None:
    """Writes a GGUF file of name -> (values, type)."""
    writer = gguf.GGUFWriter(file, "llama")
    for name, (values, kind) in matrices.items():
        qtype = gguf.GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            writer.add_tensor(name, values.astype(np.float32 if kind == "F32" else np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def values_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.usefixtures("_chunk")
def test_a_gguf_matrix_is_what_the_gguf_package_dequantises(tmp_path, kind):
    values, qtype = values_of(6, 512), gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (values, kind), "output_norm.weight": (values[0], "F32")})
    (matrix,) = stored_matrices(tmp_path / "m.gguf")
    assert (matrix.name, matrix.parameter) == ("blk.0.attn_q", "blk.0.attn_q.weight")
    check(matrix, torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values, qtype), qtype)), kind)


@pytest.mark.parametrize(
    "kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "NVFP4"]
)
def test_gguf_types_that_only_llama_cpp_writes_are_read_too(tmp_path, kind):
    """Any bytes are some matrix, also with NaN scales; so the test compares bits."""
    qtype = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    raw = np.random.default_rng(1).integers(0, 48, (6, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", raw, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (matrix,) = stored_matrices(tmp_path)
    assert (matrix.shape, matrix.dtype) == ((6, 512), kind)
    assert torch.equal(matrix.load(), torch.from_numpy(gguf.quants.dequantize(raw, qtype)))


def test_floats_of_a_gguf_file_are_read_as_stored(tmp_path):
    values = values_of(3, 32)
    write_gguf(tmp_path / "m.gguf", {f"{kind}.weight": (values, kind) for kind in ("F32", "F16", "BF16")})
    found = {m.name: m for m in stored_matrices(tmp_path)}
    for kind, dtype in {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.items():
        assert found[kind].is_float
        assert found[kind].dtype == str(dtype).removeprefix("torch.")
        assert torch.equal(found[kind].load(), torch.from_numpy(values).to(dtype))


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_gguf_experts_are_listed_one_by_one(tmp_path, kind):
    values = values_of(3, 4, 32)
    write_gguf(
        tmp_path / "m.gguf", {"blk.0.ffn_gate_exps.weight": (values, kind), "blk.0.conv.weight": (values, "F32")}
    )
    found = {m.name: m for m in stored_matrices(tmp_path)}
    assert list(found) == [f"blk.0.ffn_gate_exps[{n}]" for n in range(3)]
    for n in range(3):
        loaded = found[f"blk.0.ffn_gate_exps[{n}]"].load()
        torch.testing.assert_close(loaded, torch.from_numpy(values[n]), atol=0.0 if kind == "F32" else 0.02, rtol=0)


def test_gguf_shards_are_one_model(tmp_path):
    values = values_of(4, 32)
    for number in (1, 2):
        write_gguf(tmp_path / f"m-0000{number}-of-00002.gguf", {f"blk.{number}.attn_q.weight": (values, "Q8_0")})
    assert [m.name for m in stored_matrices(tmp_path)] == ["blk.1.attn_q", "blk.2.attn_q"]
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(UserError, match=r"m-00001-of-00002\.gguf is missing"):
        stored_matrices(tmp_path)


def test_smollm2_from_gguf_is_what_the_gguf_package_dequantises():
    file = packaged_file(SMOLLM2)
    reader = gguf.GGUFReader(file)
    found = {m.parameter: m for m in stored_matrices(file)}
    assert len(found) == 211  # 30 layers of 7, and the embedding, which is tied to the head
    for name in ("blk.0.attn_q.weight", "blk.15.ffn_down.weight", "blk.29.attn_v.weight"):
        tensor = next(t for t in reader.tensors if t.name == name)
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        check(found[name], expected, "Q4_1")
        assert found[name].shape == tuple(reversed(tensor.shape.tolist()))


@pytest.mark.slow
def test_smollm2_from_gguf_is_what_transformers_loads():
    """llama.cpp reorders the rows of q and k for its rotary embedding, so the test compares v, up and down."""
    from transformers import AutoModelForCausalLM

    file = packaged_file(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    found = {
        m.name: m.load() for m in stored_matrices(file) if m.name in ("blk.3.attn_v", "blk.7.ffn_up", "blk.9.ffn_down")
    }
    layers = model.model.layers
    assert torch.equal(found["blk.3.attn_v"], layers[3].self_attn.v_proj.weight)
    assert torch.equal(found["blk.7.ffn_up"], layers[7].mlp.up_proj.weight)
    assert torch.equal(found["blk.9.ffn_down"], layers[9].mlp.down_proj.weight)


# A mistake that a person can fix gives one line that names it, before anything large is read.


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        stored_matrices(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 20, 200, -1])
def test_a_truncated_gguf_file_is_refused_by_name(tmp_path, kept):
    write_gguf(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (values_of(8, 64), "Q8_0")})
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:kept])
    assert "m.gguf is damaged or cut short" in refusal(tmp_path)


def test_a_foreign_gguf_file_is_refused_by_name(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(1000))
    assert "m.gguf is damaged or cut short (GGUF magic invalid)" in refusal(tmp_path / "m.gguf")


def test_two_gguf_models_in_a_folder_are_refused(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, {"blk.0.attn_q.weight": (values_of(4, 32), "Q8_0")})
    assert "several GGUF models (a.gguf, b.gguf)" in refusal(tmp_path)


def test_a_gguf_type_that_cannot_be_dequantised_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 292), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "stored as Q8_K" in refusal(tmp_path)


def test_without_the_gguf_package_its_install_command_is_named(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert install_line("gguf") in refusal(tmp_path)


BYTES, SIGNED, WORDS = (torch.ones(8, 8, dtype=dtype) for dtype in (torch.uint8, torch.int8, torch.int32))
FEW_BYTES, FEW_WORDS = torch.ones(3, dtype=torch.uint8), torch.ones(1, 1, dtype=torch.int32)
FP8 = torch.ones(8, 8).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "method", "parts"),
    [
        ({"a.weight": BYTES}, {"quant_method": "bitnet"}, ["uint8", "bitnet", "unquantised"]),
        ({"a.W_q": BYTES}, {"quant_method": "hqq"}, ["uint8", "hqq"]),
        ({"a.weight": SIGNED}, None, ["int8", "none named in config.json"]),
        ({"a.weight_packed": BYTES}, {"quant_method": "compressed-tensors"}, ["uint8", "compressed-tensors"]),
        ({"a.qweight": WORDS}, {"quant_method": "gptq"}, ["a.scales is missing"]),
        (
            {"a.qweight": WORDS, "a.scales": torch.ones(1, 9), "a.qzeros": FEW_WORDS},
            {"quant_method": "awq", "version": "gemv"},
            ["int32", "awq"],
        ),
        (
            {"a.qweight": WORDS[:, :4], "a.scales": torch.ones(1, 4), "a.qzeros": FEW_WORDS},
            {"quant_method": "gptq", "bits": 3},
            ["GPTQ of 3 bits"],
        ),
        ({"a.weight": FP8}, {"quant_method": "fp8"}, ["a.weight_scale is missing"]),
        (
            {"a.weight": FP8, "a.weight_scale_inv": torch.ones(3, 1)},
            {"quant_method": "fp8"},
            ["[3, 1] do not fit a matrix of 8 x 8"],
        ),
        ({"a.weight": SIGNED, "a.SCB": torch.ones(7)}, None, ["a.SCB has shape [7], expected [8]"]),
        ({"e.up_proj_blocks": BYTES.view(2, 1, 2, 16)}, None, ["e.up_proj_scales is missing"]),
        (
            {"a.weight": BYTES, "a.weight.quant_state.bitsandbytes__nf4": FEW_BYTES},
            {"quant_method": "bitsandbytes"},
            ["quant_state is unreadable"],
        ),
    ],
)
def test_an_unknown_format_is_refused_with_tensor_type_and_method(tmp_path, tensors, method, parts):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": method} if method else {}))
    message = refusal(tmp_path)
    for part in ["model.safetensors", next(iter(tensors)), *parts]:
        assert part in message


def test_a_group_number_beyond_the_scales_is_refused(tmp_path):
    tensors = {
        "a.qweight": torch.ones(1, 8, dtype=torch.int32), "a.qzeros": torch.ones(1, 1, dtype=torch.int32),
        "a.scales": torch.ones(1, 8), "a.g_idx": torch.full((8,), 5, dtype=torch.int32),
    }  # fmt: skip
    (matrix,) = write(tmp_path, tensors).values()
    with pytest.raises(UserError, match="is damaged or cut short"):
        matrix.load()


@pytest.mark.parametrize("name", ["h.0.attn.bias", "mask", "position_ids"])
def test_masks_and_index_buffers_of_a_quantised_model_are_left_alone(tmp_path, name):
    dtype = torch.int64 if name == "position_ids" else torch.uint8
    tensors = {name: torch.ones(8, 8, dtype=dtype), "a.weight": torch.ones(4, 4)}
    assert list(write(tmp_path, tensors, quantization_config={"quant_method": "bitsandbytes"})) == ["a"]


def test_loading_holds_the_result_and_small_chunks_only(tmp_path, monkeypatch):
    """For 8 million values it makes no float tensor larger than a chunk, except the result."""
    from torch.utils._python_dispatch import TorchDispatchMode

    weight, scale = torch.ones(2000, 4000, dtype=torch.int8), torch.ones(2000)
    (matrix,) = write(tmp_path, {"a.weight": weight, "a.SCB": scale}).values()
    monkeypatch.setattr(weight_tensors, "CHUNK", 2**16)
    large: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.is_floating_point() and made.numel() > 2**16:
                large.append(made.untyped_storage().data_ptr())
            return made

    with Watch():
        loaded = matrix.load()
    assert set(large) == {loaded.untyped_storage().data_ptr()}
