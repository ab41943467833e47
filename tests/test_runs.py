"""Whole runs on pico models, through the command: what they leave, what they say, and that they can be repeated,
continued, shared between processes and taken apart."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import BAD, GOOD, OTHER, make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from processes import ROOT, adapter, assert_one_run, environment, losses, remove, torchrun, torchrun_command
from rich.console import Console
from safetensors.torch import load_file
from systems import needs_posix
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands import finetune as pipeline
from sgm_finetune.commands.cli import main, run
from sgm_finetune.data.prepared import prepare_data
from sgm_finetune.data.splits import load_splits
from sgm_finetune.measure.plan_file import load_plan
from sgm_finetune.measure.scan import scan
from sgm_finetune.method.parameter_count import adapter_parameters
from sgm_finetune.results.report.pictures import parse_pictures, save_pictures
from sgm_finetune.train.base_model import load_base
from sgm_finetune.train.trainer import SGMTrainer

TOLERANCE = {"merged": 1e-4}

LEFT = {
    "sgm_finetuned.pth", "adapter", "plan.json", "plan.safetensors", "config.yaml", "metrics.json", "report.html",
    "environment.json", "history.json", "examples.json", "pictures.json", "checkpoints",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, llama_folder, reviews) -> tuple[Path, dict, list[str], str]:
    """One merged classification run: its folder, metrics, overrides and words."""
    overrides = pico(llama_folder, reviews, tmp_path_factory.mktemp("run") / "out")
    words = StringIO()
    metrics = pipeline.finetune(load_config(None, overrides), Console(file=words, width=200))
    return Path(overrides[-1].removeprefix("output.dir=")), metrics, overrides, words.getvalue()


def pico(model: Path, data: Path, output: Path) -> list[str]:
    return [
        f"model.name={model}", "model.dtype=float32", f"data.train={data}", "data.max_length=32",
        "probe.num_batches=4", "probe.sketch_size=12", "adapter.rank=4", "training.max_steps=20",
        "training.batch_size=16", f"output.dir={output}",
    ]  # fmt: skip


def assert_same_adapter(one: Path, other: Path) -> None:
    left, right = adapter(one), adapter(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# (a) what a run leaves


def test_a_run_leaves_what_the_design_lists_and_nothing_half_written(finished):
    output, *_ = finished
    assert {path.name for path in output.iterdir()} == LEFT
    assert [path for path in output.rglob("*") if "partial" in path.name] == []


def test_a_run_improves_on_the_untrained_model(finished):
    output, metrics, *_ = finished
    assert metrics["after"]["loss"] < 0.5 * metrics["before"]["loss"]
    assert metrics["after"]["accuracy"] > 0.9 > metrics["before"]["accuracy"]
    falling = losses(output)
    assert len(falling) == 20
    assert falling[-1] < 0.5 * falling[0]


def test_the_metrics_have_the_documented_keys(finished):
    output, metrics, *_ = finished
    assert json.loads((output / "metrics.json").read_text()) == metrics
    for when in ("before", "after"):
        assert {"loss", "accuracy", "macro_f1", "num_examples", "confusion_matrix"} <= metrics[when].keys()
        assert sum(map(sum, metrics[when]["confusion_matrix"])) == metrics[when]["num_examples"] == 36
    assert {"scan", "probe", "train", "evaluate"} <= metrics["seconds"].keys()
    assert metrics["peak_memory_bytes"] > 0
    assert 0 < metrics["trainable_parameters"] < metrics["plain_lora_parameters"]
    assert metrics["environment"]["torch"] == torch.__version__


def test_the_pth_holds_tensors_and_plain_data_only(finished):
    output, metrics, *_ = finished
    content = torch.load(output / "sgm_finetuned.pth", weights_only=True)
    assert content["labels"] == metrics["labels"] == ["bad", "good"]
    folder = adapter(output)
    assert content["adapter"].keys() == folder.keys()
    assert all(torch.equal(content["adapter"][name], folder[name]) for name in folder)


def test_a_shared_factor_is_stored_once_in_the_pth(finished):
    output, metrics, *_ = finished
    content = torch.load(output / "sgm_finetuned.pth", weights_only=True)
    storages = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in content["adapter"].values()}
    assert sum(storages.values()) == metrics["trainable_parameters"]


def test_evaluate_gives_the_same_digits(finished, command):
    output, metrics, *_ = finished
    again = command("evaluate", [f"output.dir={output}"])
    assert {key: again[key] for key in metrics["after"]} == metrics["after"]


def test_evaluate_takes_changes_to_the_data(finished, command):
    output, *_ = finished
    assert command("evaluate", [f"output.dir={output}", "data.num_test=10"])["num_examples"] == 10


def test_evaluate_does_not_check_what_only_training_needs(finished, command, monkeypatch):
    output, metrics, *_ = finished
    monkeypatch.setattr(LlamaForSequenceClassification, "supports_gradient_checkpointing", False)
    again = command("evaluate", [f"output.dir={output}", "training.checkpointing=true"])
    assert again["accuracy"] == metrics["after"]["accuracy"]


def test_the_adapter_folder_loads_in_an_unmodified_peft(finished, llama_folder, reviews):
    output, metrics, *_ = finished
    base = AutoModelForSequenceClassification.from_pretrained(llama_folder, num_labels=2, pad_token_id=0)
    model = PeftModel.from_pretrained(base, output / "adapter").eval()
    splits = load_splits(load_config(None, [f"data.train={reviews}"]).data, "sequence-classification")
    tokenizer = make_tokenizer()
    predicted = []
    with torch.no_grad():
        for text in splits.test["text"]:
            predicted.append(
                int(model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits.argmax())
            )
    confusion = [[0, 0], [0, 0]]
    for truth, named in zip(splits.test["label"], predicted, strict=True):
        confusion[truth][named] += 1
    assert confusion == metrics["after"]["confusion_matrix"]


def test_the_adapter_folder_gives_the_logits_of_the_pth(finished, llama_folder):
    from sgm_finetune.results.load import attach_adapter
    from sgm_finetune.results.pth import load_pth

    output, *_ = finished
    batch = {"input_ids": torch.randint(3, 28, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}

    def base():
        return AutoModelForSequenceClassification.from_pretrained(llama_folder, num_labels=2, pad_token_id=0)

    path = output / "sgm_finetuned.pth"
    with torch.no_grad():
        expected = attach_adapter(base(), load_pth(path), path)(**batch).logits
        loaded = PeftModel.from_pretrained(base(), output / "adapter").eval()
        assert torch.equal(loaded(**batch).logits, expected)
        merged = loaded.merge_and_unload()(**batch).logits
    torch.testing.assert_close(merged, expected, atol=TOLERANCE["merged"], rtol=TOLERANCE["merged"])


def test_the_saved_configuration_repeats_the_run_digit_for_digit(finished, command, tmp_path):
    output, metrics, *_ = finished
    again = command("finetune", [f"output.dir={tmp_path / 'again'}"], "--config", str(output / "config.yaml"))
    assert again["before"] == metrics["before"]
    assert again["after"] == metrics["after"]
    assert_same_adapter(output, tmp_path / "again")
    for name in ("pictures.json", "examples.json"):
        assert (output / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert kept_history(output) == kept_history(tmp_path / "again")
    assert again["test_fingerprint"] == metrics["test_fingerprint"]


def kept_history(output: Path) -> list[dict]:
    """history.json without what differs between equal runs: times, and memory."""
    rows = json.loads((output / "history.json").read_text())
    return [{key: value for key, value in row.items() if not key.startswith("train_")} for row in rows]


def test_what_the_report_shows_is_kept(finished):
    output, metrics, *_ = finished
    steps = [row for row in json.loads((output / "history.json").read_text()) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert all(row["train_tokens_per_second"] > 0 and row["train_peak_memory_bytes"] > 0 for row in steps)
    examples = json.loads((output / "examples.json").read_text())
    wrong = {when: round((1 - metrics[when]["accuracy"]) * 36) for when in ("before", "after")}
    assert examples["num_compared"] == 36
    assert examples["num_changed"]["mended"] - examples["num_changed"]["spoilt"] == wrong["before"] - wrong["after"]
    assert len(json.loads((output / "pictures.json").read_text())["histograms"]) == 7


def test_the_output_says_every_step(finished):
    words = finished[-1]
    for step in ("data", "scan", "before", "probe", "plan", "apply", "train", "after", "saved"):
        assert any(line.startswith(step) for line in words.splitlines()), step
    assert "step 20/20" in words


def test_a_dry_run_goes_to_the_first_step_and_writes_nothing(command, settings, tmp_path):
    assert command("finetune", settings, "--dry-run")["steps"] == 20
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies bfloat16")
def test_a_processor_without_instructions_for_bfloat16_says_so(settings, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    for dtype, told in (("bfloat16", True), ("float32", False)):
        pipeline.finetune(load_config(None, [*settings, f"model.dtype={dtype}"]), Console(width=200), dry_run=True)
        assert ("model.dtype=float32 is faster" in capsys.readouterr().out) is told


def test_overwrite_replaces_the_results_and_leaves_other_files(command, settings, tmp_path):
    settings = [*settings, "training.max_steps=2"]
    first = command("finetune", settings)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    second = command("finetune", [*settings, "training.seed=1", "output.overwrite=true"])
    assert second["after"] != first["after"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


# (b) plans


def test_a_plan_is_reused_without_a_scan_or_a_probe(finished, command, tmp_path):
    output, metrics, overrides, _ = finished
    again = command("finetune", [*overrides, f"plan={output / 'plan.json'}", f"output.dir={tmp_path / 'again'}"])
    assert again["seconds"]["scan"] == again["seconds"]["probe"] == 0
    assert again["after"] == metrics["after"]
    one, other = load_plan(output / "plan.json"), load_plan(tmp_path / "again" / "plan.json")
    assert one.groups == other.groups != ()
    assert all(torch.equal(one.starts[name], other.starts[name]) for name in one.starts)


def test_the_plan_command_writes_the_plan_that_finetune_makes(finished, command, tmp_path):
    output, _, overrides, _ = finished
    command("plan", overrides, "--output", str(tmp_path / "plan.json"))
    assert rounded(tmp_path / "plan.json") == rounded(output / "plan.json")
    assert (tmp_path / "plan.safetensors").read_bytes() == (output / "plan.safetensors").read_bytes()


def test_a_published_result_file_selects_as_the_published_formula_does(settings, command, llama_folder, tmp_path):
    """An infinite ratio is told and not ranked; what the file does not hold is told and not trained."""
    shared = [*settings, "snr.estimator=spectrum", "selection.top_fraction=0.5", "merge.side=none"]
    command("plan", shared, "--output", str(tmp_path / "own.json"))
    measured = scan(llama_folder, estimator="spectrum")
    assert not any(math.isinf(matrix.snr) for matrix in measured.matrices)
    rows = {m.name: {"snr": m.snr, "type": m.kind} for m in measured.matrices if m.layer is not None}
    file = tmp_path / "snr_results.json"
    file.write_text(json.dumps(rows))
    command("plan", [*shared, f"snr.scan={file}"], "--output", str(tmp_path / "read.json"))
    own, read = (load_plan(tmp_path / name) for name in ("own.json", "read.json"))
    assert [m.name for m in read.selected] == [m.name for m in own.selected]
    assert len(read.selected) == 14

    best = max((m for m in measured.matrices if m.name.endswith("v_proj")), key=lambda m: m.snr).name
    rows[best]["snr"] = math.inf
    del rows["model.layers.0.mlp.up_proj"]
    file.write_text(json.dumps(rows))
    command("plan", [*shared, f"snr.scan={file}"], "--output", str(tmp_path / "infinite.json"))
    assert "1 with an infinite SNR, not ranked" in command.said
    assert "the scan does not have them, so they are not trained: model.layers.0.mlp.up_proj" in command.said
    planned = load_plan(tmp_path / "infinite.json")
    assert len(planned.matrices) == 27
    chosen = [m.name for m in planned.selected if m.name.endswith("v_proj")]
    assert len(chosen) == 2
    assert best not in chosen


def rounded(path: Path) -> dict:
    """A plan's numbers to nine decimals: LAPACK's last digits depend on where in memory a matrix lies."""
    return json.loads(path.read_text(), parse_float=lambda text: round(float(text), 9))


# (c) language models


def write_pairs(path: Path) -> Path:
    chooser, rows = random.Random(0), []
    for i in range(160):
        prompt = " ".join(
            ["the", *chooser.choices(OTHER, k=chooser.randint(2, 6)), chooser.choice(GOOD if i % 2 else BAD)]
        )
        rows.append(json.dumps({"prompt": prompt, "completion": " good and great" if i % 2 else " bad and awful"}))
    path.write_text("\n".join(rows))
    return path


def write_text(path: Path) -> Path:
    chooser = random.Random(0)
    path.write_text(
        "\n\n".join(
            f"the film was {chooser.choice(GOOD)} and the plot was {chooser.choice(BAD)} {word}"
            for word in chooser.choices(OTHER, k=400)
        )
    )
    return path


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(write_text, id="running text"),
        pytest.param(write_pairs, id="prompts and completions", marks=pytest.mark.slow),
    ],
)
def test_a_language_model_improves_and_evaluates_to_the_same_digits(write, settings, command, tmp_path):
    path = write(tmp_path / ("x.txt" if write is write_text else "x.jsonl"))
    metrics = command("finetune", [*settings, "model.task=causal-lm", f"data.train={path}", "training.max_steps=60"])
    assert metrics["after"]["perplexity"] < 0.7 * metrics["before"]["perplexity"]
    assert metrics["after"]["num_tokens"] > 0
    again = command("evaluate", settings[-1:])
    assert {key: again[key] for key in metrics["after"]} == metrics["after"]


# (d) encoders


def test_an_encoder_merges_learns_and_evaluates_to_the_same_digits(bert_folder, settings, command, tmp_path):
    metrics = command("finetune", [*settings, f"model.name={bert_folder}", "training.max_steps=60"])
    plan = load_plan(tmp_path / "out" / "plan.json")
    assert {group.kind for group in plan.groups} == {"bert.encoder.layer.*.attention.self.query+key+value"}
    assert metrics["after"]["accuracy"] > 0.8
    again = command("evaluate", settings[-1:])
    assert {key: again[key] for key in metrics["after"]} == metrics["after"]


# (e) interrupted


@needs_posix
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
    ids=["SIGTERM", "SIGINT"],
)
def test_interrupted_and_resumed_is_uninterrupted(number, status, settings, tmp_path, command):
    """Equal parameters, bit for bit, and an equal history of losses."""
    settings = [*settings, "training.max_steps=40", "training.eval_steps=10", "adapter.dropout=0.1"]
    (tmp_path / "empty.yaml").write_text("")
    start = [sys.executable, "src/finetune.py", "--config", str(tmp_path / "empty.yaml"), *settings]
    stopped = subprocess.Popen(
        start, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    checkpoints = tmp_path / "out" / "checkpoints"
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob("checkpoint-*")) and stopped.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    stopped.send_signal(number)
    said, error = stopped.communicate(timeout=120)
    assert stopped.returncode == status, said + error
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"Stopped by {number.name} after step ")
    assert last.endswith("of 40; continue with training.resume=true")
    assert not (tmp_path / "out" / "sgm_finetuned.pth").exists()
    assert int(last.split("after step ")[1].split()[0]) < 40

    resumed = command("finetune", [*settings, "training.resume=true"])
    whole = command("finetune", [*settings, f"output.dir={tmp_path / 'whole'}"])
    assert resumed["after"] == whole["after"]
    assert resumed["before"] == whole["before"]
    assert_same_adapter(tmp_path / "out", tmp_path / "whole")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert kept_history(tmp_path / "out") == kept_history(tmp_path / "whole")
    for name in ("pictures.json", "examples.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# (f) two processes


@pytest.mark.slow
def test_two_processes_are_one(settings, tmp_path, command):
    """The same losses and parameters, also in the short batch at the end of the first epoch."""
    settings = [*settings, "training.learning_rate=1e-3", "data.num_train=40", "training.max_steps=5"]
    (tmp_path / "empty.yaml").write_text("")
    two = tmp_path / "two"
    torchrun("src/finetune.py", "--config", str(tmp_path / "empty.yaml"), *settings, f"output.dir={two}")
    command("finetune", settings)
    assert_one_run(tmp_path / "out", two)


@pytest.mark.slow
def test_two_processes_are_one_for_language_models(settings, tmp_path, command):
    data = write_pairs(tmp_path / "x.jsonl")
    settings = [*settings, "training.learning_rate=1e-3", "model.task=causal-lm", f"data.train={data}"]
    (tmp_path / "empty.yaml").write_text("")
    two = tmp_path / "two"
    torchrun("src/finetune.py", "--config", str(tmp_path / "empty.yaml"), *settings, f"output.dir={two}")
    command("finetune", settings)
    assert_one_run(tmp_path / "out", two)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_processes_that_share_the_model_are_one(task, quantization, processes, settings, tmp_path, command):
    """FSDP2: the base in pieces, the factors whole; the same losses, adapter and answers, and a resumed run as well."""
    settings = [*settings, "training.learning_rate=1e-3", f"model.task={task}", "evaluation.num_generated=3"]
    settings += [f"model.quantization={quantization}", "model.dtype=float32"]
    if task == "causal-lm":
        settings.append(f"data.train={write_pairs(tmp_path / 'x.jsonl')}")
    (tmp_path / "empty.yaml").write_text("")
    shared = tmp_path / "shared"
    arguments = ["--config", str(tmp_path / "empty.yaml"), *settings, f"output.dir={shared}"]
    said = torchrun("src/finetune.py", *arguments, "training.shard=true", processes=processes)
    assert f"shard    4 blocks over {processes} processes" in said
    one = command("finetune", settings)
    assert_one_run(tmp_path / "out", shared)
    metrics = json.loads((shared / "metrics.json").read_text())
    assert metrics["after"]["loss"] == pytest.approx(one["after"]["loss"], rel=1e-4)
    assert metrics["after"].get("samples") == one["after"].get("samples")
    evaluated = torchrun("src/evaluate.py", f"output.dir={shared}", processes=processes)
    assert "shard " in evaluated
    assert f"loss {metrics['after']['loss']:.4f}" in evaluated
    if task == "causal-lm":
        return
    results = [name for name in LEFT if name not in ("checkpoints", "plan.json", "plan.safetensors", "config.yaml")]
    for name in results:
        remove(shared / name)
    last = max((shared / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    remove(last / "trainer_state.json")
    torchrun("src/finetune.py", *arguments, "training.shard=true", "training.resume=true", processes=processes)
    assert_one_run(tmp_path / "out", shared)


def test_a_model_is_shared_by_several_processes_only(settings, tmp_path, capfd):
    (tmp_path / "empty.yaml").write_text("")
    for more, part in (
        (["training.shard=true"], "needs several processes; start it with torchrun"),
        (["training.shard=true", "model.quantization=nf4"], "needs several processes"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["finetune", "--config", str(tmp_path / "empty.yaml"), *settings, *more])
        assert caught.value.code == 2
        assert part in capfd.readouterr().err


def process_of_rank(launcher: int, rank: int) -> int | None:
    """The process that a launcher started for a rank."""
    for found in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((found / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"\0RANK={rank}\0" in f"\0{(found / 'environ').read_text()}\0":
                return int(found.name)
        except (OSError, ValueError):
            continue
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_of_four_processes_one_is_killed_and_two_or_one_go_on(settings, tmp_path, command):
    """Every process that is left says so in one line, and any number of them comes to the same end."""
    settings = [*settings, "training.learning_rate=1e-3", "training.eval_steps=5"]
    (tmp_path / "empty.yaml").write_text("")
    whole, killed = tmp_path / "out", tmp_path / "killed"
    command("finetune", settings)
    arguments = ["src/finetune.py", "--config", str(tmp_path / "empty.yaml"), *settings, f"output.dir={killed}"]
    running = subprocess.Popen(
        torchrun_command(4, *arguments), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while not (killed / "checkpoints" / "checkpoint-5" / "contents.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim = process_of_rank(running.pid, 2)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    _, error = running.communicate(timeout=120)
    assert running.returncode != 0
    said = [line for line in error.splitlines() if "another process of this run has ended" in line]
    assert sorted(line.partition(":")[0] for line in said) == ["process 0", "process 1", "process 3"], error
    assert all("training.resume=true" in line for line in said)
    assert "sgm_finetune" not in error  # a traceback, if any, is the launcher's
    for processes in (2, 1):
        copy = shutil.copytree(killed, tmp_path / f"resumed-by-{processes}")
        torchrun(*arguments[:-1], f"output.dir={copy}", "training.resume=true", processes=processes)
        assert_one_run(whole, copy)


RANKS = """
import json, sys
import torch
from pathlib import Path
from rich.console import Console
from sgm_finetune.commands import finetune as pipeline
from sgm_finetune.base.config_file import load_config

seen = []
inner = pipeline.train
def train(job, console):
    seen.append(job.model)
    return inner(job, console)
pipeline.train = train
pipeline.finetune(load_config(None, sys.argv[2:]), Console(quiet=True))
mine = [p.detach().clone() for p in seen[0].parameters() if p.requires_grad]
equal = []
for parameter in mine:
    gathered = [torch.empty_like(parameter) for _ in range(2)]
    torch.distributed.all_gather(gathered, parameter)
    equal.append(torch.equal(*gathered))
if torch.distributed.get_rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps({"equal": all(equal), "parameters": len(equal)}))
"""


@pytest.mark.slow
def test_both_processes_end_with_equal_parameters(settings, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    torchrun(str(tmp_path / "ranks.py"), str(tmp_path / "ranks.json"), *settings)
    found = json.loads((tmp_path / "ranks.json").read_text())
    assert found["equal"]
    assert found["parameters"] > 10


# (g) the best checkpoint


def test_the_trainer_lives_as_long_as_the_model_is_tested(settings, tmp_path, command, monkeypatch):
    """With ZeRO-3 the model computes by hooks that DeepSpeed's engine, which the trainer holds, removes at its end."""
    init, made, alive = SGMTrainer.__init__, [], []

    def watched(self, *arguments, **options):
        init(self, *arguments, **options)
        made.append(weakref.ref(self))

    def tested(*arguments, test=pipeline.test):
        gc.collect()
        alive.append([one() is not None for one in made])
        return test(*arguments)

    monkeypatch.setattr(SGMTrainer, "__init__", watched)
    monkeypatch.setattr(pipeline, "test", tested)
    command("finetune", [*settings, "training.max_steps=2", f"output.dir={tmp_path / 'out'}"])
    assert alive == [[], [True]]


def test_early_stopping_stops_and_the_best_checkpoint_is_what_is_saved(settings, tmp_path, command):
    """A learning rate that ruins the model: validation gets worse, the run ends early, the best step is kept."""
    settings = [
        *settings, "training.max_steps=60", "training.eval_steps=2", "training.early_stopping_patience=2",
        "training.learning_rate=0.5", "training.warmup_fraction=0.5",
    ]  # fmt: skip
    metrics = command("finetune", settings)
    validation = losses(tmp_path / "out", "eval_loss")
    assert metrics["steps"] < 60
    assert metrics["steps"] == metrics["best_step"] + 4
    best = min(validation)
    assert best == validation[metrics["best_step"] // 2 - 1]
    validated = validation_loss(settings, tmp_path / "out")
    assert validated == best


def test_validations_by_seconds_and_the_checkpoints_that_stay(settings, tmp_path, command):
    """Every step takes longer than the given time; three checkpoints stay, the best and the newest among them."""
    settings = [*settings, "training.max_steps=6", "training.eval_seconds=0.001", "training.save_total_limit=3"]
    metrics = command("finetune", [*settings, "training.early_stopping_patience=0", "training.learning_rate=1e-3"])
    validation = losses(tmp_path / "out", "eval_loss")
    assert len(validation) == 6
    stay = {int(path.name.partition("-")[2]) for path in (tmp_path / "out" / "checkpoints").glob("checkpoint-*")}
    assert len(stay) == 3
    assert {6, metrics["best_step"]} <= stay
    assert validation[metrics["best_step"] - 1] == min(validation)


def test_validations_by_many_seconds_are_one_at_the_end(settings, tmp_path, command):
    command("finetune", [*settings, "training.max_steps=4", "training.eval_seconds=3600"])
    assert len(losses(tmp_path / "out", "eval_loss")) == 1


@pytest.mark.slow
def test_a_run_on_a_stream_resumes_on_the_rows_that_it_began_with(settings, tmp_path, command):
    """The stream is read again from the same shuffle; a source that has changed is refused."""
    reviews = next(Path(key.partition("=")[2]) for key in settings if key.startswith("data.train="))
    source = tmp_path / "stream.csv"
    source.write_text(reviews.read_text())
    counts = ["data.num_train=100", "data.num_validation=20", "data.num_test=20"]
    asked = [*settings, f"data.train={source}", "data.streaming=true", *counts, "training.max_steps=8"]
    whole = command("finetune", asked)
    (tmp_path / "out" / "sgm_finetuned.pth").unlink()
    remove(tmp_path / "out" / "checkpoints" / "checkpoint-8" / "contents.json")
    assert command("finetune", [*asked, "training.resume=true"])["after"] == whole["after"]

    (tmp_path / "out" / "sgm_finetuned.pth").unlink()
    remove(tmp_path / "out" / "checkpoints" / "checkpoint-8" / "contents.json")
    source.write_text(source.read_text().replace("good", "fine"))
    with pytest.raises(UserError, match="the train examples are not those that the run began with"):
        run(["finetune", "--config", str(tmp_path / "empty.yaml"), *asked, "training.resume=true"])


def validation_loss(settings: list[str], output: Path) -> float:
    """Of the saved .pth, on the validation data."""
    from sgm_finetune.results.evaluation import evaluate_model
    from sgm_finetune.results.files import PTH
    from sgm_finetune.results.load import attach_adapter
    from sgm_finetune.results.pth import load_pth
    from sgm_finetune.train.losses import TestSet

    config = load_config(None, settings)
    log = StepLog(Console(quiet=True))
    prepared = prepare_data(config, log)
    path = output / PTH
    model = attach_adapter(load_base(config, prepared, log).model, load_pth(path), path)
    task, labels = config.model.task, prepared.splits.labels
    test_set = TestSet(prepared.validation.dataset, prepared.collate, task, 32, labels)
    return evaluate_model(model, test_set).metrics["loss"]


# (h) merging nothing


def test_a_run_without_merging_is_plain_peft_under_the_plain_trainer(settings, tmp_path, command):
    """20 steps: the same parameters, bit for bit, from a LoraConfig written by hand and `transformers.Trainer`."""
    from transformers import Trainer, set_seed

    from sgm_finetune.data.batches import LengthGroupedSampler
    from sgm_finetune.train.arguments import training_arguments

    settings = [
        *settings, "merge.side=none", "training.step=peft", "training.optimizer=adamw",
        "training.learning_rate=5e-3", "training.early_stopping_patience=0", "training.eval_steps=20",
    ]  # fmt: skip
    command("finetune", settings)
    config = load_config(None, settings)
    log = StepLog(Console(quiet=True))
    prepared = prepare_data(config, log)
    dataset = prepared.train.dataset

    class PlainTrainer(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return LengthGroupedSampler([len(ids) for ids in dataset["input_ids"]], config.training.batch_size, 0)

    base = load_base(config, prepared, log).model
    set_seed(config.training.seed)
    names = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    plain = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, target_modules=names, task_type="SEQ_CLS"))
    trainer = PlainTrainer(
        model=plain,
        args=training_arguments(config, tmp_path / "plain", len(dataset), 1),
        train_dataset=dataset,
        eval_dataset=prepared.validation.dataset,
        data_collator=prepared.collate,
    )
    trainer.train()
    expected, found = get_peft_model_state_dict(plain), adapter(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert [name for name in found if not torch.equal(expected[name], found[name])] == []


# (i) the other criteria


@pytest.mark.slow
def test_the_cosine_criterion_says_that_it_found_nothing_and_its_numbers(settings, command, tmp_path):
    settings = [*settings, "merge.scope=layers", "merge.criterion=cosine", "training.max_steps=2"]
    metrics = command("finetune", settings)
    line = next(line for line in command.said.splitlines() if "found nothing" in line)
    plan = load_plan(tmp_path / "out" / "plan.json")
    closest = max(kind.cosine_max for kind in plan.kinds)
    assert "no two layers reach 0.85" in line
    assert f"has {closest:.2f} (a layer with itself on other data:" in line
    assert plan.groups == ()
    assert metrics["trainable_parameters"] == metrics["plain_lora_parameters"]


@pytest.mark.slow
def test_the_snr_criterion_merges_layers_of_similar_snr(settings, command, tmp_path):
    choice = ["merge.scope=layers", "merge.criterion=snr", "merge.side=input"]
    command("finetune", [*settings, *choice, "training.max_steps=2"])
    plan = load_plan(tmp_path / "out" / "plan.json")
    assert plan.groups
    assert all(group.snr_spread_db <= 3 for group in plan.groups)
    assert {group.side for group in plan.groups} == {"input"}


def test_layers_share_where_they_are_asked_to(settings, command, tmp_path):
    command("finetune", [*settings, "merge.scope=layers", "merge.threshold=0", "training.max_steps=2"])
    plan = load_plan(tmp_path / "out" / "plan.json")
    assert any(group.side == "output" for group in plan.groups)
    by_name = {matrix.name: matrix for matrix in plan.matrices}
    assert all(len({by_name[name].layer for name in group.members}) > 1 for group in plan.groups)


@pytest.mark.slow
def test_a_selected_fraction_trains_fewer_matrices(settings, command, tmp_path):
    command("finetune", [*settings, "selection.top_fraction=0.5", "training.max_steps=2"])
    plan = load_plan(tmp_path / "out" / "plan.json")
    assert 2 * len(plan.selected) == len(plan.matrices)
    reached = {name.split(".lora_")[0] for name in adapter(tmp_path / "out") if ".lora_" in name}
    assert len(reached) == len(plan.selected)


# (k) packing


@pytest.mark.slow
def test_packed_examples_train_in_fewer_sequences_and_running_text_needs_none(settings, tmp_path, command, capfd):
    data = write_pairs(tmp_path / "x.jsonl")
    settings = [*settings, "model.task=causal-lm", f"data.train={data}", "data.max_length=64", "data.packing=true"]
    metrics = command("finetune", [*settings, "training.batch_size=4", "evaluation.num_generated=4"])
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert metrics["after"]["num_generated"] == 4
    found = re.search(r"(\d+) examples packed into (\d+) sequences", command.said)
    assert found is not None
    assert int(found[1]) > 3 * int(found[2])
    (tmp_path / "novel.txt").write_text("the film was good " * 500)
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "finetune",
                "--config",
                str(tmp_path / "empty.yaml"),
                *settings,
                f"data.train={tmp_path / 'novel.txt'}",
                "output.dir=x",
            ]
        )
    assert caught.value.code == 2
    assert "running text is packed without it" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_the_fast_step_is_the_same_run(task, settings, tmp_path, command):
    settings = [*settings, "training.learning_rate=1e-3", f"model.task={task}"]
    if task == "causal-lm":
        settings.append(f"data.train={write_pairs(tmp_path / 'x.jsonl')}")
    one = command("finetune", [*settings, "training.step=peft"])
    fast = command("finetune", [*settings, f"output.dir={tmp_path / 'fast'}"])
    assert "PEFT's own forward" not in command.said
    assert "all logits" not in command.said
    assert_one_run(tmp_path / "out", tmp_path / "fast")
    assert fast["after"]["loss"] == pytest.approx(one["after"]["loss"], rel=1e-4)
    again = command("evaluate", [f"output.dir={tmp_path / 'fast'}"])
    assert again["loss"] == fast["after"]["loss"]


@pytest.mark.slow
def test_checkpointing_is_the_same_run(settings, tmp_path, command):
    settings = [*settings, "training.learning_rate=1e-3"]
    kept = command("finetune", settings)
    again = command("finetune", [*settings, "training.checkpointing=true", f"output.dir={tmp_path / 'again'}"])
    assert_one_run(tmp_path / "out", tmp_path / "again")
    assert again["predicted"]["activation_bytes"] < kept["predicted"]["activation_bytes"]


@pytest.mark.slow
def test_adamw_with_a_state_of_8_bits_learns_and_goes_on_where_it_stopped(settings, tmp_path, command):
    settings = [
        *settings,
        "training.optimizer=adamw_8bit",
        "training.learning_rate=5e-3",
    ]
    metrics = command("finetune", [*settings, "training.eval_steps=10"])
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    stored = torch.load(tmp_path / "out" / "checkpoints" / "checkpoint-20" / "optimizer.pt", weights_only=True)
    assert "__bnb_optimizer_quant_state__" in str(stored["state"].values())[:100_000]
    whole = adapter(tmp_path / "out")
    for left in ("sgm_finetuned.pth", "metrics.json", "report.html"):
        (tmp_path / "out" / left).unlink()
    remove(tmp_path / "out" / "checkpoints" / "checkpoint-20" / "trainer_state.json")
    command("finetune", [*settings, "training.eval_steps=10", "training.resume=true"])
    resumed = adapter(tmp_path / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_depth_is_preferred_where_it_is_asked_for(settings, tmp_path, command):
    command("finetune", [*settings, "selection.top_fraction=0.5", "selection.by=depth"])
    plan = load_plan(tmp_path / "out" / "plan.json")
    layers = [matrix.layer for matrix in plan.matrices]
    assert {matrix.layer for matrix in plan.selected} == {layer for layer in layers if layer > max(layers) / 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [[], ["training.shard=true"], ["training.shard=true", "model.quantization=nf4"]], ids=str
)
def test_several_processes_may_step_fast(more, settings, tmp_path, command):
    data = write_pairs(tmp_path / "x.jsonl")
    settings = [*settings, "training.learning_rate=1e-3", "model.task=causal-lm", f"data.train={data}", *more[1:]]
    settings.append("training.step=fast")
    (tmp_path / "empty.yaml").write_text("")
    two = tmp_path / "two"
    torchrun("src/finetune.py", "--config", str(tmp_path / "empty.yaml"), *settings, *more, f"output.dir={two}")
    command("finetune", settings)
    assert_one_run(tmp_path / "out", two)


def test_what_cannot_step_fast_is_said(settings, command):
    command("finetune", [*settings, "training.step=fast", "adapter.dropout=0.1"])
    assert "PEFT's own forward still computes 28 matrices (model.layers.0.self_attn.q_proj, ...)" in command.said


# (k) rank pools


@pytest.mark.slow
def test_a_pool_resumes_bit_for_bit_and_exports_as_plain_lora(settings, tmp_path, command):
    """Its .pth holds the pool alone, which evaluates to the same digits; its adapter and its merged model are plain."""
    settings = [*settings, "merge.scope=pool", "adapter.rank=6", "training.max_steps=12", "training.eval_steps=4"]
    whole = command("finetune", [*settings, f"output.dir={tmp_path / 'whole'}"])
    assert "7 pools of 6 directions" in command.said
    plan = load_plan(tmp_path / "whole" / "plan.json")
    trained, plain = adapter_parameters(plan)
    assert trained < whole["trainable_parameters"] < trained + 200 < 0.3 * plain  # with a new head
    assert (tmp_path / "whole" / "sgm_finetuned.pth").stat().st_size < 4 * trained + 200_000
    again = command("evaluate", [f"output.dir={tmp_path / 'whole'}"])
    assert {key: again[key] for key in whole["after"]} == whole["after"]

    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    last = tmp_path / "out" / "checkpoints" / "checkpoint-12"
    for name in LEFT:
        if name not in ("checkpoints", "plan.json", "plan.safetensors", "config.yaml", "pictures.json"):
            remove(tmp_path / "out" / name)
    remove(last / "trainer_state.json")
    pictures = tmp_path / "out" / "pictures.json"
    at_the_end = parse_pictures(json.loads(pictures.read_text()), "")
    save_pictures(replace(at_the_end, pools=()), pictures)
    resumed = command("finetune", [*settings, "training.resume=true"])
    assert resumed["after"] == whole["after"]
    assert_same_adapter(tmp_path / "out", tmp_path / "whole")
    assert pictures.read_bytes() == (tmp_path / "whole" / "pictures.json").read_bytes()
    assert [(len(table.members), len(table.strengths[0])) for table in at_the_end.pools] == [(4, 6)] * 7
    assert "Which layer uses which direction" in (tmp_path / "out" / "report.html").read_text()

    for form in ("adapter", "merged"):
        to = ["--to", form, "--output", str(tmp_path / form)]
        assert command("export", [f"output.dir={tmp_path / 'whole'}"], *to)["format"] == form
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tuple(t.shape) for name, t in exported.items() if "q_proj.lora_B" in name} == {(64, 6)}
    assert not [name for name in exported if "parametrizations" in name]
    to = ["--to", "adapter", "--rank", "3", "--output", str(tmp_path / "cut")]
    cut = command("export", [f"output.dir={tmp_path / 'whole'}"], *to)["cut"]
    history = json.loads((tmp_path / "whole" / "history.json").read_text())
    best = min(row["eval_loss"] for row in history if "eval_loss" in row)
    assert cut["validation_loss_before"] == pytest.approx(best, rel=1e-4)
    assert (cut["rank"], cut["rank_before"]) == (3, 6)
    assert cut["validation_loss"] != pytest.approx(best, rel=1e-4)
