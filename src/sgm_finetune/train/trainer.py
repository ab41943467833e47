"""Training by Transformers' `Trainer`, in batches that do not depend on the number of processes.

`SGMTrainer` adds a sampler, the loss in parts, tying before a checkpoint is loaded, and callbacks. A merged model
also trains under the plain `Trainer` or TRL's `SFTTrainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from sgm_finetune.base.config import PAIR_TASKS, Config, PreferenceConfig, Task
from sgm_finetune.base.errors import NotFiniteError, UserError
from sgm_finetune.base.files import writing
from sgm_finetune.base.processes import average_over_processes, sum_over_processes
from sgm_finetune.base.untrusted import refuse, rehearse_torch, require_json_object
from sgm_finetune.data.batches import LengthGroupedSampler, by_length, draw_of
from sgm_finetune.data.encoding import sequence_lengths
from sgm_finetune.data.mixture import Draw
from sgm_finetune.method.plan import Plan
from sgm_finetune.train.adapters.apply import tie
from sgm_finetune.train.adapters.optimizer import HEAD_RATE, create_optimizer
from sgm_finetune.train.callbacks import (
    Interruption,
    NonFiniteLoss,
    Pace,
    SamplerEpoch,
    StepMeter,
    TimedValidations,
    TimeLeft,
    TrainingBar,
    WholeCheckpoints,
    delete_older,
)
from sgm_finetune.train.checkpoints import TRAINER_STATE, best_checkpoint, is_whole
from sgm_finetune.train.fast.head_loss import HeadLoss
from sgm_finetune.train.full.apply import CLASSIFICATION_HEADS
from sgm_finetune.train.full.changed import load_trained_into, save_trained, trained_parameters
from sgm_finetune.train.full.optimizers import make_optimizers
from sgm_finetune.train.full.update import BackwardUpdates
from sgm_finetune.train.losses import Collator, TestSet, mean_reward_loss, sum_losses, summed_loss
from sgm_finetune.train.preference import PreferenceLoss, score
from sgm_finetune.train.preference import summed_loss as preference_loss

_OWN_LOSS: tuple[Task, ...] = ("token-classification", "seq2seq-lm")


class SGMTrainer(Trainer):
    """`Trainer` for a model from `apply_plan`, or from `train_whole` with its `updates`.

    Pass the model's `plan`, so that a loaded checkpoint keeps shared factors tied. `task` makes losses exact means over
    the whole batch. `global_batch_size` is the number of examples in a step over all processes; with it, batches hold
    examples of similar length and do not depend on the number of processes. `head_loss` computes a language model's
    loss without all of its logits. `updates` is the optimizer of whole matrices, which steps in the backward pass; a
    checkpoint then holds what it trains, and nothing else of the model. `preference` is the loss of the task
    `preference`. `draw` chooses the examples of each epoch of a mixture; it needs `global_batch_size`.
    """

    def __init__(
        self,
        *args: Any,
        plan: Plan | None = None,
        task: Task | None = None,
        global_batch_size: int | None = None,
        head_loss: HeadLoss | None = None,
        updates: BackwardUpdates | None = None,
        preference: PreferenceConfig | None = None,
        draw: Draw | None = None,
        **kwargs: Any,
    ):
        if updates is not None:
            kwargs["optimizers"] = (updates, None)
        super().__init__(*args, **kwargs)
        self.updates = updates
        if updates is not None:
            updates.is_last = lambda: self.accelerator.sync_gradients
        self.head_loss = head_loss
        self._epoch, self.meter = SamplerEpoch(), StepMeter()
        self.add_callback(self._epoch)
        self.add_callback(self.meter)
        self.plan, self.global_batch_size, self.draw = plan, global_batch_size, draw
        self.task: Task | None = task
        self.preference = PreferenceLoss(preference or PreferenceConfig(), head_loss) if task == "preference" else None
        if task in ("sequence-classification", *PAIR_TASKS):
            # one term an example: micro-batches of equal size average, whether the model takes num_items or not
            self.model_accepts_loss_kwargs = False
        elif task in _OWN_LOSS or head_loss is not None:
            self.model_accepts_loss_kwargs = True  # so that labels are counted over the whole batch

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.updates.attached() if self.updates is not None else nullcontext():
            return super().train(*args, **kwargs)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model itself, or with `updates` and several processes a wrapper around it.

        The trainer leaves a wrapped model as it is. Data parallelism would hold every gradient until the backward pass
        ends; the updates average each one as soon as it exists.
        """
        if self.updates is None or self.args.world_size == 1:
            return super()._wrap_model(model, *args, **kwargs)
        return model if isinstance(model, _Wrapped) else _Wrapped(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.global_batch_size is None or "input_ids" not in getattr(dataset, "column_names", ()):
            return super()._get_train_sampler(train_dataset)
        lengths = sequence_lengths(dataset)  # type: ignore[arg-type]
        self._epoch.sampler = LengthGroupedSampler(lengths, self.global_batch_size, self.args.seed, self.draw)
        return self._epoch.sampler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step. Those of KTO get `moved`, which is estimated on the whole batch."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.preference is not None and not self.preference.settings.has_pairs:
            model: Any = self.model
            found = [self.preference.moved(model, {k: x.to(device) for k, x in batch.items()}) for batch in batches]
            total, number = sum_over_processes(sum(float(x.sum()) for x in found), float(sum(map(len, found))))
            for batch in batches:
                batch["moved"] = torch.tensor(max(0.0, total / max(1.0, number)), device=device)
        return batches, count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, as its share of the mean over the whole batch.

        A `head_loss`, and the tasks whose models average over a micro-batch, sum over the labels here and divide by
        `num_items_in_batch`, the number of labels in the whole batch.
        """
        outputs: Any = None
        if self.preference is not None:
            return self.preference.mean(model, inputs)
        if self.task == "reward":
            return mean_reward_loss(model, inputs)
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
        """Returns the exact mean loss if `task` is set; each process computes its share of the examples."""
        if self.task is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        model: Any = self.model
        share = by_length(dataset)[self.args.process_index :: self.args.world_size]
        size, largest_share = self.args.per_device_eval_batch_size, -(-len(dataset) // self.args.world_size)
        test_set = TestSet(dataset, self.data_collator, self.task, size, head_loss=self.head_loss)
        num_batches = -(-largest_share // size)
        if self.preference is not None:
            scores = score(
                model, replace(test_set, preference=self.preference.settings), share, num_batches=num_batches
            )
            total, count = preference_loss(scores, self.preference.settings, sum_over_processes)
        else:
            losses = sum_losses(model, test_set, share, num_batches=num_batches)
            total, count = sum_over_processes(losses.total, float(losses.count))
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens per second and peak memory to the logged loss of a step (docs/report.md)."""
        if "loss" in logs:
            logs |= self.meter.read(self.state)
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clips as `Trainer` does, after a check: raises NotFiniteError that names a gradient that is not finite.

        The weights are still those of the step before. No public hook comes between the gradients and their clipping,
        which makes all of them NaN if one is. `updates` have clipped already, so this only returns their norm.
        """
        if self.updates is not None:
            return torch.tensor(self.updates.norm)
        if self.is_deepspeed_enabled or self.accelerator.scaler is not None:
            return super()._clip_grad_norm(model)
        named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for _, p in named])
        if not torch.isfinite(total):
            raise NotFiniteError(_describe_not_finite(named, self.state.global_step + 1))
        return super()._clip_grad_norm(model)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.updates is None:
            super()._save(output_dir, state_dict)
        else:
            save_trained(self._whole_model, Path(str(output_dir or self.args.output_dir)))

    def _load_best_model(self) -> None:
        if self.updates is None:
            super()._load_best_model()
        else:
            load_trained_into(self._whole_model, Path(str(self.state.best_model_checkpoint)))

    @property
    def _whole_model(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.updates is not None:
            load_trained_into(self._whole_model, Path(resume_from_checkpoint))
            return
        target = model if model is not None else self.model
        if self.plan is not None and isinstance(target, PeftModel):
            tie(target, self.plan)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


class _Wrapped(nn.Module):
    """Computes what `module` computes."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _describe_not_finite(named: Sequence[tuple[str, torch.nn.Parameter]], step: int) -> str:
    """The error message for gradients that are not finite. It names the last one in the model's order, which the
    backward pass computes first. If each is finite and only their norm is not, it names all of them."""
    bad = [name for name, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]
    if not bad:
        what = "all of them together"
    else:
        what = f"`{bad[-1].removeprefix('base_model.model.').replace('.default', '')}`"
        if len(bad) > 1:
            what += f" and {len(bad) - 1} before it"
    return (
        f"The gradient of {what} is not finite at step {step}; the weights are still those of the step before, and "
        "earlier checkpoints are whole. Try a smaller training.learning_rate or model.dtype=float32"
    )


@dataclass(frozen=True)
class TrainingJob:
    """What is trained, on what, and how."""

    config: Config
    model: PeftModel | PreTrainedModel
    plan: Plan
    train: Dataset
    validation: Dataset
    collate: Collator
    arguments: TrainingArguments
    head_loss: HeadLoss | None = None
    """Computes a language model's loss without all of its logits."""
    resume_from: Path | None = None
    """The checkpoint to continue from."""
    check_output: Callable[[], None] = lambda: None
    """Called after each step: raises UserError if the output folder is no longer this run's."""
    pace: Pace | None = None
    """With it, the training says after its second step how long the rest of the run takes."""


@dataclass(frozen=True)
class Trained:
    """How a training ended. The model holds the weights of the best checkpoint, unless a signal stopped it."""

    state: TrainerState
    stopped_by: str | None
    """Name of the signal that stopped it early; then a checkpoint of the last step is on the disk."""
    trainer: SGMTrainer
    """Keep it as long as the model is used. With ZeRO-3 the model computes by hooks of DeepSpeed's engine, which the
    trainer holds, and which removes the hooks when it is deleted."""


def train(job: TrainingJob, console: Console) -> Trained:
    """Trains the adapters of `job.model`, or its whole matrices; validates, saves checkpoints, and shows progress on
    `console`.

    Raises UserError for a loss or gradient that is not finite, a full disk, and a best checkpoint that is gone.
    """
    training = job.config.training
    interruption = Interruption()
    time_left = [TimeLeft(job.pace, console)] if job.pace is not None else []
    trainer = make_trainer(job, [interruption, TrainingBar(console), *time_left])
    if job.resume_from is not None and not trainer.is_deepspeed_enabled:
        with _reading(job.resume_from, trainer):
            state = _read_state(job.resume_from / TRAINER_STATE)
            if _has_ended(state, job.arguments.max_steps, training.early_stopping_patience):
                trainer.state = state  # Trainer would take one more step before it looks
                best = best_checkpoint(job.resume_from)
                _require_whole(best)
                trainer._load_from_checkpoint(str(best or job.resume_from))
                if best is not None:
                    state.best_model_checkpoint = str(best)  # the run's folder may have been moved
                if trainer.is_world_process_zero():
                    delete_older(
                        job.arguments, state, job.config.training.save_total_limit
                    )  # a kill may have come before
                return Trained(state, None, trainer)
    remedy = "; make room and continue with training.resume=true: earlier checkpoints are whole"
    output = Path(str(job.arguments.output_dir))
    with interruption, writing(output, remedy), _reading(job.resume_from, trainer):
        trainer.train(resume_from_checkpoint=str(job.resume_from) if job.resume_from else None)
    if interruption.signal_name is None and (best := trainer.state.best_model_checkpoint):
        _require_whole(Path(best))
    return Trained(trainer.state, interruption.signal_name, trainer)


@contextmanager
def _reading(checkpoint: Path | None, trainer: SGMTrainer) -> Iterator[None]:
    """Raises UserError if a file of `checkpoint` is not what a run writes: somebody else may have made it. From the
    first step on, exceptions have another cause and pass."""
    try:
        for path in sorted(checkpoint.glob("*.pt")) if checkpoint is not None else []:
            rehearse_torch(path)  # Trainer reads it with weights_only, which runs no code but may allocate anything
        yield
    except (TypeError, ValueError, LookupError, AttributeError, EOFError, UnpicklingError, BadZipFile) as error:
        if checkpoint is None or trainer.meter.has_begun:
            raise
        refuse(checkpoint, "checkpoint that can be resumed", error)


def _read_state(path: Path) -> TrainerState:
    """The state of a training. Raises TypeError for keys or types that Trainer does not write, where Trainer would
    fail at some later step."""
    values, default = require_json_object(path), TrainerState()
    optional = {"epoch": 0.0, "best_metric": 0.0, "best_global_step": 0, "num_train_epochs": 0}
    for key, value in values.items():
        expected = optional.get(key, getattr(default, key, None))
        kinds = (int, float) if isinstance(expected, int | float) else (type(expected),)
        if expected is not None and not isinstance(value, kinds) and not (key in optional and value is None):
            raise TypeError(f"`{key}` in {path.name} is {str(value)[:40]!r}")
    state = TrainerState(**values)
    if not all(isinstance(entry, dict) for entry in state.log_history):
        raise TypeError(f"`log_history` in {path.name} holds more than objects")
    return state


def _require_whole(best: Path | None) -> None:
    """Raises UserError if the best checkpoint is lost: Trainer would go on with the weights of the last step."""
    if best is not None and not is_whole(best):
        what = "is damaged" if best.is_dir() else "is gone, and its weights with it"
        raise UserError(f"{best}, the best checkpoint of this run, {what}; start a new run")


def make_trainer(job: TrainingJob, callbacks: Sequence[TrainerCallback]) -> SGMTrainer:
    """The trainer of `job`, with the optimizer that its configuration names."""
    training = job.config.training
    first: list[TrainerCallback] = [NonFiniteLoss(), WholeCheckpoints(training.save_total_limit, job.check_output)]
    if training.eval_seconds is not None and job.arguments.eval_strategy != "no":
        first.append(TimedValidations(training.eval_seconds))
    if training.early_stopping_patience:
        first.append(EarlyStoppingCallback(training.early_stopping_patience))
    optimizer = updates = None
    if job.config.is_full:
        updates = _make_updates(job)
    elif job.config.optimizer == "spectral":
        assert isinstance(job.model, PeftModel)
        optimizer = create_optimizer(job.model, job.arguments.learning_rate, weight_decay=training.weight_decay)
    trainer = SGMTrainer(
        model=job.model,
        optimizers=(optimizer, None),
        args=job.arguments,
        train_dataset=job.train,
        eval_dataset=job.validation,
        data_collator=job.collate,
        callbacks=[*first, *callbacks],
        plan=job.plan,
        task=job.config.model.task,
        global_batch_size=training.batch_size,
        head_loss=job.head_loss,
        updates=updates,
        preference=job.config.preference,
        draw=draw_of(job.config, job.train, job.arguments.seed),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _make_updates(job: TrainingJob) -> BackwardUpdates:
    """The optimizer of whole matrices, which steps in the backward pass."""
    training, rate = job.config.training, job.arguments.learning_rate
    matrices, trained = {f"{matrix.name}.weight" for matrix in job.plan.selected}, trained_parameters(job.model)
    heads = [name for name in trained if name.partition(".")[0] in CLASSIFICATION_HEADS]
    return BackwardUpdates(
        trained,
        lambda shadows: make_optimizers(job.config.optimizer, shadows, matrices, rate, training.weight_decay),
        rate,
        training.max_grad_norm,
        training.seed,
        rates=dict.fromkeys(heads, max(rate, HEAD_RATE)),
        average=average_over_processes,
    )


def _has_ended(state: TrainerState, max_steps: int, patience: int) -> bool:
    """Whether a checkpoint is the last of its run, so that only the evaluation after it is missing."""
    callbacks: Any = state.stateful_callbacks or {}
    stopping = callbacks.get(EarlyStoppingCallback.__name__) or {}
    waited = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return state.global_step >= max_steps or bool(patience and waited >= patience)
