"""`sgm import`: configurations of Axolotl and LLaMA-Factory become ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.cli import main
from sgm_finetune.commands.foreign import axolotl, llamafactory
from sgm_finetune.commands.import_config import import_config, translate
from sgm_finetune.data.splits import load_splits

QLORA = """
base_model: org/base
model_type: AutoModelForCausalLM
load_in_4bit: true
datasets:
  - path: org/instructions
    type: alpaca
val_set_size: 0.05
output_dir: ./out
adapter: qlora
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
fp16:
gradient_checkpointing: true
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
neftune_noise_alpha: 5
weight_decay: 0.01
wandb_project: mine
"""
FACTORY = {
    "model_name_or_path": "org/base", "stage": "sft", "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all",
    "dataset": "chats", "template": "llama3", "cutoff_len": 1024, "max_samples": 500, "output_dir": "saves/x",
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "learning_rate": 1e-4, "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True, "quantization_bit": 4, "report_to": "none",
    "use_dora": True,
}  # fmt: skip


def write(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def translated(tmp_path: Path, values: dict):
    imported = translate(write(tmp_path / "theirs.yml", values))
    return imported.config, "\n".join(imported.notes)


def test_an_axolotl_file_becomes_a_configuration_that_loads(tmp_path, capfd):
    source, path = tmp_path / "qlora.yml", tmp_path / "config.yaml"
    source.write_text(QLORA)
    with pytest.raises(SystemExit) as ended:
        main(["import", str(source), str(path)])
    assert ended.value.code == 0
    config = load_config(path)
    assert (config.model.name, config.model.quantization, config.model.task) == ("org/base", "nf4", "causal-lm")
    assert (config.data.name, config.data.format, config.data.max_length) == ("org/instructions", "alpaca", 4096)
    assert (config.data.packing, config.data.validation_fraction) == (True, 0.05)
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (32, 16, 0.05)
    training = config.training
    assert (training.batch_size, training.micro_batch_size, training.epochs) == (8, 2, 4)
    assert (training.optimizer, training.learning_rate, training.schedule) == ("adamw_8bit", 2e-4, "cosine")
    assert (training.warmup_fraction, training.weight_decay, training.checkpointing) == (0.1, 0.01, True)
    assert training.report_to == ["wandb"]
    said = capfd.readouterr().out
    assert "neftune_noise_alpha: 5 has no counterpart" in said
    assert "# - neftune_noise_alpha: 5 has no counterpart" in path.read_text()
    assert "not needed evals_per_epoch, flash_attention, model_type" in said


def test_a_llama_factory_file_finds_its_data_in_dataset_info(tmp_path):
    (tmp_path / "data").mkdir()
    described = {
        "file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "talk", "system": "sys"},
        "tags": {"role_tag": "role", "content_tag": "content"},
    }  # fmt: skip
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"chats": described}))
    config, notes = translated(tmp_path, FACTORY)
    assert config.data.train == str(tmp_path / "data" / "chats.json")
    assert (config.data.format, config.data.columns) == ("chat", {"messages": "talk", "system": "sys"})
    assert (config.data.max_length, config.data.num_train) == (1024, 500)
    assert (config.model.quantization, config.adapter.rank, config.adapter.alpha) == ("nf4", 8, 16)
    assert (config.training.batch_size, config.training.micro_batch_size) == (16, 2)
    assert (config.training.optimizer, config.training.learning_rate) == ("adamw", 1e-4)
    assert "use_dora: true has no counterpart" in notes
    assert "template: llama3" in notes


def test_a_data_set_that_dataset_info_does_not_name_is_said(tmp_path):
    config, notes = translated(tmp_path, FACTORY)
    assert config.data.train is None
    assert "dataset chats: data/dataset_info.json is not there; give data.train or data.name" in notes


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"path": "rows.jsonl", "type": "completion", "field": "body"}, ("rows.jsonl", "text", {"text": "body"})),
        ({"path": "json", "data_files": "a.jsonl", "type": "alpaca"}, ("a.jsonl", "alpaca", {})),
        ({"path": "c.jsonl", "type": "chat_template"}, ("c.jsonl", "chat", {})),
        ({"path": "c.jsonl", "type": "sharegpt"}, ("c.jsonl", "sharegpt", {})),
        (
            {
                "path": "c.json", "type": "chat_template", "field_messages": "conversations",
                "message_field_role": "from",
            },
            ("c.json", "sharegpt", {}),
        ),
        (
            {"path": "c.json", "type": {"field_instruction": "q", "field_output": "a"}},
            ("c.json", "alpaca", {"instruction": "q", "output": "a"}),
        ),
    ],
)  # fmt: skip
def test_the_formats_of_axolotl_data(entry, expected, tmp_path):
    config, _ = translated(tmp_path, {"base_model": "org/base", "adapter": "lora", "datasets": [entry]})
    assert (config.data.train, config.data.format, config.data.columns) == expected


def test_what_cannot_be_carried_over_is_noted(tmp_path):
    config, notes = translated(
        tmp_path,
        {
            "base_model": "b", "adapter": "lora", "lora_target_modules": ["q_proj", "v_proj"], "optimizer": "lion_8bit",
            "learning_rate": 1e-5, "lr_scheduler": "one_cycle", "warmup_steps": 10, "chat_template": "chatml",
            "datasets": [{"path": "a/b", "type": "alpaca", "split": "train[:10%]"}, {"path": "c/d"}],
            "train_on_inputs": True, "deepspeed": "zero3.json", "special_tokens": {"eos_token": "<end>"},
        },
    )  # fmt: skip
    for part in (
        "target modules q_proj, v_proj", "optimizer lion_8bit", "schedule one_cycle", "warmup_steps: 10", "chatml",
        "datasets a/b: split: train[:10%]", "train_on_inputs", "deepspeed", "eos_token",
    ):  # fmt: skip
        assert part in notes, part
    assert [(entry.name, entry.format) for entry in config.data.mixture] == [("a/b", "alpaca"), ("c/d", "text")]
    assert (config.training.optimizer, config.training.learning_rate) == (None, None)


CHAT = [{"role": "user", "content": "Why?"}]
PAIR = {"chosen": "Because it is so.", "rejected": "No."}
AS_MESSAGES = {name: {"role": "assistant", "content": text} for name, text in PAIR.items()}
AS_CHATS = {name: [*CHAT, message] for name, message in AS_MESSAGES.items()}
SHAREGPT = {name: {"from": "gpt", "value": text} for name, text in PAIR.items()}
VERDICT = {"completion": "Because it is so.", "label": True}


def rows_of(folder: Path, row: dict, name: str = "rows.jsonl") -> Path:
    """A file of twelve rows like `row`, which differ in the answer."""
    path, end = (
        folder / name,
        "completion" if "completion" in row else next(key for key in row if "chosen" in key or key == "win"),
    )
    path.write_text("".join(json.dumps(numbered(row, end, number)) + "\n" for number in range(12)))
    return path


def numbered(row: dict, key: str, number: int) -> dict:
    return {**row, key: json.loads(json.dumps(row[key]).replace("so.", f"so, {number}."))}


@pytest.mark.parametrize(
    ("row", "given", "entry", "expected"),
    [
        ({"question": "Why?", **PAIR}, {"rl": "dpo", "rl_beta": 0.3}, {"type": "chatml.intel"}, ("dpo", 0.3)),
        ({"input": "Why?", **PAIR}, {"rl": "ipo"}, {"type": "llama3.icr"}, ("ipo", 0.1)),
        ({"prompt": "Why?", **AS_CHATS}, {"rl": "orpo", "orpo_alpha": 0.2}, {"type": "chatml.ultra"}, ("orpo", 0.2)),
        (AS_CHATS, {"rl": "dpo", "dpo_beta": 0.2}, {"type": "chat_template.argilla_chat"}, ("dpo", 0.2)),
        ({"messages": CHAT, **AS_MESSAGES}, {"rl": "simpo"}, {"type": "chat_template.default"}, ("simpo", 2.0)),
        (
            {"talk": CHAT, "win": AS_MESSAGES["chosen"], "lose": AS_MESSAGES["rejected"]}, {"rl": "dpo"},
            {"type": "chat_template", "field_messages": "talk", "field_chosen": "win", "field_rejected": "lose"},
            ("dpo", 0.1),
        ),
        ({"question": "Why?", **VERDICT}, {"rl": "kto"}, {"type": "chatml.intel"}, ("kto", 0.1)),
        (
            {"q": "Why?", "win": "It is so.", "lose": "No."}, {"rl": "dpo"},
            {"type": {"field_prompt": "q", "field_chosen": "win", "field_rejected": "lose"}}, ("dpo", 0.1),
        ),
        ({"input": "Why?", **PAIR}, {"reward_model": True}, {"type": "bradley_terry.chat_template"}, None),
    ],
)  # fmt: skip
def test_preferences_of_axolotl_become_a_configuration_that_reads_the_data(row, given, entry, expected, tmp_path):
    path = rows_of(tmp_path, row)
    config, _ = translated(tmp_path, {"base_model": "b", **given, "datasets": [{"path": str(path), **entry}]})
    assert config.model.task == ("reward" if expected is None else "preference")
    if expected is not None:
        assert (config.preference.loss, config.preference.strength) == expected
    splits = load_splits(config.data, config.model.task)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 12


@pytest.mark.parametrize(
    ("row", "described", "given", "loss"),
    [
        (
            {"conversations": [{"from": "human", "value": "Why?"}], **SHAREGPT},
            {"formatting": "sharegpt", "ranking": True,
             "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
            {"stage": "dpo", "pref_loss": "simpo"}, "simpo",
        ),
        (
            {"instruction": "Why?", **PAIR},
            {"ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}},
            {"stage": "rm"}, None,
        ),
        (
            {"instruction": "Why?", **VERDICT},
            {"columns": {"prompt": "instruction", "response": "completion", "kto_tag": "label"}},
            {"stage": "kto", "kto_chosen_weight": 0.5}, "kto",
        ),
    ],
)  # fmt: skip
def test_preferences_of_llama_factory_become_a_configuration_that_reads_the_data(row, described, given, loss, tmp_path):
    (tmp_path / "data").mkdir()
    rows_of(tmp_path / "data", row)
    info = {"mine": {"file_name": "rows.jsonl", **described}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    config, _ = translated(tmp_path, {**FACTORY, "dataset": "mine", **given})
    if loss is not None:
        assert (config.model.task, config.preference.loss) == ("preference", loss)
        assert config.preference.strength == 0.1  # theirs, also for simpo
    splits = load_splits(config.data, config.model.task)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 12
    wrong = {"file_name": "rows.jsonl", **described, "ranking": not described.get("ranking", False)}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": wrong}))
    with pytest.raises(UserError, match=r"and stage: .* does not (need|take) that"):
        translated(tmp_path, {**FACTORY, "dataset": "mine", **given})


def test_several_data_sets_become_a_mixture_with_their_shares(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        rows_of(tmp_path / "data", {"instruction": name, "completion": "It is so."}, f"{name}.jsonl")
    columns = {"columns": {"response": "completion"}}
    info = {name: {"file_name": f"{name}.jsonl", **columns} for name in ("a", "b")}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    mixed = {"dataset": "a, b", "mix_strategy": "interleave_over", "interleave_probs": "0.75, 0.25", "max_samples": 8}
    config, notes = translated(tmp_path, {**FACTORY, **mixed})
    assert [(Path(str(entry.train)).name, entry.weight) for entry in config.data.mixture] == [
        ("a.jsonl", 0.75), ("b.jsonl", 0.25),
    ]  # fmt: skip
    assert config.data.num_train == 16
    assert "max_samples: 8 of each data set" in notes
    config, notes = translated(tmp_path, {**FACTORY, "dataset": "a,c"})
    assert [Path(str(entry.train)).name for entry in config.data.mixture] == ["a.jsonl"]
    assert "dataset c: " in notes
    assert "dataset_info.json does not name it; give data.train or data.name" in notes


@pytest.mark.parametrize(
    "theirs",
    [
        {"base_model": "b", "datasets": [{"path": "a/b"}], "optimizer": "adafactor", "lora_r": None},
        {"model_name_or_path": "b", "dataset": "x", "finetuning_type": "full", "optim": "adafactor", "lora_rank": 8},
    ],
)
def test_training_all_weights_is_training_whole_matrices(theirs, tmp_path):
    config, notes = translated(tmp_path, {**theirs, "learning_rate": 1e-5})
    assert (config.adapter.kind, config.training.optimizer) == ("full", "adafactor")
    assert config.training.learning_rate == 1e-5
    assert "adapter.kind=full trains the matrices of the blocks" in notes


def test_warm_up_steps_become_a_fraction_of_known_steps(tmp_path):
    config, _ = translated(
        tmp_path,
        {"base_model": "b", "adapter": "lora", "datasets": [{"path": "a/b"}], "max_steps": 200, "warmup_steps": 10},
    )
    assert (config.training.max_steps, config.training.warmup_fraction) == (200, 0.05)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"base_model": "b", "rl": "grpo"}, "rl: grpo has no counterpart: sgm import reads supervised fine-tuning"),
        ({"base_model": "b", "process_reward_model": True}, "process_reward_model: true has no counterpart"),
        ({"model_name_or_path": "b", "stage": "dpo", "pref_loss": "hinge"}, "pref_loss: hinge has no counterpart"),
        (
            {"model_name_or_path": "b", "dataset": "x,y", "mix_strategy": "interleave_over", "interleave_probs": "1"},
            "`interleave_probs`: 1 is not one number for each of 2 data sets",
        ),
        ({"model_name_or_path": "b", "stage": "ppo"}, "stage: ppo has no counterpart"),
        ({"base_model": "b", "adapter": "llama-adapter"}, "adapter: llama-adapter has no counterpart"),
        ({"base_model": "b", "adapter": "lora"}, "it names no data; give datasets a path"),
        ({"model": "b"}, "it has neither base_model (Axolotl) nor model_name_or_path (LLaMA-Factory)"),
        ({"base_model": "b", "adapter": "lora", "lora_r": "many", "datasets": [{"path": "a/b"}]}, "adapter.rank"),
        ({"base_model": "b", "micro_batch_size": "many", "datasets": [{"path": "a/b"}]}, "'many' is not a number"),
        ({"base_model": "b", "datasets": [{"path": "a/b"}], "load_in_4bit": "maybe"}, "is not true or false"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(values, line, tmp_path):
    source = write(tmp_path / "theirs.yml", values)
    with pytest.raises(UserError) as error:
        import_config(source, tmp_path / "config.yaml")
    assert line in str(error.value)
    assert str(source) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "config.yaml").exists()


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(UserError, match="exists; name another file"):
        import_config(tmp_path / "theirs.yml", tmp_path / "config.yaml")


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"No file .*theirs.yml; give a configuration of Axolotl or LLaMA-Factory"):
        translate(tmp_path / "theirs.yml")


VALUES = st.recursive(
    st.sampled_from(["true", "false", "auto", "3", "0.5", "-1", "1e999", "a/b", "x.json", "", "null"]) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["path", "type", "role", "columns"]), inner)
    ),
    max_leaves=4,
)
KEYS = {
    axolotl: [
        "datasets", "test_datasets", "val_set_size", "adapter", "optimizer", "warmup_steps", "special_tokens", "fsdp",
        "rl", "reward_model", "rl_beta",
        "lora_target_modules", "eval_steps", "bf16", "gradient_checkpointing", "wandb_project", "micro_batch_size",
    ],
    llamafactory: [
        "dataset", "val_size", "finetuning_type", "lora_target", "optim", "quantization_bit", "report_to", "cutoff_len",
        "stage", "pref_loss", "pref_beta", "interleave_probs",
        "dataset_dir", "per_device_train_batch_size", "warmup_ratio", "lora_rank",
    ],
}  # fmt: skip


@pytest.mark.parametrize("program", KEYS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_file_is_translated_or_refused_in_one_line(program, data, tmp_path_factory):
    values = data.draw(st.dictionaries(st.sampled_from(KEYS[program]), VALUES, max_size=5))
    source = write(tmp_path_factory.getbasetemp() / "any.yml", {program.MODEL_KEY: "b"} | values)
    try:
        translate(source)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
