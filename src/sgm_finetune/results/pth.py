"""sgm_finetuned.pth: one file of tensors and plain data, written whole and read without running any code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Self

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import PreTrainedModel

from sgm_finetune.base.config import Config, LabelKind
from sgm_finetune.base.config_file import parse_config, set_overrides
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import whole_file
from sgm_finetune.base.text import first_mistake
from sgm_finetune.base.untrusted import check_bounded, read_torch, refuse
from sgm_finetune.measure.plan_file import plan_document
from sgm_finetune.method.plan import Plan
from sgm_finetune.results.paths import found_from, with_absolute_paths
from sgm_finetune.train.adapters.apply import ADAPTER
from sgm_finetune.train.full.changed import trained_parameters

FORMAT = "sgm-finetuned/1"


def save_pth(
    path: Path,
    model: PeftModel | PreTrainedModel,
    plan: Plan,
    config: Config,
    labels: Sequence[str],
    label_kind: LabelKind | None,
    roles: Sequence[str] = (),
    head_is_new: bool = False,
) -> None:
    """Writes one file of tensors and plain data: all that `sgm evaluate` needs beside the base model.

    Its keys are format; adapter (name -> tensor; a shared factor is stored once) and peft_config, or tensors (name ->
    parameter) where matrices were trained whole; plan and config; and for the data labels, label_kind, roles (text,
    label, messages ...) and head_is_new (whether the rows that the base's files hold were for other classes).
    """
    content = {
        "format": FORMAT,
        **(_adapter(model) if isinstance(model, PeftModel) else {"tensors": _on_cpu(trained_parameters(model))}),
        "plan": plan_document(plan),
        "config": with_absolute_paths(config).model_dump(mode="json"),
        "labels": list(labels),
        "label_kind": label_kind,
        "roles": list(roles),
        "head_is_new": head_is_new,
    }
    with whole_file(path) as scratch:
        torch.save(content, scratch)


def _adapter(model: PeftModel) -> dict[str, Any]:
    """The factors and PEFT's settings of an adapter."""
    state = _on_cpu(get_peft_model_state_dict(model))
    # PEFT removes its own name for the adapter everywhere but in a pool's parts
    state = {name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in state.items()}
    return {"adapter": state, "peft_config": plain_settings(model.peft_config[ADAPTER])}


def _on_cpu(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU; those that share memory still share it."""
    moved: dict[tuple[int, torch.Size], torch.Tensor] = {}
    return {n: moved.setdefault((t.data_ptr(), t.shape), t.detach().cpu()) for n, t in state.items()}


def plain_settings(settings: PeftConfig) -> dict[str, Any]:
    """PEFT's settings as plain data."""
    return _plain(settings.to_dict())


def _plain(value: Any) -> Any:
    """The value in JSON's types: sets become sorted lists, enumerations their values."""
    match value:
        case dict():
            return {str(k): _plain(v) for k, v in value.items()}
        case set() | frozenset():
            return sorted(_plain(v) for v in value)
        case list() | tuple():
            return [_plain(v) for v in value]
        case bool() | int() | float() | None:
            return value
        case _:
            return str(getattr(value, "value", value))


class _Settings(BaseModel):
    """The PEFT settings that a run writes. A file gives PEFT nothing else: no regular expressions, classes to import or
    other files."""

    model_config = ConfigDict(strict=True, extra="ignore")
    r: int = Field(ge=1, le=2**16)
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    lora_dropout: float = Field(ge=0, lt=1)
    target_modules: list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    task_type: Literal["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM"] | None = None
    fan_in_fan_out: bool = False


class _Content(BaseModel):
    """The types of a .pth file's content."""

    model_config = ConfigDict(strict=True, extra="ignore", arbitrary_types_allowed=True)
    format: Literal["sgm-finetuned/1"]
    adapter: dict[str, torch.Tensor] | None = None
    peft_config: dict[str, Any] | None = None
    tensors: dict[str, torch.Tensor] | None = None
    plan: dict[str, Any]
    config: dict[str, Any]
    labels: list[str]
    label_kind: LabelKind | None = None
    roles: list[str] = []
    head_is_new: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.adapter is None) == (self.tensors is None) or (self.adapter is None) != (self.peft_config is None):
            raise ValueError("it holds neither an adapter with its settings nor whole tensors, or both")
        return self


def load_pth(path: Path) -> dict[str, Any]:
    """Returns the content of a .pth file that `save_pth` wrote; checks its types and runs no code from it.

    Raises UserError for any other file.
    """
    try:
        content = read_torch(path, mmap=True)
    except (OSError, ValueError):
        raise UserError(
            f"{path} is cut short, or holds more than tensors and plain data (it could be code, so it was not read); "
            "take a file that `sgm finetune` wrote"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} was not written by `sgm finetune` (format {FORMAT})")
    try:
        _Content.model_validate(content)
        for part in ("peft_config", "plan", "config"):
            check_bounded(content.get(part), leaf=_check_plain)
        if "peft_config" in content:
            _check_settings(content["peft_config"])
    except ValueError as error:
        refuse(path, "result", ValueError(first_mistake(error)) if isinstance(error, ValidationError) else error)
    return content


def _check_plain(value: Any) -> None:
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"it holds a {type(value).__name__} where plain data belongs")


def _check_settings(given: dict[str, Any]) -> None:
    """Raises ValueError for a setting that no run writes and that would change what PEFT does."""
    _Settings.model_validate(given)
    names = {field.name for field in fields(LoraConfig)}
    ours = {*_Settings.model_fields, "peft_type", "inference_mode", "base_model_name_or_path", "revision",
            "auto_mapping", "peft_version"}  # fmt: skip
    plain = _plain(LoraConfig().to_dict())
    for key in given.keys() & names - ours:
        if given[key] and given[key] != plain.get(key):
            raise ValueError(f"`peft_config.{key}` is {str(given[key])[:60]!r}, which `sgm finetune` does not write")


def stored_config(
    content: dict[str, Any],
    path: Path,
    config: Config,
    overrides: Sequence[str],
    announce: Callable[[str], None] = lambda line: None,
) -> Config:
    """The configuration in a loaded .pth file, changed by `overrides` (key=value); `announce(line)` is told what they
    replace. Paths of local files are found from the folder of the result. Raises UserError if it is not valid.

    The output folder, and whether a model's own code may run, come from `config` and never from the file, which a
    stranger may have made.
    """
    values = parse_config(content["config"], str(path)).model_dump(mode="json")
    values = found_from(values, Path(config.output.dir))
    values["output"]["dir"] = config.output.dir
    values["model"]["trust_remote_code"] = config.model.trust_remote_code
    return parse_config(values, str(path), set_overrides(values, overrides, str(path), announce))


def lora_config(content: dict[str, Any]) -> LoraConfig:
    """PEFT's configuration of the adapter in a loaded .pth file. It names no folder of the base model."""
    given = content["peft_config"]
    return LoraConfig(**{key: given[key] for key in _Settings.model_fields if key in given})
