"""Axolotl's configuration, translated into ours."""

from __future__ import annotations

from typing import Any

from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.foreign.translation import (
    NO_TRAINING,
    Translation,
    describe,
    set_data_source,
    set_format,
    set_pair_columns,
    set_sources,
    translate_evaluation,
    translate_held_out,
    translate_preference,
    translate_steps,
    translate_targets,
    translate_template,
    translate_trust,
    translate_whole,
)

NAME, MODEL_KEY = "Axolotl", "base_model"

_UNNEEDED = (
    "attn_implementation", "base_model_config", "conversation", "dataloader_num_workers", "dataloader_pin_memory",
    "dataset_prepared_path", "dataset_processes", "debug", "eager_attention", "eval_batch_size",
    "eval_max_new_tokens", "eval_sample_packing", "eval_strategy", "eval_table_size", "flash_attention",
    "flash_attn_cross_entropy", "flash_attn_fuse_mlp", "flash_attn_fuse_qkv", "flash_attn_rms_norm", "flex_attention",
    "gradient_checkpointing_kwargs", "group_by_length", "is_llama_derived_model", "is_mistral_derived_model",
    "liger_fused_linear_cross_entropy", "liger_glu_activation", "liger_layer_norm", "liger_rms_norm", "liger_rope",
    "load_best_model_at_end", "local_rank", "logging_steps", "lora_fan_in_fan_out", "lora_mlp_kernel",
    "lora_o_kernel", "lora_qkv_kernel", "low_cpu_mem_usage", "mlflow_experiment_name", "model_type",
    "pad_to_sequence_len", "plugins", "s2_attention", "save_first_step", "save_only_model", "save_safetensors",
    "save_steps", "save_strategy", "saves_per_epoch", "sdp_attention", "shuffle_merged_datasets",
    "strict", "tf32", "tokenizer_type", "tokenizer_use_fast", "torch_compile", "wandb_entity", "wandb_log_model",
    "wandb_mode", "wandb_name", "wandb_run_id", "wandb_watch", "xformers_attention",
)  # fmt: skip
"""Keys without an effect on what is learnt: SGM decides these by itself, or does so always."""


def translate(t: Translation) -> None:
    """Translates every key of `t`. Raises UserError for a training that SGM does not do."""
    loss = _translate_task(t)
    t.move("base_model", "model.name")
    t.move("revision_of_model", "model.revision")
    translate_trust(t)
    _translate_precision(t)
    _translate_adapter(t)
    _translate_data(t, loss)
    translate_steps(t, "optimizer", "lr_scheduler", "num_epochs", "micro_batch_size", 2e-4, "cosine")
    t.move("early_stopping_patience", "training.early_stopping_patience")
    translate_evaluation(t, t.number("eval_steps"))
    t.drop("evals_per_epoch")
    checkpointing = t.text("gradient_checkpointing")
    if checkpointing is not None and str(checkpointing).lower() != "false":
        t.set("training.checkpointing", "offload" if "offload" in str(checkpointing) else True)
    if t.flag("auto_resume_from_checkpoints"):
        t.set("training.resume", True)
    _translate_output(t)
    t.drop(*_UNNEEDED)
    t.finish()


def _translate_task(t: Translation) -> str | None:
    """model.task, and the loss of preferences: one of `preference.loss`, "reward", or None for a language model."""
    if t.flag("process_reward_model"):
        raise UserError(f"process_reward_model: true {NO_TRAINING}")
    kind = str(t.text("rl") or "false").lower()
    if t.flag("reward_model"):
        t.set("model.task", "reward")
        return "reward"
    if kind == "false":
        t.set("model.task", "causal-lm")
        return None
    if kind not in ("dpo", "ipo", "orpo", "simpo", "kto"):
        raise UserError(f"rl: {kind} {NO_TRAINING}")
    beta, older, odds = t.number("rl_beta"), t.number("dpo_beta"), t.number("orpo_alpha")
    beta = odds if kind == "orpo" and odds is not None else older if beta is None else beta
    numbers = {}
    if kind == "simpo":
        numbers = {"gamma": t.number("simpo_gamma")}
    if kind == "kto":
        numbers = {f"{side}_weight": t.number(f"kto_{side}_weight") for side in ("desirable", "undesirable")}
    translate_preference(t, kind, beta, **numbers)
    return kind


def _translate_precision(t: Translation) -> None:
    four, eight = t.flag("load_in_4bit"), t.flag("load_in_8bit")
    if four or eight:
        t.set("model.quantization", "nf4" if four else "int8")
    for keys, dtype in ((("bf16", "bfloat16"), "bfloat16"), (("fp16", "float16"), "float16")):
        asked = [str(t.text(key)).lower() for key in keys]
        if any(word in ("true", "full") for word in asked) and not (four or eight):
            t.set("model.dtype", dtype)


def _translate_adapter(t: Translation) -> None:
    kind = t.text("adapter")
    if kind is None:
        translate_whole(t)
        if (modules := t.take("unfrozen_parameters")) is not None:
            t.note(f"unfrozen_parameters: {describe(modules)}: selection.top_fraction chooses what is trained here")
        t.drop("lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules")
        return
    if kind not in ("lora", "qlora"):
        raise UserError(f"adapter: {kind} has no counterpart; sgm import reads lora and qlora")
    t.move("lora_r", "adapter.rank")
    t.move("lora_alpha", "adapter.alpha")
    t.move("lora_dropout", "adapter.dropout")
    everything, modules = t.flag("lora_target_linear"), t.take("lora_target_modules")
    if not everything:
        translate_targets(t, modules)


def _translate_data(t: Translation, loss: str | None) -> None:
    t.move("sequence_len", "data.max_length")
    datasets, tests = t.take("datasets") or t.take("pretraining_dataset"), t.take("test_datasets")
    datasets = datasets if isinstance(datasets, list) else [datasets]
    found = [{"path": one} if isinstance(one, str) else one for one in datasets if one] or [{}]
    sources: dict[str, Translation] = {}
    for number, one in enumerate(found, start=1):
        if not isinstance(one, dict):
            raise UserError(f"`datasets` holds {describe(one)}, not a mapping with `path`; correct it")
        source = Translation({})
        _translate_data_set(source, Translation(one), loss)
        name = f"datasets {one.get('path')}"
        sources[f"{name} ({number})" if name in sources else name] = source
    set_sources(t, sources)
    if isinstance(tests, list) and tests and isinstance(tests[0], dict) and "data.train" in t.values:
        t.set("data.validation", tests[0].get("path"))
        t.drop("val_set_size")
    else:
        if tests is not None:
            t.note("test_datasets: give each as `validation` of its entry of data.mixture, or as data.validation")
        translate_held_out(t, "val_set_size")
    packs = t.flag("sample_packing")
    if packs and loss is None and not any(source.values.get("data.format") == "text" for source in sources.values()):
        t.set("data.packing", True)
    if t.flag("train_on_inputs"):
        t.note("train_on_inputs: the loss is on the answers alone here")
    translate_template(t, "chat_template")


def _translate_data_set(t: Translation, one: Translation, loss: str | None) -> None:
    """One entry of `datasets`."""
    path, files = one.text("path"), one.take("data_files")
    if isinstance(files, list):
        if len(files) > 1:
            t.note(f"data_files: {describe(files[1:])} left out: give each file as an entry of data.mixture")
        files = files[0]
    if path is None:
        raise UserError("it names no data; give datasets a path")
    name = str(files) if files and path in ("json", "csv", "parquet", "text") else str(path)
    set_data_source(t, name, one.text("name"))
    split = one.text("split")
    if split not in (None, "train"):
        t.note(f"split: {split}: SGM reads the part `train`")
    kind: Any = one.take("type")
    if loss is not None:
        _translate_answers(t, one, kind, loss)
    elif isinstance(kind, dict):
        asked = Translation(kind)
        columns = {"instruction": asked.text("field_instruction"), "input": asked.text("field_input"),
                   "output": asked.text("field_output"), "system": asked.text("field_system")}  # fmt: skip
        set_format(t, "alpaca", columns)
        asked.finish()
        t.notes += [f"type, {line}" for line in asked.notes]
    elif kind is None or str(kind).startswith(("completion", "pretrain")):
        set_format(t, "text", {"text": one.text("field") or one.text("text_column")})
    elif str(kind).startswith("alpaca"):
        set_format(t, "alpaca", {})
    elif str(kind).startswith(("chat_template", "sharegpt")):
        _translate_messages(t, one, str(kind))
    else:
        t.note(f"type: {kind}: SGM finds the format by the columns (sgm data shows it)")
    one.drop("ds_type", "conversation", "roles", "message_field_training", "shards", "train_on_eos", "chat_template")
    one.finish()
    t.notes += one.notes


_QUESTIONS = {"intel": "question", "icr": "input"}
"""Axolotl's prompt strategy -> its column of the prompt, where that is not `prompt`."""


def _translate_answers(t: Translation, one: Translation, kind: Any, loss: str) -> None:
    """The columns of preferences. Axolotl writes texts by a template; SGM writes messages by the model's template."""
    asked = Translation(kind) if isinstance(kind, dict) else one
    strategy = "" if isinstance(kind, dict) else str(kind or "").rpartition(".")[2]
    columns = {"prompt": asked.text("field_prompt"), "chosen": asked.text("field_chosen"),
               "rejected": asked.text("field_rejected")}  # fmt: skip
    if loss == "kto":
        columns = {"prompt": columns["prompt"], "completion": asked.text("field_completion"),
                   "label": asked.text("field_label")}  # fmt: skip
    messages, system = one.text("field_messages"), asked.text("field_system")
    one.drop("message_property_mappings", "message_field_role", "message_field_content")
    if str(kind).startswith("chat_template") and not strategy.endswith("argilla_chat"):
        columns["prompt"] = messages or "messages"
    elif strategy == "argilla" and loss == "kto":
        columns["prompt"] = "instruction"
    elif strategy == "argilla":
        t.note("type: argilla: SGM reads the columns prompt, chosen and rejected; name others with data.columns")
    elif strategy in _QUESTIONS:
        columns["prompt"] = _QUESTIONS[strategy]
    elif str(kind).startswith("bradley_terry"):
        columns["prompt"] = "input"
    if system is not None:
        t.note(f"field_system: {system}: write system messages into the list of messages of the prompt")
    set_pair_columns(t, loss, columns)
    if isinstance(kind, dict):
        asked.finish()
        t.notes += [f"type, {line}" for line in asked.notes]
    t.note(
        "prompts and answers that are texts are joined as they are; write them as lists of messages for the chat "
        "template (sgm data shows both)"
    )


def _translate_messages(t: Translation, one: Translation, kind: str) -> None:
    role = one.mapping("message_property_mappings").get("role") or one.text("message_field_role")
    one.drop("message_field_content")
    shared = kind.startswith("sharegpt") or role == "from"
    default = "conversations" if kind.startswith("sharegpt") else "messages"
    columns = {"messages": one.text("field_messages") or default, "system": one.text("field_system"),
               "tools": one.text("field_tools")}  # fmt: skip
    set_format(t, "sharegpt" if shared else "chat", columns)
    if (trained := one.take("roles_to_train")) not in (None, ["assistant"], ["gpt"], ["assistant", "gpt"]):
        t.note(f"roles_to_train: {describe(trained)}: the loss is on the assistant's turns here")


def _translate_output(t: Translation) -> None:
    t.move("output_dir", "output.dir")
    trackers = {"wandb_project": "wandb", "mlflow_tracking_uri": "mlflow", "use_tensorboard": "tensorboard"}
    asked = [tracker for key, tracker in trackers.items() if str(t.take(key) or "false").lower() != "false"]
    t.set("training.report_to", asked or None)
    if (repository := t.text("hub_model_id")) is not None:
        t.note(f"hub_model_id: after the training, sgm export --push-to-hub {repository}")
    for key in ("deepspeed", "fsdp", "fsdp_config"):
        if t.take(key) is not None:
            t.note(
                f"{key}: start with torchrun or accelerate launch (docs/scale.md); training.shard=true cuts the base"
            )
    special = t.take("special_tokens")
    if isinstance(special, dict) and set(special) - {"pad_token"}:
        t.note(f"special_tokens: {describe(special)}: SGM takes those that come with the tokenizer")
