"""Reward models: they learn from pairs to score answers, and every way to ask for a score gives the same one."""

from __future__ import annotations

import copy
import json
import math
import shutil
from io import StringIO
from pathlib import Path

import datasets
import pytest
import torch
import transformers as hf
from conftest import OTHER, adapted, llama_config, make_tokenizer, pair_rows
from processes import adapter, assert_one_run, losses, torchrun
from rich.console import Console
from torch import Tensor, nn

from sgm_finetune.base.config_file import load_config, parse_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.finetune import finetune
from sgm_finetune.data.batches import collator
from sgm_finetune.data.encoding import encode
from sgm_finetune.data.pair_encoding import scored_conversation, scored_text
from sgm_finetune.model.classes import choose_head
from sgm_finetune.train.adapters.apply import lora_layers
from sgm_finetune.train.fast.adapter_forward import use_fast_step
from sgm_finetune.train.fast.prepare import prepare_base
from sgm_finetune.train.losses import mean_reward_loss, summed_loss

PAIRS = [([9, 4, 5, 2], [9, 12, 13, 14, 2]), ([9, 10, 6, 7, 8, 4, 2], [9, 10, 12, 2]), ([15, 3, 2], [15, 13, 12, 2])]
CHATML = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <eos> ' }}{% endfor %}"


def made_batch() -> dict[str, Tensor]:
    rows = [
        {
            "input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids,
            "other_ids": other, "other_labels": other,
        }
        for ids, other in PAIRS
    ]  # fmt: skip
    return collator(make_tokenizer(), "reward")(rows)


def reward_model(**changes: object) -> hf.LlamaForSequenceClassification:
    torch.manual_seed(1)
    return hf.LlamaForSequenceClassification(llama_config(num_labels=1, **changes))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_loss_is_that_of_bradley_and_terry_of_the_scores_at_the_last_tokens():
    """A float64 oracle scores each answer alone, without padding."""
    model = reward_model(num_hidden_layers=2)
    found = mean_reward_loss(model, made_batch())
    oracle = copy.deepcopy(model).double()

    def score(ids: list[int]) -> Tensor:
        return oracle.score(oracle.model(torch.tensor([ids])).last_hidden_state[0, -1])[0]

    expected = sum(torch.log1p(torch.exp(score(worse) - score(better))) for better, worse in PAIRS) / len(PAIRS)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for (name, grad), truth in zip(gradients(model, found).items(), gradients(oracle, expected).values(), strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_the_gradients_of_the_fast_step_are_those_of_pefts_step():
    plain, batch = reward_model(), made_batch()
    fast = copy.deepcopy(plain)
    config = parse_config({"model": {"task": "reward"}}, "config.yaml")
    assert prepare_base(config, fast, ("score",), batch) == (None, [])  # type: ignore[arg-type]
    made = []
    for model in (plain, fast):
        torch.manual_seed(2)
        made.append(adapted(model, modules_to_save=["score"]))
    assert use_fast_step(made[1]) == []
    expected, found = (gradients(model, mean_reward_loss(model, batch)) for model in made)
    assert len(found) == 2 * len(lora_layers(made[0])) + 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_that_of_trl(tmp_path, monkeypatch):
    from trl import RewardConfig, RewardTrainer

    monkeypatch.chdir(tmp_path)
    model = reward_model(num_hidden_layers=2)
    rows = datasets.Dataset.from_list([{"prompt": OTHER[0], "chosen": OTHER[1], "rejected": OTHER[2]}] * 4)
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    arguments = RewardConfig(output_dir="unused", disable_tqdm=True, **settings)
    trainer = RewardTrainer(
        model=copy.deepcopy(model), args=arguments, train_dataset=rows, processing_class=make_tokenizer()
    )
    batch = made_batch()
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    torch.testing.assert_close(mean_reward_loss(model, batch), trainer.compute_loss(trainer.model, inputs))


def test_scores_far_apart_have_finite_losses():
    loss, count = summed_loss(torch.tensor([[500.0], [-500.0]]), torch.tensor([1.0, 0.0]), "reward")
    wrong, _ = summed_loss(torch.tensor([[-500.0], [500.0]]), torch.tensor([1.0, 0.0]), "reward")
    assert (float(loss), float(wrong), count) == (0.0, 1000.0, 1)


# ---------------------------------------------------------------- what a model reads


@pytest.mark.parametrize("max_length", [32, 8])
def test_an_answer_is_scored_as_it_was_trained_also_where_it_is_cut(max_length):
    tokenizer = make_tokenizer()
    rows = {"prompt": ["the film was"], "completion": [" good great fine lovely superb bright"], "rejected": [" bad"]}
    row = encode(datasets.Dataset.from_dict(rows), tokenizer, "reward", max_length).dataset[0]
    whole = rows["prompt"][0] + rows["completion"][0]
    assert scored_text(whole, tokenizer, max_length) == row["input_ids"]
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    assert len(row["input_ids"]) == min(10, max_length)


def test_a_conversation_is_scored_as_it_was_trained():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    turns = [("user", "the film"), ("assistant", "it was fine"), ("user", "and the cast"), ("assistant", "very good")]
    chosen = [{"role": role, "content": text} for role, text in turns]
    asked = [{**said, "weight": 0} if said["role"] == "assistant" else said for said in chosen[:-1]]
    rejected = [*asked, {"role": "assistant", "content": "very bad"}]
    split = datasets.Dataset.from_list([{"messages": [*asked, chosen[-1]], "rejected": rejected}])
    row = encode(split, tokenizer, "reward", 64).dataset[0]
    assert scored_conversation(chosen, None, tokenizer, 64) == row["input_ids"]
    assert scored_conversation(rejected, None, tokenizer, 64) == row["other_ids"]
    with pytest.raises(UserError, match="ends with a message by the user; end it with the assistant's answer"):
        scored_conversation(chosen[:-1], None, tokenizer, 64)


def test_a_tokenizer_without_an_end_of_sequence_token_will_do():
    """Encoders such as BERT have none."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    assert scored_text("the film was good", tokenizer, 32) == tokenizer("the film was good")["input_ids"]


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path, rows = tmp_path_factory.mktemp("data") / "pairs.jsonl", pair_rows()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    singles = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]
    path.with_name("singles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in singles))
    return path


@pytest.fixture(scope="module")
def lines(llama_folder, pairs) -> list[str]:
    return [
        f"model.name={llama_folder}", "model.task=reward", "model.dtype=float32", f"data.train={pairs}",
        "data.max_length=32", "probe.num_batches=4", "probe.batch_size=8", "probe.sketch_size=12", "adapter.rank=4",
        "training.max_steps=12", "training.batch_size=8", "training.eval_steps=6", "training.learning_rate=0.03",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(lines, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run, and its metrics."""
    out = tmp_path_factory.mktemp("runs") / "out"
    return out, finetune(load_config(None, [*lines, f"output.dir={out}"]), Console(file=StringIO()))


@pytest.fixture
def run(lines, tmp_path) -> list[str]:
    return [*lines, f"output.dir={tmp_path / 'out'}"]


def test_a_run_scores_the_chosen_answers_higher(trained):
    out, metrics = trained
    before, after = metrics["before"], metrics["after"]
    assert before["loss"] == pytest.approx(math.log(2), abs=0.1), "a new head knows nothing"
    assert after["reward_accuracy"] > 0.9 > before["reward_accuracy"]
    assert after["reward_margin"] > 1
    assert after["loss"] < 0.3
    for name in ("reward_accuracy", "reward_margin"):
        low, high = after["intervals"][name]
        assert low <= after[name] <= high
    assert metrics["improved"]
    page = (out / "report.html").read_text()
    for words in ("Reward accuracy", "Reward margin", "rejected: ", "AutoModelForSequenceClassification", "--input"):
        assert words in page
    assert "sgm chat" not in page
    mended = json.loads((out / "examples.json").read_text())
    assert mended["num_compared"] == 18
    assert mended["counts"]["mended"] > 0


def test_evaluating_exporting_and_asking_give_the_same_scores(trained, command, pairs, tmp_path):
    out, metrics = trained
    again = command("evaluate", [f"output.dir={out}"])
    assert {key: again[key] for key in metrics["after"]} == metrics["after"]

    row = json.loads(pairs.read_text().splitlines()[0])
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"prompt": row["prompt"], "completion": row["rejected"]}) + "\n")
    asked = ["--prompt", row["prompt"] + row["chosen"], "--input", str(file)]
    scores = [one["answer"] for one in command("generate", [f"output.dir={out}"], *asked)["rows"]]

    merged = tmp_path / "merged"
    command("export", [f"output.dir={out}"], "--to", "merged", "--output", str(merged))
    model = hf.AutoModelForSequenceClassification.from_pretrained(merged)
    tokenizer = hf.AutoTokenizer.from_pretrained(merged)
    assert (model.config.num_labels, model.config.id2label, model.config.pad_token_id) == (1, {0: "reward"}, 0)
    texts = [row["prompt"] + row[side] + tokenizer.eos_token for side in ("chosen", "rejected")]
    with torch.no_grad():
        found = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.squeeze(-1)
    torch.testing.assert_close(found, torch.tensor(scores), rtol=1e-4, atol=1e-4)
    assert scores[0] > scores[1]


def test_both_answers_of_a_pair_are_shown(run, command):
    example = command("data", run)["examples"][0]
    assert example["parts"][0] == [example["rejected"][0][0], False], "one prompt"
    assert [learnt for _, learnt in example["rejected"]] == [False, True]
    assert "chosen: " in command.said


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(run, command, tmp_path):
    whole, out = command("finetune", run), tmp_path / "out"
    expected, rows = adapter(out), losses(out)
    shutil.rmtree(out / "checkpoints" / "checkpoint-12")
    for name in ("metrics.json", "sgm_finetuned.pth"):
        (out / name).unlink()
    assert command("finetune", [*run, "training.resume=true"])["after"] == whole["after"]
    assert losses(out) == rows
    assert all((adapter(out)[name] == value).all() for name, value in expected.items())


@pytest.mark.slow
def test_parts_of_a_batch_checkpointing_and_pefts_step_are_the_step(run, command, tmp_path):
    run = [*run, "training.learning_rate=1e-3", "training.max_steps=5"]
    command("finetune", run)
    for line in ("training.step=peft", "training.checkpointing=true", "training.micro_batch_size=2"):
        command("finetune", [*run, line, f"output.dir={tmp_path / line}"])
        assert_one_run(tmp_path / "out", tmp_path / line)


@pytest.mark.slow
def test_two_processes_are_one(run, command, tmp_path):
    run, two = [*run, "training.learning_rate=1e-3", "training.max_steps=5"], tmp_path / "two"
    (tmp_path / "empty.yaml").write_text("")
    torchrun("src/finetune.py", "--config", str(tmp_path / "empty.yaml"), *run, f"output.dir={two}")
    command("finetune", run)
    assert_one_run(tmp_path / "out", two)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["model.quantization=nf4", "training.optimizer=adamw", "training.learning_rate=auto", "merge.scope=layers"],
        ["merge.scope=pool", "training.early_stopping_patience=1"],
        ["adapter.kind=full", "training.learning_rate=3e-3"],
        ["model.name=BERT", "data.max_length=32"],
    ],
    ids=lambda more: more[0],
)
def test_other_ways_to_train_learn_too_and_evaluate_to_the_same_digits(more, lines, command, bert_folder, tmp_path):
    if "adapter.kind=full" in more:
        lines = [line for line in lines if not line.startswith(("adapter.", "merge.", "probe."))]
    more = [line.replace("BERT", str(bert_folder)) for line in more]
    found = command("finetune", [*lines, *more, f"output.dir={tmp_path / 'out'}"])
    assert found["after"]["reward_accuracy"] > 0.8
    assert found["after"]["loss"] < found["before"]["loss"]
    again = command("evaluate", [f"output.dir={tmp_path / 'out'}"])
    assert {key: again[key] for key in found["after"]} == found["after"]
    command("export", [f"output.dir={tmp_path / 'out'}"], "--to", "merged", "--output", str(tmp_path / "merged"))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("values", "said_so"),
    [
        ({"data": {"packing": True}}, "data.packing=true does not go with model.task=reward"),
        ({"preference": {"loss": "ipo"}}, "preference.loss needs model.task=preference, not reward"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(values, said_so):
    with pytest.raises(UserError, match=said_so):
        parse_config({"model": {"task": "reward"}, **values}, "config.yaml")


@pytest.mark.parametrize(
    ("changes", "said_so"),
    [
        (
            ["data.train=SINGLES"],
            "learns from pairs (chosen, rejected), and singles.jsonl has single answers with a la",
        ),
        (["data.train=REVIEWS"], "its columns look like model.task=sequence-classification"),
        (["model.name=MARIAN"], "model.task=reward does not fit model.name="),
        (
            ["data.columns={completion: chosen}"],
            "model.task=reward has no role `completion`; its roles are chosen, rej",
        ),
    ],
)
def test_data_and_models_that_do_not_fit_are_refused(changes, said_so, run, pairs, reviews, tmp_path, capfd):
    from sgm_finetune.commands.cli import main

    marian = tmp_path / "marian"
    hf.MarianConfig(vocab_size=32, d_model=16).save_pretrained(marian)
    make_tokenizer().save_pretrained(marian)
    named = {"SINGLES": pairs.with_name("singles.jsonl"), "REVIEWS": reviews, "MARIAN": marian}
    for name, path in named.items():
        changes = [line.replace(name, str(path)) for line in changes]
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--config", str(tmp_path / "empty.yaml"), *run, *changes])
    said = capfd.readouterr().err
    assert caught.value.code == 2
    assert said_so in " ".join(said.split())


@pytest.mark.parametrize(
    ("name", "options", "said_so"),
    [
        ("export", ["--to", "gguf"], "--to gguf needs model.task=causal-lm, and this is reward"),
        ("chat", [], "model.task is reward; take sgm generate"),
        ("generate", ["--prompt", '[{"role": "user", "content": "the film"}]'], "ends with a message by the user"),
        ("generate", ["--prompt", '[{"role": "user"'], "which is not JSON"),
        ("generate", ["--input", "PAIRS"], "has none of the columns messages, completion, text"),
    ],
)
def test_what_a_reward_model_cannot_do_is_refused_before_it_is_loaded(
    name, options, said_so, trained, pairs, capfd, monkeypatch
):
    from sgm_finetune.commands.cli import main

    monkeypatch.setattr("sgm_finetune.results.load.load_base_weights", lambda *_: pytest.fail("loaded"))
    options = [str(pairs) if option == "PAIRS" else option for option in options]
    with pytest.raises(SystemExit) as caught:
        main([name, f"output.dir={trained[0]}", *options])
    assert caught.value.code == 2
    assert said_so in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("architecture", "num_rows", "said"),
    [
        ("BertModel", 2, "a new head for rewards, which scores at random before it is trained"),
        ("BertForSequenceClassification", 3, "a new head for rewards, which scores at random before it is trained"),
        ("BertForSequenceClassification", 1, "the model's own is kept: its row is the reward"),
    ],
)
def test_the_head_of_a_reward_model_is_kept_and_another_is_not(architecture, num_rows, said):
    config = hf.BertConfig(num_labels=num_rows, architectures=[architecture])
    chosen = choose_head((), config, "reward")
    assert (chosen.line, chosen.labels, chosen.is_new) == (said, (), False)
