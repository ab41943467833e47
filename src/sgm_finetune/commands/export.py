"""What `sgm export` does: read the result, write it in a format, load that again, compare, and only then keep it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig, PreTrainedModel

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import disk_free, whole_folder, write_json, write_text
from sgm_finetune.base.memory import peak_memory, release_memory
from sgm_finetune.base.untrusted import require_json_object
from sgm_finetune.results.export import gguf_file
from sgm_finetune.results.export.adapter import write_adapter
from sgm_finetune.results.export.card import Format, hub_model, model_card
from sgm_finetune.results.export.chat_format import CONVERSATIONS, ChatFormat, find_format, modelfile
from sgm_finetune.results.export.check import (
    Comparison,
    Reference,
    check_adapter,
    check_gguf,
    check_merged,
    reference,
)
from sgm_finetune.results.export.gguf_file import GgufType
from sgm_finetune.results.export.hub import check_push, push
from sgm_finetune.results.export.merge import MergedTensor, merged_tensors
from sgm_finetune.results.export.shards import SHARD_BYTES, write_config_files, write_shards
from sgm_finetune.results.load import Result, base_skeleton, dtype_name, read_result

REPORT = "export.json"
"""What was measured; by it a folder is known as an export."""


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    to: Format
    output: Path | None = None
    gguf_type: GgufType | None = None
    push_to_hub: str | None = None


def export_result(config: Config, overrides: Sequence[str], request: Request, console: Console) -> dict[str, Any]:
    """Exports the result in `config.output.dir`; returns what was measured, the content of export.json.

    The folder appears under its name only when its logits have been compared with the reference's; a comparison that
    fails is a UserError and leaves nothing. Raises UserError before anything large is loaded for what can be known
    then: no result, a format that cannot hold it, no room, no token.
    """
    started = time.perf_counter()
    log = StepLog(console)
    if request.push_to_hub is not None:
        check_push(request.push_to_hub)
    result = read_result(config, overrides, log)
    folder = request.output or Path(config.output.dir) / "export" / request.to
    _check_folder(folder, config.output.overwrite)
    if request.push_to_hub is not None and request.to == "adapter" and hub_model(result.config.model.name) is None:
        raise UserError(
            f"An adapter on the hub needs a base that others can have, and model.name={result.config.model.name} is no "
            "hub id; push --to merged or --to gguf, or name the base with model.name=owner/name"
        )
    export = _PREPARE[request.to](result, request, log)
    _check_room(folder, export.num_bytes)
    log.line("export", export.described)
    expected = reference(result, export.num_parameters)
    with whole_folder(folder) as scratch:
        files = export.write(scratch)
        release_memory()
        found = export.compare(scratch, expected)
        if not found.passed():
            raise UserError(
                f"The export as {export.kind} computes something else than was trained: logits differ by "
                f"{found.difference:.2g} (at most {found.tolerance:g}), {_percent(found.arrived)} of the update is in "
                "it; nothing was kept. Try a wider type, or --to adapter"
            )
        report = {
            "format": request.to,
            "stored_in": export.stored_in,
            "model": result.config.model.name,
            **found.to_dict(),
            "bytes": sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file()),
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_memory(),
        }
        write_text(scratch / "README.md", model_card(result, request.to, report, files))
        write_json(scratch / REPORT, report)
    log.line("check", _told(found))
    log.line("saved", f"{folder} ({report['bytes'] / 2**20:,.1f} MiB, {report['seconds']:.0f} s)")
    if request.push_to_hub is not None:
        report["address"] = push(folder, request.push_to_hub)
        log.line("pushed", report["address"])
    return {"folder": str(folder), **report}


def _percent(share: float | None) -> str:
    return "nothing" if share is None else f"{share:.0%}"


def _told(found: Comparison) -> str:
    moved = f"the update moves them by {found.effect:.2g}"
    if found.arrived is not None:
        moved += f", of which {found.arrived:.1%} is there"
    return (
        f"loaded by {found.by}: logits differ by {found.difference:.1e} (at most {found.tolerance:g}), top token equal "
        f"in {found.top_agreement:.0%} of {found.num_positions} · {moved}"
    )


def _check_room(folder: Path, needed: int) -> None:
    free = disk_free(folder)
    if needed > free:
        raise UserError(
            f"{folder} will take about {needed / 2**20:,.0f} MiB, and its disk has {free / 2**20:,.0f} MiB free; "
            "make room, or name an --output on another disk"
        )


def _check_folder(folder: Path, overwrite: bool) -> None:
    """UserError unless the folder is new, or an earlier export that may be replaced, on a disk that takes it."""
    if folder.exists():
        empty = folder.is_dir() and not any(folder.iterdir())
        if not empty and not (folder / REPORT).is_file():
            raise UserError(f"{folder} is there and no earlier export; name another --output")
        if not empty and not overwrite:
            raise UserError(f"{folder} exists; name another --output, or replace it with output.overwrite=true")
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"{folder} cannot be written: {parent} is no folder that you may write to; name another --output"
        )


@dataclass(frozen=True)
class _Prepared:
    """One export, ready to be written."""

    kind: str
    stored_in: str
    """Type of its matrices, a key of check.TOLERANCES."""
    num_parameters: int
    """Of the model that it is compared by."""
    num_bytes: int
    """About what it takes."""
    described: str
    write: Callable[[Path], dict[str, str]]
    """Into a folder; returns the names of files by their role."""
    compare: Callable[[Path, Reference], Comparison]


def _adapter(result: Result, request: Request, log: StepLog) -> _Prepared:
    skeleton = base_skeleton(result)
    num_parameters = _num_parameters(skeleton)
    num_bytes = sum(tensor.nbytes for tensor in result.content["adapter"].values()) + _TEXT_BYTES

    def write(folder: Path) -> dict[str, str]:
        write_adapter(result, skeleton, _base_for_peft(result), folder)
        return {}

    return _Prepared(
        kind="an adapter",
        stored_in="float32",
        num_parameters=num_parameters,
        num_bytes=num_bytes,
        described=f"a PEFT adapter for {result.config.model.name}",
        write=write,
        compare=lambda folder, expected: check_adapter(result, folder, expected),
    )


def _merged(result: Result, request: Request, log: StepLog) -> _Prepared:
    tensors, skeleton = merged_tensors(result)
    stored_in = _stored_in(tensors)

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
        described=_told_merge(tensors, stored_in),
        write=write,
        compare=lambda folder, expected: check_merged(result, folder, expected, stored_in),
    )


def _gguf(result: Result, request: Request, log: StepLog) -> _Prepared:
    kind = request.gguf_type or "f16"
    words = gguf_file.check_exportable(result, AutoConfig.from_pretrained(result.folder))
    tensors, skeleton = merged_tensors(result)
    name = f"model-{kind}.gguf"

    def write(folder: Path) -> dict[str, str]:
        with log.bar("gguf") as progress:
            gguf_file.write_gguf(tensors, skeleton.config, words, result, kind, folder / name, progress)
        found = _chat_format(result)
        begin = result.tokenizer.bos_token if words.adds["bos"] else None
        write_text(folder / "Modelfile", modelfile(name, found, begin, _stops(result, found)))  # type: ignore[arg-type]
        log.line("", _told_template(result, found))
        return {"gguf": name}

    return _Prepared(
        kind=f"GGUF in {kind}",
        stored_in=gguf_file.STORED_IN[kind],
        num_parameters=_num_parameters(skeleton),
        num_bytes=gguf_file.num_bytes(tensors, kind) + _TEXT_BYTES,
        described=f"{_told_merge(tensors, kind)} · tokens as {words.model}, {words.pre}",
        write=write,
        compare=lambda folder, expected: check_gguf(result, folder / name, expected, gguf_file.STORED_IN[kind]),
    )


_PREPARE: dict[Format, Callable[[Result, Request, StepLog], _Prepared]] = {
    "adapter": _adapter,
    "merged": _merged,
    "gguf": _gguf,
}
_TEXT_BYTES = 2**24
"""About what tokenizer, configuration and card take."""


def _num_parameters(skeleton: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in skeleton.parameters())


def _base_for_peft(result: Result) -> str:
    """The base's name in adapter_config.json: a hub id, else where it is here."""
    return hub_model(result.config.model.name) or str(result.folder.absolute())


def _stored_in(tensors: Sequence[MergedTensor]) -> str:
    """The coarsest type of a matrix."""
    names = {dtype_name(t.dtype) for t in tensors if t.dtype.is_floating_point}
    return next((name for name in ("bfloat16", "float16") if name in names), "float32")


def _told_merge(tensors: Sequence[MergedTensor], stored_in: str) -> str:
    changed = sum(tensor.is_changed for tensor in tensors)
    size = sum(tensor.num_bytes for tensor in tensors) / 2**20
    return f"{changed} of {len(tensors)} tensors changed, of {size:,.1f} MiB in the base's files · as {stored_in}"


def _chat_format(result: Result) -> ChatFormat | None:
    tokenizer = result.tokenizer
    if not tokenizer.chat_template:
        return None
    return find_format(
        lambda messages, asks: str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks)
        )
    )


def _stops(result: Result, found: ChatFormat | None) -> list[str]:
    """The texts that end an answer: the chat format's, the end-of-text tokens'."""
    tokenizer = result.tokenizer
    path = result.folder / "generation_config.json"
    ids: Any = require_json_object(path).get("eos_token_id") if path.is_file() else None
    ids = ids if isinstance(ids, list) else [ids]
    known = [number for number in ids if isinstance(number, int) and 0 <= number < len(tokenizer)]  # type: ignore[arg-type]
    tokens = [str(tokenizer.convert_ids_to_tokens(number)) for number in known]
    eos = tokenizer.eos_token
    return [*([found.stop()] if found else []), *([str(eos)] if eos else []), *tokens]


def _told_template(result: Result, found: ChatFormat | None) -> str:
    if not result.tokenizer.chat_template:
        return "Modelfile: no chat template; Ollama passes the prompt as it is"
    if found is None:
        return (
            "Modelfile: this chat template has no counterpart in Ollama's language here; Ollama reads the GGUF file's"
        )
    return f"Modelfile: the chat template in Ollama's language, equal on {len(CONVERSATIONS)} conversations"
