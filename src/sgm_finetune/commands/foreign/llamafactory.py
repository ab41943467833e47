"""LLaMA-Factory's configuration, and its dataset_info.json, translated into ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.untrusted import require_json_object
from sgm_finetune.commands.foreign.translation import (
    NO_TRAINING,
    Translation,
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

NAME, MODEL_KEY = "LLaMA-Factory", "model_name_or_path"

_UNNEEDED = (
    "bf16", "cache_dir", "compute_dtype", "dataloader_num_workers", "ddp_timeout", "disable_gradient_checkpointing",
    "do_eval", "do_predict", "do_train", "double_quantization", "enable_liger_kernel", "eval_strategy",
    "evaluation_strategy", "flash_attn", "fp16", "include_num_input_tokens_seen", "load_best_model_at_end",
    "logging_steps", "low_cpu_mem_usage", "neat_packing", "overwrite_cache", "per_device_eval_batch_size", "plot_loss",
    "predict_with_generate", "preprocessing_num_workers", "pure_bf16", "quantization_method", "quantization_type",
    "save_only_model", "save_steps", "save_strategy", "tokenized_path",
    "upcast_layernorm", "use_unsloth", "tf32", "use_fast_tokenizer", "gradient_checkpointing",
)  # fmt: skip
"""Keys without an effect on what is learnt: SGM decides these by itself, or does so always."""


def translate(t: Translation, folder: Path) -> None:
    """Translates every key of `t`, from a file in `folder`. Raises UserError for a training that SGM does not do."""
    stage = t.text("stage") or "sft"
    if stage not in ("sft", "pt", "dpo", "kto", "rm"):
        raise UserError(f"stage: {stage} {NO_TRAINING}")
    kind = t.text("finetuning_type") or "lora"
    if kind not in ("lora", "full"):
        raise UserError(f"finetuning_type: {kind} has no counterpart; sgm import reads lora and full")
    loss = _translate_task(t, stage)
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
    _translate_data(t, stage, loss, folder)
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


_PAIR_LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}


def _translate_task(t: Translation, stage: str) -> str | None:
    """model.task, and the loss of preferences: one of `preference.loss`, "reward", or None for a language model."""
    if stage not in ("dpo", "kto"):
        t.set("model.task", "reward" if stage == "rm" else "causal-lm")
        return "reward" if stage == "rm" else None
    kind = t.text("pref_loss") or "sigmoid"
    loss = "kto" if stage == "kto" else _PAIR_LOSSES.get(str(kind))
    if loss is None:
        raise UserError(f"pref_loss: {kind} {NO_TRAINING}")
    numbers = {"gamma": t.number("simpo_gamma") or 0.5} if loss == "simpo" else {}
    if loss == "kto":
        numbers = {
            "desirable_weight": t.number("kto_chosen_weight"),
            "undesirable_weight": t.number("kto_rejected_weight"),
        }
    translate_preference(t, loss, t.number("pref_beta") or 0.1, **numbers)
    for name in ("ref_model", "ref_model_adapters"):
        if (reference := t.text(name)) is not None:
            t.note(f"{name}: {reference}: the reference is the base with its adapter off here")
    return loss


def _translate_data(t: Translation, stage: str, loss: str | None, folder: Path) -> None:
    t.set("data.max_length", t.text("cutoff_len") or 2048)
    if t.flag("packing") and stage == "sft":
        t.set("data.packing", True)
    place = Path(t.text("dataset_dir") or "data")
    names = [name.strip() for name in str(t.text("dataset") or "").split(",")]
    if not names[0]:
        raise UserError("it names no data; give `dataset` a name of dataset_info.json")
    info = next(
        (path for path in (folder / place, folder.parent / place, place) if (path / "dataset_info.json").is_file()),
        None,
    )
    sources = {}
    for name in names:
        source = Translation({})
        described = require_json_object(info / "dataset_info.json").get(name) if info is not None else None
        if info is None or not isinstance(described, dict):
            where = f"{info or place}/dataset_info.json"
            what = "does not name it" if info else "is not there"
            source.note(f"{where} {what}; give data.train or data.name")
        else:
            _translate_data_set(source, described, stage, loss, info)
        sources[f"dataset {name}"] = source
    set_sources(t, sources, _weights(t, len(sources)))
    if (most := t.number("max_samples")) is not None:
        t.set("data.num_train", round(most) * len(sources))
        if len(sources) > 1:
            t.note(f"max_samples: {most:g} of each data set, and data.num_train counts the examples of all")
    if (validation := t.text("eval_dataset")) is not None:
        t.note(f"eval_dataset: {validation}: give its file as data.validation")
    translate_held_out(t, "val_size")
    translate_template(t, "template")
    if t.flag("train_on_prompt"):
        t.note("train_on_prompt: the loss is on the answers alone here")
    if t.flag("mask_history"):
        t.note("mask_history: the loss is on all of the assistant's turns here")


def _weights(t: Translation, number: int) -> list[float] | None:
    """The share of each data set, which LLaMA-Factory gives for mixtures that it interleaves."""
    shares, strategy = t.text("interleave_probs"), str(t.text("mix_strategy") or "concat")
    if shares is None or number == 1 or strategy == "concat":
        return None
    parts = [part.strip() for part in str(shares).split(",")]
    try:
        weights = [float(part) for part in parts]
    except ValueError:
        weights = []
    if len(weights) != number:
        raise UserError(f"`interleave_probs`: {shares} is not one number for each of {number} data sets; correct it")
    return weights


def _translate_data_set(
    t: Translation, described: Mapping[str, Any], stage: str, loss: str | None, place: Path
) -> None:
    """An entry of dataset_info.json in the folder `place`."""
    one = Translation(described)
    hub, file = one.text("hf_hub_url"), one.text("file_name")
    if hub is not None:
        set_data_source(t, hub, one.text("subset"))
    elif file is not None:
        set_data_source(t, str(place / file))
    else:
        t.note("only files and data sets of the Hugging Face hub have a counterpart")
    columns, tags = one.mapping("columns"), one.mapping("tags")
    is_ranked, talks = one.flag("ranking"), one.text("formatting") == "sharegpt"
    if is_ranked != (loss not in (None, "kto")):
        needed = "need" if is_ranked else "take"
        raise UserError(
            f"dataset_info.json has ranking: {str(is_ranked).lower()}, and stage: {stage} does not {needed} that; "
            "correct one of them"
        )
    roles = {"system": columns.get("system"), "tools": columns.get("tools")}
    if stage == "pt":
        set_format(t, "text", {"text": columns.get("prompt") or "text"})
    elif loss is not None:
        _translate_answers(t, loss, columns, talks)
    elif talks:
        messages = {"messages": columns.get("messages") or "conversations", **roles}
        set_format(t, "chat" if tags.get("role_tag") == "role" else "sharegpt", messages)
    else:
        theirs = {"instruction": "prompt", "input": "query", "output": "response", "history": "history"}
        set_format(t, "alpaca", {role: columns.get(name) for role, name in theirs.items()} | roles)
    one.drop("file_name", "subset", "ms_hub_url", "om_hub_url", "split")
    one.finish()
    t.notes += one.notes


def _translate_answers(t: Translation, loss: str, columns: Mapping[str, Any], talks: bool) -> None:
    """The columns of preferences; `talks` says whether their prompts are conversations."""
    prompt = columns.get("messages") or "conversations" if talks else columns.get("prompt") or "instruction"
    roles = {"prompt": prompt, "chosen": columns.get("chosen"), "rejected": columns.get("rejected")}
    if loss == "kto":
        roles = {"prompt": prompt, "completion": columns.get("response") or "output", "label": columns.get("kto_tag")}
        if talks:
            t.note("its conversations end with the answer; write the answer into a column of its own, `completion`")
            roles["completion"] = None
    if talks:
        roles |= {"system": columns.get("system"), "tools": columns.get("tools")}
    elif columns.get("query"):
        t.note(f"query: {columns['query']}: append it to the column {prompt}")
    set_pair_columns(t, loss, roles)
    if not talks:
        t.note(
            "prompts and answers that are texts are joined as they are; write them as lists of messages for the chat "
            "template (sgm data shows both)"
        )
