"""The formats of `sgm export`: what each refuses, writes and how it is loaded again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from sgm_finetune.base.config import DECODER_TASKS
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.files import write_text
from sgm_finetune.commands.requests import CALIBRATION, ExportRequest
from sgm_finetune.data.template_trial import try_template
from sgm_finetune.results.export import bnb_folder, compressed_folder, gguf_file
from sgm_finetune.results.export.adapter import write_adapter
from sgm_finetune.results.export.answer_check import result_stops
from sgm_finetune.results.export.ask_auto_round import num_steps
from sgm_finetune.results.export.chat_format import CONVERSATIONS, ChatFormat, find_format, modelfile
from sgm_finetune.results.export.check import LogitCheck, ReferenceLogits, check_adapter, check_merged
from sgm_finetune.results.export.gguf_adapter import gguf_factors, write_gguf_adapter
from sgm_finetune.results.export.gguf_architecture import computed_as, ignored_window
from sgm_finetune.results.export.gguf_check import check_gguf, check_gguf_adapter
from sgm_finetune.results.export.gguf_tensors import gguf_tensors
from sgm_finetune.results.export.merge import MergedTensor, merged_tensors
from sgm_finetune.results.export.quantise_gguf import quantise
from sgm_finetune.results.export.shards import SHARD_BYTES, write_config_files, write_shards
from sgm_finetune.results.export.target import K_QUANTS, ExportFormat, GgufType, base_for_peft
from sgm_finetune.results.load import Result, base_skeleton, dtype_name
from sgm_finetune.results.pth import lora_config
from sgm_finetune.train.losses import Progress

_TEXT_BYTES = 2**24
"""Approximate size of the tokenizer, configuration and model card together."""


@dataclass(frozen=True)
class Prepared:
    """One export, ready to be written."""

    result: Result
    """What is exported."""
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
    compare: Callable[[Path, ReferenceLogits, Progress], LogitCheck]
    """Loads the export from a folder and compares what it computes with the reference."""


def _prepare_adapter(result: Result, request: ExportRequest, log: StepLog) -> Prepared:
    skeleton = base_skeleton(result)
    num_bytes = sum(tensor.nbytes for tensor in result.content["adapter"].values()) + _TEXT_BYTES

    def write(folder: Path) -> dict[str, str]:
        write_adapter(result, skeleton, base_for_peft(result.config.model.name, result.folder), folder)
        return {}

    return Prepared(
        result=result,
        kind="an adapter",
        stored_in="float32",
        num_parameters=_num_parameters(skeleton),
        num_bytes=num_bytes,
        description=f"a PEFT adapter of rank {lora_config(result.content).r} for {result.config.model.name}",
        write=write,
        compare=partial(check_adapter, result),
    )


def _prepare_merged(result: Result, request: ExportRequest, log: StepLog) -> Prepared:
    return _merged(result, *merged_tensors(result), log)


def _merged(result: Result, tensors: Sequence[MergedTensor], skeleton: PreTrainedModel, log: StepLog) -> Prepared:
    stored_in = _coarsest_type(tensors)

    def write(folder: Path) -> dict[str, str]:
        with log.bar("merge") as progress:
            write_shards(tensors, folder, SHARD_BYTES, progress)
        write_config_files(result, skeleton, folder)
        return {}

    return Prepared(
        result=result,
        kind="a merged model",
        stored_in=stored_in,
        num_parameters=_num_parameters(skeleton),
        num_bytes=sum(tensor.num_bytes for tensor in tensors) + _TEXT_BYTES,
        description=_describe_merge(tensors, stored_in),
        write=write,
        compare=lambda folder, *reference: check_merged(result, folder, stored_in, *reference),
    )


def _prepare_bnb(result: Result, request: ExportRequest, log: StepLog) -> Prepared:
    tensors, skeleton = merged_tensors(result)
    merged = _merged(result, tensors, skeleton, log)
    share = bnb_folder.quantised_share(tensors, skeleton)

    def write(folder: Path) -> dict[str, str]:
        (folder / "merged").mkdir()
        merged.write(folder / "merged")
        bnb_folder.quantise_bnb(result, folder / "merged", skeleton, merged.stored_in, folder)
        return {}

    return dataclasses.replace(
        merged,
        kind="a model in bitsandbytes' 4 bits",
        stored_in="nf4",
        num_bytes=bnb_folder.num_bytes(tensors, share) + _TEXT_BYTES,
        description=f"{merged.description} · {share:.0%} of the numbers are rounded to NF4",
        write=write,
        compare=lambda folder, *reference: check_merged(result, folder, "nf4", *reference),
    )


def prepare_compressed(result: Result, request: ExportRequest, log: StepLog, training: Dataset) -> Prepared:
    """`--to compressed-tensors`, calibrated on some of the `training` data."""
    tensors, skeleton = merged_tensors(result)
    merged = _merged(result, tensors, skeleton, log)
    group = compressed_folder.group_size(skeleton)
    number = request.calibration or CALIBRATION
    rows = compressed_folder.calibration_rows(training, number, result.config.data.max_length)

    def write(folder: Path) -> dict[str, str]:
        (folder / "merged").mkdir()
        merged.write(folder / "merged")
        with log.bar("round") as progress:
            compressed_folder.quantise_compressed(result, folder / "merged", skeleton, rows, group, folder, progress)
        return {}

    return dataclasses.replace(
        merged,
        kind="a model in 4 bits",
        stored_in="int4",
        num_bytes=compressed_folder.num_bytes(tensors, skeleton, group) + _TEXT_BYTES,
        description=f"{merged.description} · rounded to 4 bits in groups of {group}, on {min(number, len(training)):,} "
        f"training examples ({rows.numel():,} tokens, {num_steps()} steps a block)",
        write=write,
        compare=lambda folder, *reference: check_merged(result, folder, "int4", *reference),
    )


def _prepare_gguf(result: Result, request: ExportRequest, log: StepLog) -> Prepared:
    kind = request.gguf_type or "f16"
    vocabulary = gguf_file.check_exportable(result, AutoConfig.from_pretrained(result.folder), request.to)
    merged, skeleton = merged_tensors(result)
    tensors = gguf_tensors(merged, skeleton.config)
    name = f"model-{kind}.gguf"
    stored_in, rounded = gguf_file.STORED_IN[kind], kind in K_QUANTS
    tolerated = computed_as(skeleton.config, stored_in)

    def write(folder: Path) -> dict[str, str]:
        first, written = (folder / "model-f16.gguf", "f16") if rounded else (folder / name, kind)
        with log.bar("gguf") as progress:
            gguf_file.write_gguf(tensors, skeleton.config, vocabulary, written, first, progress)
        if rounded:
            quantise(first, folder / name, kind)
            first.unlink()
        if result.config.model.task not in DECODER_TASKS:
            return {"gguf": name}
        chat_format = _find_chat_format(result)
        bos = str(result.tokenizer.bos_token) if vocabulary.adds["bos"] else None
        write_text(folder / "Modelfile", modelfile(name, chat_format, bos, _stop_texts(result, skeleton.config)))
        log.line("", _describe_template(result, chat_format))
        return {"gguf": name}

    return Prepared(
        result=result,
        kind=f"GGUF in {kind}",
        stored_in=stored_in,
        num_parameters=_num_parameters(skeleton),
        num_bytes=gguf_file.num_bytes(tensors, kind) + _TEXT_BYTES,
        description=f"{_describe_merge(merged, kind)} · tokenizer {vocabulary.model}, pre-tokenizer {vocabulary.pre}"
        + _describe_window(skeleton.config),
        write=write,
        compare=lambda folder, *reference: check_gguf(result, folder / name, tolerated, *reference),
    )


def _prepare_gguf_adapter(result: Result, request: ExportRequest, log: StepLog) -> Prepared:
    kind = request.gguf_type or "f32"
    vocabulary = gguf_file.check_exportable(result, AutoConfig.from_pretrained(result.folder), request.to)
    stored, skeleton = merged_tensors(result, with_update=False)
    base = gguf_tensors(stored, skeleton.config)
    base_kind: GgufType = "f32" if _coarsest_type(base) == "float32" else "f16"
    factors = gguf_factors(result, skeleton)
    name = f"adapter-{kind}.gguf"

    def write(folder: Path) -> dict[str, str]:
        write_gguf_adapter(result, skeleton, kind, folder / name)
        return {"gguf": name}

    def compare(folder: Path, expected: ReferenceLogits, progress: Progress) -> LogitCheck:
        whole = folder / "base.gguf"
        gguf_file.write_gguf(base, skeleton.config, vocabulary, base_kind, whole, progress)
        try:
            return check_gguf_adapter(result, whole, folder / name, kinds, expected)
        finally:
            whole.unlink()

    kinds = computed_as(skeleton.config, gguf_file.STORED_IN["f16" if "f16" in (kind, base_kind) else "f32"])
    num_bytes = sum(factor.numel() for factor in factors.values()) * 4
    return Prepared(
        result=result,
        kind=f"an adapter in GGUF ({kind})",
        stored_in=gguf_file.STORED_IN[kind],
        num_parameters=_num_parameters(skeleton),
        num_bytes=num_bytes + gguf_file.num_bytes(base, base_kind),
        description=f"{len(factors) // 2} updates of rank {lora_config(result.content).r} for llama.cpp, in {kind}",
        write=write,
        compare=compare,
    )


PREPARE: dict[ExportFormat, Callable[[Result, ExportRequest, StepLog], Prepared]] = {
    "adapter": _prepare_adapter,
    "merged": _prepare_merged,
    "bnb-4bit": _prepare_bnb,
    "gguf": _prepare_gguf,
    "gguf-adapter": _prepare_gguf_adapter,
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


def _describe_window(config: PreTrainedConfig) -> str:
    window = ignored_window(config)
    return (
        "" if window is None else f" · context of {window} tokens, as llama.cpp has no window for {config.model_type}"
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
