"""The whole way: scan -> probe -> plan -> apply -> train -> evaluate -> save, one function a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, TrainerState

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import Clock, StepLog
from sgm_finetune.base.environment import environment
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import disk_free, locked, write_json, write_text
from sgm_finetune.base.memory import memory_within_reach, peak_memory, release_memory
from sgm_finetune.base.processes import on_main, processes
from sgm_finetune.base.text import gib
from sgm_finetune.data.prepared import PreparedData, prepare_data
from sgm_finetune.data.questions import has_answers, questions
from sgm_finetune.measure.make_plan import describe_plan, make_plan, remarks
from sgm_finetune.measure.plan_file import load_plan
from sgm_finetune.measure.probe import Probe, probe
from sgm_finetune.measure.probe_batches import probe_batches, probe_pieces
from sgm_finetune.measure.scan import scan
from sgm_finetune.measure.scan_formats import load_scan
from sgm_finetune.measure.scan_result import Scan
from sgm_finetune.method.build_plan import Plan
from sgm_finetune.method.plan_rules import adapter_parameters
from sgm_finetune.model.load import check_checkpointing
from sgm_finetune.model.matrices import adaptable, out_of_reach
from sgm_finetune.results.answers import _read_result
from sgm_finetune.results.evaluation import evaluate_with_predictions
from sgm_finetune.results.examples import changed_examples, fingerprint_of_test, kept_predictions
from sgm_finetune.results.files import PTH, save_adapter, save_pth
from sgm_finetune.results.folder import Measured, as_it_began, begin, check_same_data, claim_output, earlier
from sgm_finetune.results.generation import answer_metrics, generate_answers
from sgm_finetune.results.harness import check_harness, harness_metrics
from sgm_finetune.results.load import attach_adapter
from sgm_finetune.results.metrics import describe_metrics
from sgm_finetune.results.report.histogram import Histogram
from sgm_finetune.results.report.page import render_report
from sgm_finetune.results.report.pictures import Pictures, histograms_of, save_pictures, similarity_tables
from sgm_finetune.results.report.run_files import load_run
from sgm_finetune.results.report.scan_table import scan_summary
from sgm_finetune.train.adapters.apply import apply_plan, check_plan, check_starts
from sgm_finetune.train.adapters.shard import reduce_factors_only
from sgm_finetune.train.arguments import check_machine, training_arguments
from sgm_finetune.train.base_model import load_base
from sgm_finetune.train.budget.estimate import Estimate, PredictionError, estimate
from sgm_finetune.train.budget.fit import check_fits, fit
from sgm_finetune.train.budget.table import describe_estimate, estimate_table
from sgm_finetune.train.checkpoints import discard_after
from sgm_finetune.train.fast.head_loss import HeadLoss
from sgm_finetune.train.fast.prepare import prepare_adapters, prepare_base
from sgm_finetune.train.launch import check_launch, follow_launcher, in_pieces, whole_factors
from sgm_finetune.train.losses import check_packing
from sgm_finetune.train.trainer import train


class Interrupted(Exception):  # noqa: N818 - the user's wish, not an error
    """Training was stopped by a signal; a checkpoint holds everything up to then."""


def finetune(config: Config, console: Console, dry_run: bool = False) -> dict[str, Any]:
    """The run that `config` describes; returns its metrics (the content of metrics.json) and leaves output.dir.

    Raises UserError before anything large is loaded for what can be known then, and Interrupted when a signal stopped
    the training after a checkpoint. A dry run does everything up to the first step and writes nothing.
    """
    with ExitStack() as held:
        return _finetune(config, console, dry_run, held)


def _finetune(config: Config, console: Console, dry_run: bool, held: ExitStack) -> dict[str, Any]:
    """`held`: keeps the output folder locked, from the beginning where it is there, else from the first file on."""
    started = time.perf_counter()
    log, clock = _step_log(console), Clock()
    config = follow_launcher(config)
    output = Path(config.output.dir)
    if was_there := output.is_dir() and not dry_run:
        _hold(output, held)
    asked = config
    if config.training.resume:
        config = as_it_began(config, output)
    checkpoint = claim_output(config, output)
    check_machine(config)
    check_launch(config, processes().num_processes, checkpoint)
    given_plan = _given_plan(config, output, checkpoint)
    check_harness(config.evaluation.harness, config.model.task)
    prepared = prepare_data(config, log)
    if checkpoint is not None:
        check_same_data(prepared, output)
    config, needed = _within_memory(config, prepared, given_plan, log, resumed=checkpoint is not None)
    datasets = (prepared.train.dataset, prepared.validation.dataset)
    scanned = scan_model(config, prepared.folder, log, clock) if given_plan is None else None
    histograms = _histograms(config, scanned, prepared.folder, clock)
    model, new_modules = load_base(config, prepared, log)
    check_packing(model, prepared.train.dataset)
    if config.training.checkpointing:
        check_checkpointing(model)
    if given_plan is not None:
        check_plan(model, given_plan)  # before the minutes of evaluation and not after them
        check_starts(given_plan)
    head_loss = _prepare_base(config, model, new_modules, prepared, log)
    test = _evaluator(config, prepared, log, clock, head_loss)
    if checkpoint is not None and given_plan is not None:
        measured = earlier(output, given_plan, clock.seconds)
    else:
        before, predicted = _agreed(config, lambda: test(model, "before"))
        plan, numbers = given_plan, None
        if plan is None:
            plan, numbers = _agreed(config, lambda: measure(config, model, scanned, prepared, log, clock, head_loss))
        measured = Measured(plan, before, predicted, numbers)
    adapted, parameters = _adapt(config, model, measured.plan, new_modules, log)
    # not before: they tell Transformers of DeepSpeed, which would have the base partitioned as it is loaded
    arguments = training_arguments(config, output / "checkpoints", len(datasets[0]), processes().num_processes)
    if dry_run:
        log.line("dry run", f"{arguments.max_steps} steps of {config.training.batch_size} would follow")
        return {**parameters, "steps": arguments.max_steps}
    if checkpoint is None and processes().is_main_process:
        if not was_there:
            _hold(output, held)
        begin(config, asked, output, measured, prepared, clock.seconds)
        save_pictures(Pictures(histograms, similarity_tables(measured.plan.similarities)), output / "pictures.json")
    elif checkpoint is not None and processes().is_main_process:
        discard_after(checkpoint)
    processes().wait_for_everyone()
    release_memory()
    with clock.time("train"):
        trainer, stopped_by = train(
            adapted, measured.plan, config, datasets, prepared.collate, arguments, log.console, head_loss, checkpoint
        )
    release_memory()
    state = trainer.state
    if stopped_by is not None:
        raise Interrupted(
            f"Stopped by {stopped_by} after step {state.global_step} of {state.max_steps}; "
            "continue with training.resume=true"
        )
    log.line("train", _describe_training(state, clock.seconds["train"]))
    after, predicted = _agreed(config, lambda: test(adapted, "after"))
    clock.seconds["total"] = time.perf_counter() - started
    metrics = {
        "model": config.model.name,
        "task": config.model.task,
        "data": prepared.splits.description,
        "test_fingerprint": fingerprint_of_test(prepared.splits),
        "labels": list(prepared.splits.labels),
        "before": measured.before,
        "after": after,
        **parameters,
        "seconds": {name: round(clock.seconds.get(name, 0.0), 3) for name in (*_STEPS, "total")},
        "peak_memory_bytes": peak_memory(),
        "predicted": needed and needed.to_dict(),
        "optimizer": config.training.optimizer,
        "learning_rate": config.training.peak_learning_rate,
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "tokens_per_second": None if checkpoint else state.num_input_tokens_seen / clock.seconds["train"],
        "probe": measured.probe,
        "environment": environment(),
    }
    with whole_factors(adapted):
        if processes().is_main_process:
            examples = changed_examples(
                prepared.splits, config.model.task, prepared.test.dataset, (measured.predicted, predicted),
                (measured.before, after),
            )  # fmt: skip
            write_json(output / "examples.json", examples)
            write_json(output / "history.json", state.log_history)
            _save(config, adapted, measured.plan, prepared, metrics, output)
        processes().wait_for_everyone()
    if needed is not None:
        log.line("memory", _describe_peak(needed.peak_bytes, metrics["peak_memory_bytes"]))
    log.line("saved", f"{output / PTH}, {output / 'adapter'}/, {output / 'report.html'}")
    return metrics


def _hold(output: Path, held: ExitStack) -> None:
    """By the first process, for all."""
    if processes().is_main_process:
        held.enter_context(locked(output))


def _estimated(config: Config, prepared: PreparedData, plan: Plan | None, log: StepLog) -> tuple[Config, Estimate]:
    """The configuration that fits into `memory.budget`, else as it is, and what it will need."""
    if config.memory.budget is None:
        return config, estimate(config, prepared, plan)
    budget = min(config.memory.budget, memory_within_reach())
    fitted = fit(config, prepared, budget, plan)
    if fitted.given_up:
        log.line("memory", f"to fit into {gib(budget)}: {', '.join(fitted.given_up)}")
    return fitted.config, fitted.estimate


def _within_memory(
    config: Config, prepared: PreparedData, plan: Plan | None, log: StepLog, resumed: bool = False
) -> tuple[Config, Estimate | None]:
    """`_estimated` by the first process (as it began, where it is resumed), and None where what it needs cannot be
    told and no budget asks for it. Raises UserError where that is more than there is."""

    def decided() -> tuple[Config, Estimate | None, int]:
        reach = memory_within_reach()
        try:
            if resumed:
                return config, estimate(config, prepared, plan), reach
            return *_estimated(config, prepared, plan, log), reach
        except PredictionError as error:
            if config.memory.budget is not None:
                raise
            log.line("memory", str(error))
            return config, None, reach

    config, needed, reach = on_main(decided)
    release_memory()
    if needed is None:
        return config, None
    check_fits(needed, reach, config)
    log.line("memory", describe_estimate(needed, reach))
    free = disk_free(Path(config.output.dir))
    if needed.disk_bytes > free:
        raise UserError(
            f"output.dir={config.output.dir} will take about {needed.disk_bytes / 2**20:,.0f} MiB, and its disk has "
            f"{free / 2**20:,.0f} MiB free; make room, or name a folder on another disk"
        )
    return config, needed


def _describe_peak(predicted: int, measured: int) -> str:
    return f"{gib(measured)} at most, predicted {gib(predicted)} ({predicted / measured - 1:+.0%})"


def _adapt(
    config: Config, model: PreTrainedModel, plan: Plan, new_modules: Sequence[str], log: StepLog
) -> tuple[PeftModel, dict[str, int]]:
    """The merged model, and its number of trainable parameters beside plain LoRA's."""
    _tell_plan(plan, log)
    set_seed(config.training.seed)
    adapted = apply_plan(model, plan, new_modules)
    total = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    trainable, plain = adapter_parameters(plan)
    log.line("apply", _describe_parameters(total, trainable, plain))
    _prepare_adapters(config, adapted, log)
    if config.training.shard:
        reduce_factors_only(adapted)
    return adapted, {"trainable_parameters": total, "plain_lora_parameters": total - trainable + plain}


def _prepare_base(
    config: Config, model: PreTrainedModel, new_modules: Sequence[str], prepared: PreparedData, log: StepLog
) -> HeadLoss | None:
    dataset = prepared.train.dataset
    first = prepared.collate([dataset[i] for i in range(min(2, len(dataset)))])
    head_loss, said = prepare_base(config, model, new_modules, first)
    for line in said:
        log.line("", line)
    return head_loss


def _prepare_adapters(config: Config, adapted: PeftModel, log: StepLog) -> None:
    if slow := prepare_adapters(config, adapted):
        log.line("", f"by PEFT's own forward: {_some(slow)}")


def _describe_training(state: TrainerState, seconds: float) -> str:
    line = f"{state.global_step} steps in {seconds:.0f} s"
    if state.best_metric is not None:
        line += f" · best validation loss {state.best_metric:.4f} at step {state.best_global_step}"
    return line


_STEPS = ("scan", "probe", "train", "evaluate")


def make_plan_for(config: Config, console: Console) -> Plan:
    """scan -> probe -> plan, without training: what `sgm plan` writes."""
    log, clock = _step_log(console), Clock()
    check_harness(config.evaluation.harness, config.model.task)
    prepared = prepare_data(config, log)
    if config.memory.budget is not None:
        config, _ = _within_memory(config, prepared, None, log)
    scanned = scan_model(config, prepared.folder, log, clock)
    model, new_modules = load_base(config, prepared, log)
    head_loss = _prepare_base(config, model, new_modules, prepared, log)
    plan, _ = measure(config, model, scanned, prepared, log, clock, head_loss)
    _tell_plan(plan, log)
    return plan


def estimate_for(config: Config, console: Console) -> Estimate:
    """What `sgm estimate` prints: the memory, disk and time of the run that `config` describes; nothing is loaded."""
    log = _step_log(console)
    check_machine(config)
    check_harness(config.evaluation.harness, config.model.task)
    prepared = prepare_data(config, log)
    plan = load_plan(config.plan) if config.plan is not None else None
    _, needed = _estimated(config, prepared, plan, log)
    console.print(estimate_table(needed, memory_within_reach()))
    return needed


def evaluate(config: Config, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """The test metrics of output.dir/sgm_finetuned.pth, from that file and the base model alone.

    The configuration that was trained with is in the file; `overrides` (key=value) change it.
    """
    log, clock = _step_log(console), Clock()
    own = config.evaluation.harness
    path, content, config = _read_result(config, overrides)
    if strange := [name for name in config.evaluation.harness if name.endswith((".yaml", ".yml")) and name not in own]:
        raise UserError(
            f"{path} was trained with evaluation.harness={strange[0]}, a file that can run code; say "
            "evaluation.harness=... yourself, or evaluation.harness=[]"
        )
    check_harness(config.evaluation.harness, config.model.task)
    prepared = prepare_data(config, log)
    labels = tuple(content["labels"])
    if prepared.splits.labels != labels:
        raise UserError(
            f"The data has the labels {list(prepared.splits.labels)}, {path} was trained with {list(labels)}; "
            "choose other test data"
        )
    base, new_modules = load_base(config, prepared, log)
    head_loss = _prepare_base(config, base, new_modules, prepared, log)
    model = attach_adapter(base, content, path)
    _prepare_adapters(config, model, log)
    metrics, _ = _evaluator(config, prepared, log, clock, head_loss)(model, "test")
    return {"model": config.model.name, "data": prepared.splits.description, **metrics}


def scan_model(config: Config, folder: Path, log: StepLog, clock: Clock) -> Scan:
    """The scan of the model's files, or the one in snr.scan."""
    if config.snr.scan is not None:
        scanned = load_scan(config.snr.scan, config.snr.estimator)
        log.line("scan", f"{scan_summary(scanned)} · from {config.snr.scan}")
        return scanned

    def measured() -> Scan:
        with clock.time("scan"), log.bar("scan") as progress:
            return scan(folder, estimator=config.snr.estimator, progress=progress)

    scanned = on_main(measured)
    log.line("scan", scan_summary(scanned))
    return scanned


def _histograms(config: Config, scanned: Scan | None, folder: Path, clock: Clock) -> tuple[Histogram, ...]:
    """What the report draws of the scan, by the first process. A scan from a file may be of other weights: nothing."""
    if scanned is None or config.snr.scan is not None or not processes().is_main_process:
        return ()
    with clock.time("scan"):
        return histograms_of(scanned, folder)


def measure(
    config: Config,
    model: PreTrainedModel,
    scanned: Scan | None,
    prepared: PreparedData,
    log: StepLog,
    clock: Clock,
    head_loss: HeadLoss | None = None,
) -> tuple[Plan, dict[str, Any] | None]:
    """The plan that follows from the probe, and what is told of the probe (None: nothing is to be merged, and there is
    none); its sketches are let go."""
    probed = None
    if config.merge.side != "none":
        with clock.time("probe"), log.bar("probe") as progress:
            probed = probe(
                model,
                probe_batches(config, prepared),
                sketch_size=config.probe.sketch_size,
                seed=config.probe.seed,
                progress=progress,
                mean_loss=head_loss and head_loss.mean,
                pieces=partial(probe_pieces, config),
            )
        log.line(
            "probe",
            f"{probed.num_batches} batches, {probed.num_tokens:,} tokens in {probed.seconds:.1f} s · sketches "
            f"{probed.sketch_bytes / 2**20:.0f} MiB · activations at most {probed.activation_bytes / 2**20:.0f} MiB",
        )
    else:
        log.line("probe", "not needed: merge.side=none")
    assert scanned is not None
    release_memory()
    plan = make_plan(scanned, probed, config, model)
    if beyond := out_of_reach(model):
        log.line("", f"not told from experts by PEFT, so not trained: {_some(beyond)}")
    if probed is not None and probed.unused:
        log.line("", f"not in the loss, so not trained: {_some(probed.unused)}")
    measured = adaptable(model) if probed is None else probed.shapes
    if missing := [name for name in measured if name not in {matrix.name for matrix in plan.matrices}]:
        log.line("", f"not in the scan, so not trained: {_some(missing)}")
    return plan, _probe_numbers(probed)


def _some(names: Sequence[str]) -> str:
    return f"{names[0]}" if len(names) == 1 else f"{len(names)} matrices ({names[0]}, ...)"


def _tell_plan(plan: Plan, log: StepLog) -> None:
    log.line("plan", describe_plan(plan))
    for remark in remarks(plan):
        log.line("", remark)


def _given_plan(config: Config, output: Path, checkpoint: Path | None) -> Plan | None:
    if checkpoint is not None:
        return load_plan(output / "plan.json")
    return load_plan(config.plan) if config.plan is not None else None


def _evaluator(
    config: Config, prepared: PreparedData, log: StepLog, clock: Clock, head_loss: HeadLoss | None
) -> Callable[[nn.Module, str], tuple[dict[str, Any], list[Any]]]:
    """A function that gives a model's metrics on the test data, and the predictions that are kept."""

    def test(model: nn.Module, when: str) -> tuple[dict[str, Any], list[Any]]:
        with clock.time("evaluate"), log.bar(when) as progress:
            metrics, predicted = evaluate_with_predictions(
                model,
                prepared.test.dataset,
                prepared.collate,
                config.model.task,
                config.training.eval_batch_size,
                prepared.splits.labels,
                progress,
                head_loss,
            )
            metrics |= _answers(config, prepared, model, progress)
            if asked := config.evaluation.harness:
                size, limit = config.training.eval_batch_size, config.evaluation.harness_limit
                metrics["harness"] = harness_metrics(model, prepared.tokenizer, asked, size, limit)
        release_memory()
        log.line(when, describe_metrics(metrics))
        for name, numbers in metrics.get("harness", {}).items():
            log.line("", " · ".join([name, *(f"{key} {value:.4f}" for key, value in numbers.items())]))
        return metrics, kept_predictions(predicted)

    return test


def _answers(config: Config, prepared: PreparedData, model: nn.Module, progress: Callable[..., None]) -> dict[str, Any]:
    """Metrics of generated answers, and the first few of them; nothing where the data has none."""
    dataset, task, tokenizer = prepared.test.dataset, config.model.task, prepared.tokenizer
    number = min(config.evaluation.num_generated, len(dataset))
    if not number or not has_answers(dataset, task):
        return {}
    asked = questions(dataset, range(number), task)
    answers = generate_answers(model, asked, tokenizer, task, config.training.eval_batch_size, progress)
    texts = [
        [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in (q.prompt, q.answer)] for q in asked
    ]
    samples = [
        {"prompt": prompt, "reference": reference, "answer": answer}
        for (prompt, reference), answer in zip(texts[:_SAMPLES], answers, strict=False)
    ]
    found = answer_metrics(answers, [reference for _, reference in texts])
    return {**found, "num_generated": number, "samples": samples}


_SAMPLES = 8


def _describe_parameters(total: int, trainable: int, plain: int) -> str:
    head = f" (and {total - trainable:,} of a new head)" if total > trainable else ""
    line = f"PEFT LoRA: {trainable:,} trainable adapter parameters{head}; without sharing {plain:,}"
    if processes().num_processes > 1:  # gradients are float32
        reduced, unshared = (4 * size / 2**20 for size in (total, total - trainable + plain))
        line += f" · gradients of {reduced:,.2f} MiB reduced a step, {unshared:,.2f} without sharing"
    return line


def _probe_numbers(probed: Probe | None) -> dict[str, Any] | None:
    if probed is None:
        return None
    names = ("loss", "num_batches", "num_tokens", "sketch_bytes", "activation_bytes")
    return {name: getattr(probed, name) for name in names}


def _save(
    config: Config, model: PeftModel, plan: Plan, prepared: PreparedData, metrics: dict[str, Any], output: Path
) -> None:
    save_adapter(model, prepared.tokenizer, output / "adapter")
    splits = prepared.splits
    save_pth(output / PTH, model, plan, config, splits.labels, splits.label_kind, splits.train.column_names)
    write_json(output / "metrics.json", metrics)
    write_text(output / "report.html", render_report(load_run(output)))


def _step_log(console: Console) -> StepLog:
    """Only the first process speaks."""
    return StepLog(console if processes().is_main_process else Console(quiet=True))


def _agreed(config: Config, measured: Callable[[], Any]) -> Any:
    """What is measured on the model, as the first process found it; on a model in pieces all compute it together."""
    if not in_pieces(config):
        return on_main(measured)
    found = measured()
    return on_main(lambda: found)
