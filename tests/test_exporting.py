"""Exports: a merge equals PEFT's own, an export computes what was trained, and one that does not is not kept."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import shutil
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from architectures import DECODERS, ENCODER_DECODERS, save_pico
from conftest import WORDS, make_model, make_tokenizer
from datasets import Dataset
from made_up_runs import plain_plan
from markdown_it import MarkdownIt
from rich.console import Console
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from sgm_finetune.base.config import LabelKind, Task
from sgm_finetune.base.config_file import load_config, parse_config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line
from sgm_finetune.commands import finetune as pipeline
from sgm_finetune.commands import validation_data as validation_room
from sgm_finetune.commands.cli import run
from sgm_finetune.commands.export import ExportRequest, export_result
from sgm_finetune.measure.make_plan import make_plan
from sgm_finetune.measure.plan_file import plan_document
from sgm_finetune.measure.scan import scan
from sgm_finetune.model.architecture import auto_class
from sgm_finetune.model.as_trained import quantised_layers, round_as_trained
from sgm_finetune.model.load import Head, load_model
from sgm_finetune.results.evaluation import evaluate_model
from sgm_finetune.results.export import check, merge, validation
from sgm_finetune.results.export.card import model_card
from sgm_finetune.results.export.chat_format import CONVERSATIONS, find_format, modelfile
from sgm_finetune.results.export.cut import cut_result
from sgm_finetune.results.export.gguf_adapter import gguf_factors
from sgm_finetune.results.export.gguf_file import check_exportable, write_gguf
from sgm_finetune.results.export.gguf_tensors import gguf_tensors, reordering, rope_order, tensor_names
from sgm_finetune.results.export.gguf_vocabulary import read_vocabulary
from sgm_finetune.results.export.merge import layer_factors, linear_update, merged_tensors, stack_update
from sgm_finetune.results.export.shards import write_shards
from sgm_finetune.results.export.target import check_packages
from sgm_finetune.results.export.validation import choose_examples, most_tokens, paired_difference
from sgm_finetune.results.load import (
    Result,
    attach_adapter,
    attach_untrained,
    base_skeleton,
    load_unquantised,
    read_result,
    unquantised,
)
from sgm_finetune.results.pth import lora_config, save_pth
from sgm_finetune.results.stops import Stops
from sgm_finetune.train.adapters.apply import apply_plan, num_experts
from sgm_finetune.train.adapters.pool import plain_factors

ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""Largest relative error of one rounding to the type."""
SUM = 1e-6
"""Largest absolute error of a float32 product of pico factors, against float64."""
TEXT = "\n\n".join(
    f"the film was good {'very ' * (i % 9)}plot {'cast ' * (i // 9)}and the story " * 4 for i in range(60)
)


def needs_llama_cpp(test):
    """Marks a comparison with llama.cpp, which pip compiles: it is slow, and skipped where llama.cpp is absent."""
    absent = importlib.util.find_spec("llama_cpp") is None
    return pytest.mark.slow(pytest.mark.skipif(absent, reason=install_line("llama-cpp"))(test))


def quiet() -> Console:
    return Console(file=StringIO(), width=200)


@pytest.fixture(scope="module")
def data(tmp_path_factory, reviews) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT)
    pairs = [{"source": f"the film {'very ' * (i % 9)}", "target": f"good {'cast ' * (i // 9)}"} for i in range(80)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {
        "causal-lm": folder / "text.txt",
        "seq2seq-lm": folder / "pairs.jsonl",
        "sequence-classification": reviews,
    }


def task_of(name: str) -> Task:
    if name in DECODERS:
        return "causal-lm"
    return "seq2seq-lm" if name in ENCODER_DECODERS else "sequence-classification"


def train(model: Path, task: Task, source: Path, output: Path, *more: str) -> list[str]:
    """Writes a result as a run does, with random factors. Returns the override that names it."""
    settings = [f"model.name={model}", f"model.task={task}", f"data.train={source}", "data.max_length=32"]
    settings += ["merge.side=none", "adapter.rank=4", "data.num_validation=4", f"output.dir={output}", *more]
    config = load_config(None, settings)
    labels = ("bad", "good") if task == "sequence-classification" else ()
    kind: LabelKind | None = "class" if labels else None
    base, new = load_model(config.model, model, Head(labels, kind, make_tokenizer().pad_token_id))
    plan = make_plan(scan(model), None, config, base)
    adapted = apply_plan(base, plan, new)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_pth(output / "sgm_finetuned.pth", adapted, plan, config, labels, kind)
    scores = {"before": {"loss": 3.25}, "after": {"loss": 1.125}, "data": f"{source.name}: 60 train"}
    (output / "metrics.json").write_text(json.dumps(scores))
    return [f"output.dir={output}"]


def read(where: list[str]):
    return read_result(load_config(None, where), [], StepLog(quiet()))


def exported(where: list[str], to: str, **asked) -> dict:
    return export_result(load_config(None, where), where, ExportRequest(to, **asked), quiet())


@torch.no_grad()
def oracle(result) -> dict[str, torch.Tensor]:
    """Returns PEFT's own merge, in float64."""
    model = attach_adapter(load_unquantised(result, "float32"), result.content, result.path).double()
    return model.merge_and_unload().state_dict()


ARCHITECTURES = ["llama", "gpt2", "bert", "t5", "mixtral", "gpt_oss"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def finished(request, tmp_path_factory, data) -> list[str]:
    folder = tmp_path_factory.mktemp("finished")
    model = save_pico(request.param, folder / "model")
    return train(model, task_of(request.param), data[task_of(request.param)], folder / "out")


@pytest.fixture(scope="module")
def llama(tmp_path_factory, data, llama_folder) -> list[str]:
    return train(llama_folder, "causal-lm", data["causal-lm"], tmp_path_factory.mktemp("llama") / "out")


# merging


@pytest.fixture(scope="module")
def merged(finished, tmp_path_factory) -> tuple[Path, dict, str]:
    """A merged model's folder, what was measured, and what the command said."""
    folder, words = tmp_path_factory.mktemp("merged") / "m", Console(file=StringIO(), width=300)
    report = export_result(load_config(None, finished), finished, ExportRequest("merged", folder), words)
    return folder, report, words.file.getvalue()


def test_a_merged_model_is_that_of_peft(finished, merged):
    result = read(finished)
    tensors, _ = merged_tensors(result)
    expected = oracle(result)
    loaded = auto_class(result.config.model.task).from_pretrained(merged[0]).state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=ROUNDING[torch.float32], atol=SUM)
    assert sum(tensor.is_changed for tensor in tensors) >= 8


def test_the_adapter_of_every_architecture_loads_in_peft(finished, tmp_path):
    report = exported(finished, "adapter", output=tmp_path / "a")
    assert report["difference"] < 1e-6
    assert report["by"] == "PEFT"


# a smaller rank


def layer_updates(result) -> dict[str, torch.Tensor]:
    """Name of a matrix -> the updates of its experts, (experts, d_out, d_in), float64; a layer is one expert."""
    state = plain_factors(result.content["adapter"])
    model = attach_untrained(base_skeleton(result), result.content, result.path)
    return {
        name: stack_update(state[a].double(), state[b].double(), layer.scaling["default"], num_experts(layer), False)
        for name, (layer, (a, b)) in layer_factors(model, state, result.path).items()
    }


def test_a_cut_adapter_holds_the_largest_directions_of_every_layer_and_expert(finished):
    result = read(finished)
    whole, cut = layer_updates(result), cut_result(result, 2)
    found = layer_updates(cut.result)
    assert found.keys() == whole.keys()
    kept = norm = 0.0
    for name, update in whole.items():
        U, values, Vt = torch.linalg.svd(update, full_matrices=False)
        expected = (U[..., :2] * values[..., None, :2]) @ Vt[..., :2, :]
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
        kept, norm = kept + float(values[..., :2].square().sum()), norm + float(values.square().sum())
    assert cut.kept == pytest.approx(kept / norm)
    for name, update in layer_updates(cut_result(result, 4).result).items():
        torch.testing.assert_close(update, whole[name], rtol=1e-5, atol=1e-6)


def test_a_cut_adapter_says_what_it_costs_and_loads_with_whole_numbers(finished, tmp_path):
    where = finished
    words = Console(file=StringIO(), width=300)
    request = ExportRequest("adapter", tmp_path / "a", rank=2)
    report = export_result(load_config(None, where), where, request, words)
    cut = report["cut"]
    assert report["difference"] < 1e-5
    assert (cut["rank"], cut["rank_before"]) == (2, 4)
    assert cut["validation_loss"] != cut["validation_loss_before"]
    assert 0.5 < cut["kept"] < 1
    line = f"validation loss {cut['validation_loss_before']:.4f} -> {cut['validation_loss']:.4f} at rank 2 of 4 ("
    assert line in words.file.getvalue()
    assert json.loads((tmp_path / "a/export.json").read_text())["cut"] == cut
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 2)
    assert "cut to its best approximation of rank 2" in (tmp_path / "a/README.md").read_text()


def test_at_its_own_rank_a_cut_changes_no_logit_and_no_loss(llama, tmp_path):
    result = read(llama)
    before, after = (check.compute_reference(one, 1) for one in (result, cut_result(result, 4).result))
    torch.testing.assert_close(after.trained, before.trained, rtol=1e-5, atol=1e-5)
    cut = exported(llama, "adapter", output=tmp_path / "a", rank=4)["cut"]
    assert cut["validation_loss"] == pytest.approx(cut["validation_loss_before"], rel=1e-6)
    assert cut["kept"] == pytest.approx(1)


def test_no_adapter_is_cut_to_a_larger_rank_or_for_another_format(llama, tmp_path):
    with pytest.raises(UserError, match=r"--rank 5 is more than the rank 4 of this adapter; give --rank 4 or less"):
        exported(llama, "adapter", output=tmp_path / "a", rank=5)
    with pytest.raises(UserError, match=r"--rank 2 goes with --to adapter or --to gguf-adapter, not with --to merged"):
        run(["export", "--to", "merged", "--rank", "2", *llama])
    with pytest.raises(UserError, match="'--rank'"):
        run(["export", "--to", "adapter", "--rank", "0", *llama])


def test_a_factor_that_does_not_fit_or_is_not_finite_is_named(llama):
    result = read(llama)
    name = next(key for key in result.content["adapter"] if "lora_A" in key)
    for tensor, words in (
        (torch.zeros(3, 5), r"is \[3, 5\] instead of"),
        (torch.full((4, 64), torch.nan), "not finite"),
    ):
        content = {**result.content, "adapter": {**result.content["adapter"], name: tensor}}
        with pytest.raises(UserError, match=words):
            cut_result(dataclasses.replace(result, content=content), 2)


def test_an_update_is_scaled_and_transposed_as_the_layer_stores_it():
    A, B = torch.randn(3, 5), torch.randn(7, 3)
    torch.testing.assert_close(linear_update(A, B, 2.0, False), 2 * B @ A)
    torch.testing.assert_close(linear_update(A, B, 2.0, True), (2 * B @ A).T)


def test_a_stack_of_one_expert_is_a_layer():
    A, B = torch.randn(3, 5), torch.randn(7, 3)
    for transposed in (False, True):
        torch.testing.assert_close(stack_update(A, B, 0.5, 1, transposed)[0], linear_update(A, B, 0.5, transposed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sharded_base_is_merged_in_its_type_and_rounded_once(dtype, data, tmp_path):
    base = tmp_path / "base"
    make_model("causal-lm").to(dtype).save_pretrained(base, max_shard_size="64KB")
    make_tokenizer().save_pretrained(base)
    assert len(list(base.glob("*.safetensors"))) > 2
    where = train(base, "causal-lm", data["causal-lm"], tmp_path / "out")
    result = read(where)
    expected = oracle(result)
    report = exported(where, "merged", output=tmp_path / "m")
    written = {}
    for file in (tmp_path / "m").glob("*.safetensors"):
        written |= load_file(file)
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    for name, tensor in written.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=ROUNDING[dtype], atol=SUM)
    assert report["stored_in"] == str(dtype).removeprefix("torch.")


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory, data, llama_folder) -> list[str]:
    folder = tmp_path_factory.mktemp("four_bits")
    return train(llama_folder, "causal-lm", data["causal-lm"], folder / "out", "model.quantization=nf4")


@pytest.mark.parametrize("base", ["original", "trained"])
def test_what_was_trained_on_four_bits_is_merged_into_the_weights_asked_for(base, four_bits, llama_folder, tmp_path):
    report = exported(four_bits, "merged", output=tmp_path / "m", base=base)
    assert report["base"] == {"weights": base, "validation_loss": None}
    written = load_file(tmp_path / "m/model.safetensors")
    stored = load_file(llama_folder / "model.safetensors")
    expected = oracle(dataclasses.replace(read(four_bits), base_weights=base))
    for name, tensor in written.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=ROUNDING[torch.float32], atol=SUM)
    unchanged = [name for name in stored if torch.equal(stored[name], written[name])]
    assert "model.embed_tokens.weight" in unchanged
    assert not any("q_proj" in name for name in unchanged)


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_trained_weights_are_those_that_the_quantised_base_computes_with(name, quantisation, tmp_path):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    folder = save_pico(name, tmp_path / "model")
    where = [f"model.name={folder}", "model.task=causal-lm", f"model.quantization={quantisation}", "data.name=none"]
    config = load_config(None, where).model
    quantised, plain = (load_model(c, folder)[0] for c in (config, unquantised(config, "float32")))
    round_as_trained(plain, config)
    packed = {name: m for name, m in quantised.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}
    assert len(packed) >= 8
    assert packed.keys() == quantised_layers(plain).keys()
    for name, layer in packed.items():
        weight, found = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)), plain.get_submodule(name)
        assert torch.equal(weight.float(), found.weight.T if isinstance(found, Conv1D) else found.weight)


def test_without_a_choice_the_weights_that_predict_better_are_taken(four_bits, tmp_path):
    where, words = [*four_bits, "model.residence=disk"], Console(file=StringIO(), width=300)
    report = export_result(load_config(None, where), where, ExportRequest("merged", tmp_path / "m"), words)
    losses = report["base"]["validation_loss"]
    assert losses["trained"] != losses["original"]
    assert report["base"]["weights"] == min(losses, key=losses.__getitem__)
    assert report["validation"]["loss_trained"] == min(losses.values())
    assert all(f"{loss:.4f}" in words.file.getvalue() for loss in losses.values())


def test_without_data_the_original_weights_are_taken_and_that_is_said(four_bits, tmp_path, monkeypatch):
    words = Console(file=StringIO(), width=300)
    monkeypatch.setattr(validation_room, "prepare_trained", gone)
    report = export_result(load_config(None, four_bits), four_bits, ExportRequest("merged", tmp_path / "m"), words)
    assert report["base"] == {"weights": "original", "validation_loss": None}
    assert report["validation"] is None
    assert "the original weights are taken, since" in words.file.getvalue()


def gone(stored, log):
    raise UserError("No data file x.csv")


def test_a_base_of_its_own_type_has_no_other_weights(llama, tmp_path):
    with pytest.raises(UserError, match=r"--base trained is for a base that was quantised .*model.quantization=none"):
        exported(llama, "merged", output=tmp_path / "m", base="trained")
    with pytest.raises(
        UserError, match=r"--base trained goes with --to merged or --to bnb-4bit or .*, not with --to adapter"
    ):
        exported(llama, "adapter", output=tmp_path / "m", base="trained")


# the loss on validation data


def test_an_export_is_scored_beside_what_was_trained(finished, merged):
    folder, report, said = merged
    found = report["validation"]
    assert found["loss"] == pytest.approx(found["loss_trained"], rel=1e-5)
    assert found["num_examples"] == found["num_available"] > 1
    assert f"loss {found['loss']:.4f}, as trained {found['loss_trained']:.4f} (" in said
    result = read(finished)
    assert (found["accuracy"] is not None) == (result.config.model.task == "sequence-classification")
    data = validation_room.validation_data(result, (), 1, StepLog(quiet()))
    model = auto_class(result.config.model.task).from_pretrained(folder)
    metrics = evaluate_model(model, data.examples).metrics
    assert found["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert found["accuracy"] == metrics.get("accuracy")


def test_an_export_whose_loss_is_worse_is_not_kept(llama, tmp_path, monkeypatch):
    """Also where the logits of a few texts show nothing."""
    score, scored = check.score, []

    def worse(*arguments):
        scored.append(score(*arguments))
        losses = scored[-1].losses + 0.02 * scored[-1].counts * (len(scored) - 1)
        return dataclasses.replace(scored[-1], losses=losses)

    monkeypatch.setattr(check, "score", worse)
    with pytest.raises(UserError, match=r"predicts worse than what was trained: its loss on 8 of 8 validation examples "
                       r"is [\d.]+ instead of [\d.]+, worse by 0\.0200 ± .*; nothing was kept\. Try"):  # fmt: skip
        exported(llama, "merged", output=tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_result_whose_data_are_gone_is_exported_unscored(llama, tmp_path, monkeypatch):
    words = Console(file=StringIO(), width=300)
    monkeypatch.setattr(validation_room, "prepare_trained", gone)
    report = export_result(load_config(None, llama), llama, ExportRequest("adapter", tmp_path / "a", rank=2), words)
    assert report["validation"] is None
    assert report["cut"]["validation_loss"] is report["cut"]["validation_loss_before"] is None
    said = words.file.getvalue()
    assert "not scored, since the run's validation data cannot be read: No data file x.csv" in said
    assert re.search(r"rank 2 of 4 keeps [\d.]+% of the update's squared norm", said)
    assert "rank 2." in (tmp_path / "a/README.md").read_text()


def test_data_that_the_command_names_must_be_there(llama, tmp_path):
    where = [*llama, "data.train=gone.txt"]
    with pytest.raises(UserError, match=r"gone\.txt"):
        export_result(load_config(None, llama), where, ExportRequest("adapter", tmp_path / "a"), quiet())


def test_a_difference_counts_beyond_chance_and_beyond_what_is_allowed():
    counts = np.array([4, 8, 4, 8])
    noise = np.array([0.3, -0.3, 0.3, -0.3])
    same = paired_difference(noise, 0 * noise, counts)
    worse = paired_difference(0.5 * counts + noise, 0 * noise, counts)
    assert not same.exceeds(0.0)
    assert worse.mean == pytest.approx(0.5)
    assert worse.exceeds(0.1)
    assert not worse.exceeds(0.6)
    assert paired_difference(counts * float("nan"), 0 * noise, counts).exceeds(9.0)
    assert not paired_difference(counts[:1] + 9.0, 0.0 * counts[:1], counts[:1]).exceeds(0.1)  # one example: no noise


def test_a_paired_error_is_that_of_repeated_draws():
    """The standard error of a ratio of sums, against the spread of the ratio over many samples."""
    chooser = np.random.default_rng(0)
    counts = chooser.integers(1, 20, (2000, 64))
    first = counts * 0.2 + chooser.normal(size=counts.shape) * np.sqrt(counts)
    found = [paired_difference(a, 0 * a, n) for a, n in zip(first, counts, strict=True)]
    assert np.mean([one.standard_error for one in found]) == pytest.approx(np.std([o.mean for o in found]), rel=0.05)
    assert np.mean([one.exceeds(0.0) for one in found]) > 0.2
    assert np.mean([one.mean - one.margin > 0.2 for one in found]) == pytest.approx(0.025, abs=0.01)


@pytest.mark.parametrize(
    ("predicted", "truth", "task", "right"),
    [
        (1, 1, "sequence-classification", 1),
        ([1, 0], [1.0, 0.0], "sequence-classification", 1),
        ([1, 1], [1.0, 0.0], "sequence-classification", 0),
        (0.5, 0.5, "sequence-classification", None),
        ([3, 0, 2], [-100, 3, 1, -100, 2], "token-classification", 2),
        (None, [4, 5], "causal-lm", None),
    ],
)
def test_right_predictions_are_counted_where_a_task_has_some(predicted, truth, task, right):
    assert validation.num_right(predicted, truth, task) == right


def test_few_examples_are_chosen_from_all_over_the_data():
    many = Dataset.from_dict({"input_ids": [[7] * 10] * 1000, "at": list(range(1000))})
    assert choose_examples(many, 9999)["at"][:3] == [0, 7, 15]
    assert len(choose_examples(many, 9999)) == 128
    assert len(choose_examples(many, 640)) in range(56, 65)
    assert len(choose_examples(many, 3)) == 1


def test_a_larger_model_is_scored_on_fewer_tokens_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(validation, "has_gpu", lambda: False)
    assert [most_tokens(size) for size in (10**8, 8 * 10**9)] == [16_384, 1250]
    monkeypatch.setattr(validation, "has_gpu", lambda: True)
    assert most_tokens(8 * 10**9) == 16_384


def test_tied_embeddings_stay_tied(llama, tmp_path):
    exported(llama, "merged", output=tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m/model.safetensors")
    model = auto_class("causal-lm").from_pretrained(tmp_path / "m")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_pickled_base_is_merged_as_well(llama, llama_folder, tmp_path):
    base = shutil.copytree(llama_folder, tmp_path / "base")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    where = [*llama, f"model.name={base}"]
    export_result(load_config(None, where), where, ExportRequest("merged", tmp_path / "bin"), quiet())
    exported(llama, "merged", output=tmp_path / "m")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("bin", "m"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_no_more_than_one_shard_is_in_memory(llama, tmp_path, monkeypatch):
    tensors, _ = merged_tensors(read(llama))
    limit = max(tensor.num_bytes for tensor in tensors)
    held = []
    from sgm_finetune.results.export import shards

    save = shards.save_file
    monkeypatch.setattr(
        shards,
        "save_file",
        lambda shard, *rest: (held.append(sum(t.nbytes for t in shard.values())), save(shard, *rest)),
    )
    write_shards(tensors, tmp_path, limit)
    assert max(held) <= limit
    assert len(held) > 4
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {tensor.name for tensor in tensors}


def test_a_classifier_keeps_its_head_and_its_labels(data, bert_folder, tmp_path):
    source = data["sequence-classification"]
    where = train(bert_folder, "sequence-classification", source, tmp_path / "out")
    exported(where, "merged")
    model = auto_class("sequence-classification").from_pretrained(tmp_path / "out/export/merged")
    head = read(where).content["adapter"]["base_model.model.classifier.weight"]
    torch.testing.assert_close(model.classifier.weight.detach(), head, rtol=0, atol=0)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.problem_type == "single_label_classification"
    assert model.config.architectures == ["BertForSequenceClassification"]


# exports that are not kept


def spoiled(name: str, monkeypatch) -> None:
    if name == "an update that is left out":
        monkeypatch.setattr(merge, "add_update", lambda weight, update: weight)
    else:
        monkeypatch.setattr(merge, "add_update", lambda weight, update: weight - update)


@pytest.mark.parametrize("name", ["an update that is left out", "an update that is taken away"])
def test_an_export_that_computes_something_else_is_not_kept(name, llama, tmp_path, monkeypatch):
    spoiled(name, monkeypatch)
    with pytest.raises(UserError, match=r"does not compute what was trained: .* nothing was kept"):
        exported(llama, "merged", output=tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_stays_where_a_new_one_fails(llama, tmp_path, monkeypatch):
    exported(llama, "merged", output=tmp_path / "m")
    before = (tmp_path / "m/model.safetensors").read_bytes()
    monkeypatch.setattr(merge, "add_update", lambda weight, update: weight)
    where = [*llama, "output.overwrite=true"]
    with pytest.raises(UserError):
        export_result(load_config(None, where), where, ExportRequest("merged", tmp_path / "m"), quiet())
    assert (tmp_path / "m/model.safetensors").read_bytes() == before


def test_a_number_that_the_type_cannot_hold_stops_the_merge(llama):
    tensors, _ = merged_tensors(read(llama))
    tensor = next(t for t in tensors if t.is_changed)
    narrow = merge.MergedTensor(
        tensor.name, tensor.name, tensor.shape, torch.float16, True, lambda: tensor.read() * 1e9
    )
    with pytest.raises(UserError, match=rf"`{re.escape(tensor.name)}` is not finite as torch.float16"):
        narrow.read_rounded()


def test_a_comparison_sees_how_much_of_the_update_arrived():
    z0, effect = torch.randn(3, 5, 11), torch.randn(3, 5, 11)
    reference = check.ReferenceLogits(torch.zeros(3, 5, dtype=torch.long), z0 + effect, z0, "float32")
    whole, half = (check.compare_logits(z0 + share * effect, reference, "float32", "us") for share in (1.0, 0.4))
    assert whole.passes()
    assert (whole.difference, whole.top_agreement) == (pytest.approx(0, abs=1e-7), 1.0)
    assert whole.arrived == pytest.approx(1, rel=1e-6)
    assert half.arrived == pytest.approx(0.4, rel=1e-6)
    assert not half.passes()
    assert not check.compare_logits(torch.full_like(z0, float("nan")), reference, "float32", "us").passes()


# GGUF


def bpe_tokenizer(byte_fallback: bool = False, divides_digits: bool = True, adds_space: bool = True):
    """Returns a pico tokenizer that GGUF supports: byte-level BPE, or BPE with a fallback to bytes (which Llama 2 and
    Phi-3 have with a space before a text, and Gemma without)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    corpus = [" ".join(WORDS), TEXT, "It's 2023 and 1234, isn't it? " * 9]
    if byte_fallback:
        raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        before = [normalizers.Prepend("▁")] * adds_space
        raw.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
        raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*special, *alphabet], show_progress=False)
        raw.train_from_iterator([" " * (not adds_space) + word for line in corpus for word in line.split()], trainer)
        state = json.loads(raw.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
        raw = Tokenizer.from_str(json.dumps(state))
    else:
        raw = Tokenizer(models.BPE())
        steps = [pre_tokenizers.Digits(individual_digits=True)] * divides_digits
        raw.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        raw.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=384, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        raw.train_from_iterator(corpus, trainer)
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


LLAMA_3_ROPE = {
    "rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GGUF_MODELS: dict[str, dict] = {
    "llama": {},
    "llama, an output matrix of its own, biases": {"tie_word_embeddings": False, "attention_bias": True},
    "llama, positions as in Llama 3, wide heads": {"rope_parameters": LLAMA_3_ROPE, "head_dim": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}


def save_decoder(name: str, folder: Path, tokenizer=None, **more: int) -> Path:
    import transformers as hf

    kind = name.partition(",")[0]
    config = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config, "qwen3": hf.Qwen3Config}[kind]
    sizes = {
        "vocab_size": 448, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config(**{**sizes, **GGUF_MODELS[name], **more}))
    with torch.no_grad():
        for parameter in model.parameters():  # makes biases non-zero and norms unequal
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (tokenizer or bpe_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(GGUF_MODELS))
def decoder(request, tmp_path_factory, data) -> list[str]:
    folder = tmp_path_factory.mktemp("decoder")
    return train(save_decoder(request.param, folder / "m"), "causal-lm", data["causal-lm"], folder / "out")


@needs_llama_cpp
def test_llama_cpp_computes_what_was_trained(decoder, tmp_path):
    report = exported(decoder, "gguf", gguf_type="f32", output=tmp_path / "g")
    assert report["by"] == "llama.cpp"
    assert report["difference"] < 1e-5
    assert report["top_agreement"] == 1.0
    assert report["arrived"] == pytest.approx(1, abs=1e-4)
    assert {path.name for path in (tmp_path / "g").iterdir()} == {
        "model-f32.gguf", "Modelfile", "README.md", "export.json",
    }  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory, data) -> list[str]:
    folder = tmp_path_factory.mktemp("small")
    return train(save_decoder("llama", folder / "m"), "causal-lm", data["causal-lm"], folder / "out")


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_a_smaller_type_stays_within_its_tolerance(kind, small, tmp_path):
    report = exported(small, "gguf", gguf_type=kind, output=tmp_path / "g")
    assert 0 < report["difference"] < report["tolerance"]
    assert 0.9 < report["arrived"] < 1.1


@pytest.fixture(scope="module")
def wide(tmp_path_factory, data) -> list[str]:
    """Rows of 256 numbers, which is the size of a block of a k-quant."""
    folder = tmp_path_factory.mktemp("wide")
    model = save_decoder("llama", folder / "m", hidden_size=256, intermediate_size=256)
    return train(model, "causal-lm", data["causal-lm"], folder / "out")


@needs_llama_cpp
@pytest.mark.parametrize(("kind", "stored"), [("q6_k", "Q6_K"), ("q5_k_m", "Q5_K"), ("q4_k_m", "Q4_K")])
def test_a_k_quant_is_what_llama_cpp_s_quantiser_writes(kind, stored, wide, tmp_path):
    from gguf import GGUFReader

    report = exported(wide, "gguf", gguf_type=kind, output=tmp_path / "g")
    assert 1e-3 < report["difference"] < report["tolerance"]
    assert sorted(path.name for path in (tmp_path / "g").glob("*.gguf")) == [f"model-{kind}.gguf"]
    types = {
        tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "g" / f"model-{kind}.gguf").tensors
    }
    assert types["blk.0.attn_q.weight"] == stored


@needs_llama_cpp
def test_a_quantiser_that_fails_leaves_nothing(small, tmp_path, monkeypatch):
    from sgm_finetune.results.export import quantise_gguf

    monkeypatch.setattr(quantise_gguf, "__file__", str(tmp_path / "none.py"))
    with pytest.raises(UserError, match=r"llama\.cpp cannot write q4_k_m: .*; nothing was kept"):
        exported(small, "gguf", gguf_type="q4_k_m", output=tmp_path / "g")
    assert list(tmp_path.iterdir()) == []


def test_a_k_quant_without_llama_cpp_is_refused_before_the_result_is_loaded(small, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "llama_cpp" else find(name))
    with pytest.raises(UserError, match=r"--gguf-type q4_k_m needs llama\.cpp, whose quantiser writes it"):
        exported(small, "gguf", gguf_type="q4_k_m", output=tmp_path / "g")


@needs_llama_cpp
def test_a_sequence_that_llama_cpp_reads_in_pieces_has_the_same_loss_and_answer(small, tmp_path, monkeypatch):
    from sgm_finetune.results.export import ask_llama_cpp

    exported(small, "gguf", gguf_type="f32", output=tmp_path / "g")
    ids = torch.randint(3, 400, (200,)).tolist()
    asked = {
        "model": str(tmp_path / "g/model-f32.gguf"), "ids": [ids[:9]], "texts": [], "threads": 1,
        "prompts": [ids[:150]], "max_new_tokens": 4, "scored": [[ids, [-100] * 100 + ids[100:]], [ids[:3], ids[:3]]],
    }  # fmt: skip
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    found = []
    for piece in (512, 64):
        monkeypatch.setattr(ask_llama_cpp, "_PIECE", piece)
        ask_llama_cpp.main(tmp_path / "asked.json", tmp_path / f"{piece}.npz")
        found.append(np.load(tmp_path / f"{piece}.npz"))
    whole, pieces = found
    assert whole["counts"].tolist() == pieces["counts"].tolist() == [100, 2]
    np.testing.assert_allclose(pieces["losses"], whole["losses"], rtol=1e-5)
    assert pieces["answer.0"].tolist() == whole["answer.0"].tolist()


@needs_llama_cpp
def test_llama_cpp_adds_an_adapter_to_the_bases_own_file(decoder, tmp_path):
    report = exported(decoder, "gguf-adapter", output=tmp_path / "g")
    assert report["by"] == "llama.cpp"
    assert report["difference"] < 1e-5
    assert report["arrived"] == pytest.approx(1, abs=1e-4)
    assert report["validation"]["loss"] == pytest.approx(report["validation"]["loss_trained"], rel=1e-5)
    assert {path.name for path in (tmp_path / "g").iterdir()} == {"adapter-f32.gguf", "README.md", "export.json"}


@needs_llama_cpp
def test_a_cut_adapter_in_half_precision_runs_on_a_base_of_another_type(small, tmp_path):
    """The way of llama-cpp-python, over a base that another command wrote."""
    from llama_cpp import Llama

    exported(small, "gguf-adapter", gguf_type="f16", rank=2, output=tmp_path / "a")
    result = read(small)
    tensors, skeleton = merged_tensors(result, with_update=False)
    words = check_exportable(result, skeleton.config, "gguf")
    write_gguf(gguf_tensors(tensors, skeleton.config), skeleton.config, words, "f16", tmp_path / "base.gguf")
    ids = [5, 9, 30, 41, 7]
    settings = {"n_ctx": 64, "logits_all": True, "verbose": False, "n_gpu_layers": 0}
    model = Llama(str(tmp_path / "base.gguf"), lora_path=str(tmp_path / "a/adapter-f16.gguf"), **settings)
    model.eval(ids)
    found, cut = torch.tensor(model.scores[: len(ids)]), cut_result(result, 2).result
    model.close()
    trained = attach_adapter(load_unquantised(cut, "float32"), cut.content, cut.path)
    expected = check.compute_logits(trained, torch.tensor([ids]))[0]
    assert float((found - expected).norm() / expected.norm()) < check.TOLERANCES["float16"]


def test_the_factors_of_an_adapter_in_gguf_make_the_updates_of_the_merged_file(llama):
    result = read(llama)
    _, skeleton = merged_tensors(result)
    factors, alpha = gguf_factors(result, skeleton), lora_config(result.content).lora_alpha
    name_of = tensor_names(skeleton.config)
    updates = layer_updates(result)
    assert len(factors) == 2 * len(updates)
    for name, update in updates.items():
        A, B = (factors[f"{name_of(f'{name}.weight')}.lora_{which}"].double() for which in "ab")
        expected = reordering(f"{name}.weight", skeleton.config)(update[0])
        torch.testing.assert_close(alpha / len(A) * B @ A, expected, rtol=1e-5, atol=1e-6)
    assert "blk.0.attn_q.weight.lora_a" in factors


def test_an_adapter_in_gguf_is_refused_where_it_cannot_be_written(llama, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--gguf-type q8_0 is for whole models, .* take --gguf-type f16"):
        exported(llama, "gguf-adapter", gguf_type="q8_0", output=tmp_path / "g")
    result = read(llama)
    content = {**result.content, "adapter": {**result.content["adapter"], "base_model.model.x": torch.zeros(2)}}
    with pytest.raises(UserError, match=r"holds low-rank updates alone, and this run trained `base_model.model.x`"):
        gguf_factors(dataclasses.replace(result, content=content), merged_tensors(result)[1])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else object())
    with pytest.raises(UserError, match=r"--to gguf-adapter needs llama\.cpp, which alone can load and check it; .*"):
        exported(llama, "gguf-adapter", output=tmp_path / "g")


def test_without_llama_cpp_transformers_reads_the_file(small, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "llama_cpp" else find(name))
    report = exported(small, "gguf", gguf_type="f32", output=tmp_path / "g")
    assert report["by"] == "Transformers"
    assert report["difference"] < 1e-5


@pytest.mark.slow
def test_a_base_on_disk_makes_the_same_gguf_file(small, tmp_path, monkeypatch):
    monkeypatch.setenv("SGM_CACHE", str(tmp_path / "cache"))
    for place in ("device", "disk"):
        where = [*small, f"model.residence={place}", "model.dtype=bfloat16"]
        assert exported(where, "gguf", gguf_type="f16", output=tmp_path / place)["difference"] < 0.01
    one, other = (tmp_path / place / "model-f16.gguf" for place in ("device", "disk"))
    assert one.read_bytes() == other.read_bytes()


@needs_llama_cpp
def test_a_tokenizer_of_sentencepiece_s_kind_goes_the_same_way(data, tmp_path):
    model = save_decoder("llama", tmp_path / "m", bpe_tokenizer(byte_fallback=True))
    where = train(model, "causal-lm", data["causal-lm"], tmp_path / "out")
    report = exported(where, "gguf", gguf_type="f32")
    assert report["difference"] < 1e-5


@needs_llama_cpp
def test_a_tokenizer_that_llama_cpp_splits_differently_is_refused(data, tmp_path, monkeypatch):
    from sgm_finetune.results.export import gguf_vocabulary

    model = save_decoder("llama", tmp_path / "m", bpe_tokenizer(divides_digits=False))
    where = train(model, "causal-lm", data["causal-lm"], tmp_path / "out")
    monkeypatch.setattr(gguf_vocabulary, "_RULES", dict.fromkeys(gguf_vocabulary._RULES, "smollm"))
    with pytest.raises(UserError, match=r"llama\.cpp splits .*1,234.* into the tokens"):
        exported(where, "gguf", gguf_type="f32", output=tmp_path / "g")
    assert {path.name for path in tmp_path.iterdir()} == {"m", "out"}


def test_the_pre_tokenizer_s_name_is_found_in_the_tokenizer():
    assert read_vocabulary(bpe_tokenizer(), 448, Stops((2,))).pre == "smollm"
    assert read_vocabulary(bpe_tokenizer(divides_digits=False), 448, Stops((2,))).pre == "gpt-2"
    assert read_vocabulary(bpe_tokenizer(byte_fallback=True), 448, Stops((2,))).model == "llama"
    with pytest.raises(UserError, match=r"does not support this tokenizer \(WordLevel"):
        read_vocabulary(make_tokenizer(), 32, Stops())


def test_reordered_rows_are_a_permutation_of_each_head():
    rows = torch.arange(24.0)
    reordered = rope_order(rows, num_heads=3)
    for head in range(3):
        assert reordered[8 * head : 8 * head + 8].sort().values.tolist() == rows[8 * head : 8 * head + 8].tolist()
        assert reordered[8 * head : 8 * head + 2].tolist() == [8 * head, 8 * head + 4]


# Ollama

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "ChatML with a system message of its own": "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}" + CHATML,
    "Llama 3": "{{ '<s>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "Zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
}


def renderer(template: str):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = template
    return lambda messages, asks: tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=asks
    )


def go(template: str, messages) -> str:
    """Renders the part of Go's template language that our Modelfiles use."""
    words = re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL)
    begin, end = words.index("{{ range .Messages }}"), len(words) - 1 - words[::-1].index("{{ end }}")
    text = "".join(words[:begin])
    for message in messages:
        taken = False
        for word in words[begin + 1 : end]:
            if found := re.fullmatch(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', word):
                taken = found[1] == message["role"]
            elif word == "{{ end }}":
                taken = False
            elif taken:
                text += message["content"] if word == "{{ .Content }}" else word
    return text + "".join(words[end + 1 :])


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_ollamas_template_writes_what_the_tokenizers_does(name):
    render = renderer(TEMPLATES[name])
    found = find_format(render)
    assert found is not None
    for messages in CONVERSATIONS:
        given = list(messages)
        if found.default_system is not None and given[0]["role"] != "system":
            given.insert(0, {"role": "system", "content": found.default_system})  # as Ollama does with SYSTEM
        assert go(found.go_template(), given) == render(messages, True)


def test_a_template_without_a_counterpart_is_left_to_ollama():
    counted = "{% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}"
    assert find_format(renderer(counted)) is None
    assert modelfile("m.gguf", None, None, ["</s>"]) == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n'


def test_a_modelfile_stops_where_an_answer_ends():
    found = find_format(renderer(TEMPLATES["Llama 3"]))
    assert found is not None
    written = modelfile("m.gguf", found, "<s>", ["<|eot_id|>", "</s>", "<|eot_id|>"])
    assert written.splitlines()[-2:] == ['PARAMETER stop "<|eot_id|>"', 'PARAMETER stop "</s>"']
    assert 'TEMPLATE """{{ range' in written  # the runtime writes <s> itself


def test_a_system_message_of_the_template_is_ollamas():
    found = find_format(renderer(TEMPLATES["ChatML with a system message of its own"]))
    assert found is not None
    assert 'SYSTEM """You are helpful"""' in modelfile("m.gguf", found, None, [])


# the card, and the hub


def test_the_card_says_what_it_is_and_names_no_folder_of_this_machine(llama, tmp_path):
    exported(llama, "merged", output=tmp_path / "m")
    card = (tmp_path / "m/README.md").read_text()
    assert "| loss | 3.2500 | 1.1250 |" in card
    assert card.startswith("---\n")
    for word in ("library_name: transformers", "pico-llama", "text.txt", "AutoModelForCausalLM", "rank 4", "peft 0."):
        assert word in card
    assert str(tmp_path) not in card
    assert "/pico-llama" not in card


HOSTILE = "x`]\n\n# Mine\n<img src=a onerror=b> [here](c) <b>\x1b[31m"


@pytest.mark.parametrize("to", ["adapter", "merged", "bnb-4bit", "compressed-tensors", "gguf", "gguf-adapter"])
def test_a_card_shows_names_and_labels_of_files_as_they_are(to):
    """Without markup, HTML, links and headings: a reader's Markdown sees only ours."""
    values = {
        "model": {"name": f"/models/{HOSTILE}", "task": "sequence-classification"},
        "data": {"train": f"/data/{HOSTILE}"},
    }
    metrics = {
        "data": HOSTILE, "steps": 3, "optimizer": HOSTILE, "learning_rate": 0.1, "environment": {HOSTILE: HOSTILE},
        "after": {"loss": 1.0},
    }  # fmt: skip
    result = SimpleNamespace(
        config=parse_config(values, ""), metrics=metrics, labels=(HOSTILE, "b"), path=Path("a.pth"),
        content={"plan": plan_document(plain_plan())}, head=Head((HOSTILE, "b")), is_full=False,
    )  # fmt: skip
    measured = {"by": "Transformers", "num_positions": 1, "difference": 0.0, "top_agreement": 1.0}
    card = model_card(cast(Result, result), to, measured, {"gguf": "model-f16.gguf"})
    assert "\x1b" not in card
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    seen = [part for token in tokens for part in (token, *(token.children or []))]
    assert [token.type for token in seen if token.type.startswith(("html", "link", "image"))] == []
    assert sum(token.type == "heading_open" for token in seen) == 5
    shown = [token.content for token in seen if token.type == "code_inline"]
    assert sum("# Mine <img src=a onerror=b> [here](c) <b>" in text for text in shown) == 7
    if to == "adapter":
        (python,) = (token.content for token in seen if token.type == "fence")
        ast.parse(python)


def test_a_stop_text_makes_no_line_of_its_own_in_a_modelfile():
    stops = ["\nUser:", 'a"\nSYSTEM evil\n"', "a\\b", 'say "x"', '"""\nSYSTEM """evil"""', "\r\nFROM other", '""\n"']
    written = modelfile("m.gguf", None, None, stops)
    read = read_modelfile(written)
    assert read == [("model", "./m.gguf"), *(("stop", stop) for stop in stops if '"""' not in stop)]


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """The commands that Ollama's parser reads: a value ends with its line unless its quotes are still open."""
    commands, name, value = [], "", ""
    for line in re.split("(?<=[\r\n])", text):
        if not name:
            if not line.strip():
                continue
            name, line = line.split(" ", 1)
            if name == "PARAMETER":
                name, line = line.split(" ", 1)
        value += line
        found = value.strip()
        if found.startswith('"""'):
            found = found[3:-3] if len(found) >= 6 and found.endswith('"""') else None
        elif found.startswith('"'):
            found = found[1:-1] if len(found) >= 2 and found.endswith('"') else None
        if found is not None:
            commands.append((name.replace("FROM", "model"), found))
            name, value = "", ""
    assert not name
    return commands


class FakeHub:
    """The part of the hub's client that SGM calls."""

    def __init__(self):
        self.calls, self.error = [], None

    def __call__(self):
        return self

    def create_repo(self, name, private, exist_ok):
        self.calls.append(("create_repo", name, private, exist_ok))
        return f"https://hub/{name}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        if self.error is not None:
            raise self.error
        self.calls.append(("upload_folder", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


@pytest.fixture
def hub(monkeypatch) -> FakeHub:
    import huggingface_hub

    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return fake


def test_a_checked_export_is_uploaded_whole_and_private(llama, hub, tmp_path):
    report = exported(llama, "merged", output=tmp_path / "m", push_to_hub="me/mine")
    assert report["address"] == "https://hub/me/mine"
    assert hub.calls[0] == ("create_repo", "me/mine", True, True)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(hub.calls[1][2])


def test_what_fails_its_check_is_not_uploaded(llama, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "add_update", lambda weight, update: weight)
    with pytest.raises(UserError, match="nothing was kept"):
        exported(llama, "merged", output=tmp_path / "m", push_to_hub="me/mine")
    assert hub.calls == []


def test_an_upload_that_fails_leaves_the_folder_and_says_how_to_go_on(llama, hub, tmp_path):
    hub.error = OSError("the line is down")
    with pytest.raises(UserError, match=r"is complete, but could not be uploaded .* the line is down; .*hf upload"):
        exported(llama, "merged", output=tmp_path / "m", push_to_hub="me/mine")
    assert (tmp_path / "m/model.safetensors").is_file()


# the command


def test_the_command_prints_one_object_and_says_what_it_measured(llama, command):
    where = [*llama, "output.overwrite=true"]
    report = command("export", where, "--to", "merged")
    assert report["format"] == "merged"
    assert json.loads((Path(report["folder"]) / "export.json").read_text()).items() <= report.items()
    assert "same top token at 100%" in command.said
    again = command("export", where, "--to", "merged")
    assert again["difference"] == report["difference"]


def test_a_disk_without_room_is_found_before_anything_is_loaded(llama, tmp_path, monkeypatch):
    from sgm_finetune.commands import export as command

    monkeypatch.setattr(command, "disk_free", lambda folder: 1000)
    monkeypatch.setattr(command, "compute_reference", None)
    with pytest.raises(UserError, match=r"will take about .* MiB, and its disk has 0 MiB free"):
        exported(llama, "merged", output=tmp_path / "m")


@needs_llama_cpp
def test_a_real_model_goes_all_three_ways(tmp_path):
    rows = [
        {"prompt": f"How far is mill {i}?", "completion": f" It is {3 * i + 7} leagues, by the old river road."}
        for i in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        "model.task=causal-lm", "model.quantization=nf4", f"data.train={tmp_path / 'rows.jsonl'}", "data.max_length=48",
        "probe.num_batches=2", "training.max_steps=5", "training.batch_size=8", "evaluation.num_generated=0",
        f"output.dir={tmp_path / 'out'}",
    ]  # fmt: skip
    pipeline.finetune(load_config(None, overrides), quiet())
    where = overrides[-1:]
    reports = {to: exported(where, to) for to in ("adapter", "merged", "gguf-adapter")}
    for kind in ("f32", "f16", "q8_0"):
        reports[kind] = exported(where, "gguf", gguf_type=kind, output=tmp_path / kind)
    assert reports["adapter"]["difference"] < 1e-6
    assert reports["gguf-adapter"]["difference"] < 5e-3
    assert reports["f32"]["difference"] < 1e-4
    assert reports["f32"]["by"] == "llama.cpp"
    assert reports["merged"]["difference"] < 0.05
    assert min(report["top_agreement"] for report in reports.values()) > 0.9
    assert "<|im_end|>" in (tmp_path / "q8_0/Modelfile").read_text()


def test_a_missing_package_of_a_format_is_said_before_the_result_is_loaded(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else found(name, *more))
    check_packages("merged")
    with pytest.raises(UserError, match=r"--to gguf needs the package gguf; in the clone of SGM: pip install"):
        check_packages("gguf")
