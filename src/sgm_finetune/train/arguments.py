"""Transformers' TrainingArguments for a run, and the check that this machine can follow them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from sgm_finetune.base.config import PAIR_TASKS, Config, Schedule
from sgm_finetune.base.device import has_gpu
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.batches import divide_batch, num_steps


def training_arguments(
    config: Config, checkpoints: Path, num_train: int, world_size: int, saves: bool = True
) -> TrainingArguments:
    """Transformers' arguments for the run; without `saves` it validates as often, and writes no checkpoints.

    Raises UserError when the batch cannot be divided over the processes.
    """
    steps = num_steps(config, num_train)
    training = config.training
    every = training.eval_steps or (steps if training.eval_seconds is not None else max(1, -(-steps // 4)))
    return _arguments(
        config,
        checkpoints,
        steps,
        world_size,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps" if saves else "no",
        save_steps=every,
        load_best_model_at_end=saves,
        report_to=list(config.training.report_to) or "none",
        per_device_eval_batch_size=config.training.eval_batch_size,
    )


def trial_arguments(config: Config, folder: Path, steps: int, world_size: int) -> TrainingArguments:
    """Transformers' arguments for `steps` steps with the whole schedule of a run, which leave nothing behind.

    The test after them takes batches as small as a step's, so that it needs no more memory than a step.
    """
    micro, _ = divide_batch(config, world_size)
    return _arguments(
        config,
        folder,
        steps,
        world_size,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        per_device_eval_batch_size=micro,
    )


def _arguments(config: Config, folder: Path, steps: int, world_size: int, **what: Any) -> TrainingArguments:
    training = config.training
    micro, num_micro = divide_batch(config, world_size)
    warmup = round(training.warmup_fraction * steps)
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=num_micro,
        max_steps=steps,
        learning_rate=config.peak_learning_rate(steps),
        lr_scheduler_type=_SCHEDULES[training.schedule],
        lr_scheduler_kwargs=_schedule_settings(training.schedule, steps, warmup),
        warmup_steps=warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        **_OPTIMIZERS.get(config.optimizer, {}),
        activation_checkpointing=bool(training.checkpointing),
        activation_checkpointing_kwargs=_CHECKPOINTING[training.checkpointing],
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all" if config.data.packing else "non_padding",
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        seed=training.seed,
        data_seed=training.seed,
        use_cpu=not has_gpu(),
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=has_gpu(),
        remove_unused_columns=config.model.task not in PAIR_TASKS,  # the model does not read all of their columns
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if world_size > 1 and not has_gpu() else None,
        **what,
    )


def _schedule_settings(schedule: Schedule, steps: int, warmup: int) -> dict[str, int] | None:
    """What Transformers' function of `schedule` takes beside the numbers of all steps and of the `warmup`."""
    if schedule != "wsd":
        return None
    return {"num_decay_steps": min(max(1, round(_DECAY * steps)), steps - warmup)}


_DECAY = 0.2
"""Share of the steps, at their end, in which training.schedule=wsd falls."""
_SCHEDULES: dict[Schedule, str] = {
    "linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup", "wsd": "warmup_stable_decay",
}  # fmt: skip
"""Our name of a schedule -> Transformers'."""
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"optim": "adamw_bnb_8bit"}, "paged_adamw_8bit": {"optim": "paged_adamw_8bit"},
}  # fmt: skip
"""Our name of an optimizer -> the arguments by which Trainer makes it."""


_CHECKPOINTING: dict[bool | str, dict[str, bool] | None] = {
    False: None, True: {"use_reentrant": False}, "offload": {"use_reentrant": False, "offload": True},
}  # fmt: skip
"""`training.checkpointing` -> Transformers' settings for it."""


def check_machine(config: Config) -> None:
    """Raises UserError when this machine lacks the GPU, or a package, that the optimizer, checkpointing or a tracker
    needs."""
    if config.training.checkpointing == "offload" and not has_gpu():
        raise UserError("training.checkpointing=offload needs a GPU, and this machine has none; set it to true")
    if config.training.shard and config.model.residence in ("host", "disk"):
        raise UserError(
            "training.shard=true cuts a base that is on the device; set it to false, or model.residence=device"
        )
    name = config.optimizer
    if "8bit" in name and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"training.optimizer={name} needs bitsandbytes; pip install bitsandbytes, or set it to adamw")
    if name.startswith("paged") and not has_gpu():
        raise UserError(f"training.optimizer={name} needs a GPU, and this machine has none; set it to adamw_8bit")
    for tracker in config.training.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"training.report_to={tracker} needs its package; pip install {tracker}, or remove it")
