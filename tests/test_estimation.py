"""What a run is predicted to need: parts that can be counted by hand, budgets that are kept, refusals."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from architectures import save_pico
from peft import LoraConfig, get_peft_model
from rich.console import Console

from sgm_finetune.base.config import Config
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import gib
from sgm_finetune.commands import finetune as pipeline
from sgm_finetune.commands import session
from sgm_finetune.commands.cli import main
from sgm_finetune.data.prepared import PreparedData, prepare_data
from sgm_finetune.model.load import Head, load_model, skeleton
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.model.residence.sizes import sizes_elsewhere
from sgm_finetune.model.stand_ins import stored_bytes
from sgm_finetune.train.budget.estimate import ALLOCATOR, estimate
from sgm_finetune.train.budget.fit import check_fits, fit
from sgm_finetune.train.budget.needs import Estimate
from sgm_finetune.train.budget.reading import ASSUMED_RATE, read_rate
from sgm_finetune.train.budget.reuse import replaced, reuse_fit
from sgm_finetune.train.budget.speed import Speed
from sgm_finetune.train.budget.table import describe_estimate
from sgm_finetune.train.budget.weights import count_weights

QUIET = StepLog(Console(quiet=True))


@pytest.fixture
def described(llama_folder: Path, reviews: Path, tmp_path: Path) -> list[str]:
    return [
        f"model.name={llama_folder}", f"data.train={reviews}", "data.max_length=24", "training.batch_size=16",
        "probe.num_batches=4", "probe.sketch_size=12", "adapter.rank=4", "training.max_steps=5",
        "training.eval_batch_size=8", f"output.dir={tmp_path / 'out'}",
    ]  # fmt: skip


def made(described: list[str], *more: str) -> tuple[Config, PreparedData]:
    config = load_config(None, [*described, *more])
    return config, prepare_data(config, QUIET)


def predicted(described: list[str], *more: str) -> Estimate:
    return estimate(*made(described, *more))


def test_weights_adapters_and_optimizer_are_what_the_run_holds(described) -> None:
    config, prepared = made(described, "merge.side=none", "training.optimizer=adamw")
    needed = estimate(config, prepared)
    model, new = load_model(config.model, prepared.folder, Head(prepared.splits.labels, pad_token_id=0))
    assert needed.weights_bytes == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    plain = get_peft_model(
        model, LoraConfig(r=4, target_modules=list(adaptable(model)), task_type="SEQ_CLS", modules_to_save=list(new))
    )
    trained = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    assert needed.trainable_parameters == trained
    assert needed.adapter_bytes == needed.gradient_bytes == 4 * trained
    assert needed.optimizer_bytes == 8 * trained
    assert needed.steps == 5
    assert needed.micro_batch_size == 16


@pytest.mark.slow
def test_what_costs_memory_is_predicted_to(described) -> None:
    least = predicted(described)
    assert predicted(described, "training.batch_size=32").activation_bytes > 1.8 * least.activation_bytes
    assert predicted(described, "training.checkpointing=true").activation_bytes < least.activation_bytes
    assert predicted(described, "training.step=peft").activation_bytes > least.activation_bytes
    assert predicted(described, "training.optimizer=adamw").optimizer_bytes > 1.5 * least.optimizer_bytes
    assert predicted(described, "training.optimizer=adamw_8bit").optimizer_bytes <= 2 * least.optimizer_bytes
    assert predicted(described, "merge.side=none").trainable_parameters > least.trainable_parameters
    assert predicted(described, "adapter.rank=8").trainable_parameters > 1.5 * least.trainable_parameters
    upper = ("selection.top_fraction=0.25", "selection.by=depth")
    spread = predicted(described, upper[0])
    assert predicted(described, *upper).activation_bytes < spread.activation_bytes
    assert predicted(described, *upper).trainable_parameters <= spread.trainable_parameters


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_skeleton_weighs_what_bitsandbytes_holds(described, quantization) -> None:
    config, prepared = made(described, f"model.quantization={quantization}")
    labels = prepared.splits.labels
    hollow = skeleton(config.model, prepared.folder, Head(labels, pad_token_id=0))
    model, _ = load_model(config.model, prepared.folder, Head(labels, pad_token_id=0))
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        held += 4 * state.absmax.numel() if state is not None else 0
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        held += 4 * scales.numel() if isinstance(scales, torch.Tensor) else 0
    assert stored_bytes(hollow) == pytest.approx(held, rel=0.01)
    assert estimate(config, prepared).weights_bytes == stored_bytes(hollow)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's prediction has no allocator's share")
@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_is_dropped_in_a_step_leaves_holes_of_its_own_size(described, monkeypatch, checkpointing: bool) -> None:
    """The dequantised weights of the base, whatever is adapted, and the products of gated MLPs; with checkpointing the
    weights of one block."""
    monkeypatch.setitem(ALLOCATOR, "step", 0.0)
    settings = ("model.quantization=nf4", "model.dtype=float32", f"training.checkpointing={str(checkpointing).lower()}")
    config, prepared = made(described, *settings)
    needed = estimate(config, prepared)
    base = adaptable(skeleton(config.model, prepared.folder, Head(prepared.splits.labels, pad_token_id=0)))
    held = needed.process_bytes + needed.weights_bytes + needed.adapter_bytes + needed.optimizer_bytes
    widths = sum(matrix.shape[0] for name, matrix in base.items() if name.endswith("gate_proj"))
    padded = -(-needed.longest // 8) * 8
    products = 0 if checkpointing else widths * needed.micro_batch_size * padded
    weights = sum(m.shape[0] * m.shape[1] for n, m in base.items() if not checkpointing or ".layers.0." in n)
    assert needed.phases["step"] - held == 4 * (weights + products)


@pytest.mark.slow
def test_a_budget_changes_the_least_costly_first_and_is_kept(described, monkeypatch) -> None:
    monkeypatch.setattr("sgm_finetune.train.budget.estimate.held_memory", lambda: 0)  # differs at every call
    batches = ("training.batch_size=32", "training.eval_batch_size=64", "data.max_length=24")
    config, prepared = made(described, *batches, "merge.side=none")
    whole = estimate(config, prepared)
    floor = whole.process_bytes + whole.weights_bytes
    assert fit(config, prepared, 2 * whole.peak_bytes).given_up == ()
    seen: list[str] = []
    for share in (0.3, 0.1, 0.05, 0.03):
        budget = floor + int(share * (whole.firm_bytes - floor))
        try:
            fitted = fit(config, prepared, budget)
        except UserError:
            break
        assert fitted.estimate.firm_bytes <= budget
        assert fitted.config.training.batch_size == 32
        seen = [line.partition("=")[0] for line in fitted.given_up]
        if "adapter.rank" in seen:  # comes after what costs no quality
            assert "training.checkpointing" in seen
        if "training.checkpointing" in seen:
            assert fitted.config.training.micro_batch_size == 1
    assert {"training.micro_batch_size", "training.eval_batch_size", "training.checkpointing"} <= set(seen)


def test_of_a_base_on_disk_a_block_and_pages_of_output_layer_or_embeddings_count(described) -> None:
    config, prepared = made(described, "model.dtype=bfloat16", "merge.side=none")
    followed: dict = {}
    resident = estimate(config, prepared, cache=followed)
    disk = estimate(replaced(config, "model", residence="disk"), prepared, cache=followed)
    sizes = sizes_elsewhere(skeleton(config.model, prepared.folder, prepared.head), "disk")
    assert resident.weights_bytes - disk.weights_bytes == sizes.total - disk.mapped_bytes > 0
    assert disk.mapped_bytes == sizes.largest_block + sizes.embeddings  # they are small
    assert disk.store_bytes == sizes.total  # the files are float32
    assert resident.mapped_bytes == resident.store_bytes == 0
    for settings, store in (("model.dtype=auto",), 0), (("model.dtype=float32", "model.quantization=nf4"), 1):
        config, _ = made(described, *settings)
        counted = count_weights(config, prepared, skeleton(config.model, prepared.folder, prepared.head), {}, 1, True)
        assert counted.block == counted.output == counted.store == 0
        config = replaced(config, "model", residence="disk")
        empty = skeleton(config.model, prepared.folder, prepared.head)
        counted = count_weights(config, prepared, empty, {}, 1, True)
        assert counted.held > counted.block > 0
        assert (
            counted.store == store * sizes_elsewhere(empty, "disk").blocks
        )  # the files' own embeddings compute as they are


def test_of_an_output_layer_on_disk_a_slice_counts_where_the_loss_is_computed_in_parts(described, monkeypatch) -> None:
    monkeypatch.setattr("sgm_finetune.train.budget.weights.SLICE", {"cpu": 8})
    config, prepared = made(described, "model.residence=disk", "model.task=causal-lm")
    empty = skeleton(config.model, prepared.folder, prepared.head)
    slices, whole = (count_weights(config, prepared, empty, {}, 1, in_parts) for in_parts in (True, False))
    assert sizes_elsewhere(empty, "disk").is_tied
    assert slices.output == slices.output_layer * 8 // empty.config.vocab_size < whole.output == whole.output_layer


def test_a_base_that_does_not_stay_in_memory_is_read_in_every_step(described, monkeypatch) -> None:
    reading = "sgm_finetune.train.budget.reading"
    monkeypatch.setattr(f"{reading}.read_rate", lambda folder: 1000.0)
    settings = ("model.residence=disk", "model.task=causal-lm", "merge.side=none", "training.micro_batch_size=4")
    config, prepared = made(described, *settings)
    cache: dict = {}
    kept = estimate(config, prepared, cache=cache)
    assert kept.read_bytes == 0
    monkeypatch.setattr(f"{reading}.memory_within_reach", lambda: kept.process_bytes)
    read = estimate(config, prepared, cache=cache)
    sizes = sizes_elsewhere(skeleton(config.model, prepared.folder, prepared.head), "disk")
    assert read.read_bytes == config.training.batch_size // 4 * (2 * sizes.blocks + 2 * sizes.output_layer)
    assert read.seconds["train"] >= read.steps * read.read_bytes / 1000 > kept.seconds["train"]
    assert read.seconds["evaluate"] > kept.seconds["evaluate"]
    assert f"a step reads {gib(read.read_bytes)} of base from the disk" in describe_estimate(read, 2**30)
    assert estimate(replaced(config, "model", residence="device"), prepared, cache=cache).read_bytes == 0


def test_the_speed_of_a_disk_is_measured_past_the_systems_cache(tmp_path, monkeypatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(2**24))
    assert read_rate(tmp_path) > 0
    monkeypatch.setattr(os, "preadv", refuse_to_read)
    read_rate.cache_clear()
    assert read_rate(tmp_path) == ASSUMED_RATE
    assert read_rate(tmp_path / "nowhere") == ASSUMED_RATE
    read_rate.cache_clear()


def refuse_to_read(*_: object) -> int:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.mark.slow
def test_the_base_goes_to_the_disk_where_the_weights_are_more_than_the_budget(described, monkeypatch) -> None:
    monkeypatch.setattr("sgm_finetune.train.budget.estimate.held_memory", lambda: 0)
    config, prepared = made(described, "model.dtype=bfloat16", "adapter.rank=2", "merge.side=none")
    resident = estimate(config, prepared)
    too_little = resident.process_bytes + resident.weights_bytes - 1
    fitted = fit(config, prepared, too_little)
    assert "model.residence=disk (was null)" in fitted.given_up
    assert fitted.estimate.firm_bytes <= too_little


@pytest.fixture
def as_with_a_gpu(monkeypatch) -> None:
    for name, value in {
        "torch.cuda.is_available": lambda: True, "torch.cuda.get_device_name": lambda: "a GPU",
        "torch.cuda.empty_cache": lambda: None,
        "sgm_finetune.train.budget.estimate.measure_speed": lambda *_: Speed(1e12, 1e11),
        "sgm_finetune.train.budget.reading.copy_rate": lambda: 1e5,
    }.items():  # fmt: skip
        monkeypatch.setattr(name, value)


def test_of_a_base_in_the_hosts_memory_two_blocks_and_slices_of_the_output_layer_count(
    described, as_with_a_gpu, monkeypatch
):
    config, prepared = made(described, "model.task=causal-lm", "merge.side=none", "training.checkpointing=true")
    resident = estimate(config, prepared)
    host_config, _ = made(described, "model.task=causal-lm", "merge.side=none", "model.residence=host")
    assert host_config.training.checkpointing is True
    host = estimate(host_config, prepared)
    sizes = sizes_elsewhere(skeleton(config.model, prepared.folder, prepared.head), "host")
    assert host.host_bytes == sizes.total > 0
    on_gpu = 2 * sizes.largest_block + sizes.output_layer  # two slices would be larger than all of it
    assert resident.weights_bytes - host.weights_bytes == sizes.total - on_gpu
    assert host.mapped_bytes == host.store_bytes == resident.host_bytes == 0
    assert host.read_bytes == 2 * sizes.blocks + 2 * sizes.output_layer
    assert host.seconds["train"] >= host.steps * host.read_bytes / 1e5
    assert "of base in the host's memory" in describe_estimate(host, 2**40)
    check_fits(host, 2**40, host_config)
    monkeypatch.setattr("sgm_finetune.train.budget.fit.host_memory_within_reach", lambda: 10)
    with pytest.raises(UserError, match=r"keeps .* in the host's memory, and .* are within reach there; try .*nf4"):
        check_fits(host, 2**40, host_config)


@pytest.mark.slow
def test_a_budget_moves_the_base_to_the_hosts_memory_where_there_is_a_gpu(described, as_with_a_gpu):
    config, prepared = made(described, "model.task=causal-lm", "adapter.rank=2", "merge.side=none")
    resident = estimate(config, prepared)
    fitted = fit(config, prepared, resident.weights_bytes - 1)
    assert {"model.residence=host (was null)", "training.checkpointing=true (was false)"} <= set(fitted.given_up)


def test_a_budget_asks_no_checkpointing_of_a_model_that_has_none(described, as_with_a_gpu, tmp_path):
    """The host's memory would need it."""
    folder = save_pico("albert", tmp_path / "albert")
    config, prepared = made(described, f"model.name={folder}", "training.batch_size=1", "merge.side=none")
    resident = estimate(config, prepared)
    with pytest.raises(UserError, match="is not enough: weights, libraries and data take"):
        fit(config, prepared, resident.weights_bytes - 1)
    with pytest.raises(UserError, match="with every other setting at its smallest"):
        fit(config, prepared, resident.weights_bytes + resident.process_bytes)


def test_a_budget_that_is_not_enough_is_refused_with_a_remedy(described, monkeypatch) -> None:
    monkeypatch.setattr("sgm_finetune.train.budget.estimate.held_memory", lambda: 0)
    config, prepared = made(described, "model.residence=device")
    with pytest.raises(UserError, match=r"memory.budget=0.01 GiB is not enough: .*model.quantization=nf4"):
        fit(config, prepared, 10 * 2**20)
    needed = estimate(config, prepared)
    with pytest.raises(UserError, match=r"with every other setting at its smallest.*model.quantization=nf4"):
        fit(config, prepared, needed.process_bytes + needed.weights_bytes + 2**19)
    with pytest.raises(UserError, match=r"needs about .* within reach .*model.quantization=nf4"):
        check_fits(needed, needed.weights_bytes, config)
    with pytest.raises(UserError, match=r"memory.budget=\d+\.\dGiB finds what fits"):
        check_fits(needed, needed.firm_bytes - 1, config)
    check_fits(needed, needed.firm_bytes, config)


def test_a_run_stops_before_anything_is_loaded_where_it_cannot_fit(described, monkeypatch) -> None:
    monkeypatch.setattr(session, "memory_within_reach", lambda: 50 * 2**20)
    monkeypatch.setattr(pipeline, "load_base", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"0\.05 GiB are within reach"):
        pipeline.finetune(load_config(None, described), Console(quiet=True))
    monkeypatch.undo()
    monkeypatch.setattr(session, "disk_free", lambda folder: 1000)
    monkeypatch.setattr(pipeline, "load_base", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(UserError, match="its disk has 0 MiB free"):
        pipeline.finetune(load_config(None, described), Console(quiet=True))


@pytest.mark.slow
def test_a_run_in_a_budget_prints_what_it_gave_up_and_resumes_so(described, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sgm_finetune.train.budget.estimate.held_memory", lambda: 0)
    config, prepared = made(described, "training.batch_size=32", "training.eval_batch_size=64")
    whole = estimate(config, prepared)
    step = whole.phases["step"]
    budget = step - (step - whole.process_bytes - whole.weights_bytes) // 4
    console = Console(width=250)
    asked = [*described, "training.batch_size=32", "training.eval_batch_size=64", f"memory.budget={budget}"]
    metrics = pipeline.finetune(load_config(None, asked), console)
    printed = capsys.readouterr().out
    assert "to fit into" in printed
    assert "training.micro_batch_size=" in printed
    assert metrics["predicted"]["peak_bytes"] > 0
    assert "predicted" in printed.splitlines()[-2]
    begun = load_config(tmp_path / "out" / "config.yaml")
    assert reuse_fit(load_config(None, asked), begun) == begun
    by_hand = load_config(None, [*asked, "adapter.rank=3"])
    assert reuse_fit(by_hand, begun, load_config(None, asked)).adapter.rank == 3
    with pytest.raises(UserError, match=r"`adapter.rank` is 3 now and was 4 when the run began"):
        pipeline.finetune(load_config(None, [*asked, "adapter.rank=3", "training.resume=true"]), Console(quiet=True))


def test_the_command_prints_parts_phases_and_one_object(described, capsys, tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("training: {batch_size: 8}\n")
    for arguments in (
        [*described, "--config", str(tmp_path / "run.yaml"), "--json"],
        [str(tmp_path / "run.yaml"), *described, "--json"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(["estimate", *arguments])
        assert ended.value.code == 0
        printed = capsys.readouterr()
        found = json.loads(printed.out)
        assert found["peak_bytes"] == max(found["phases"].values())
        assert "activations" in printed.err
        assert "training" in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_whole_matrices_need_their_state_and_one_gradient_and_give_up_checkpointing_before_micro_batches(
    described,
) -> None:
    whole = ("adapter.kind=full", "training.learning_rate=1e-3")
    described = [given for given in described if not given.startswith("adapter.rank")]
    config, prepared = made(described, *whole)
    needed = estimate(config, prepared)
    size = needed.trainable_parameters
    assert needed.adapter_bytes == 0
    assert needed.optimizer_bytes == 8 * size
    assert 0 < needed.gradient_bytes < size / 4
    accumulated = estimate(replaced(config, "training", micro_batch_size=1), prepared)
    assert accumulated.gradient_bytes == 4 * size
    half = predicted(described, *whole, "selection.top_fraction=0.5", "selection.by=depth")
    assert half.optimizer_bytes < 0.6 * needed.optimizer_bytes
    assert half.activation_bytes < 0.8 * needed.activation_bytes
    large = replaced(config, "training", batch_size=128)
    fitted = fit(large, prepared, estimate(large, prepared).phases["step"] - 2**23)
    assert [line.partition("=")[0] for line in fitted.given_up] == ["training.checkpointing"]
