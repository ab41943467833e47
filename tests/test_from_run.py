"""`adapter.from_run`: a run goes on from the adapter of an earlier one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_bert, make_tokenizer, pair_rows
from processes import adapter, losses, remove
from safetensors.torch import load_file

from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.cli import run


@pytest.fixture(scope="module")
def finished(llama_folder, reviews, tmp_path_factory) -> Path:
    """A short run on classes."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "empty.yaml").write_text("")
    short = ["model.dtype=float32", "data.max_length=32", "probe.num_batches=2", "probe.sketch_size=12"]
    short += ["adapter.rank=4", "training.max_steps=2", "training.batch_size=8"]
    asked = [*short, f"model.name={llama_folder}", f"data.train={reviews}", f"output.dir={folder / 'out'}"]
    run(["finetune", "--config", str(folder / "empty.yaml"), *asked])
    return folder / "out"


@pytest.fixture
def answers(settings, tmp_path) -> tuple[list[str], list[str]]:
    """Settings of a run on the chosen answers alone, and of one on preferences."""
    kept = [line for line in settings if not line.startswith(("data.train", "training.learning_rate", "output.dir"))]
    kept += ["training.batch_size=8", "evaluation.num_generated=2", "training.max_steps=10"]
    rows = pair_rows()
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    taught = ({"prompt": row["prompt"], "completion": row["chosen"]} for row in rows)
    (tmp_path / "taught.jsonl").write_text("".join(json.dumps(row) + "\n" for row in taught))
    first = [*kept, f"data.train={tmp_path / 'taught.jsonl'}", "model.task=causal-lm", f"output.dir={tmp_path / 'sft'}"]
    second = [*kept, f"data.train={tmp_path / 'pairs.jsonl'}", "model.task=preference"]
    return [*first, "training.learning_rate=0.1"], [*second, f"output.dir={tmp_path / 'out'}"]


def test_preferences_begin_at_the_earlier_adapter_and_compare_with_it(answers, command, tmp_path):
    first, second = answers
    command("finetune", first)
    sft = adapter(tmp_path / "sft")
    asked = [*second, f"adapter.from_run={tmp_path / 'sft'}", "training.learning_rate=0.02"]
    found = command("finetune", [*asked, "training.eval_steps=5"])
    assert f"goes on from {tmp_path / 'sft'}" in command.said
    assert found["before"]["loss"] == pytest.approx(0.69315, abs=1e-4), "the model is its own reference"
    assert found["after"]["loss"] < 0.68
    assert (
        json.loads((tmp_path / "out" / "plan.json").read_text())["groups"]
        == (json.loads((tmp_path / "sft" / "plan.json").read_text())["groups"])
    )
    moved = adapter(tmp_path / "out")
    near = sum(float((moved[name] - sft[name]).square().sum()) for name in sft)
    assert 0 < near < 0.3 * sum(float(value.square().sum()) for value in sft.values())

    again = command("evaluate", [f"output.dir={tmp_path / 'out'}"])
    assert {key: again[key] for key in found["after"]} == found["after"]

    rows = losses(tmp_path / "out")
    (tmp_path / "out" / "sgm_finetuned.pth").unlink()
    remove(tmp_path / "out" / "checkpoints" / "checkpoint-10" / "contents.json")
    assert command("finetune", [*asked, "training.eval_steps=5", "training.resume=true"])["after"] == found["after"]
    assert losses(tmp_path / "out") == rows

    remove(tmp_path / "out" / "checkpoints" / "checkpoint-10" / "contents.json")
    (tmp_path / "out" / "sgm_finetuned.pth").replace(tmp_path / "sft" / "sgm_finetuned.pth")
    with pytest.raises(UserError, match="sft holds another result than the run began with; bring it back"):
        run(
            [
                "finetune",
                "--config",
                str(tmp_path / "empty.yaml"),
                *asked,
                "training.eval_steps=5",
                "training.resume=true",
            ]
        )


@pytest.mark.parametrize("scope", ["activation", pytest.param("pool", marks=pytest.mark.slow)])
def test_before_is_what_was_after_and_a_step_of_nothing_changes_nothing(scope, settings, command, tmp_path):
    short = [*settings, f"merge.scope={scope}", "training.max_steps=3", "training.batch_size=8"]
    first = command("finetune", [*short, f"output.dir={tmp_path / 'first'}"])
    tiny = ["training.max_steps=1", "training.learning_rate=1e-9", "adapter.rank=3"]
    second = command("finetune", [*short, *tiny, f"adapter.from_run={tmp_path / 'first'}"])
    assert second["before"] == first["after"]
    before, after = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("first", "out"))
    factors = [name for name in before if "lora" in name]
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in factors)
    assert second["trainable_parameters"] == first["trainable_parameters"], "the earlier rank holds"


@pytest.fixture
def in_tmp(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (["adapter.from_run=nowhere"], "adapter.from_run=nowhere has no sgm_finetuned.pth; name the folder of a fini"),
        (["output.dir={finished}", "output.overwrite=true"], "adapter.from_run and output.dir are both"),
        (["plan=plan.json"], "give adapter.from_run or plan, not both"),
        (["adapter.parameters=300k"], "give adapter.from_run or adapter.parameters, not both"),
        (["model.name={encoder}"], "is of the base model {llama}, and this run has model.name={encoder}"),
        (["model.task=causal-lm", "data.columns={text: text}"], "has model.task=sequence-classification, and this run"),
        (["data.train={other}"], "was trained on the labels ['bad', 'good'], and the data has ['no', 'yes']"),
    ],
)
def test_what_does_not_go_on_is_one_line(change, line, finished, settings, llama_folder, in_tmp):
    make_bert().save_pretrained(in_tmp / "encoder")
    make_tokenizer().save_pretrained(in_tmp / "encoder")
    (in_tmp / "other.csv").write_text("text,label\n" + "".join(f"w{i} w1,{('yes', 'no')[i % 2]}\n" for i in range(60)))
    names = {"encoder": str(in_tmp / "encoder"), "llama": str(llama_folder), "other": str(in_tmp / "other.csv")}
    names["finished"] = str(finished)
    (in_tmp / "empty.yaml").write_text("")
    filled = []
    for part in change:
        for name, value in names.items():
            part = part.replace(f"{{{name}}}", value)
        filled.append(part)
    asked = [*settings, f"adapter.from_run={finished}", *filled]
    with pytest.raises(UserError) as caught:
        run(["finetune", "--config", str(in_tmp / "empty.yaml"), *asked])
    for name, value in names.items():
        line = line.replace(f"{{{name}}}", value)
    assert line in str(caught.value)
    assert not Path("out").exists()


def test_a_sweep_does_not_go_on_from_a_run(finished, settings, in_tmp):
    pytest.importorskip("optuna")
    (in_tmp / "empty.yaml").write_text("")
    kept = [line for line in settings if not line.startswith("training.learning_rate")]
    asked = [*kept, f"adapter.from_run={finished}", "training.learning_rate=log:1e-3..1e-1"]
    with pytest.raises(UserError, match=r"adapter.from_run is for a run; leave it out of a sweep"):
        run(["sweep", str(in_tmp / "empty.yaml"), *asked])
