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
    assert "dataset: chats: data/dataset_info.json is not there; give data.train or data.name" in notes


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
        "train[:10%]", "1 more (c/d)", "train_on_inputs", "deepspeed", "eos_token",
    ):  # fmt: skip
        assert part in notes, part
    assert (config.training.optimizer, config.training.learning_rate) == (None, None)


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
        ({"base_model": "b", "rl": "dpo"}, "rl: dpo has no counterpart: sgm import reads supervised fine-tuning"),
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
        "lora_target_modules", "eval_steps", "bf16", "gradient_checkpointing", "wandb_project", "micro_batch_size",
    ],
    llamafactory: [
        "dataset", "val_size", "finetuning_type", "lora_target", "optim", "quantization_bit", "report_to", "cutoff_len",
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
