"""The scan of a model's files: its numbers, its files, its refusals, its cache."""

from __future__ import annotations

import json
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import write_text
from sgm_finetune.measure.scan import batches_by_size, measured_singular_values, scan
from sgm_finetune.measure.scan_formats import axolotl_format, json_format, load_scan, spectrum_format
from sgm_finetune.method.decibels import NO_SIGNAL_DB
from sgm_finetune.method.singular_values import batched_singular_values, singular_values
from sgm_finetune.method.snr import signal_to_noise
from sgm_finetune.model.names import kind_of, layer_of
from sgm_finetune.model.weights.stored import weight_files

NUM_LAYERS = 11


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """The weights of a small LLaMA: eleven layers, so that layer 10 must come after layer 9."""
    draw = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    named = {"model.embed_tokens.weight": matrix(50, 16), "lm_head.weight": matrix(50, 16)}
    for layer in range(NUM_LAYERS):
        spike = (layer + 1) * matrix(16, 1) @ matrix(1, 16)
        named[f"model.layers.{layer}.self_attn.q_proj.weight"] = matrix(16, 16) + spike
        named[f"model.layers.{layer}.mlp.up_proj.weight"] = matrix(40, 16)
        named[f"model.layers.{layer}.mlp.up_proj.bias"] = matrix(40)
        named[f"model.layers.{layer}.input_layernorm.weight"] = matrix(16)
    return named


@pytest.fixture
def folder(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def shard(tensors: dict[str, torch.Tensor], folder: Path, count: int = 3) -> dict[str, str]:
    """Writes the tensors to `count` shards in turn; returns tensor name -> shard."""
    folder.mkdir(exist_ok=True)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    placed = {name: files[i % count] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in placed if placed[name] == file}, folder / file)
    return placed


def test_matrices_are_scanned_in_the_order_of_their_layers(folder: Path):
    found = scan(folder)
    assert [m.layer for m in found.matrices] == [None, None, *sorted([*range(NUM_LAYERS), *range(NUM_LAYERS)])]
    assert [m.kind for m in found.matrices[:4]] == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.*.mlp.up_proj",
        "model.layers.*.self_attn.q_proj",
    ]
    first = found.matrices[2]
    assert (first.name, first.parameter) == ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.weight")
    assert first.shape == (40, 16)
    assert found.seconds > 0


def test_a_scan_holds_the_statistics_of_each_matrix(folder: Path, tensors: dict[str, torch.Tensor]):
    for estimator in ("mp", "spectrum"):
        for matrix in scan(folder, estimator=estimator).matrices:
            weights = tensors[f"{matrix.name}.weight"]
            values = singular_values(weights)
            expected = signal_to_noise(values, *weights.shape, estimator)
            assert matrix.energy == pytest.approx(weights.double().square().sum().item(), rel=1e-6)
            got = (matrix.sigma, matrix.edge, matrix.signal_rank, matrix.snr, matrix.snr_db)
            assert got == (expected.sigma, expected.edge, expected.signal_rank, expected.snr, expected.snr_db)


def test_shards_files_and_checkpoints_of_one_model_scan_alike(
    folder: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
):
    plain = scan(folder).matrices
    assert scan(folder / "model.safetensors").matrices == plain
    placed = shard(tensors, tmp_path / "no_index")
    assert scan(tmp_path / "no_index").matrices == plain
    shard(tensors, tmp_path / "index")
    (tmp_path / "index" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert scan(tmp_path / "index").matrices == plain
    (tmp_path / "bin").mkdir()
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    assert scan(tmp_path / "bin").matrices == plain
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert scan(tmp_path / "bin").matrices == plain


def test_half_precision_is_scanned_by_its_stored_values(tensors: dict[str, torch.Tensor], tmp_path: Path):
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(rounded, tmp_path / "half.safetensors")
    save_file({name: tensor.float() for name, tensor in rounded.items()}, tmp_path / "full.safetensors")
    assert scan(tmp_path / "half.safetensors").matrices == scan(tmp_path / "full.safetensors").matrices


def test_names_restrict_the_scan(folder: Path):
    found = scan(folder, names=["lm_head", "model.layers.3.self_attn.q_proj"])
    assert [(m.name, m.layer, m.kind) for m in found.matrices] == [
        ("lm_head", None, "lm_head"),
        ("model.layers.3.self_attn.q_proj", 3, "model.layers.*.self_attn.q_proj"),
    ]
    with pytest.raises(UserError, match=r"did you mean model\.layers\.3\.self_attn\.q_proj"):
        scan(folder, names=["model.layers.3.self_attn.q_prj"])


def test_a_kind_has_no_number_of_the_name():
    assert kind_of("h.10.attn.c_attn") == "h.*.attn.c_attn"
    assert kind_of("encoder.block.2.layer.1.fc") == "encoder.block.*.layer.*.fc"
    assert (layer_of("encoder.block.2.layer.1.fc"), layer_of("layer2.fc")) == (2, None)


def test_pruned_units_are_neither_noise_nor_signal(tmp_path: Path):
    noise = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    pruned = torch.zeros(60, 40)
    pruned[3:51, 5:37] = noise
    save_file({"h.0.whole.weight": noise, "h.0.pruned.weight": pruned}, tmp_path / "model.safetensors")
    found, whole = scan(tmp_path).matrices
    assert (found.signal_rank, found.shape) == (0, (60, 40))
    assert found.sigma == pytest.approx(whole.sigma, rel=1e-12)


def test_progress_is_called_after_each_matrix(folder: Path):
    told: list[tuple[int, int, str]] = []
    found = scan(folder, progress=lambda done, total, name: told.append((done, total, name)))
    total = len(found.matrices)
    assert told == [(i + 1, total, matrix.name) for i, matrix in enumerate(found.matrices)]


def test_a_saved_scan_is_the_same_scan(folder: Path, tmp_path: Path):
    for estimator in ("mp", "spectrum"):
        found = scan(folder, estimator=estimator)
        path = tmp_path / "deep" / "scan.json"
        write_text(path, json_format(found))
        assert load_scan(path) == found
        assert [p.name for p in path.parent.iterdir()] == ["scan.json"]
        document = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))
        assert document == found.to_dict()
        assert set(document) == {"model", "estimator", "matrices"}


def test_an_infinite_ratio_is_null_in_json_and_comes_back(tmp_path: Path):
    save_file(
        {"h.0.fc.weight": torch.randn(8, 64, generator=torch.Generator().manual_seed(0))}, tmp_path / "m.safetensors"
    )
    found = scan(tmp_path, estimator="spectrum")
    assert math.isinf(found.matrices[0].snr)
    write_text(tmp_path / "scan.json", json_format(found))
    assert json.loads((tmp_path / "scan.json").read_text())["matrices"][0]["snr"] is None
    assert load_scan(tmp_path / "scan.json") == found
    assert json.loads(spectrum_format(found))["h.0.fc"]["snr"] == math.inf


def test_the_published_format_holds_ratio_and_kind_of_every_module(folder: Path):
    found = scan(folder, estimator="spectrum")
    document = json.loads(spectrum_format(found))
    assert document == {m.name: {"snr": m.snr, "type": m.kind} for m in found.matrices}


def test_the_axolotl_list_matches_the_top_of_each_kind_and_nothing_else(folder: Path, tensors: dict[str, torch.Tensor]):
    found = scan(folder)
    patterns = yaml.safe_load(axolotl_format(found, 0.25))["unfrozen_parameters"]
    matched = [name for name in tensors if any(re.match(pattern, name) for pattern in patterns)]
    assert len(matched) == len(patterns) == 2 * math.ceil(0.25 * NUM_LAYERS) + 2  # and the head and the embedding
    queries = {m.name: m.snr for m in found.matrices if "q_proj" in m.name}
    best = sorted(queries, key=lambda name: -queries[name])[:3]
    assert {f"{name}.weight" for name in best} == {name for name in matched if "q_proj" in name}
    assert "^model[.]layers[.]10[.]self_attn[.]q_proj[.]weight$" in patterns
    # Axolotl itself escapes every dot of an entry before it matches
    escaped = [pattern.replace(".", r"\.") for pattern in patterns]
    assert [n for n in tensors if any(re.match(pattern, n) for pattern in escaped)] == matched
    with pytest.raises(UserError, match=r"1\.5"):
        axolotl_format(found, 1.5)


# A mistake that a person can fix gives one line that names it.


def refusal(path: Path, **choices) -> str:
    with pytest.raises(UserError) as caught:
        scan(path, **choices)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_model_is_refused(tmp_path: Path):
    assert "nowhere" in refusal(tmp_path / "nowhere")


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert "no weights" in refusal(tmp_path)


def test_a_model_without_matrices_is_refused(tmp_path: Path):
    save_file({"norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    assert "nothing to scan" in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_a_truncated_file_is_refused_by_name(folder: Path, kept: int):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "model.safetensors is damaged or cut short" in refusal(folder)


def test_a_truncated_checkpoint_is_refused_by_name(tensors: dict[str, torch.Tensor], tmp_path: Path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors, file)
    file.write_bytes(file.read_bytes()[:-500])
    assert "pytorch_model.bin is damaged or cut short" in refusal(tmp_path)


def test_every_header_is_checked_before_the_first_matrix_is_read(tensors: dict[str, torch.Tensor], tmp_path: Path):
    shard(tensors, tmp_path)
    last = weight_files(tmp_path)[-1]
    last.write_bytes(last.read_bytes()[:-3])
    told: list[str] = []
    assert last.name in refusal(tmp_path, progress=lambda done, total, name: told.append(name))
    assert told == []


def test_a_missing_shard_is_refused_by_name(tensors: dict[str, torch.Tensor], tmp_path: Path):
    placed = shard(tensors, tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert "model-00002-of-00003.safetensors, which is missing" in refusal(tmp_path)


def test_an_index_that_its_shards_contradict_is_refused(tensors: dict[str, torch.Tensor], tmp_path: Path):
    placed = shard(tensors, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed | {"ghost.weight": "model-00001-of-00003.safetensors"}}))
    assert "ghost.weight" in refusal(tmp_path)
    index.write_text("{")
    assert "index.json is damaged" in refusal(tmp_path)


def test_two_models_in_one_folder_are_refused(tensors: dict[str, torch.Tensor], tmp_path: Path):
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    assert "a.safetensors and in b.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_weight_stops_the_scan_and_names_the_matrix(
    tensors: dict[str, torch.Tensor], tmp_path: Path, value: float
):
    tensors["model.layers.7.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, tmp_path / "model.safetensors")
    assert "model.layers.7.mlp.up_proj in" in refusal(tmp_path)
    assert "1 of 640 values" in refusal(tmp_path, fresh=True)
    assert len(scan(tmp_path, names=["lm_head"]).matrices) == 1


def test_a_quantised_matrix_is_refused_before_anything_is_read(tensors: dict[str, torch.Tensor], tmp_path: Path):
    tensors["model.layers.10.self_attn.q_proj.weight"] = torch.ones(16, 16, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    told: list[str] = []
    message = refusal(tmp_path, progress=lambda done, total, name: told.append(name))
    assert "model.layers.10.self_attn.q_proj.weight" in message
    assert "unquantised" in message
    assert told == []


def test_a_file_that_is_not_a_scan_is_refused(tmp_path: Path):
    for text in ("", "[]", '{"model": "m", "estimator": "mp"}', '{"model": "m", "estimator": "x", "matrices": []}'):
        (tmp_path / "scan.json").write_text(text)
        with pytest.raises(UserError, match="is no scan"):
            load_scan(tmp_path / "scan.json")
    with pytest.raises(UserError, match="Cannot read"):
        load_scan(tmp_path / "none.json")


# The cache, the control, interruptions.


def test_a_scan_resumes_where_it_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After an interruption at five matrices the second scan decomposes only what the first did not finish."""
    monkeypatch.setenv("SGM_CACHE", str(tmp_path / "cache"))
    calls: list[int] = []
    stopped = threading.Event()

    class OneWorker(ThreadPoolExecutor):
        """Maps in order, and records when it accepts no more matrices."""

        def __init__(self, workers: int, *rest):
            super().__init__(1, *rest)

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            stopped.set()
            super().shutdown(wait)

    def counted(matrices):
        calls.append(len(matrices))
        if len(calls) == 8:  # a worker may be far ahead of the thread that is interrupted
            assert stopped.wait(60)
        return batched_singular_values(matrices)

    def interrupt(done: int, total: int, name: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr("sgm_finetune.measure.scan.ThreadPoolExecutor", OneWorker)
    monkeypatch.setattr("sgm_finetune.measure.scan.batched_singular_values", counted)
    with pytest.raises(KeyboardInterrupt):
        scan(folder, progress=interrupt)
    assert 5 <= len(calls) <= 8  # started decompositions finish, and no other starts
    found = scan(folder)
    assert len(calls) == 2 * NUM_LAYERS + 2
    assert found == scan(folder)
    assert len(calls) == 2 * NUM_LAYERS + 2
    assert scan(folder, fresh=True) == found
    assert len(calls) == 2 * (2 * NUM_LAYERS + 2)


def test_a_changed_matrix_is_computed_again(folder: Path, tensors: dict[str, torch.Tensor]):
    before = scan(folder)
    tensors["model.layers.4.mlp.up_proj.weight"][0, 0] += 3
    save_file(tensors, folder / "model.safetensors")
    changed = [m.name for m, old in zip(scan(folder).matrices, before.matrices, strict=True) if m.energy != old.energy]
    assert changed == ["model.layers.4.mlp.up_proj"]


def test_a_cache_that_is_broken_or_cannot_be_written_is_not_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = tmp_path / "cache"
    monkeypatch.setenv("SGM_CACHE", str(cache))
    found = scan(folder)
    for file in cache.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:20])
    assert scan(folder) == found
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SGM_CACHE", str(blocked))
    assert scan(folder) == found


def test_shuffled_entries_have_no_signal(tmp_path: Path):
    draw = torch.Generator().manual_seed(3)
    spikes = torch.randn(96, 5, generator=draw) @ torch.randn(5, 64, generator=draw)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weights = (torch.randn(96, 64, generator=draw) + spikes).to(dtype)
        save_file({"h.0.fc.weight": weights}, tmp_path / "model.safetensors")
        (found,) = scan(tmp_path, control=True).matrices
        assert found.signal_rank == 5
        assert found.control is not None
        assert (found.control.signal_rank, found.control.snr_db) == (0, NO_SIGNAL_DB)
        assert scan(tmp_path).matrices[0].control is None


def test_the_singular_values_of_one_matrix(folder: Path, tensors: dict[str, torch.Tensor]):
    ((found, matrix),) = measured_singular_values(folder, ["model.layers.3.self_attn.q_proj"])
    assert matrix == next(m for m in scan(folder).matrices if m.name == matrix.name)
    direct = torch.linalg.svdvals(tensors["model.layers.3.self_attn.q_proj.weight"].double())
    assert torch.allclose(found.values, direct, rtol=1e-6)
    assert found.alive == (16, 16)


def test_the_number_of_threads_and_the_precision_of_products_are_left_alone(folder: Path, tensors, tmp_path: Path):
    save_file({name: t.bfloat16() for name, t in tensors.items()}, tmp_path / "half.safetensors")
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    scan(tmp_path / "half.safetensors", fresh=True)
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


def test_bfloat16_and_float32_matrices_of_one_file_keep_their_order(tensors: dict[str, torch.Tensor], tmp_path: Path):
    mixed = {name: t.bfloat16() if i % 2 else t for i, (name, t) in enumerate(tensors.items())}
    save_file(mixed, tmp_path / "model.safetensors")
    found = scan(tmp_path)
    assert [m.layer for m in found.matrices] == [None, None, *sorted([*range(NUM_LAYERS), *range(NUM_LAYERS)])]


def test_fused_matrices_are_scanned_in_parts_and_whole_by_the_published_formula(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=40, n_positions=16)).save_pretrained(tmp_path)
    found = scan(tmp_path)
    parts = [m for m in found.matrices if m.parameter.endswith("h.1.attn.c_attn.weight")]
    assert [(m.name.split(".")[-1], m.shape) for m in parts] == [(f"c_attn[{part}]", (32, 32)) for part in "kqv"]
    assert {m.kind.split("h.")[1] for m in parts} == {f"*.attn.c_attn[{part}]" for part in "kqv"}
    assert sum(m.name.endswith("lm_head") for m in found.matrices) == 0  # tied
    whole = [m for m in scan(tmp_path, estimator="spectrum").matrices if m.parameter.endswith("h.1.attn.c_attn.weight")]
    assert [m.shape for m in whole] == [(32, 96)]
    assert {m.name for m in scan(tmp_path, names=[parts[0].name.split("[")[0]]).matrices} == {m.name for m in parts}


def test_matrices_decomposed_together_have_the_numbers_that_they_have_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Batches as on a GPU: all matrices with equal smaller sides together."""
    alone = scan(folder)
    calls: list[int] = []

    def counted(matrices):
        calls.append(len(matrices))
        return batched_singular_values(matrices)

    monkeypatch.setattr("sgm_finetune.measure.scan.batched_singular_values", counted)
    monkeypatch.setattr(
        "sgm_finetune.measure.scan.batches_by_size", lambda m, device: batches_by_size(m, torch.device("cuda"))
    )
    together = scan(folder, fresh=True)
    assert calls == [2 * NUM_LAYERS + 2]
    for one, other in zip(alone.matrices, together.matrices, strict=True):
        assert (one.name, one.signal_rank) == (other.name, other.signal_rank)
        assert (one.sigma, one.snr) == pytest.approx((other.sigma, other.snr), rel=1e-9)


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds(tmp_path: Path):
    draw = torch.Generator().manual_seed(0)
    named = {f"h.{i}.fc.weight": torch.randn(1100, 1024 + 8 * (i % 2), generator=draw).bfloat16() for i in range(6)}
    save_file(named, tmp_path / "model.safetensors")
    for ours, theirs in zip(
        scan(tmp_path, fresh=True, device="cuda").matrices,
        scan(tmp_path, fresh=True, device="cpu").matrices,
        strict=True,
    ):
        assert ours.name == theirs.name
        assert ours.signal_rank == theirs.signal_rank
        assert ours.sigma == pytest.approx(theirs.sigma, rel=1e-4)
