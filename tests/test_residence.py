"""Whole runs on a base that stays on disk, or in the host's memory: what they leave is what the resident base leaves.

A base in the host's memory is for machines with a GPU. Here the buffers are in the same memory, and all else is the
same; tests/test_gpu_host.py runs on a GPU.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from architectures import save_pico
from conftest import WORDS, make_tokenizer
from processes import forkserver, run_command, torchrun
from rich.console import Console
from safetensors.torch import load_file
from test_answering import TEMPLATE
from test_harness import TASK, film

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.chat import chat
from sgm_finetune.commands.evaluate import evaluate
from sgm_finetune.model import architecture
from sgm_finetune.model.load import check_checkpointing, skeleton
from sgm_finetune.results import load
from sgm_finetune.results.answers import Sampling
from sgm_finetune.train.arguments import check_machine


def results(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    expected, found = results(one), results(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


ON_DISK = ("model.residence=disk", "model.dtype=bfloat16")


@pytest.fixture(autouse=True)
def as_with_a_gpu(monkeypatch):
    """Lets a base be in the host's memory here too."""
    refuse = architecture.why_not_at
    for module in (architecture, load):
        monkeypatch.setattr(
            module, "why_not_at", lambda place, *more: None if place == "host" else refuse(place, *more)
        )
    monkeypatch.setattr("sgm_finetune.train.budget.reading.copy_rate", lambda: 1e9)


PLACES = pytest.mark.parametrize("place", ["disk", "host"])
CHECKPOINTING = "training.checkpointing=true"
"""What a base in the host's memory implies."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "more"),
    [
        ("disk", ()), ("disk", (CHECKPOINTING,)), ("disk", ("model.quantization=nf4",)), ("host", (CHECKPOINTING,)),
        ("host", (CHECKPOINTING, "model.quantization=nf4")), ("host", (CHECKPOINTING, "merge.scope=pool")),
        ("host", (CHECKPOINTING, "training.learning_rate=auto", "training.optimizer=adamw")),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_leaves_the_adapter_and_metrics_of_the_resident_base(place, more, settings, command, tmp_path):
    """With the scan, both tests, the probe, and validations."""
    short = [*settings, "training.max_steps=6", ON_DISK[1], *more]
    resident = command("finetune", [*short, f"output.dir={tmp_path / 'resident'}"])
    found = command("finetune", [*short, f"model.residence={place}", f"output.dir={tmp_path / place}"])
    assert_same(tmp_path / "resident", tmp_path / place)
    for when in ("before", "after"):
        assert resident[when] == found[when]
    assert found["predicted"]["mapped_bytes" if place == "disk" else "host_bytes"] > 0
    again = command("evaluate", [f"output.dir={tmp_path / place}"])
    assert again["loss"] == found["after"]["loss"]


@pytest.mark.slow
def test_a_result_is_read_where_its_base_cannot_be_as_it_was_trained(language, command, tmp_path, monkeypatch):
    """It was trained on a machine with a GPU. A place that the command line asks for is still refused."""
    output = f"output.dir={tmp_path / 'out'}"
    trained = command("finetune", [*language, "model.residence=host", output])
    monkeypatch.undo()
    found = command("evaluate", [output])
    assert found["loss"] == trained["after"]["loss"]
    assert "in memory here: model.residence=host, as it was trained, is for machines with a GPU" in command.said
    with pytest.raises(UserError, match=r"^model.residence=host is for machines with a GPU"):
        evaluate(load_config(None, [output]), [output, "model.residence=host"], Console(quiet=True))


@pytest.mark.slow
@PLACES
def test_a_run_resumes_as_it_began(place, settings, command, tmp_path):
    short = [*settings, "training.max_steps=6", "training.eval_steps=3", f"model.residence={place}", ON_DISK[1]]
    command("finetune", [*short, f"output.dir={tmp_path / 'whole'}"])
    command("finetune", [*short, f"output.dir={tmp_path / 'cut'}"])
    checkpoints = sorted((tmp_path / "cut" / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    (tmp_path / "cut" / "sgm_finetuned.pth").unlink()
    (tmp_path / "cut" / "metrics.json").unlink()
    shutil.rmtree(checkpoints[-1])
    command("finetune", [*short, f"output.dir={tmp_path / 'cut'}", "training.resume=true"])
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture
def language(tmp_path) -> list[str]:
    """Overrides of a short run of a pico Llama that learns to answer."""
    folder = save_pico("llama", tmp_path / "llama")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    pairs = [(f"{one} {two} film", "was good") for one in WORDS for two in WORDS[:4]]
    chats = [[{"role": "user", "content": p}, {"role": "assistant", "content": c}] for p, c in pairs]
    rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats))
    return [
        f"model.name={folder}", "model.task=causal-lm", ON_DISK[1], f"data.train={rows}", "data.max_length=32",
        "training.max_steps=2", "training.batch_size=4", "probe.num_batches=2", "probe.batch_size=4",
        "probe.sketch_size=12", "adapter.rank=4", "evaluation.num_generated=4",
    ]  # fmt: skip


@pytest.mark.slow
@PLACES
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_answers_chat_and_exports_come_from_a_base_elsewhere(
    quantization, place, language, command, tmp_path, monkeypatch
):
    output = f"output.dir={tmp_path / 'out'}"
    command("finetune", [*language, f"model.quantization={quantization}", f"model.residence={place}", output])
    asked = ("--prompt", "the film", "--compare")
    found = command("generate", [output], *asked)
    resident = command("generate", [output, "model.residence=device"], *asked)
    assert found["rows"] == resident["rows"]
    turns = []
    for there in (place, "device"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("the film\nwas it good\n/exit\n"))
        names = [output, f"model.residence={there}"]
        turns.append(chat(load_config(None, names), names, Console(file=io.StringIO()), Sampling(max_new_tokens=4)))
    assert turns[0] == turns[1]
    assert len(turns[0]) == 2
    for kind, file in (("merged", "config.json"), ("adapter", "adapter_config.json")):
        assert command("export", [output], "--to", kind, "--output", str(tmp_path / kind))
        assert (tmp_path / kind / file).is_file()


@pytest.mark.slow
@PLACES
def test_a_harness_finds_elsewhere_what_it_finds_in_memory(place, language, command, tmp_path):
    rows, task = tmp_path / "films.jsonl", tmp_path / "pico.yaml"
    rows.write_text("".join(json.dumps({"film": film(n), "verdict": n % 2}) + "\n" for n in range(200, 208)))
    task.write_text(TASK.format(data=rows))
    found = [
        command(
            "finetune",
            [
                *language,
                f"model.residence={there}",
                f"evaluation.harness=[{task}]",
                CHECKPOINTING,
                f"output.dir={tmp_path / there}",
            ],
        )
        for there in (place, "device")
    ]
    assert found[0]["before"] == found[1]["before"]
    assert found[0]["after"] == found[1]["after"]
    assert "harness" in found[0]["after"]


@pytest.mark.slow
def test_two_processes_train_on_disk_what_they_train_in_memory(settings, tmp_path, monkeypatch):
    """They make the store together, and each has a window of its own."""
    monkeypatch.setenv("SGM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty.yaml").write_text("")
    short = ["--config", str(tmp_path / "empty.yaml"), *settings, "training.max_steps=4", "training.eval_steps=2"]
    for place in ("device", "disk"):
        more = (f"model.residence={place}", ON_DISK[1], f"output.dir={tmp_path / place}")
        torchrun("src/finetune.py", *short, *more)
    assert_same(tmp_path / "device", tmp_path / "disk")
    files = list((tmp_path / "cache").glob("bases/*/*"))
    assert len(files) > 5
    assert not [path for path in files if path.suffix != ".safetensors" and path.name != ".lock"]


@pytest.mark.slow
def test_a_run_that_was_killed_twice_ends_as_one_that_was_not(settings, tmp_path, monkeypatch):
    """Once while the store is made, once after a checkpoint in the middle of an epoch."""
    monkeypatch.setenv("SGM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty.yaml").write_text("")
    short = ["finetune", "--config", str(tmp_path / "empty.yaml"), *settings, *ON_DISK, "training.max_steps=8"]
    short += ["training.eval_steps=2", "training.early_stopping_patience=0"]
    cut, processes = tmp_path / "cut", forkserver()
    for begun, more in (
        ("cache/bases/*/*.layers.1.safetensors", []),
        ("cut/checkpoints/checkpoint-4/*", ["output.overwrite=true"]),
        ("cut/metrics.json", ["training.resume=true"]),
    ):
        process = processes.Process(target=run_command, args=([*short, f"output.dir={cut}", *more],))
        process.start()
        while not list(tmp_path.glob(begun)) and process.is_alive():
            time.sleep(0.001)
        if begun != "cut/metrics.json":
            assert process.is_alive()
            process.kill()
        process.join()
    assert process.exitcode == 0
    process = processes.Process(target=run_command, args=([*short, f"output.dir={tmp_path / 'whole'}"],))
    process.start()
    process.join()
    assert_same(cut, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_preferences_are_learnt_on_a_base_in_the_hosts_memory(loss, language, command, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    asked = [f"{one} {two}" for one in WORDS for two in WORDS[:4]]
    if loss == "kto":
        made = [
            {"prompt": p, "completion": "was good" if n % 2 else "bad", "label": n % 2} for n, p in enumerate(asked)
        ]
    else:
        made = [{"prompt": prompt, "chosen": "was good", "rejected": "was bad film"} for prompt in asked]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    short = [*language, "model.task=preference", f"data.train={rows}", f"preference.loss={loss}", CHECKPOINTING]
    found = [
        command("finetune", [*short, f"model.residence={there}", f"output.dir={tmp_path / there}"])
        for there in ("device", "host")
    ]
    assert_same(tmp_path / "device", tmp_path / "host")
    assert found[0]["after"] == found[1]["after"]


@PLACES
def test_a_base_elsewhere_and_shards_exclude_each_other(place, tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    config = load_config(tmp_path / "config.yaml", [f"model.residence={place}", "training.shard=true"])
    with pytest.raises(UserError, match=r"^training.shard=true cuts a base.*or model.residence=device$"):
        check_machine(config)


def test_a_model_that_cannot_recompute_its_blocks_is_refused_with_a_way_that_works(tmp_path):
    folder = save_pico("albert", tmp_path / "albert")
    for place, said in ("device", "use training.checkpointing=false$"), ("host", "use model.residence=device with"):
        config = ModelConfig(name=str(folder), residence=place)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"AlbertForSequenceClassification does not support .*{said}"):
            check_checkpointing(skeleton(config, folder), config)


def test_a_base_in_the_hosts_memory_implies_checkpointing_and_refuses_to_go_without():
    host = "model.residence=host"
    assert load_config(None, [host]).training.checkpointing is True
    assert load_config(None, [host, "training.checkpointing=offload"]).training.checkpointing == "offload"
    with pytest.raises(UserError, match=r"computes each block again .*; give training.checkpointing=true, or leave"):
        load_config(None, [host, "training.checkpointing=false"])
