"""`sgm finetune`: the whole run on one screen, a function a step."""

from __future__ import annotations

import signal
import time
from dataclasses import asdict, replace
from typing import Any

from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import TrainerState, TrainingArguments

from sgm_finetune.base.config import Config
from sgm_finetune.base.environment import environment
from sgm_finetune.base.errors import Interrupted
from sgm_finetune.base.files import write_json, write_text
from sgm_finetune.base.memory import peak_memory, release_memory
from sgm_finetune.base.processes import processes
from sgm_finetune.base.text import about, gib
from sgm_finetune.commands.session import Session, open_session
from sgm_finetune.commands.steps import (
    TEST_LOSS,
    Adapted,
    Tested,
    agree,
    apply,
    choose_plan,
    go_on,
    load_base,
    probe_gradients,
    refer,
    scan_weights,
    test,
)
from sgm_finetune.data.batches import tokens_per_example
from sgm_finetune.data.encoding import num_tokens
from sgm_finetune.measure.probe import Probe
from sgm_finetune.measure.scan_result import Scan
from sgm_finetune.results.answers import generates_text
from sgm_finetune.results.examples import changed_examples, fingerprint_of_test
from sgm_finetune.results.export.target import base_for_peft
from sgm_finetune.results.files import PTH, save_adapter
from sgm_finetune.results.folder import Start, begin, recall_start
from sgm_finetune.results.kept_prompts import save_prompts
from sgm_finetune.results.pth import save_pth
from sgm_finetune.results.report.histogram import Histogram
from sgm_finetune.results.report.measured_histograms import histograms_of
from sgm_finetune.results.report.measured_pools import pool_tables
from sgm_finetune.results.report.page import render_report
from sgm_finetune.results.report.pictures import Pictures, save_pictures, similarity_tables
from sgm_finetune.results.report.run_files import load_run
from sgm_finetune.results.stops import save_tokenizer, stored_generation
from sgm_finetune.results.verdict import improved, shortfall
from sgm_finetune.train.adapters.apply import check_plan, check_starts
from sgm_finetune.train.arguments import training_arguments
from sgm_finetune.train.base_model import Base
from sgm_finetune.train.budget.reuse import replaced
from sgm_finetune.train.callbacks import Pace
from sgm_finetune.train.checkpoints import discard_after
from sgm_finetune.train.launch import gather_factors
from sgm_finetune.train.rate_trials import try_rates
from sgm_finetune.train.trainer import Trained, TrainingJob, train
from sgm_finetune.train.trial_size import FEWEST, MOST, TrialSize, trial_size

_STEPS = ("scan", "probe", "train", "evaluate")


def finetune(config: Config, console: Console, dry_run: bool = False) -> dict[str, Any]:
    """Runs what `config` describes; returns the metrics (the content of metrics.json) and leaves output.dir.

    Raises UserError, before anything large is loaded, for what can be known then, and Interrupted when a signal stopped
    the training after a checkpoint. A dry run does everything up to the first step and writes nothing.
    """
    with open_session(config, console, dry_run) as s:  # the lock, the checkpoint, the data, the memory
        scanned = scan_weights(s) if s.given_plan is None else None  # signal-to-noise ratio of every matrix
        histograms = scan_histograms(s, scanned)  # for the report
        base = load_base(s, will_train=True)  # the frozen model
        earlier = go_on(s, base)  # the model of an earlier run, if this one goes on from it
        before = base.model if earlier is None else earlier.model
        refer(s, base, before)  # what it says of the answers, for the loss of preferences
        start = measure_start(s, base, before, scanned)  # the test before, the probe, the plan
        adapted = earlier or apply(s, base, start.plan)  # a PEFT model whose groups share a factor, or whole matrices
        start = choose_rate(s, base, adapted, start)  # by trials, if the configuration asks for them
        arguments = trainer_arguments(s)  # not before: with DeepSpeed, Transformers would partition the base
        if dry_run:
            return preview(s, adapted, arguments)
        claim_folder(s, start, histograms)  # from here on, output.dir is this run's
        trained = train_adapters(s, base, adapted, start, arguments)  # the model holds the best checkpoint's weights
        after = agree(s.config, lambda: test(s, base, adapted.model, "after"))
        return save(s, start, adapted, trained.state, after)


def scan_histograms(s: Session, scanned: Scan | None) -> tuple[Histogram, ...]:
    """The report's histograms of singular values, by the first process. A scan from a file may be of other weights,
    so it has none."""
    if scanned is None or s.config.snr.scan is not None or not processes().is_main_process:
        return ()
    with s.clock.time("scan"):
        return histograms_of(scanned, s.prepared.folder)


def measure_start(s: Session, base: Base, model: nn.Module, scanned: Scan | None) -> Start:
    """What the run knows before its first step: the test of `model`, which is the base or that of an earlier run, and
    the plan.

    A resumed run recalls both. A given plan is checked before the minutes that the test takes.
    """
    if s.given_plan is not None:
        if s.earlier is None:
            check_plan(base.model, s.given_plan)
            check_starts(s.given_plan)
        if s.checkpoint is not None:
            return recall_start(s.output, s.given_plan, s.clock.seconds)
    before: Tested = agree(s.config, lambda: test(s, base, model, "before"))
    if s.given_plan is not None:
        return Start(s.given_plan, before.metrics, before.predictions, None)
    assert scanned is not None

    def measure() -> tuple[Any, dict[str, Any] | None]:
        probed = probe_gradients(s, base)
        return choose_plan(s, base, scanned, probed), _probe_numbers(probed)

    plan, numbers = agree(s.config, measure)
    return Start(plan, before.metrics, before.predictions, numbers)


def choose_rate(s: Session, base: Base, adapted: Adapted, start: Start) -> Start:
    """With training.learning_rate=auto, chooses it by trials, which `start` then holds. The model stays as it is."""
    if s.config.training.learning_rate != "auto":
        return start
    size = trial_size(s.config, len(s.prepared.train.dataset))
    s.log.line("rate", _describe_trials(s, size))
    with s.clock.time("rate_trials"), s.log.bar("rate") as progress:
        trials = try_rates(training_job(s, base, adapted, start, trainer_arguments(s)), progress)
    s.config = replaced(s.config, "training", learning_rate=trials.chosen)
    tried = " · ".join(f"{rate:.3g}: {loss:.4f}" for rate, loss in sorted(trials.losses.items()))
    s.log.line(
        "rate", f"training.learning_rate={trials.chosen:g} for {trials.steps} steps, after {trials.seconds:.0f} s"
    )
    s.log.line("", f"learning rate and loss of the trials: {tried}")
    return replace(start, rate_trials=trials.to_dict())


def _describe_trials(s: Session, size: TrialSize) -> str:
    line = f"{FEWEST} to {MOST} trials of {size.steps} steps, tested on {size.num_held_out} training examples left out"
    if s.estimate is None:
        return line
    one = s.estimate.seconds["rate_trials"] / FEWEST
    return f"{line}: about {about(FEWEST * one)} to {about(MOST * one)}"


def trainer_arguments(s: Session) -> TrainingArguments:
    num_train = len(s.prepared.train.dataset)
    return training_arguments(s.config, s.output / "checkpoints", num_train, processes().num_processes)


def preview(s: Session, adapted: Adapted, arguments: TrainingArguments) -> dict[str, Any]:
    """What a dry run returns: the sizes, and the number of steps that would follow."""
    s.log.line("dry run", f"{arguments.max_steps} steps of {s.config.training.batch_size} would follow")
    return {**adapted.to_dict(), "steps": arguments.max_steps}


def claim_folder(s: Session, start: Start, histograms: tuple[Histogram, ...]) -> None:
    """Writes what is known before the first step; a resumed run drops what came after its checkpoint instead."""
    if processes().is_main_process:
        if s.checkpoint is not None:
            discard_after(s.checkpoint)
        else:
            s.hold_output()
            begin(s.config, s.asked, s.output, start, s.prepared, s.clock.seconds)
            save_pictures(Pictures(histograms, similarity_tables(start.plan.similarities)), s.output / "pictures.json")
    processes().wait_for_everyone()


def train_adapters(s: Session, base: Base, adapted: Adapted, start: Start, arguments: TrainingArguments) -> Trained:
    """Trains the adapters. Raises Interrupted if a signal stopped it."""
    release_memory()
    job = training_job(s, base, adapted, start, arguments)
    with s.clock.time("train"):
        trained = train(job, s.log.console)
    release_memory()
    state = trained.state
    if trained.stopped_by is not None:
        raise Interrupted(
            f"Stopped by {trained.stopped_by} after step {state.global_step} of {state.max_steps}; "
            "continue with training.resume=true",
            getattr(signal, trained.stopped_by, signal.SIGINT),
        )
    line = f"{state.global_step} steps in {s.clock.seconds['train']:.0f} s"
    if state.best_metric is not None:
        line += f" · best validation loss {state.best_metric:.4f} at step {state.best_global_step}"
    s.log.line("train", line)
    return trained


def training_job(s: Session, base: Base, adapted: Adapted, start: Start, arguments: TrainingArguments) -> TrainingJob:
    return TrainingJob(
        config=s.config,
        model=adapted.model,
        plan=start.plan,
        train=s.prepared.train.dataset,
        validation=s.prepared.validation.dataset,
        collate=s.prepared.collate,
        arguments=arguments,
        head_loss=base.head_loss,
        resume_from=s.checkpoint,
        pace=expected_pace(s),
        check_output=s.check_output,
    )


def expected_pace(s: Session) -> Pace:
    """What the test of the untouched model says about the time of the validations and of the last test."""
    seconds, training = s.clock.seconds, s.config.training
    tokens = {name: num_tokens(getattr(s.prepared, name).dataset) for name in ("validation", "test")}
    test = seconds.get("evaluate", 0.0)
    return Pace(
        tokens_per_step=training.batch_size * tokens_per_example(s.config, s.prepared.train.dataset),
        validation=seconds.get(TEST_LOSS, test) * tokens["validation"] / tokens["test"],
        test=test,
        spent=test + sum(seconds.get(name, 0.0) for name in ("reference", "probe", "rate_trials")),
        predicted=None if s.estimate is None or s.checkpoint is not None else sum(s.estimate.seconds.values()),
        between_validations=training.eval_seconds,
    )


def save(s: Session, start: Start, adapted: Adapted, state: TrainerState, after: Tested) -> dict[str, Any]:
    """Writes the results into output.dir, by the first process, and returns the metrics."""
    s.clock.seconds["total"] = time.perf_counter() - s.started
    metrics = _metrics(s, start, adapted, state, after)
    short = shortfall(metrics)
    metrics["improved"] = improved(metrics)
    with gather_factors(adapted.model):
        if processes().is_main_process:
            _write_results(s, start, adapted, state, after, metrics)
        processes().wait_for_everyone()
    if s.estimate is not None:
        predicted, measured = s.estimate.peak_bytes, metrics["peak_memory_bytes"]
        s.log.line("memory", f"{gib(measured)} at most, predicted {gib(predicted)} ({predicted / measured - 1:+.0%})")
    folders = [] if s.config.is_full else [f"{s.output / 'adapter'}/"]
    s.log.line("saved", ", ".join([str(s.output / PTH), *folders, str(s.output / "report.html")]))
    if short is not None:
        for step, line in zip(("result", *[""] * len(short.advice)), (short.line, *short.advice), strict=True):
            s.log.line(step, line)
    return metrics


def _metrics(s: Session, start: Start, adapted: Adapted, state: TrainerState, after: Tested) -> dict[str, Any]:
    """The content of metrics.json."""
    config, seconds = s.config, s.clock.seconds
    more = tuple(name for name in ("reference", "rate_trials") if name in seconds)
    return {
        "model": config.model.name,
        "task": config.model.task,
        "data": s.prepared.splits.description,
        "test_fingerprint": fingerprint_of_test(s.prepared.splits),
        "labels": list(s.prepared.splits.labels),
        "head_is_new": s.prepared.head.is_new,
        "before": start.before,
        "after": after.metrics,
        **adapted.to_dict(),
        "seconds": {name: round(seconds.get(name, 0.0), 3) for name in (*_STEPS, *more, "total")},
        "peak_memory_bytes": peak_memory(),
        "predicted": s.estimate and s.estimate.to_dict(),
        "optimizer": config.optimizer,
        "learning_rate": config.peak_learning_rate(state.max_steps),
        "rate_trials": start.rate_trials,
        "num_train": len(s.prepared.train.dataset),
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "tokens_per_second": None if s.checkpoint else state.num_input_tokens_seen / seconds["train"],
        "probe": start.probe,
        **({"mixture": [asdict(share) for share in s.prepared.mixture]} if s.prepared.mixture else {}),
        "environment": environment(),
    }


def _write_results(
    s: Session, start: Start, adapted: Adapted, state: TrainerState, after: Tested, metrics: dict[str, Any]
) -> None:
    s.check_output()
    output, prepared, splits = s.output, s.prepared, s.prepared.splits
    examples = changed_examples(
        splits,
        s.config.model.task,
        prepared.test.dataset,
        (start.predictions, after.predictions),
        (start.before, after.metrics),
    )
    write_json(output / "examples.json", examples)
    steps = [row for row in state.log_history if "train_loss" not in row]  # the summary that ends a call of Trainer
    write_json(output / "history.json", steps)
    if isinstance(adapted.model, PeftModel):
        _write_adapter(s, adapted.model)
    save_prompts(prepared.test.dataset, s.config.model.task, output)
    save_pth(
        output / PTH,
        adapted.model,
        start.plan,
        s.config,
        splits.labels,
        splits.label_kind,
        splits.roles,
        prepared.head.is_new,
    )
    write_json(output / "metrics.json", metrics)
    run = load_run(output)
    if isinstance(adapted.model, PeftModel) and (pools := pool_tables(adapted.model, start.plan)):
        run = replace(run, pictures=replace(run.pictures, pools=pools))
        save_pictures(run.pictures, output / "pictures.json")
    write_text(output / "report.html", render_report(run))


def _write_adapter(s: Session, model: PeftModel) -> None:
    prepared, task = s.prepared, s.config.model.task
    is_chat = "messages" in prepared.splits.train.column_names
    generation = stored_generation(prepared.folder, model.config) if generates_text(task) else None
    save_adapter(
        model,
        s.output / "adapter",
        base_for_peft(s.config.model.name, prepared.folder),
        lambda folder: save_tokenizer(prepared.tokenizer, folder, generation, is_chat),
    )


def _probe_numbers(probed: Probe | None) -> dict[str, Any] | None:
    """What metrics.json reports about the probe, whose sketches are then released."""
    if probed is None:
        return None
    names = ("loss", "num_batches", "num_tokens", "sketch_bytes", "activation_bytes")
    return {name: getattr(probed, name) for name in names}
