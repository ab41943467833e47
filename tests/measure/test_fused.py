"""Parts of fused parameters: together they make up the parameter, and the model computes with each of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sgm_finetune.model.weights.fused import EXPERT_LAYOUTS, Cut, Layout, cuts
from sgm_finetune.model.weights.stored import StoredMatrix, stored_matrices

TOLERANCE = 1e-5  # for float32 products of 16 numbers


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def build(name: str, **config):
    """A tiny model `<name>Model` with random weights; biases are zero."""
    model_class = getattr(transformers, f"{name}Model")
    torch.manual_seed(3)
    described = model_class.config_class(**{"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, **config})
    described._attn_implementation = "eager"
    model = model_class(described).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 3 or key.endswith((".weight", "in_proj_weight")):
                parameter.normal_()
            elif key.endswith("bias"):
                parameter.zero_()
    return model


def saved(model, folder: Path, **settings) -> dict[str, StoredMatrix]:
    """Name -> matrix, from a folder into which the model is saved."""
    model.save_pretrained(folder, **settings)
    return {matrix.name: matrix for matrix in stored_matrices(folder)}


def parts_of(matrices: dict[str, StoredMatrix], parameter: str) -> dict[str, torch.Tensor]:
    """Part -> matrix, for the parameter of the first layer whose name contains `parameter`."""
    first = next(m.parameter for m in matrices.values() if parameter in m.parameter)
    return {str(m.part): m.load() for m in matrices.values() if m.parameter == first}


PLAIN = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 4}
MPT = {"d_model": 16, "n_layers": 1, "n_heads": 4}
FALCON = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": False, "parallel_attn": True}
GQA = {**PLAIN, "num_key_value_heads": 2, "pad_token_id": 0}
MOE = {**GQA, "head_dim": 4, "moe_intermediate_size": 24}

FUSED = {
    "GPT2": GPT2,
    "ImageGPT": GPT2,
    "OpenAIGPT": GPT2,
    "GPTBigCode": {**GPT2, "multi_query": True},
    "GPTBigCode per head": {**GPT2, "multi_query": False},
    "GPTNeoX": PLAIN,
    "Bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 4},
    "Persimmon": {**PLAIN, "pad_token_id": 0},
    "Falcon": {**FALCON, "multi_query": True, "new_decoder_architecture": False},
    "Falcon per head": {**FALCON, "multi_query": False, "new_decoder_architecture": False},
    "Falcon new decoder": {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
    "Phi3": GQA,
    "Glm4": {**GQA, "head_dim": 4},
    "Mpt": MPT,
    "ModernBert": {**PLAIN, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
    "CodeGen": {**GPT2, "rotary_dim": 4},
    "Dbrx": {
        **MPT,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": None, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "hidden_size": 16},
    },
    "Mixtral": {**MOE, "num_local_experts": 3},
    "Qwen3Moe": {**MOE, "num_experts": 3},
    "GptOss": {**MOE, "num_local_experts": 3},
    "GraniteMoe": {**GQA, "num_local_experts": 3},
}  # fmt: skip


def tiny(case: str):
    return build(case.split()[0], **FUSED[case])


@pytest.mark.parametrize("case", FUSED)
def test_the_parts_of_a_parameter_make_up_the_parameter(case: str, tmp_path: Path):
    """Their (random, so distinct) values are the same multiset; splitting changes no other parameter."""
    matrices = saved(tiny(case), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    whole = stored_matrices(tmp_path, split_fused=False)
    assert all(m.part is None or m.part.isdecimal() for m in whole)
    parameters = list(dict.fromkeys(m.parameter for m in matrices.values()))
    assert list(dict.fromkeys(m.parameter for m in whole)) == parameters
    assert len(matrices) > len(whole) or case in ("Mixtral", "Qwen3Moe")  # these files store each gate and up by itself
    for parameter in parameters:
        parts = [m for m in matrices.values() if m.parameter == parameter]
        assert all(tuple(m.load().shape) == m.shape for m in parts)
        values = torch.cat([m.load().flatten() for m in parts])
        assert torch.equal(values.sort().values, stored[parameter].flatten().sort().values)


@given(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 1), st.integers(1, 4))
def test_cuts_of_any_layout_are_a_partition(groups: int, lengths: list[int], axis: int, other: int):
    layout = Layout(tuple((str(n), length) for n, length in enumerate(lengths)), groups)
    shape = (layout.length, other) if axis == 0 else (other, layout.length)
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    taken = []
    for cut in layout.cuts(axis):
        assert tuple(cut.of(whole).shape) == cut.shape(shape)
        rows = torch.cat([whole[start:stop] for start, stop in cut.row_ranges(shape[0])])
        assert torch.equal(cut.of(whole), rows if axis == 0 else cut.of(rows))
        taken.append(cut.of(whole).flatten())
    assert torch.equal(torch.cat(taken).sort().values, whole.flatten())


# The parts are those that the model computes with.


def heads(states: torch.Tensor) -> torch.Tensor:
    """(1, heads, inputs, d) -> (heads d, inputs): the matrix, if the inputs were the rows of the identity."""
    return states[0].transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("case", ["Bloom", "Persimmon", "Falcon", "Falcon per head", "Falcon new decoder"])
def test_parts_are_what_the_models_own_function_splits(case: str, tmp_path: Path):
    """The fused product of the identity splits into the three matrices; Falcon repeats shared heads."""
    model = tiny(case)
    parts = parts_of(saved(model, tmp_path), "query_key_value")
    module = next(m for m in model.modules() if hasattr(m, "query_key_value"))
    fused = module.query_key_value(torch.eye(16)[None])
    split = [s.detach() for s in (module._reshape if case == "Bloom" else module._split_heads)(fused)]
    if case != "Bloom":
        split = [s.transpose(1, 2) for s in split]
    for part, states in zip(("q", "k", "v"), split, strict=True):
        matrix = heads(states)
        repeats = len(matrix) // len(parts[part])
        expected = parts[part].unflatten(0, (-1, 4)).repeat_interleave(repeats, 0).flatten(0, 1)
        torch.testing.assert_close(matrix, expected)


@pytest.mark.parametrize("case", ["GPT2", "GPTBigCode", "GPTBigCode per head", "GPTNeoX", "Phi3", "ModernBert"])
def test_parts_give_the_queries_keys_and_values_of_a_forward_pass(case: str, tmp_path: Path, monkeypatch):
    """They agree at the first position, where rotary embeddings change nothing."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny(case)
    seen: dict[str, torch.Tensor] = {}

    def spy(module, query, key, value, *args, **kwargs):
        seen.update(q=query, k=key, v=value)
        return torch.zeros(1, 1, 4, 4), None

    leaf = {"GPT2": "c_attn", "GPTBi": "c_attn", "GPTNe": "query_key_value", "Phi3": "qkv_proj", "Moder": "Wqkv"}[
        case[:5].split()[0]
    ]
    module = next(m for name, m in model.named_modules() if name.endswith(leaf))
    module.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "spy", spy)
    model.config._attn_implementation = "spy"
    with torch.no_grad():
        model(torch.tensor([[5]]), attention_mask=None)
    parts = parts_of(saved(model, tmp_path), leaf)
    if case == "GPT2":
        parts = {name: matrix.T for name, matrix in parts.items()}  # Conv1D
    for name, matrix in parts.items():
        torch.testing.assert_close(seen[name].flatten(), matrix @ seen["x"].flatten(), rtol=TOLERANCE, atol=TOLERANCE)


def test_parts_that_a_forward_pass_cuts_itself(tmp_path: Path):
    """MPT chunks; OpenAI's GPT splits columns; CodeGen has four blocks of q, v, k; DBRX splits by head counts."""
    for case, leaf in {"Mpt": "Wqkv", "OpenAIGPT": "c_attn", "CodeGen": "qkv_proj", "Dbrx": "Wqkv"}.items():
        model = tiny(case)
        matrices = saved(model, tmp_path / case)
        stored = next(p for name, p in model.named_parameters() if name.endswith(f"{leaf}.weight")).detach()
        q, k, v = (parts_of(matrices, leaf)[part] for part in "qkv")
        if case == "Mpt":
            expected = stored.chunk(3)
        elif case == "OpenAIGPT":
            expected = stored.split(16, dim=1)
        elif case == "Dbrx":
            expected = stored.split((16, 8, 8))
        else:
            blocks = stored.reshape(4, 12, 16)
            expected = (blocks[:, :4].flatten(0, 1), blocks[:, 8:].flatten(0, 1), blocks[:, 4:8].flatten(0, 1))
        assert all(torch.equal(part, other) for part, other in zip((q, k, v), expected, strict=True))


def activated(module, inputs: tuple, monkeypatch) -> torch.Tensor:
    """The module's gate: the input of its activation function (of the sigmoid for gpt-oss)."""
    seen: list[torch.Tensor] = []
    for name in ("act_fn", "activation_fn", "activation", "act"):
        function = getattr(module, name, None)
        if isinstance(function, torch.nn.Module):
            function.register_forward_pre_hook(lambda function, given: seen.append(given[0]))
    sigmoid = torch.sigmoid
    monkeypatch.setattr(torch, "sigmoid", lambda x: (seen.append(x), sigmoid(x))[1])
    with torch.no_grad():
        module(*inputs)
    return seen[0].flatten()


@pytest.mark.parametrize(("case", "leaf"), [("Phi3", "gate_up_proj"), ("Glm4", "gate_up_proj"), ("ModernBert", "Wi")])
def test_the_gate_is_what_goes_through_the_activation(case: str, leaf: str, tmp_path: Path, monkeypatch):
    model = tiny(case)
    x = torch.randn(1, 1, 16)
    module = next(m for m in model.modules() if hasattr(m, leaf))
    gate = activated(module, (x,), monkeypatch)
    parts = parts_of(saved(model, tmp_path), leaf)
    assert set(parts) == {"gate", "up"}
    torch.testing.assert_close(gate, parts["gate"] @ x.flatten(), rtol=TOLERANCE, atol=TOLERANCE)


def expert_inputs(expert: int):
    return torch.randn(1, 16), torch.tensor([[expert]]), torch.ones(1, 1)


@pytest.mark.parametrize("layout", ["as published", "as in memory"])
@pytest.mark.parametrize("case", ["Mixtral", "Qwen3Moe", "GptOss", "GraniteMoe"])
def test_every_expert_is_one_matrix(case: str, layout: str, tmp_path: Path, monkeypatch):
    """Gate and up of expert 2, from one stack or from files that store every expert by itself.

    gpt-oss alternates them, and clamps its gates at 7, so the inputs are small.
    """
    model = tiny(case)
    experts = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    x, index, weights = expert_inputs(2)
    gate = activated(experts, (0.1 * x, index, weights), monkeypatch)
    matrices = saved(model, tmp_path, save_original_format=layout == "as published")
    found = [m for m in matrices.values() if "experts" in m.name or "input_linear" in m.name]
    chosen = [
        m for m in found
        if m.part == "2.gate" or m.parameter.endswith(("experts.2.gate_proj.weight", "experts.2.w1.weight"))
    ]  # fmt: skip
    assert len(chosen) == 1
    matrix = chosen[0].load()
    matrix = matrix.T if case == "GptOss" else matrix
    expected = matrix @ (0.1 * x).flatten()
    if case == "GptOss":
        expected = expected.clamp(max=experts.limit) * experts.alpha
    torch.testing.assert_close(gate, expected, rtol=1e-4, atol=TOLERANCE)


def test_experts_of_a_stack_are_listed_one_by_one_also_without_splitting(tmp_path: Path):
    tiny("Mixtral").save_pretrained(tmp_path, save_original_format=False)
    names = [m.name for m in stored_matrices(tmp_path, split_fused=False) if "experts" in m.name]
    assert sorted(names) == sorted(
        f"layers.0.mlp.experts.{leaf}[{n}]" for leaf in ("gate_up_proj", "down_proj") for n in range(3)
    )
    split = {m.name: m for m in stored_matrices(tmp_path)}
    assert split["layers.0.mlp.experts.gate_up_proj[1.up]"].shape == (24, 16)
    assert split["layers.0.mlp.experts.down_proj[1]"].shape == (16, 24)


def test_experts_of_llama4_and_of_published_qwen3_vl_moe_are_columns():
    for model_type in ("llama4", "llama4_text", "qwen3_vl_moe"):
        found = cuts("mlp.experts.gate_up_proj", (16, 48), {"model_type": model_type, "hidden_size": 16}, expert=True)
        assert found == (Cut("gate", 1, 1, 0, 24), Cut("up", 1, 1, 24, 48))


def test_torchs_own_attention_needs_no_config(tmp_path: Path):
    attention = torch.nn.MultiheadAttention(8, 2)
    save_file({"attn." + k: v for k, v in attention.state_dict().items()}, tmp_path / "model.safetensors")
    found = {m.name: m for m in stored_matrices(tmp_path)}
    assert list(found) == [f"attn.in_proj_weight[{p}]" for p in "qkv"] + ["attn.out_proj"]
    for part, expected in zip("qkv", attention.in_proj_weight.detach().chunk(3), strict=True):
        assert torch.equal(found[f"attn.in_proj_weight[{part}]"].load(), expected)
    whole = stored_matrices(tmp_path, split_fused=False)
    assert [m.name for m in whole] == ["attn.in_proj_weight", "attn.out_proj"]


@pytest.mark.parametrize(
    "config", [None, {"model_type": "unheard_of", "n_embd": 4}, {"model_type": "gpt2", "n_embd": 5}]
)
def test_an_unknown_layout_is_one_matrix(config: dict | None, tmp_path: Path):
    """No config, another model type, or a matrix of another size (cross attention: k and v only)."""
    save_file({"h.0.attn.c_attn.weight": torch.randn(4, 12)}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert [m.name for m in stored_matrices(tmp_path)] == ["h.0.attn.c_attn"]
    assert cuts("h.0.crossattention.c_attn.weight", (12, 24), {"model_type": "gpt2", "n_embd": 12}) == ()


def test_the_text_model_of_a_multimodal_config_counts():
    config = {"model_type": "glm4v", "text_config": {"model_type": "glm4v_text", "hidden_size": 4}}
    assert [c.name for c in cuts("model.layers.0.mlp.gate_up_proj.weight", (6, 4), config)] == ["gate", "up"]


def test_a_transposed_conv1d_is_split_along_its_outputs():
    """bitsandbytes stores GPT-2 that way."""
    assert [c.axis for c in cuts("h.0.attn.c_attn.weight", (12, 4), {"model_type": "gpt2", "n_embd": 4})] == [0] * 3


@pytest.mark.parametrize(
    "model_type", [t for name, _, types in EXPERT_LAYOUTS if name == "gate_up_proj" for t in types.split()]
)
def test_the_table_of_experts_is_what_the_installed_modeling_files_say(model_type: str):
    """Every listed model cuts gate and up in halves; only gpt-oss alternates them."""
    source = (Path(transformers.__file__).parent / "models" / model_type / f"modeling_{model_type}.py").read_text()
    assert "self.gate_up_proj = nn.Parameter(" in source
    if model_type == "gpt_oss":
        assert "gate, up = gate_up[..., ::2], gate_up[..., 1::2]" in source
    else:
        halves = [line for line in source.splitlines() if ".chunk(2, dim=-1)" in line and "gate, up = " in line]
        assert halves
