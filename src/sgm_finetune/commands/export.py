"""`sgm export`: reads the result, writes it in a format, loads that again, compares, and only then keeps it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import disk_free, whole_folder, write_json, write_text
from sgm_finetune.base.memory import peak_memory, release_memory
from sgm_finetune.base.text import mib
from sgm_finetune.commands.calibration_data import calibration_data
from sgm_finetune.commands.export_formats import PREPARE, Prepared, prepare_compressed
from sgm_finetune.commands.requests import ExportRequest
from sgm_finetune.commands.validation_data import validation_data
from sgm_finetune.results.answers import generates_text
from sgm_finetune.results.export.card import model_card
from sgm_finetune.results.export.check import LogitCheck, ReferenceLogits, compute_reference, reference_scores
from sgm_finetune.results.export.combine import combine
from sgm_finetune.results.export.compressed_folder import check_model
from sgm_finetune.results.export.cut import Cut, cut_result
from sgm_finetune.results.export.hub import push
from sgm_finetune.results.export.shards import check_own_files
from sgm_finetune.results.export.target import ADAPTERS, REPORT, BaseWeights, hub_model
from sgm_finetune.results.export.validation import Scores, Validation
from sgm_finetune.results.load import Result, StoredResult, find_base, read_stored


def export_result(config: Config, overrides: Sequence[str], request: ExportRequest, console: Console) -> dict[str, Any]:
    """Exports the result in `config.output.dir`. Returns what was measured: the content of export.json.

    The folder gets its name only after its logits, its answers and its loss on validation data have been compared with
    the reference's. A failed comparison raises UserError and leaves nothing. UserError is also raised, before anything
    large is loaded, when there is no result, the format cannot hold it, the disk is too full, or a hub token is
    missing.

    With `request.rank` the export is compared with the cut adapter, which computes something else than the result on
    purpose. The loss on the run's validation data, before and after the cut, says how much that costs.
    """
    started = time.perf_counter()
    log = StepLog(console)
    request.check(config)
    stored = read_stored(config, overrides, log)
    _check_fits(request, stored)
    own = result = find_base(stored, log)
    if request.combination is not None:
        result = combine(result, request.combination, config, overrides, log)
    check_own_files(result.folder)
    folder = request.folder(config)
    cut = None if request.rank is None else cut_result(result, request.rank)
    exported = result if cut is None else cut.result
    prepare = _preparation(request, result)
    exports: dict[BaseWeights, Prepared] = {
        base: prepare(dataclasses.replace(exported, base_weights=base), request, log)
        for base in _possible_bases(request, result)
    }
    export = next(iter(exports.values()))
    _check_room(folder, export.num_bytes)
    validation = validation_data(result, overrides, export.num_parameters, log)
    bases = None if len(exports) == 1 else _compare_bases(exports, validation, log)
    if bases is not None:
        export = exports[bases.taken]
    log.line("export", export.description)
    alone = _loss_alone(own, export, validation, log) if request.combination is not None else None
    cost = None if cut is None else _measure_cut(result, cut, export.num_parameters, validation, log)
    with log.bar("score") as progress:
        known = None if bases is None else bases.scores
        expected = compute_reference(export.result, export.num_parameters, validation, progress, known)
    with whole_folder(folder) as scratch:
        files = export.write(scratch)
        release_memory()
        with log.bar("check") as progress:
            found = export.compare(scratch, expected, progress)
        _require_same(export, found)
        if cost is not None and expected.scores is not None:
            cost["validation_loss"] = expected.scores.loss
        report = {
            "format": request.to,
            "stored_in": export.stored_in,
            "model": result.config.model.name,
            "base": _base_report(export, bases),
            **found.to_dict(),
            **({} if cost is None else {"cut": cost}),
            **_combination_report(request, alone),
            "bytes": sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file()),
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_memory(),
        }
        write_text(scratch / "README.md", model_card(result, request.to, report, files))
        write_json(scratch / REPORT, report)
    log.line("check", _describe_check(found))
    if found.validation is not None:
        log.line("score", f"{found.validation.describe()} · computed by {found.by}")
    for remark in _answer_remarks(result, found, expected):
        log.line("", remark)
    if alone is not None and expected.scores is not None:
        log.line(
            "combined",
            f"validation loss {alone:.4f} with this run's adapter alone, {expected.scores.loss:.4f} combined",
        )
    if cost is not None:
        log.line("cut", _describe_cut(cost))
        if cut is not None and cut.left_out:
            log.line("", f"left out, since no low-rank update holds them: {_some(cut.left_out)}")
    log.line("saved", f"{folder} ({report['bytes'] / 2**20:,.1f} MiB, {report['seconds']:.0f} s)")
    if request.push_to_hub is not None:
        report["address"] = push(folder, request.push_to_hub)
        log.line("pushed", report["address"])
    return {"folder": str(folder), **report}


def _preparation(request: ExportRequest, result: Result) -> Callable[[Result, ExportRequest, StepLog], Prepared]:
    """What prepares the export. Raises UserError where it must be calibrated and there are no data for that."""
    if request.to != "compressed-tensors":
        return PREPARE[request.to]
    check_model(result)
    return partial(prepare_compressed, training=calibration_data(result))


def _check_fits(request: ExportRequest, stored: StoredResult) -> None:
    """Raises UserError when the result has not what the request asks for."""
    name = stored.config.model.name
    if request.base == "trained" and stored.config.model.quantization == "none":
        raise UserError(
            "--base trained is for a base that was quantised in training, and this run has model.quantization=none; "
            "leave --base out"
        )
    if request.push_to_hub is not None and request.to in ADAPTERS and hub_model(name) is None:
        raise UserError(
            f"An adapter on the hub needs a base model that others can download, and model.name={name} is not a hub "
            "id; push --to merged or --to gguf, or name the base with model.name=owner/name"
        )
    if stored.is_full and request.to in ADAPTERS and request.rank is None:
        raise UserError(
            "This run trained whole matrices, and an adapter holds low-rank updates; give --rank, for example --rank "
            "16, or take --to merged"
        )


def _possible_bases(request: ExportRequest, result: Result) -> tuple[BaseWeights, ...]:
    """The weights to which the update may be added."""
    if request.base is not None:
        return (request.base,)
    is_plain = result.config.model.quantization == "none"
    return ("original",) if is_plain or request.to in ADAPTERS else ("original", "trained")


@dataclass(frozen=True)
class _Bases:
    """The losses on validation data with each of the weights to which an update can be added."""

    losses: dict[BaseWeights, float]
    taken: BaseWeights
    scores: Scores
    """Of what is taken."""


def _compare_bases(
    exports: Mapping[BaseWeights, Prepared], validation: Validation | None, log: StepLog
) -> _Bases | None:
    """Measures which weights predict the validation data better; None, said in one line, where there are none."""
    if validation is None:
        log.line(
            "base", "the original weights are taken, since there are no data to compare them with the trained ones"
        )
        return None
    scores = {}
    for base, export in exports.items():
        with log.bar(base) as progress:
            scores[base] = reference_scores(export.result, export.num_parameters, validation, progress)
    losses = {base: found.loss for base, found in scores.items()}
    taken: BaseWeights = "trained" if losses["trained"] < losses["original"] else "original"
    kind = exports[taken].result.config.model.quantization
    log.line(
        "base",
        f"validation loss {losses['original']:.4f} with the update on the original weights, {losses['trained']:.4f} "
        f"on those of training in {kind}: the {taken} ones are taken",
    )
    return _Bases(losses, taken, scores[taken])


def _base_report(export: Prepared, bases: _Bases | None) -> dict[str, Any] | None:
    """Which weights were taken; None where there is one kind of them."""
    if export.result.config.model.quantization == "none":
        return None
    return {
        "weights": export.result.base_weights,
        "validation_loss": None if bases is None else bases.losses,
    }


def _loss_alone(own: Result, export: Prepared, validation: Validation | None, log: StepLog) -> float | None:
    """The loss on validation data of the run's adapter before it was combined; None without such data."""
    if validation is None:
        return None
    with log.bar("alone") as progress:
        result = dataclasses.replace(own, base_weights=export.result.base_weights)
        return reference_scores(result, export.num_parameters, validation, progress).loss


def _combination_report(request: ExportRequest, alone: float | None) -> dict[str, Any]:
    """What export.json says of the adapters that were combined; nothing where there is one."""
    if request.combination is None:
        return {}
    return {"combined": {**request.combination.to_dict(), "validation_loss_alone": alone}}


def _require_same(export: Prepared, found: LogitCheck) -> None:
    """Raises UserError unless the export passes every comparison."""
    if not found.passes():
        raise UserError(
            f"The export as {export.kind} does not compute what was trained: its logits differ by "
            f"{found.difference:.2g} (at most {found.tolerance:g} is allowed), and it holds "
            f"{_percent(found.arrived)} of the update; nothing was kept. Try a wider type, or --to adapter"
        )
    if found.answers is not None and found.answers.runs_on is not None:
        raise UserError(
            f"The export as {export.kind} does not stop where an answer ends: {found.by} goes on after "
            f"{found.answers.runs_on}; nothing was kept. Take --to merged, and convert that folder"
        )
    if found.validation is not None and not found.validation.passes():
        raise UserError(
            f"The export as {export.kind} predicts worse than what was trained: {found.validation.describe_drop()}; "
            "nothing was kept. Try a wider type, or --to adapter"
        )


def _measure_cut(
    result: Result, cut: Cut, num_parameters: int, validation: Validation | None, log: StepLog
) -> dict[str, float | int | None]:
    """What the cut costs. The loss after it is not known yet, and None where there are no validation data."""
    before = None
    if validation is not None:
        with log.bar("before") as progress:
            before = reference_scores(result, num_parameters, validation, progress).loss
    return {
        "rank": cut.rank,
        "rank_before": cut.rank_before,
        "kept": cut.kept,
        "validation_loss": None,
        "validation_loss_before": before,
        "num_validation": 0 if validation is None else len(validation.examples.encoded),
    }


def _describe_cut(cut: Mapping[str, float | int | None]) -> str:
    rank = f"rank {cut['rank']} of {cut['rank_before']}"
    loss = "" if cut["validation_loss"] is None else (
        f"validation loss {cut['validation_loss_before']:.4f} -> {cut['validation_loss']:.4f} at {rank} "
        f"({cut['num_validation']:,} examples), which keeps "
    )  # fmt: skip
    return f"{loss or f'{rank} keeps '}{cut['kept']:.1%} of the update's squared norm"


def _some(names: Sequence[str]) -> str:
    return f"`{names[0]}`" if len(names) == 1 else f"{len(names)} tensors (`{names[0]}`, ...)"


def _percent(share: float | None) -> str:
    return "nothing" if share is None else f"{share:.0%}"


def _describe_check(found: LogitCheck) -> str:
    effect = f"the update moves the logits by {found.effect:.2g}"
    if found.arrived is not None:
        effect += f", and the export keeps {found.arrived:.1%} of that"
    return (
        f"loaded by {found.by}: logits differ by {found.difference:.1e} (at most {found.tolerance:g}), same top token "
        f"at {found.top_agreement:.0%} of {found.num_positions} positions · {effect}"
    )


def _answer_remarks(result: Result, found: LogitCheck, expected: ReferenceLogits) -> list[str]:
    """What the check says about answers, in lines of their own."""
    if found.answers is None or expected.own is None:
        has_answers = generates_text(result.config.model.task) and "text" not in result.roles
        return ["answers not compared: this result kept no test prompts (it is of an older run)"] if has_answers else []
    remarks = [found.answers.describe()]
    if texts := expected.own.stops.texts:
        named = ", ".join(repr(text) for text in texts)
        remarks.append(
            f"the chat template ends an answer with the text {named}, and no token of its own: a program must be told "
            f"to stop there (in Transformers: generate(..., stop_strings=[{named}], tokenizer=tokenizer))"
        )
    return remarks


def _check_room(folder: Path, needed: int) -> None:
    """Raises UserError when the disk has less than `needed` bytes free."""
    free = disk_free(folder)
    if needed > free:
        raise UserError(
            f"{folder} will take about {mib(needed)}, and its disk has {mib(free)} free; make room, or name an "
            "--output on another disk"
        )
