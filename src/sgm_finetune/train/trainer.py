"""Training: Transformers' `Trainer` with batches that do not depend on the number of processes, and manners.

`SGMTrainer` adds to `Trainer` only what it has hooks for: a sampler, tying before a checkpoint is loaded, callbacks.
A merged model trains as well under the plain `Trainer` or TRL's `SFTTrainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from sgm_finetune.base.config import Config, Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import writing
from sgm_finetune.base.processes import sum_over_processes
from sgm_finetune.data.batches import LengthGroupedSampler, by_length
from sgm_finetune.method.plan import Plan
from sgm_finetune.train.adapters.apply import tie
from sgm_finetune.train.adapters.optimizer import create_optimizer
from sgm_finetune.train.callbacks import Interruption, NonFiniteLoss, SamplerEpoch, StepMeter, TrainingBar
from sgm_finetune.train.checkpoints import WholeCheckpoints, best_checkpoint
from sgm_finetune.train.fast.head_loss import HeadLoss
from sgm_finetune.train.losses import sum_losses, summed_loss

_OWN_LOSS: tuple[Task, ...] = ("token-classification", "seq2seq-lm")


class SGMTrainer(Trainer):
    """`Trainer` for a model from `apply_plan`: pass its `plan`, so that loaded checkpoints stay tied."""

    def __init__(
        self,
        *args: Any,
        plan: Plan | None = None,
        task: Task | None = None,
        global_batch_size: int | None = None,
        head_loss: HeadLoss | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.head_loss = head_loss
        self._epoch, self._meter = SamplerEpoch(), StepMeter()
        self.add_callback(self._epoch)
        self.add_callback(self._meter)
        self.plan, self.global_batch_size = plan, global_batch_size
        self.task: Task | None = task
        if task == "sequence-classification":
            # one label an example: micro-batches of equal size average, whether the model takes num_items or not
            self.model_accepts_loss_kwargs = False
        elif task in _OWN_LOSS or head_loss is not None:
            self.model_accepts_loss_kwargs = True  # so that labels are counted over the whole batch

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.global_batch_size is None or "input_ids" not in getattr(dataset, "column_names", ()):
            return super()._get_train_sampler(train_dataset)
        lengths = [len(ids) for ids in dataset["input_ids"]]  # type: ignore[index]
        self._epoch.sampler = LengthGroupedSampler(lengths, self.global_batch_size, self.args.seed)
        return self._epoch.sampler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """With a `head_loss`, and of tasks whose models average over a micro-batch: the sum over the labels that the
        whole batch has."""
        outputs: Any = None
        if num_items_in_batch is not None and self.head_loss is not None:
            batch = {key: value for key, value in inputs.items() if key != "labels"}
            total, _ = self.head_loss(model, batch, inputs["labels"])
        elif num_items_in_batch is not None and self.task in _OWN_LOSS:
            outputs = model(**inputs)
            total, _ = summed_loss(outputs.logits, inputs["labels"], self.task)  # type: ignore[arg-type]
        else:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = total / num_items_in_batch
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """With a `task`: the exact mean loss, each process taking its share, whatever their number."""
        if self.task is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        model: Any = self.model
        share = by_length(dataset)[self.args.process_index :: self.args.world_size]
        size, largest_share = self.args.per_device_eval_batch_size, -(-len(dataset) // self.args.world_size)
        losses = sum_losses(
            model, dataset, share, self.data_collator, self.task, size, num_batches=-(-largest_share // size),
            head_loss=self.head_loss,
        )  # fmt: skip
        total, count = sum_over_processes(losses.total, float(losses.count))
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With a step's loss also its tokens per second, and the most memory until then (docs/report.md)."""
        if "loss" in logs:
            logs |= self._meter.read(self.state)
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: Any) -> Any:
        """As `Trainer` clips, and before that: UserError for a gradient that is not finite, by name, while the weights
        are those of the step before. No public hook comes between the gradients and their clipping, which makes all of
        them NaN when one is."""
        if self.is_deepspeed_enabled or self.accelerator.scaler is not None:
            return super()._clip_grad_norm(model)
        named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for _, p in named])
        if not torch.isfinite(total):
            raise UserError(_not_finite(named, self.state.global_step + 1))
        return super()._clip_grad_norm(model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target = model if model is not None else self.model
        if self.plan is not None and isinstance(target, PeftModel):
            tie(target, self.plan)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def _not_finite(named: Sequence[tuple[str, torch.nn.Parameter]], step: int) -> str:
    """Which gradient it is: of several the last, since they come backward; the norm of finite ones can be infinite."""
    bad = [name for name, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]
    last = bad[-1].removeprefix("base_model.model.").replace(".default", "") if bad else "all of them together"
    what = f"`{last}`" if len(bad) == 1 else f"`{last}` and {len(bad) - 1} before it" if bad else last
    return (
        f"The gradient of {what} is not finite at step {step}; the weights are still those of the step before, and "
        "earlier checkpoints are whole. Try a smaller training.learning_rate or model.dtype=float32"
    )


def train(
    model: PeftModel,
    plan: Plan,
    config: Config,
    datasets: tuple[Dataset, Dataset],
    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    arguments: TrainingArguments,
    console: Console,
    head_loss: HeadLoss | None = None,
    resume_from: Path | None = None,
) -> tuple[SGMTrainer, str | None]:
    """Trains on `datasets` = (train, validation); the model holds the best checkpoint's weights afterwards.

    Also returns the name of the signal that ended it early, if one did; then a checkpoint of the last step is on disk.
    """
    callbacks: list[TrainerCallback] = [NonFiniteLoss(), WholeCheckpoints()]
    if config.training.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(config.training.early_stopping_patience))
    interruption = Interruption()
    optimizer = None
    if config.training.optimizer == "spectral":
        optimizer = create_optimizer(
            model, config.training.peak_learning_rate, weight_decay=config.training.weight_decay
        )
    trainer = SGMTrainer(
        model=model,
        optimizers=(optimizer, None),
        args=arguments,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        data_collator=collator,
        callbacks=[*callbacks, interruption, TrainingBar(console)],
        plan=plan,
        task=config.model.task,
        global_batch_size=config.training.batch_size,
        head_loss=head_loss,
    )
    trainer.remove_callback(PrinterCallback)
    if resume_from is not None and not trainer.is_deepspeed_enabled:
        state = TrainerState.load_from_json(str(resume_from / TRAINER_STATE_NAME))
        if _has_ended(state, arguments.max_steps, config.training.early_stopping_patience):
            trainer.state = state  # Trainer would take one more step before it looks
            trainer._load_from_checkpoint(str(best_checkpoint(resume_from) or resume_from))
            return trainer, None
    remedy = "; make room and continue with training.resume=true: earlier checkpoints are whole"
    with interruption, writing(Path(str(arguments.output_dir)), remedy):
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    best = trainer.state.best_model_checkpoint
    if interruption.signal_name is None and best and not Path(best).is_dir():  # Trainer would go on without it
        raise UserError(f"{best}, the best checkpoint of this run, is gone, and its weights with it; start a new run")
    return trainer, interruption.signal_name


def _has_ended(state: TrainerState, max_steps: int, patience: int) -> bool:
    """Whether a checkpoint is the last of its run: killed after it, only the evaluation was lost."""
    callbacks: Any = state.stateful_callbacks or {}
    stopping = callbacks.get(EarlyStoppingCallback.__name__) or {}
    waited = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return state.global_step >= max_steps or bool(patience and waited >= patience)
