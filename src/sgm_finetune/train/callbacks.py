"""Callbacks for Transformers' Trainer: whole checkpoints, signals, progress, non-finite losses, the sampler's epoch."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import NotFiniteError
from sgm_finetune.base.memory import peak_memory
from sgm_finetune.base.processes import any_process
from sgm_finetune.base.text import about
from sgm_finetune.data.batches import LengthGroupedSampler
from sgm_finetune.train.checkpoints import seal


class WholeCheckpoints(TrainerCallback):
    """Lists a checkpoint's files when all processes have written theirs, then deletes older checkpoints.

    `limit` is `training.save_total_limit`. Calls `check_output` after each step, before a checkpoint is written.
    """

    def __init__(self, limit: int, check_output: Callable[[], None] = lambda: None):
        self.limit, self.check_output = limit, check_output

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if best := state.best_model_checkpoint:  # the run's folder may have been moved
            state.best_model_checkpoint = str(Path(str(args.output_dir)) / Path(best).name)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.check_output()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes its own random states
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            seal(folder)
            delete_older(args, state, self.limit)


def delete_older(args: TrainingArguments, state: TrainerState, limit: int) -> None:
    """Deletes the oldest checkpoints beyond `limit`, but never the newest or the best.

    Trainer's own `save_total_limit` would delete them before the new one is whole.
    """
    best = state.best_model_checkpoint
    rotate_checkpoints(str(args.output_dir), limit, best_model_checkpoint=best, use_mtime=False)


class TimedValidations(TrainerCallback):
    """Validates at the first step that ends `seconds` after the last validation, and saves a checkpoint if the run does
    that at all."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.since = time.perf_counter()

    def on_train_begin(self, args, state: TrainerState, control, **kwargs: Any) -> None:
        self.since = time.perf_counter()

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if any_process(time.perf_counter() - self.since >= self.seconds):
            control.should_evaluate = True
            control.should_save = args.save_strategy != "no"
        return control

    def on_evaluate(self, args, state: TrainerState, control, **kwargs: Any) -> None:
        self.since = time.perf_counter()


class SamplerEpoch(TrainerCallback):
    """Sets the sampler's epoch. The data loader does not do so when several processes resume within an epoch."""

    def __init__(self) -> None:
        self.sampler: LengthGroupedSampler | None = None

    def on_epoch_begin(self, args, state: TrainerState, control, **kwargs: Any) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class StepMeter(TrainerCallback):
    """Measures the speed of steps. Work between steps (validation, checkpoints) does not count."""

    def __init__(self) -> None:
        self.began: tuple[float, int] | None = None
        self.has_begun = False
        """Whether this process has begun a step, and so has read the checkpoint that it resumes from."""

    def on_step_begin(self, args, state: TrainerState, control, **kwargs: Any) -> None:
        self.has_begun = True
        if self.began is None:
            self.began = time.perf_counter(), state.num_input_tokens_seen

    def read(self, state: TrainerState) -> dict[str, float]:
        """Peak memory, and tokens per second since the first step after the last reading.

        The `train_` prefix is Transformers' own, for logs of the training loop.
        """
        measured: dict[str, float] = {"train_peak_memory_bytes": peak_memory()}
        if self.began is not None:
            seconds, tokens = time.perf_counter() - self.began[0], state.num_input_tokens_seen - self.began[1]
            if seconds > 0 and tokens > 0:
                measured["train_tokens_per_second"] = tokens / seconds
        self.began = None
        return measured


class NonFiniteLoss(TrainerCallback):
    """Stops the run when a loss or gradient norm is not finite; the error names the step."""

    def on_log(self, args, state: TrainerState, control, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not torch.isfinite(torch.tensor(float(value))):
                raise NotFiniteError(
                    f"{name} is {value} at step {state.global_step}; try a smaller training.learning_rate "
                    "or model.dtype=float32"
                )


@dataclass(frozen=True)
class Pace:
    """What a run knows of its own speed before its first step, in seconds. `TimeLeft` adds the speed of a step."""

    tokens_per_step: float
    """Average over the run."""
    validation: float
    test: float
    """The test after the training."""
    spent: float
    """Since the scan."""
    predicted: float | None
    """From the scan to the end, as the estimate before the run said; None where there was none."""
    between_validations: float | None = None
    """`training.eval_seconds`."""


class TimeLeft(TrainerCallback):
    """After the second step of this process, prints how long the rest of the run takes: the estimate before the run
    knows neither what else the machine does nor how fast this model really is on it.

    The first step does not count: it also prepares what the others reuse.
    """

    def __init__(self, pace: Pace, console: Console):
        self.pace, self.console = pace, console
        self.started = time.perf_counter()
        self.second: int | None = None
        self.began: tuple[float, int] | None = None

    def on_step_begin(self, args, state: TrainerState, control, **kwargs: Any) -> None:
        if self.second is None:
            self.second = state.global_step + 1
        elif state.global_step == self.second:
            self.began = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args, state: TrainerState, control, **kwargs: Any) -> None:
        if self.began is None or not state.is_world_process_zero:
            return
        seconds, tokens = time.perf_counter() - self.began[0], state.num_input_tokens_seen - self.began[1]
        self.began = None
        one_step = seconds / max(1, tokens) * self.pace.tokens_per_step
        spent = self.pace.spent + time.perf_counter() - self.started
        every, num_steps = int(args.eval_steps or state.max_steps), state.max_steps - state.global_step
        num_validations = state.max_steps // every - (state.global_step - 1) // every
        if self.pace.between_validations is not None:
            num_validations += int(num_steps * one_step / self.pace.between_validations)
        line = describe_time_left(self.pace, one_step, num_steps, num_validations, spent)
        if line is not None:
            StepLog(self.console).line("train", line)


def describe_time_left(pace: Pace, one_step: float, num_steps: int, num_validations: int, spent: float) -> str | None:
    """The time that is left after `spent` seconds; None where it is less than half a minute. Where the estimate before
    the run is wrong by more than a quarter, the line says so.

    >>> pace = Pace(tokens_per_step=800, validation=30, test=60, spent=100, predicted=420)
    >>> describe_time_left(pace, one_step=9.1, num_steps=62, num_validations=4, spent=130)
    'about 12 min left: 62 steps of 9.1 s, 4 validations, the test · in all 15 min, where 7 min were estimated'
    >>> describe_time_left(pace, one_step=3.0, num_steps=62, num_validations=4, spent=130)
    'about 6 min left: 62 steps of 3.0 s, 4 validations, the test'
    """
    left = num_steps * one_step + num_validations * pace.validation + pace.test
    if left < 30:
        return None
    validations = f"{num_validations} validation{'' if num_validations == 1 else 's'}, " if num_validations else ""
    line = f"about {about(left)} left: {num_steps:,} steps of {one_step:.1f} s, {validations}the test"
    if pace.predicted is not None and not 0.8 <= (spent + left) / pace.predicted <= 1.25:
        line += f" · in all {about(spent + left)}, where {about(pace.predicted)} were estimated"
    return line


_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # Windows has no SIGHUP, and alone has Ctrl-Break
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class Interruption(TrainerCallback):
    """On Ctrl-C, Ctrl-Break, SIGTERM or a closed terminal, finishes the step, saves a checkpoint and stops the
    training. A second signal stops it at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None:
            if signal.Signals(number).name == "SIGHUP":  # shells send it twice
                return
            previous = self._previous[number]  # the command's own, which ends it
            if callable(previous):
                previous(number, frame)
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        if not torch.distributed.is_initialized():  # otherwise this step may never end, if another process has died
            self._announce()

    def _announce(self) -> None:
        print(f"{self.signal_name}: finishing this step and saving a checkpoint", file=sys.stderr, flush=True)

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if any_process(self.signal_name is not None) and state.global_step < state.max_steps:
            if torch.distributed.is_initialized() and state.is_world_process_zero:
                self._announce()
            self.signal_name = self.signal_name or "signal on another process"
            control.should_save = control.should_training_stop = True  # a due validation still runs first
        return control


class TrainingBar(TrainerCallback):
    """A progress bar with loss, validation loss, tokens/s and memory; without a terminal, a line after each
    validation."""

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
            TextColumn("train"), BarColumn(20), MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn(
                "{task.fields[loss]} {task.fields[validation]} {task.fields[rate]} {task.fields[memory]}",
                table_column=Column(overflow="fold"),
            ),
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
