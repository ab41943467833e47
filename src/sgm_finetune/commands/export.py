"""`sgm export`: reads the result, writes it in a format, loads that again, compares, and only then keeps it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import disk_free, whole_folder, write_json, write_text
from sgm_finetune.base.memory import peak_memory, release_memory
from sgm_finetune.base.text import mib
from sgm_finetune.commands.requests import ExportRequest
from sgm_finetune.commands.session import prepare_trained
from sgm_finetune.data.batches import collator
from sgm_finetune.data.template_trial import try_template
from sgm_finetune.results.answers import generates_text
from sgm_finetune.results.export import gguf_file
from sgm_finetune.results.export.adapter import write_adapter
from sgm_finetune.results.export.answer_check import result_stops
from sgm_finetune.results.export.card import model_card
from sgm_finetune.results.export.chat_format import CONVERSATIONS, ChatFormat, find_format, modelfile
from sgm_finetune.results.export.check import (
    LogitCheck,
    ReferenceLogits,
    check_adapter,
    check_gguf,
    check_merged,
    compute_reference,
    reference_loss,
)
from sgm_finetune.results.export.combine import combine
from sgm_finetune.results.export.cut import Cut, cut_result
from sgm_finetune.results.export.hub import push
from sgm_finetune.results.export.merge import MergedTensor, merged_tensors
from sgm_finetune.results.export.quantise_gguf import quantise
from sgm_finetune.results.export.shards import SHARD_BYTES, check_own_files, write_config_files, write_shards
from sgm_finetune.results.export.target import K_QUANTS, REPORT, ExportFormat, base_for_peft, hub_model
from sgm_finetune.results.load import Result, base_skeleton, dtype_name, read_result
from sgm_finetune.results.pth import lora_config
from sgm_finetune.train.budget.reuse import replaced
from sgm_finetune.train.losses import TestSet

_TEXT_BYTES = 2**24
"""Approximate size of the tokenizer, configuration and model card together."""


def export_result(config: Config, overrides: Sequence[str], request: ExportRequest, console: Console) -> dict[str, Any]:
    """Exports the result in `config.output.dir`. Returns what was measured: the content of export.json.

    The folder gets its name only after its logits and answers have been compared with the reference's. A failed
    comparison raises UserError and leaves nothing. UserError is also raised, before anything large is loaded, when
    there is no result, the format cannot hold it, the disk is too full, or a hub token is missing.

    With `request.rank` the export is compared with the cut adapter, which computes something else than the result on
    purpose. The loss on the run's validation data, before and after the cut, says how much that costs.
    """
    started = time.perf_counter()
    log = StepLog(console)
    request.check(config)
    result = read_result(config, overrides, log)
    if request.combination is not None:
        result = combine(result, request.combination, config, overrides, log)
    check_own_files(result.folder)
    folder = request.folder(config)
    if request.push_to_hub is not None and request.to == "adapter" and hub_model(result.config.model.name) is None:
        raise UserError(
            f"An adapter on the hub needs a base model that others can download, and model.name="
            f"{result.config.model.name} is not a hub id; push --to merged or --to gguf, or name the base with "
            "model.name=owner/name"
        )
    if result.is_full and request.to == "adapter" and request.rank is None:
        raise UserError(
            "This run trained whole matrices, and an adapter holds low-rank updates; give --rank, for example --rank "
            "16, or take --to merged"
        )
    cut = None if request.rank is None else cut_result(result, request.rank)
    exported = result if cut is None else cut.result
    export = _PREPARE[request.to](exported, request, log)
    _check_room(folder, export.num_bytes)
    log.line("export", export.description)
    if cut is None:
        expected, cost = compute_reference(result, export.num_parameters), None
    else:
        expected, cost = _measure_cut(result, cut, export.num_parameters, log)
    with whole_folder(folder) as scratch:
        files = export.write(scratch)
        release_memory()
        found = export.compare(scratch, expected)
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
        report = {
            "format": request.to,
            "stored_in": export.stored_in,
            "model": result.config.model.name,
            **found.to_dict(),
            **({} if cost is None else {"cut": cost}),
            **({} if request.combination is None else {"combined": request.combination.to_dict()}),
            "bytes": sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file()),
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_memory(),
        }
        write_text(scratch / "README.md", model_card(result, request.to, report, files))
        write_json(scratch / REPORT, report)
    log.line("check", _describe_check(found))
    for remark in _answer_remarks(result, found, expected):
        log.line("", remark)
    if cost is not None:
        log.line("cut", _describe_cut(cost))
        if cut is not None and cut.left_out:
            log.line("", f"left out, since no low-rank update holds them: {_some(cut.left_out)}")
    log.line("saved", f"{folder} ({report['bytes'] / 2**20:,.1f} MiB, {report['seconds']:.0f} s)")
    if request.push_to_hub is not None:
        report["address"] = push(folder, request.push_to_hub)
        log.line("pushed", report["address"])
    return {"folder": str(folder), **report}


def _measure_cut(
    result: Result, cut: Cut, num_parameters: int, log: StepLog
) -> tuple[ReferenceLogits, dict[str, float | int]]:
    """The reference of the cut adapter, and the loss on the validation data before and after the cut."""
    config = replaced(result.config, "evaluation", harness=[])  # the file's tasks may be code, and are not run here
    prepared = prepare_trained(dataclasses.replace(result, config=config), log).prepared
    encoded, size = prepared.validation.dataset, config.training.eval_batch_size
    task, collate = config.model.task, prepared.collate
    if task == "preference":  # the chosen answers, as a language model predicts them
        task, encoded = "causal-lm", encoded.select_columns(["input_ids", "attention_mask", "labels"])
        collate = collator(prepared.tokenizer, task, 8)
    validation = TestSet(encoded, collate, task, size, result.labels)
    with log.bar("before") as progress:
        before = reference_loss(result, num_parameters, validation, progress)
    with log.bar("after") as progress:
        expected = compute_reference(cut.result, num_parameters, validation, progress)
    assert expected.validation_loss is not None
    return expected, {
        "rank": cut.rank,
        "rank_before": cut.rank_before,
        "kept": cut.kept,
        "validation_loss": expected.validation_loss,
        "validation_loss_before": before,
        "num_validation": len(encoded),
    }


def _describe_cut(cut: Mapping[str, float | int]) -> str:
    return (
        f"validation loss {cut['validation_loss_before']:.4f} -> {cut['validation_loss']:.4f} at rank {cut['rank']} of "
        f"{cut['rank_before']} ({cut['num_validation']:,} examples), which keeps {cut['kept']:.1%} of the update's "
        "squared norm"
    )


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


@dataclass(frozen=True)
class _Prepared:
    """One export, ready to be written."""

    kind: str
    """The format in words, for messages."""
    stored_in: str
    """Type of the matrices in the export, a key of check.TOLERANCES."""
    num_parameters: int
    """Parameters of the model that computes the logits for the comparison."""
    num_bytes: int
    """Approximate size on disk."""
    description: str
    write: Callable[[Path], dict[str, str]]
    """Writes the export into a folder. Returns file names by their role."""
    compare: Callable[[Path, ReferenceLogits], LogitCheck]
    """Loads the export from a folder and compares its logits with the reference's."""


def _prepare_adapter(result: Result, request: ExportRequest, log: StepLog) -> _Prepared:
    skeleton = base_skeleton(result)
    num_bytes = sum(tensor.nbytes for tensor in result.content["adapter"].values()) + _TEXT_BYTES

    def write(folder: Path) -> dict[str, str]:
        write_adapter(result, skeleton, base_for_peft(result.config.model.name, result.folder), folder)
        return {}

    return _Prepared(
        kind="an adapter",
        stored_in="float32",
        num_parameters=_num_parameters(skeleton),
        num_bytes=num_bytes,
        description=f"a PEFT adapter of rank {lora_config(result.content).r} for {result.config.model.name}",
        write=write,
        compare=lambda folder, expected: check_adapter(result, folder, expected),
    )


def _prepare_merged(result: Result, request: ExportRequest, log: StepLog) -> _Prepared:
    tensors, skeleton = merged_tensors(result)
    stored_in = _coarsest_type(tensors)

    def write(folder: Path) -> dict[str, str]:
        with log.bar("merge") as progress:
            write_shards(tensors, folder, SHARD_BYTES, progress)
        write_config_files(result, skeleton, folder)
        return {}

    return _Prepared(
        kind="a merged model",
        stored_in=stored_in,
        num_parameters=_num_parameters(skeleton),
        num_bytes=sum(tensor.num_bytes for tensor in tensors) + _TEXT_BYTES,
        description=_describe_merge(tensors, stored_in),
        write=write,
        compare=lambda folder, expected: check_merged(result, folder, expected, stored_in),
    )


def _prepare_gguf(result: Result, request: ExportRequest, log: StepLog) -> _Prepared:
    kind = request.gguf_type or "f16"
    vocabulary = gguf_file.check_exportable(result, AutoConfig.from_pretrained(result.folder))
    tensors, skeleton = merged_tensors(result)
    name = f"model-{kind}.gguf"
    rounded = kind in K_QUANTS

    def write(folder: Path) -> dict[str, str]:
        first, written = (folder / "model-f16.gguf", "f16") if rounded else (folder / name, kind)
        with log.bar("gguf") as progress:
            gguf_file.write_gguf(tensors, skeleton.config, vocabulary, written, first, progress)
        if rounded:
            quantise(first, folder / name, kind)
            first.unlink()
        chat_format = _find_chat_format(result)
        bos = str(result.tokenizer.bos_token) if vocabulary.adds["bos"] else None
        write_text(folder / "Modelfile", modelfile(name, chat_format, bos, _stop_texts(result, skeleton.config)))
        log.line("", _describe_template(result, chat_format))
        return {"gguf": name}

    return _Prepared(
        kind=f"GGUF in {kind}",
        stored_in=gguf_file.STORED_IN[kind],
        num_parameters=_num_parameters(skeleton),
        num_bytes=gguf_file.num_bytes(tensors, kind) + _TEXT_BYTES,
        description=f"{_describe_merge(tensors, kind)} · tokenizer {vocabulary.model}, pre-tokenizer {vocabulary.pre}",
        write=write,
        compare=lambda folder, expected: check_gguf(result, folder / name, expected, gguf_file.STORED_IN[kind]),
    )


_PREPARE: dict[ExportFormat, Callable[[Result, ExportRequest, StepLog], _Prepared]] = {
    "adapter": _prepare_adapter,
    "merged": _prepare_merged,
    "gguf": _prepare_gguf,
}


def _num_parameters(skeleton: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in skeleton.parameters())


def _coarsest_type(tensors: Sequence[MergedTensor]) -> str:
    names = {dtype_name(t.dtype) for t in tensors if t.dtype.is_floating_point}
    return next((name for name in ("bfloat16", "float16") if name in names), "float32")


def _describe_merge(tensors: Sequence[MergedTensor], stored_in: str) -> str:
    num_changed = sum(tensor.is_changed for tensor in tensors)
    size = sum(tensor.num_bytes for tensor in tensors) / 2**20
    return (
        f"{num_changed} of {len(tensors)} tensors change; {size:,.1f} MiB in the base's files · stored as {stored_in}"
    )


def _find_chat_format(result: Result) -> ChatFormat | None:
    tokenizer = result.tokenizer
    if not tokenizer.chat_template:
        return None
    try_template(tokenizer)
    return find_format(
        lambda messages, asks: str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks)
        )
    )


def _stop_texts(result: Result, config: PreTrainedConfig) -> list[str]:
    """The texts that end an answer, those of tokens included."""
    tokenizer, stops = result.tokenizer, result_stops(result, config)
    known = [number for number in stops.tokens if number < len(tokenizer)]  # type: ignore[arg-type]
    return [*(str(tokenizer.convert_ids_to_tokens(number)) for number in known), *stops.texts]


def _describe_template(result: Result, chat_format: ChatFormat | None) -> str:
    if not result.tokenizer.chat_template:
        return "Modelfile: the tokenizer has no chat template; Ollama passes the prompt unchanged"
    if chat_format is None:
        return "Modelfile: SGM cannot translate this chat template; Ollama uses the one in the GGUF file"
    return f"Modelfile: the chat template was translated for Ollama and agrees on {len(CONVERSATIONS)} conversations"
