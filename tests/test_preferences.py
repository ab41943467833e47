"""Whole runs on preferences: they learn, resume bit for bit, evaluate to the same digits and answer as decoders do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import pair_rows
from processes import adapter, assert_one_run, losses, torchrun
from rich.console import Console

from sgm_finetune.base.config_file import load_config, parse_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.requests import ShipRequest
from sgm_finetune.commands.ship import ship


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path, rows = tmp_path_factory.mktemp("data") / "pairs.jsonl", pair_rows()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdicts = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    path.with_name("verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in verdicts))
    return path


@pytest.fixture
def run(settings, pairs) -> list[str]:
    given = [line for line in settings if not line.startswith("data.train")]
    return [
        *given, f"data.train={pairs}", "model.task=preference", "training.batch_size=8", "training.eval_steps=10",
        "evaluation.num_generated=2",
    ]  # fmt: skip


def test_a_run_prefers_the_chosen_answers_and_resumes_and_evaluates_to_the_same_digits(run, command, tmp_path):
    whole = command("finetune", run)
    before, after = whole["before"], whole["after"]
    assert before["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert "reward_accuracy" not in before, "the base has no rewards"
    assert after["preference_accuracy"] > 0.9 > before["preference_accuracy"]
    assert after["reward_accuracy"] > 0.9
    assert after["loss"] < 0.6
    assert after["preference_margin"] > before["preference_margin"]
    assert after["num_examples"] == 18
    assert after["answer_tokens"] > 0
    for name in ("preference_accuracy", "preference_margin", "reward_accuracy", "reward_margin"):
        low, high = after["intervals"][name]
        assert low <= after[name] <= high
    assert whole["seconds"]["reference"] > 0

    out = tmp_path / "out"
    page = (out / "report.html").read_text()
    for words in ("Preference accuracy", "Reward margin", "Length of answers", "sgm chat"):
        assert words in page
    assert len(json.loads((out / "prompts.json").read_text())["prompts"]) == 8
    again = command("evaluate", [run[-1], f"output.dir={out}"])
    assert {key: again[key] for key in after} == after

    expected, rows = adapter(out), losses(out)
    for path in [*out.glob("*.json*"), *out.glob("checkpoints/checkpoint-20/*"), out / "sgm_finetuned.pth"]:
        if path.name in ("metrics.json", "sgm_finetuned.pth") or path.parent.name == "checkpoint-20":
            path.unlink()
    (out / "checkpoints" / "checkpoint-20").rmdir()
    resumed = command("finetune", [*run, "training.resume=true"])
    assert resumed["after"] == after
    assert losses(out) == rows
    assert all((adapter(out)[name] == value).all() for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_ship_compares_preferences_on_the_same_pairs(loss, run, command, pairs, tmp_path):
    data = [f"data.train={pairs.with_name('verdicts.jsonl')}"] if loss == "kto" else []
    metrics = command("finetune", [*run, *data, f"preference.loss={loss}"])
    found = ship(load_config(None, [f"output.dir={tmp_path / 'out'}"]), [], ShipRequest(), Console(quiet=True))
    task = found["checks"][0]
    assert task["name"] == "preference accuracy"
    for when in ("before", "after"):
        assert task[when] == pytest.approx(metrics[when]["preference_accuracy"])
    assert {"text", "answers"} <= {check["subject"] for check in found["checks"]}


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ipo", "orpo", "simpo", "kto", "apo_zero", "apo_down"])
def test_every_loss_learns(loss, run, command, pairs):
    data = [f"data.train={pairs.with_name('verdicts.jsonl')}"] if loss == "kto" else []
    rate = ["training.learning_rate=0.3"] if loss == "kto" else []
    found = command("finetune", [*run, *data, *rate, f"preference.loss={loss}"])
    assert found["after"]["preference_accuracy"] > found["before"]["preference_accuracy"] + 0.1
    assert found["after"]["loss"] < found["before"]["loss"]
    assert ("reward_accuracy" in found["after"]) == (loss not in ("orpo", "simpo"))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_parts_of_a_batch_are_the_batch(loss, run, command, pairs, tmp_path):
    """Gradients accumulate to the exact mean; KTO's distance from the base is that of the whole batch."""
    data = [f"data.train={pairs.with_name('verdicts.jsonl')}"] if loss == "kto" else []
    run = [*run, *data, f"preference.loss={loss}", "training.learning_rate=1e-3", "training.max_steps=5"]
    command("finetune", [*run, f"output.dir={tmp_path / 'whole'}"])
    command("finetune", [*run, f"output.dir={tmp_path / 'parts'}", "training.micro_batch_size=2"])
    assert_one_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_two_processes_are_one(loss, run, command, pairs, tmp_path):
    data = [f"data.train={pairs.with_name('verdicts.jsonl')}"] if loss == "kto" else []
    run = [*run, *data, f"preference.loss={loss}", "training.learning_rate=1e-3", "training.max_steps=5"]
    (tmp_path / "empty.yaml").write_text("")
    two = tmp_path / "two"
    torchrun("src/finetune.py", "--config", str(tmp_path / "empty.yaml"), *run, f"output.dir={two}")
    command("finetune", run)
    assert_one_run(tmp_path / "out", two)


@pytest.mark.slow
def test_the_fast_step_is_the_step(run, command, tmp_path):
    """As PEFT and Transformers compute it from all logits; and with checkpointing."""
    run = [*run, "training.learning_rate=1e-3", "training.max_steps=5"]
    command("finetune", run)
    for name, line in (("peft", "training.step=peft"), ("kept", "training.checkpointing=true")):
        command("finetune", [*run, line, f"output.dir={tmp_path / name}"])
        assert_one_run(tmp_path / "out", tmp_path / name)


@pytest.mark.slow
def test_4_bits_adamw_and_a_rate_by_trials(run, command):
    run = [line for line in run if not line.startswith("training.learning_rate")]
    found = command(
        "finetune",
        [
            *run,
            "model.quantization=nf4",
            "training.optimizer=adamw",
            "training.learning_rate=auto",
            "merge.scope=layers",
        ],
    )
    assert found["rate_trials"]["chosen"] > 0
    assert found["after"]["loss"] < found["before"]["loss"]


def test_a_pair_is_shown_with_what_is_learnt_of_both_answers(run, command):
    shown = command("data", run)
    example = shown["examples"][0]
    assert example["parts"][0] == [example["rejected"][0][0], False], "one prompt"
    assert [learnt for _, learnt in example["rejected"]] == [False, True]
    assert "chosen: " in command.said
    assert "rejected: " in command.said


@pytest.mark.parametrize(
    ("values", "said_so"),
    [
        ({"data": {"packing": True}}, "data.packing=true does not go with model.task=preference"),
        ({"model": {"task": "causal-lm"}, "preference": {"beta": 0.2}}, "preference.beta needs model.task=preference"),
        ({"preference": {"gamma": 0.2}}, "preference.gamma is for preference.loss=simpo, not dpo"),
        (
            {"preference": {"loss": "ipo", "desirable_weight": 2}},
            "preference.desirable_weight is for preference.loss=kto",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(values, said_so):
    with pytest.raises(UserError, match=said_so):
        parse_config({"model": {"task": "preference"}, **values}, "config.yaml")


@pytest.mark.parametrize(
    ("lines", "said_so"),
    [
        (["preference.loss=kto"], "preference.loss=kto learns from single answers"),
        (["data.train=VERDICTS"], "preference.loss=dpo learns from pairs"),
        (["model.name=BERT"], "model.task=preference does not fit model.name="),
        (["data.train=REVIEWS"], "has no column"),
    ],
)
def test_data_and_models_that_do_not_fit_are_refused(lines, said_so, run, pairs, bert_folder, reviews, tmp_path, capfd):
    from sgm_finetune.commands.cli import main

    named = {"VERDICTS": pairs.with_name("verdicts.jsonl"), "BERT": bert_folder, "REVIEWS": reviews}
    lines = [
        line.partition("=")[0] + "=" + str(named.get(line.partition("=")[2], line.partition("=")[2])) for line in lines
    ]
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--config", str(tmp_path / "empty.yaml"), *run, *lines])
    said = capfd.readouterr().err
    assert caught.value.code == 2
    assert said_so in " ".join(said.split())


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_whole_matrices_learn_preferences(loss, run, command, pairs, tmp_path):
    """The base of the reference is the model before it changes, also when the result is evaluated."""
    data = [f"data.train={pairs.with_name('verdicts.jsonl')}"] if loss == "kto" else []
    run = [line for line in run if not line.startswith(("adapter.", "merge.", "probe.", "training.optimizer"))]
    whole = ["adapter.kind=full", "training.learning_rate=3e-3", f"preference.loss={loss}", *data]
    found = command("finetune", [*run, *whole])
    assert found["after"]["preference_accuracy"] > found["before"]["preference_accuracy"] + 0.1
    assert found["after"]["loss"] < found["before"]["loss"]
    again = command("evaluate", [run[-1], f"output.dir={tmp_path / 'out'}"])
    assert {key: again[key] for key in found["after"]} == found["after"]
