"""LLaMA-Factory's configuration, and its dataset_info.json, translated into ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.untrusted import require_json_object
from sgm_finetune.commands.foreign.translation import (
    NOT_SUPERVISED,
    Translation,
    set_data_source,
    set_format,
    translate_evaluation,
    translate_held_out,
    translate_steps,
    translate_targets,
    translate_template,
    translate_trust,
    translate_whole,
)

NAME, MODEL_KEY = "LLaMA-Factory", "model_name_or_path"

_UNNEEDED = (
    "bf16", "cache_dir", "compute_dtype", "dataloader_num_workers", "ddp_timeout", "disable_gradient_checkpointing",
    "do_eval", "do_predict", "do_train", "double_quantization", "enable_liger_kernel", "eval_strategy",
    "evaluation_strategy", "flash_attn", "fp16", "include_num_input_tokens_seen", "load_best_model_at_end",
    "logging_steps", "low_cpu_mem_usage", "neat_packing", "overwrite_cache", "per_device_eval_batch_size", "plot_loss",
    "predict_with_generate", "preprocessing_num_workers", "pure_bf16", "quantization_method", "quantization_type",
    "save_only_model", "save_steps", "save_strategy", "save_total_limit", "tokenized_path",
    "upcast_layernorm", "use_unsloth", "tf32", "use_fast_tokenizer", "gradient_checkpointing",
)  # fmt: skip
"""Keys without an effect on what is learnt: SGM decides these by itself, or does so always."""


def translate(t: Translation, folder: Path) -> None:
    """Translates every key of `t`, from a file in `folder`. Raises UserError for a training that SGM does not do."""
    stage = t.text("stage") or "sft"
    if stage not in ("sft", "pt"):
        raise UserError(f"stage: {stage} {NOT_SUPERVISED}")
    kind = t.text("finetuning_type") or "lora"
    if kind not in ("lora", "full"):
        raise UserError(f"finetuning_type: {kind} has no counterpart; sgm import reads lora and full")
    t.set("model.task", "causal-lm")
    t.move("model_name_or_path", "model.name")
    t.move("model_revision", "model.revision")
    translate_trust(t)
    bits = t.number("quantization_bit")
    if bits in (4, 8):
        t.set("model.quantization", "nf4" if bits == 4 else "int8")
    elif bits is not None:
        t.note(f"quantization_bit: {bits:g} has no counterpart; 4 and 8 have")
    if kind == "full":
        translate_whole(t)
        t.drop("lora_rank", "lora_alpha", "lora_dropout", "lora_target")
    else:
        rank = t.number("lora_rank") or 8
        t.set("adapter.rank", round(rank))
        t.set("adapter.alpha", t.number("lora_alpha") or 2 * rank)
        t.move("lora_dropout", "adapter.dropout")
        translate_targets(t, t.take("lora_target"))
    _translate_data(t, stage, folder)
    translate_steps(t, "optim", "lr_scheduler_type", "num_train_epochs", "per_device_train_batch_size", 5e-5, "linear")
    translate_evaluation(t, t.number("eval_steps"))
    t.move("output_dir", "output.dir")
    if t.flag("overwrite_output_dir"):
        t.set("output.overwrite", True)
    tracker = t.text("report_to")
    if tracker in ("tensorboard", "wandb", "mlflow", "trackio"):
        t.set("training.report_to", [str(tracker)])
    elif tracker not in (None, "none", "all"):
        t.note(f"report_to: {tracker} has no counterpart")
    if t.take("deepspeed") is not None:
        t.note("deepspeed: start with accelerate launch (docs/scale.md)")
    t.drop(*_UNNEEDED)
    t.finish()


def _translate_data(t: Translation, stage: str, folder: Path) -> None:
    t.set("data.max_length", t.text("cutoff_len") or 2048)
    t.move("max_samples", "data.num_train")
    packing = t.flag("packing")
    if packing and stage == "sft":
        t.set("data.packing", True)
    place = Path(t.text("dataset_dir") or "data")
    names = str(t.text("dataset") or "").split(",")
    name, *others = [name.strip() for name in names]
    if others:
        t.note(f"dataset: {', '.join(others)} left out; give them all as entries of data.mixture")
    if not name:
        raise UserError("it names no data; give `dataset` a name of dataset_info.json")
    info = next(
        (path for path in (folder / place, folder.parent / place, place) if (path / "dataset_info.json").is_file()),
        None,
    )
    described = require_json_object(info / "dataset_info.json").get(name) if info is not None else None
    if info is None or not isinstance(described, dict):
        where = f"{info or place}/dataset_info.json"
        t.note(
            f"dataset: {name}: {where} {'does not name it' if info else 'is not there'}; give data.train or data.name"
        )
    else:
        _translate_data_set(t, described, stage, info)
    if (validation := t.text("eval_dataset")) is not None:
        t.note(f"eval_dataset: {validation}: give its file as data.validation")
    translate_held_out(t, "val_size")
    translate_template(t, "template")
    if t.flag("train_on_prompt"):
        t.note("train_on_prompt: the loss is on the answers alone here")
    if t.flag("mask_history"):
        t.note("mask_history: the loss is on all of the assistant's turns here")


def _translate_data_set(t: Translation, described: Mapping[str, Any], stage: str, place: Path) -> None:
    """An entry of dataset_info.json in the folder `place`."""
    one = Translation(described)
    hub, file = one.text("hf_hub_url"), one.text("file_name")
    if hub is not None:
        set_data_source(t, hub, one.text("subset"))
    elif file is not None:
        set_data_source(t, str(place / file))
    else:
        t.note("dataset: only files and data sets of the Hugging Face hub have a counterpart")
    columns, tags = one.mapping("columns"), one.mapping("tags")
    if one.flag("ranking"):
        raise UserError(f"ranking: true {NOT_SUPERVISED}")
    roles = {"system": columns.get("system"), "tools": columns.get("tools")}
    if stage == "pt":
        set_format(t, "text", {"text": columns.get("prompt") or "text"})
    elif one.text("formatting") == "sharegpt":
        messages = {"messages": columns.get("messages") or "conversations", **roles}
        set_format(t, "chat" if tags.get("role_tag") == "role" else "sharegpt", messages)
    else:
        theirs = {"instruction": "prompt", "input": "query", "output": "response", "history": "history"}
        set_format(t, "alpaca", {role: columns.get(name) for role, name in theirs.items()} | roles)
    one.drop("file_name", "subset", "ms_hub_url", "om_hub_url", "split")
    one.finish()
    t.notes += [f"dataset, {line}" for line in one.notes]
