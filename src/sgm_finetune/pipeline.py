"""The whole way: scan -> probe -> plan -> apply -> train -> evaluate -> save, one function a step."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, set_seed
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from sgm_finetune.adapters.apply import apply_plan, check_plan, check_starts
from sgm_finetune.adapters.plan_file import load_plan, save_plan
from sgm_finetune.config import Config, load_config, parse_config, set_overrides
from sgm_finetune.data import DataSplits, Encoded, collator, encode, load_splits
from sgm_finetune.errors import UserError
from sgm_finetune.evaluation import evaluate_model
from sgm_finetune.export import (
    PTH,
    RESULTS,
    attach_adapter,
    clear_results,
    load_pth,
    pth_config,
    save_adapter,
    save_pth,
    write_config,
)
from sgm_finetune.files import write_json, write_text
from sgm_finetune.measure.probe import Probe, probe
from sgm_finetune.measure.scan import scan
from sgm_finetune.measure.scan_formats import load_scan
from sgm_finetune.method.plan import MatrixNumbers, Plan, PlanSettings, adapter_parameters, build_plan
from sgm_finetune.method.spectrum import Scan, by_parameter
from sgm_finetune.method.subspace import SIDES
from sgm_finetune.model_folder import local_folder
from sgm_finetune.models import (
    check_model,
    device_for,
    linear_layers,
    load_model,
    load_tokenizer,
    matrix_shape,
)
from sgm_finetune.report.page import render_report
from sgm_finetune.report.scan_table import scan_summary
from sgm_finetune.trainer import last_whole_checkpoint, peak_memory, train, training_arguments
from sgm_finetune.voice import Voice


class Interrupted(Exception):  # noqa: N818 - the user's wish, not an error
    """Training was stopped by a signal; a checkpoint holds everything up to then."""


@dataclass(frozen=True)
class Materials:
    """What is known before the model is loaded."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    splits: DataSplits
    train: Encoded
    validation: Encoded
    test: Encoded
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


@dataclass
class Clock:
    """Seconds spent in each step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def finetune(config: Config, console: Console, dry_run: bool = False) -> dict[str, Any]:
    """The run that `config` describes; returns its metrics (the content of metrics.json) and leaves output.dir.

    Raises UserError before anything large is loaded for what can be known then, and Interrupted when a signal stopped
    the training after a checkpoint. A dry run does everything up to the first step and writes nothing.
    """
    started = time.perf_counter()
    voice, clock = _voice(console), Clock()
    output = Path(config.output.dir)
    checkpoint = _claim_output(config, output)
    given_plan = _given_plan(config, output, checkpoint)
    materials = prepare(config, voice)
    datasets = (materials.train.dataset, materials.validation.dataset)
    arguments = training_arguments(config, output / "checkpoints", len(datasets[0]), _state().num_processes)
    scanned = scan_model(config, materials.folder, voice, clock) if given_plan is None else None
    model = load_base(config, materials)
    if given_plan is not None:
        check_plan(model, given_plan)  # before the minutes of evaluation and not after them
        check_starts(given_plan)
    test = _evaluator(config, materials, voice, clock)
    if checkpoint is not None and given_plan is not None:
        measured = _earlier(output, given_plan, clock)
    else:
        before = _on_main(lambda: test(model, "before"))
        plan, probed = given_plan, None
        if plan is None:
            plan, probed = _on_main(lambda: measure(config, model, scanned, materials, voice, clock))
        measured = Measured(plan, before, _probe_numbers(probed))
    adapted, parameters = _adapt(config, model, measured.plan, voice)
    if dry_run:
        voice.say("dry run", f"{arguments.max_steps} steps of {config.training.batch_size} would follow")
        return {**parameters, "steps": arguments.max_steps}
    if checkpoint is None and _state().is_main_process:
        _begin(config, output, measured, clock)
    _state().wait_for_everyone()
    with clock.time("train"):
        trainer, stopped_by = train(
            adapted, measured.plan, config, datasets, materials.collate, arguments, voice.console, checkpoint
        )
    state = trainer.state
    if stopped_by is not None:
        raise Interrupted(
            f"Stopped by {stopped_by} after step {state.global_step} of {state.max_steps}; "
            "continue with training.resume=true"
        )
    voice.say("train", _describe_training(state, clock.seconds["train"]))
    after = _on_main(lambda: test(adapted, "after"))
    clock.seconds["total"] = time.perf_counter() - started
    metrics = {
        "model": config.model.name,
        "task": config.model.task,
        "data": materials.splits.description,
        "labels": list(materials.splits.labels),
        "before": measured.before,
        "after": after,
        **parameters,
        "seconds": {name: round(clock.seconds.get(name, 0.0), 3) for name in (*_STEPS, "total")},
        "peak_memory_bytes": peak_memory(),
        "optimizer": config.training.optimizer,
        "learning_rate": config.training.peak_learning_rate,
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "tokens_per_second": None if checkpoint else state.num_input_tokens_seen / clock.seconds["train"],
        "probe": measured.probe,
        "environment": environment(),
    }
    if _state().is_main_process:
        _save(config, adapted, measured.plan, materials, metrics, state.log_history, output)
        voice.say("saved", f"{output / PTH}, {output / 'adapter'}/, {output / 'report.html'}")
    _state().wait_for_everyone()
    return metrics


@dataclass(frozen=True)
class Measured:
    """What is known before training; kept in checkpoints/progress.json for a run that is resumed."""

    plan: Plan
    before: dict[str, Any]
    probe: dict[str, Any] | None


def _begin(config: Config, output: Path, measured: Measured, clock: Clock) -> None:
    """The output folder as training finds it: an earlier run's results gone, this run's plan and numbers there."""
    if config.output.overwrite:
        clear_results(output)
    save_plan(measured.plan, output / "plan.json")
    write_config(output / "config.yaml", config)
    progress = {"before": measured.before, "probe": measured.probe, "seconds": clock.seconds}
    write_json(output / "checkpoints" / "progress.json", progress)


def _earlier(output: Path, plan: Plan, clock: Clock) -> Measured:
    """What the interrupted run had measured; its seconds count."""
    progress = json.loads((output / "checkpoints" / "progress.json").read_text(encoding="utf-8"))
    clock.seconds |= progress["seconds"]
    return Measured(plan, progress["before"], progress["probe"])


def _adapt(config: Config, model: PreTrainedModel, plan: Plan, voice: Voice) -> tuple[PeftModel, dict[str, int]]:
    """The merged model, and its number of trainable parameters beside plain LoRA's."""
    _tell_plan(plan, voice)
    set_seed(config.training.seed)
    adapted = apply_plan(model, plan)
    total = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    trainable, plain = adapter_parameters(plan)
    voice.say("apply", _describe_parameters(total, trainable, plain))
    return adapted, {"trainable_parameters": total, "plain_lora_parameters": total - trainable + plain}


def _describe_training(state: TrainerState, seconds: float) -> str:
    line = f"{state.global_step} steps in {seconds:.0f} s"
    if state.best_metric is not None:
        line += f" · best validation loss {state.best_metric:.4f} at step {state.best_global_step}"
    return line


_STEPS = ("scan", "probe", "train", "evaluate")


def make_plan_for(config: Config, console: Console) -> Plan:
    """scan -> probe -> plan, without training: what `sgm plan` writes."""
    voice, clock = _voice(console), Clock()
    materials = prepare(config, voice)
    scanned = scan_model(config, materials.folder, voice, clock)
    plan, _ = measure(config, load_base(config, materials), scanned, materials, voice, clock)
    _tell_plan(plan, voice)
    return plan


def evaluate(config: Config, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """The test metrics of output.dir/sgm_finetuned.pth, from that file and the base model alone.

    The configuration that was trained with is in the file; `overrides` (key=value) change it.
    """
    voice, clock = _voice(console), Clock()
    path = Path(config.output.dir) / PTH
    content = load_pth(path)
    values = pth_config(content).model_dump(mode="json")
    config = parse_config(values, str(path), set_overrides(values, overrides))
    materials = prepare(config, voice)
    labels = tuple(content["labels"])
    if materials.splits.labels != labels:
        raise UserError(
            f"The data has the labels {list(materials.splits.labels)}, {path} was trained with {list(labels)}; "
            "choose other test data"
        )
    model = attach_adapter(load_base(config, materials), content, path)
    metrics = _evaluator(config, materials, voice, clock)(model, "test")
    return {"model": config.model.name, "data": materials.splits.description, **metrics}


def prepare(config: Config, voice: Voice) -> Materials:
    """Everything that can be checked without the model's weights: files, columns, labels, lengths, the tokenizer."""
    splits = load_splits(config.data, config.model.task)
    with _state().main_process_first():  # one process converts or downloads, the others find it done
        folder = local_folder(config.model.name, config.model.revision, lambda line: voice.say("model", line))
    check_model(config.model, folder, config.data.max_length)
    tokenizer = load_tokenizer(folder)
    encoded = {
        name: encode(getattr(splits, name), tokenizer, config.model.task, config.data.max_length)
        for name in ("train", "validation", "test")
    }
    cut = sum(part.num_truncated for part in encoded.values())
    dropped = sum(part.num_dropped for part in encoded.values())
    losses = [f"{cut:,} cut to {config.data.max_length} tokens"] * bool(cut) + [f"{dropped:,} dropped"] * bool(dropped)
    voice.say("data", " · ".join([splits.description, *losses]))
    return Materials(folder, tokenizer, splits, **encoded, collate=collator(tokenizer, config.model.task, 8))


def scan_model(config: Config, folder: Path, voice: Voice, clock: Clock) -> Scan:
    """The scan of the model's files, or the one in snr.scan."""
    if config.snr.scan is not None:
        scanned = load_scan(config.snr.scan, config.snr.estimator)
        voice.say("scan", f"{scan_summary(scanned)} · from {config.snr.scan}")
        return scanned

    def measured() -> Scan:
        with clock.time("scan"), voice.bar("scan") as progress:
            return scan(folder, estimator=config.snr.estimator, progress=progress)

    scanned = _on_main(measured)
    voice.say("scan", scan_summary(scanned))
    return scanned


def load_base(config: Config, materials: Materials) -> PreTrainedModel:
    set_seed(config.training.seed)  # a new classification head is random
    return load_model(
        config.model,
        materials.folder,
        materials.splits.labels,
        materials.tokenizer.pad_token_id,  # type: ignore[arg-type]  # one token's id
        device_for(_state().local_process_index),
    )


def measure(
    config: Config, model: PreTrainedModel, scanned: Scan | None, materials: Materials, voice: Voice, clock: Clock
) -> tuple[Plan, Probe | None]:
    """The probe (unless nothing is to be merged) and the plan that follows."""
    probed = None
    if config.merge.side != "none":
        with clock.time("probe"), voice.bar("probe") as progress:
            probed = probe(
                model,
                probe_batches(config, materials),
                sketch_size=config.probe.sketch_size,
                seed=config.probe.seed,
                progress=progress,
            )
        voice.say(
            "probe",
            f"{probed.num_batches} batches, {probed.num_tokens:,} tokens in {probed.seconds:.1f} s · sketches "
            f"{probed.sketch_bytes / 2**20:.0f} MiB · activations at most {probed.activation_bytes / 2**20:.0f} MiB",
        )
    else:
        voice.say("probe", "not needed: merge.side=none")
    assert scanned is not None
    plan = make_plan(scanned, probed, config, model)
    if missing := len(linear_layers(model)) - len(plan.matrices):
        voice.say("", f"not in the scan, so not trained: {missing} of the model's matrices")
    return plan, probed


def make_plan(scanned: Scan, probed: Probe | None, config: Config, model: nn.Module | None = None) -> Plan:
    """The plan that follows from a scan and a probe (None: nothing is merged). Data: print it, edit it, save it.

    Planned are the matrices that both measured; without a probe those of `model`'s linear layers that were scanned.
    """
    if probed is not None:
        shapes = dict(probed.shapes)
    elif model is not None:
        shapes = {name: matrix_shape(layer) for name, layer in linear_layers(model).items()}
    else:
        shapes = {matrix.name: matrix.shape for matrix in by_parameter(scanned) if matrix.layer is not None}
    by_name = _match_names(scanned, shapes)
    numbers = [
        MatrixNumbers(
            name=name,
            kind=found.kind,
            layer=found.layer,
            shape=shape,
            snr=found.snr,
            snr_db=found.snr_db,
            signal_rank=found.signal_rank,
            halves=probed.halves[name] if probed is not None else None,
            activation=probed.activations[name] if probed is not None else None,
        )
        for name, shape in shapes.items()
        if (found := by_name.get(name)) is not None
    ]
    if not numbers:
        raise UserError(
            f"The scan of {scanned.model} and the model have no matrix in common; scan the model's own files"
        )
    merge, selection, adapter = config.merge, config.selection, config.adapter
    settings = PlanSettings(
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        scope=merge.scope,
        criterion=merge.criterion,
        side=merge.side if probed is not None else "none",
        threshold=merge.threshold,
        snr_tolerance_db=merge.snr_tolerance_db,
        max_group_size=merge.max_group_size,
        top_fraction=selection.top_fraction,
        snr_threshold=selection.snr_threshold,
    )
    return build_plan(config.model.name, numbers, settings, scanned.estimator)


def _match_names(scanned: Scan, shapes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Module name -> scanned matrix. Files of a bare encoder lack the task model's prefix (`bert.`), and the other
    way round: names are matched whole, else by the longest common ending that is unique."""
    modules = by_parameter(scanned)
    by_name = {matrix.name: matrix for matrix in modules}
    matched = {}
    for name in shapes:
        if name in by_name:
            matched[name] = by_name[name]
            continue
        endings = [m for m in modules if name.endswith(f".{m.name}") or m.name.endswith(f".{name}")]
        if len(endings) == 1:
            matched[name] = endings[0]
    return matched


def probe_batches(config: Config, materials: Materials) -> list[dict[str, torch.Tensor]]:
    """The first batches of a seeded permutation of the training data."""
    dataset = materials.train.dataset
    wanted = config.probe.num_batches * config.probe.batch_size
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.probe.seed)).tolist()[:wanted]
    size = max(1, min(config.probe.batch_size, len(order) // 2))
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    return [materials.collate([dataset[i] for i in batch]) for batch in batches]


def _tell_plan(plan: Plan, voice: Voice) -> None:
    voice.say("plan", describe_plan(plan))
    for remark in remarks(plan):
        voice.say("", remark)


def describe_plan(plan: Plan) -> str:
    merged = sum(len(group.members) for group in plan.groups)
    parts = [f"{len(plan.selected)} of {len(plan.matrices)} matrices"]
    if plan.groups:
        counts = Counter(group.side for group in plan.groups)
        sides = ", ".join(f"{counts[side]} share their {side} side" for side in SIDES if counts[side])
        parts.append(f"{merged} of them in {len(plan.groups)} groups ({sides})")
    else:
        spectral = any(matrix.start == "spectral" for matrix in plan.selected)
        parts.append("no groups: " + ("LoRA started at its gradients' spectra" if spectral else "plain LoRA"))
    trainable, plain = adapter_parameters(plan)
    parts.append(f"{trainable / 1e6:.2f} M adapter parameters instead of {plain / 1e6:.2f} M")
    return " · ".join(parts)


def remarks(plan: Plan) -> list[str]:
    """What a person should know about the plan: a criterion that found nothing says so, with its numbers."""
    settings = plan.settings
    kinds = [kind for kind in plan.kinds if kind.side is not None]
    if plan.groups or settings.side == "none":
        return []
    if not kinds:
        return ["no two of them read the same activations"] * (settings.scope == "activation")
    match settings.criterion:
        case "cosine":
            best = max(kinds, key=lambda kind: kind.cosine_max or -1.0)
            ceiling = sum(kind.cosine_other_half or 0.0 for kind in kinds) / len(kinds)
            return [
                f"merge.criterion=cosine found nothing: no two layers reach {settings.threshold}; the closest pair, in "
                f"{best.kind}, has {best.cosine_max:.2f} (a layer with itself on other data: {ceiling:.2f} on average)"
            ]
        case "subspace":
            best = max(kinds, key=lambda k: max(k.retention_input or 0.0, k.retention_output or 0.0))
            return [
                f"merge.criterion=subspace found nothing at merge.threshold={settings.threshold}; {best.kind} keeps "
                f"{max(best.retention_input or 0.0, best.retention_output or 0.0):.2f} on average of all pairs"
            ]
        case "snr":
            who = "layers of a kind" if settings.scope == "layers" else "readers of the same activations"
            return [f"merge.criterion=snr found nothing: no two {who} are within the tolerance"]


def environment() -> dict[str, str]:
    names = ("sgm-finetune", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {**found, "device": device}


def _claim_output(config: Config, output: Path) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run. Raises UserError rather than touch earlier results."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output.dir={output} is a file; name a folder")
    present = [name for name in RESULTS if (output / name).exists()]
    if config.training.resume:
        checkpoint = last_whole_checkpoint(output / "checkpoints")
        if checkpoint is None:
            raise UserError(f"training.resume=true finds no checkpoint in {output / 'checkpoints'}; start without it")
        if not (output / "plan.json").is_file() or not (output / "checkpoints" / "progress.json").is_file():
            raise UserError(
                f"{output} lacks the plan or the progress of the run to resume; start without training.resume"
            )
        _same_run(config, output)
        return checkpoint
    if present and not config.output.overwrite:
        can_resume = PTH not in present and last_whole_checkpoint(output / "checkpoints") is not None
        unfinished = "; continue it with training.resume=true" if can_resume else ""
        raise UserError(
            f"{output} holds an earlier run ({', '.join(present[:3])}){unfinished}; name another output.dir, or "
            "replace it with output.overwrite=true"
        )
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"output.dir={output} cannot be written: {parent} is read-only for you")
    return None


def _same_run(config: Config, output: Path) -> None:
    """A resumed run must be the run that was interrupted: every key that shapes the result is equal."""
    earlier = load_config(output / "config.yaml").model_dump(mode="json")
    now = config.model_dump(mode="json")
    for section, values in now.items():
        pairs = {section: (earlier.get(section), values)}
        if isinstance(values, dict):
            pairs = {f"{section}.{key}": (earlier[section].get(key), value) for key, value in values.items()}
        for key, (old, new) in pairs.items():
            if old != new and key not in ("training.resume", "output.dir", "output.overwrite", "plan"):
                raise UserError(
                    f"training.resume=true: `{key}` is {new!r} now and was {old!r} when the run began; "
                    "use the same value, or start a new run"
                )


def _given_plan(config: Config, output: Path, checkpoint: Path | None) -> Plan | None:
    if checkpoint is not None:
        return load_plan(output / "plan.json")
    return load_plan(config.plan) if config.plan is not None else None


def _evaluator(
    config: Config, materials: Materials, voice: Voice, clock: Clock
) -> Callable[[nn.Module, str], dict[str, Any]]:
    def test(model: nn.Module, when: str) -> dict[str, Any]:
        with clock.time("evaluate"), voice.bar(when) as progress:
            metrics = evaluate_model(
                model,
                materials.test.dataset,
                materials.collate,
                config.model.task,
                config.training.eval_batch_size,
                materials.splits.labels,
                progress,
            )
        voice.say(when, describe_metrics(metrics))
        return metrics

    return test


def describe_metrics(metrics: dict[str, Any]) -> str:
    if "accuracy" in metrics:
        return (
            f"accuracy {metrics['accuracy']:.4f} (majority class {metrics['majority_accuracy']:.4f}) · macro-F1 "
            f"{metrics['macro_f1']:.4f} · loss {metrics['loss']:.4f} · {metrics['num_examples']:,} test examples"
        )
    return (
        f"perplexity {metrics['perplexity']:.3f} · loss {metrics['loss']:.4f} · {metrics['num_tokens']:,} test tokens"
    )


def _describe_parameters(total: int, trainable: int, plain: int) -> str:
    head = f" (and {total - trainable:,} of a new head)" if total > trainable else ""
    return f"PEFT LoRA: {trainable:,} trainable adapter parameters{head}; without sharing {plain:,}"


def _probe_numbers(probed: Probe | None) -> dict[str, Any] | None:
    if probed is None:
        return None
    names = ("loss", "num_batches", "num_tokens", "sketch_bytes", "activation_bytes")
    return {name: getattr(probed, name) for name in names}


def _save(
    config: Config, model: PeftModel, plan: Plan, materials: Materials, metrics: dict[str, Any],
    history: list[dict[str, Any]], output: Path,
) -> None:  # fmt: skip
    save_adapter(model, materials.tokenizer, output / "adapter")
    save_pth(output / PTH, model, plan, config, materials.splits.labels)
    write_text(output / "report.html", render_report(config=config, plan=plan, metrics=metrics, history=history))
    write_json(output / "metrics.json", metrics)


def _voice(console: Console) -> Voice:
    """Only the first process speaks."""
    return Voice(console if _state().is_main_process else Console(quiet=True))


def _state() -> PartialState:
    """The processes of this run; one alone, or those that torchrun or accelerate started."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=24))


def _on_main(measured: Callable[[], Any]) -> Any:
    """What the first process measures, on every process."""
    result = [measured() if _state().is_main_process else None]
    if _state().num_processes > 1:
        broadcast_object_list(result)
    return result[0]
