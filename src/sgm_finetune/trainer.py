"""Training: Transformers' `Trainer` with batches that do not depend on the number of processes, and manners.

`SGMTrainer` adds to `Trainer` only what it has hooks for: a sampler, tying before a checkpoint is loaded, callbacks.
A merged model trains as well under the plain `Trainer` or TRL's `SFTTrainer`.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from sgm_finetune.adapters.apply import tie
from sgm_finetune.adapters.descent import create_optimizer
from sgm_finetune.checkpoints import WholeCheckpoints, best_checkpoint
from sgm_finetune.config import Config, Task
from sgm_finetune.errors import UserError
from sgm_finetune.evaluation import by_length, sum_losses, summed_loss
from sgm_finetune.files import writing
from sgm_finetune.head_loss import HeadLoss
from sgm_finetune.memory import peak_memory
from sgm_finetune.method.plan import Plan
from sgm_finetune.models import has_gpu

_OWN_LOSS: tuple[Task, ...] = ("token-classification", "seq2seq-lm")
_WINDOW = 16  # batches within which examples are sorted by length


class LengthGroupedSampler(Sampler[int]):
    """Every example once an epoch, in batches of similar length; the last batch is filled up from the beginning.

    The order is a seeded permutation; within windows of 16 batches examples are sorted by length, cut into batches,
    and the batches shuffled. It depends on the *global* batch size only, and every batch is full, so any number of
    processes that share each batch see the same batches.

    >>> sampler = LengthGroupedSampler([5, 5, 9, 9, 5], batch_size=2, seed=0)
    >>> len(sampler), sorted(set(sampler))
    (6, [0, 1, 2, 3, 4])
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        order = [order[i % len(order)] for i in range(len(self))]
        size = self.batch_size
        for first in range(0, len(order), _WINDOW * size):
            window = sorted(order[first : first + _WINDOW * size], key=lambda i: -self.lengths[i])
            batches = [window[at : at + size] for at in range(0, len(window), size)]
            for index in torch.randperm(len(batches), generator=generator).tolist():
                yield from batches[index]


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
        total, count = _sum_over_processes(losses.total, float(losses.count))
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


def divided_batch(config: Config, world_size: int) -> tuple[int, int]:
    """(examples in a micro-batch, micro-batches of each process in a step). Raises UserError where the batch cannot be
    divided over the processes."""
    batch = config.training.batch_size
    micro = config.training.micro_batch_size or max(1, batch // world_size)
    if batch % (micro * world_size):
        raise UserError(
            f"training.batch_size={batch} cannot be divided into micro-batches of {micro} on {world_size} processes; "
            "choose multiples"
        )
    return micro, batch // (micro * world_size)


def training_arguments(config: Config, checkpoints: Path, num_train: int, world_size: int) -> TrainingArguments:
    """Transformers' arguments for the run. Raises UserError where the batch cannot be divided over the processes."""
    training = config.training
    micro, num_micro = divided_batch(config, world_size)
    steps = num_steps(config, num_train)
    every = training.eval_steps or max(1, -(-steps // 4))
    return TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=num_micro,
        per_device_eval_batch_size=training.eval_batch_size,
        max_steps=steps,
        learning_rate=training.peak_learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(training.warmup_fraction * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        **_OPTIMIZERS.get(training.optimizer, {}),
        activation_checkpointing=bool(training.checkpointing),
        activation_checkpointing_kwargs=_CHECKPOINTING[training.checkpointing],
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all" if config.data.packing else "non_padding",
        restore_callback_states_from_checkpoint=True,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        seed=training.seed,
        data_seed=training.seed,
        use_cpu=not has_gpu(),
        bf16=False,
        report_to=list(training.report_to) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=has_gpu(),
        remove_unused_columns=True,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if world_size > 1 and not has_gpu() else None,
    )


_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"optim": "adamw_bnb_8bit"}, "paged_adamw_8bit": {"optim": "paged_adamw_8bit"},
}  # fmt: skip
"""Our names for what Trainer makes by another."""


_CHECKPOINTING: dict[bool | str, dict[str, bool] | None] = {
    False: None, True: {"use_reentrant": False}, "offload": {"use_reentrant": False, "offload": True},
}  # fmt: skip


def check_machine(config: Config) -> None:
    """Raises UserError for an optimizer, a place for activations, or a tracker, that this machine has not."""
    if config.training.checkpointing == "offload" and not has_gpu():
        raise UserError("training.checkpointing=offload is for GPUs, and there is none here; take true")
    name = config.training.optimizer
    if "8bit" in name and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"training.optimizer={name} needs bitsandbytes; pip install bitsandbytes, or take adamw")
    if name.startswith("paged") and not has_gpu():
        raise UserError(f"training.optimizer={name} is for GPUs, and there is none here; take adamw_8bit")
    for tracker in config.training.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"training.report_to={tracker} needs its package; pip install {tracker}, or leave it out")


def num_steps(config: Config, num_train: int) -> int:
    """Optimizer steps of the run: `training.max_steps`, or as many as the epochs hold."""
    if config.training.max_steps is not None:
        return config.training.max_steps
    return max(1, round(config.training.epochs * -(-num_train // config.training.batch_size)))


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


class SamplerEpoch(TrainerCallback):
    """Tells the sampler its epoch. The data loader does not reach it when several processes resume within an epoch."""

    def __init__(self) -> None:
        self.sampler: LengthGroupedSampler | None = None

    def on_epoch_begin(self, args, state: TrainerState, control, **kwargs: Any) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class StepMeter(TrainerCallback):
    """Times steps: what is between them (validation, checkpoints) does not count."""

    def __init__(self) -> None:
        self.began: tuple[float, int] | None = None

    def on_step_begin(self, args, state: TrainerState, control, **kwargs: Any) -> None:
        if self.began is None:
            self.began = time.perf_counter(), state.num_input_tokens_seen

    def read(self, state: TrainerState) -> dict[str, float]:
        """Since the step that began after the last reading; named as Transformers names what differs between runs."""
        measured: dict[str, float] = {"train_peak_memory_bytes": peak_memory()}
        if self.began is not None:
            seconds, tokens = time.perf_counter() - self.began[0], state.num_input_tokens_seen - self.began[1]
            if seconds > 0 and tokens > 0:
                measured["train_tokens_per_second"] = tokens / seconds
        self.began = None
        return measured


class NonFiniteLoss(TrainerCallback):
    """Stops the run on a loss or gradient that is not finite, naming the step."""

    def on_log(self, args, state: TrainerState, control, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not torch.isfinite(torch.tensor(float(value))):
                raise UserError(
                    f"{name} is {value} at step {state.global_step}; try a smaller training.learning_rate "
                    "or model.dtype=float32"
                )


_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interruption(TrainerCallback):
    """Ctrl-C, SIGTERM, or a closed terminal: finish the step, save a checkpoint, stop. A second signal stops now."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None:
            if signal.Signals(number).name == "SIGHUP":  # shells send it again
                return
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        if not torch.distributed.is_initialized():  # else perhaps there will be no end of this step
            self._say()

    def _say(self) -> None:
        print(f"{self.signal_name}: finishing this step and saving a checkpoint", file=sys.stderr, flush=True)

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if _any_process(self.signal_name is not None) and state.global_step < state.max_steps:
            if torch.distributed.is_initialized() and state.is_world_process_zero:
                self._say()
            self.signal_name = self.signal_name or "signal on another process"
            control.should_save = control.should_training_stop = True  # and a validation that is due comes first
        return control


def _any_process(flag: bool) -> bool:
    """Whether the flag is up on any process, so that all of them stop after the same step."""
    return _sum_over_processes(float(flag))[0] > 0


def _sum_over_processes(*values: float) -> list[float]:
    if not torch.distributed.is_initialized():
        return list(values)
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(values, device=device, dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


class TrainingBar(TrainerCallback):
    """A bar with loss, validation loss, tokens/s and memory; without a terminal, a line now and then."""

    def __init__(self, console: Console):
        self.console = console
        self.columns: dict[str, Any] = {"loss": "", "validation": "", "rate": "", "memory": ""}
        self.progress: Progress | None = None
        self.first_step = self.first_tokens = 0
        self.started = time.perf_counter()

    def on_train_begin(self, args, state: TrainerState, control, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.started = time.perf_counter()
        self.first_step, self.first_tokens = state.global_step, state.num_input_tokens_seen
        self.progress = Progress(
            TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[loss]} {task.fields[validation]} {task.fields[rate]} {task.fields[memory]}"),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step, **self.columns)
        self.progress.start()

    def on_step_end(self, args, state: TrainerState, control, **kwargs: Any) -> None:
        if self.progress is not None:
            self.columns["memory"] = f"{peak_memory() / 2**30:.1f} GiB"
            self.progress.update(self.task, completed=state.global_step, **self.columns)

    def on_log(self, args, state: TrainerState, control, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if self.progress is None:
            return
        if "loss" in logs:
            self.columns["loss"] = f"loss {logs['loss']:.4f}"
        if "eval_loss" in logs:
            self.columns["validation"] = f"validation {logs['eval_loss']:.4f}"
        steps = max(1, state.global_step - self.first_step)
        seconds = time.perf_counter() - self.started
        tokens = state.num_input_tokens_seen - self.first_tokens
        self.columns["rate"] = f"{tokens / seconds:,.0f} tokens/s · {seconds / steps:.2f} s/step"
        self.progress.update(self.task, **self.columns)
        if "eval_loss" in logs and not self.console.is_terminal:
            shown = " · ".join(text for text in self.columns.values() if text)
            line = f"  step {state.global_step}/{state.max_steps} · {shown}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, args, state: TrainerState, control, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.stop()
